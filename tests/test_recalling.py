import jax
import numpy as np
import pytest

from vla_jax.training import recalling
from vla_jax.types import Recall

B, W, H = 3, 5, 7
RNG = np.random.default_rng(0)
RECALL = Recall(
    RNG.normal(size=(B, W, 2)).astype(np.float32),
    tuple(np.eye(m, dtype=np.float32)[RNG.integers(0, m, (B, W))] for m in (4, 3)),
)
FEATURES = RNG.normal(size=(B, W, H)).astype(np.float32)
MASK = RNG.random((B, W)) < 0.6


def test_the_loss_is_that_written_out_by_hand():
    params = jax.tree.map(np.asarray, recalling.init(jax.random.key(0), H, RECALL))
    output = FEATURES @ params["kernel"] + params["bias"]
    assert output.shape[-1] == 2 + 4 + 3
    error = np.sum((output[..., :2] - RECALL.numbers) ** 2, axis=-1)
    for choice, (start, end) in zip(RECALL.choices, ((2, 6), (6, 9)), strict=True):
        likelihood = np.exp(output[..., start:end])
        likelihood /= likelihood.sum(axis=-1, keepdims=True)
        error -= np.log(np.sum(likelihood * choice, axis=-1))
    expected = np.mean((error / 4)[MASK])  # two numbers and two choices
    loss, metrics = recalling.loss(params, FEATURES, RECALL, MASK)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    right = [
        np.argmax(output[..., start:end], axis=-1) == np.argmax(choice, axis=-1)
        for choice, (start, end) in zip(RECALL.choices, ((2, 6), (6, 9)), strict=True)
    ]
    accuracy = np.mean(np.stack(right)[:, MASK])
    np.testing.assert_allclose(metrics["recall_accuracy"], accuracy, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_masked_steps_have_no_effect_on_loss_and_gradient(bad):
    params = recalling.init(jax.random.key(0), H, RECALL)
    loss = jax.jit(jax.value_and_grad(recalling.loss, argnums=(0, 1), has_aux=True))
    other = np.where(MASK[..., None], FEATURES, bad)
    recall = jax.tree.map(lambda part: np.where(MASK[..., None], part, bad), RECALL)
    expected, found = (
        loss(params, *inputs, MASK) for inputs in ((FEATURES, RECALL), (other, recall))
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(("numbers", "choices"), [(0, (2,)), (1, ())])
def test_numbers_or_choices_may_be_absent(numbers, choices):
    recall = Recall(
        np.ones((B, W, numbers)), tuple(np.eye(m)[np.zeros((B, W), int)] for m in choices)
    )
    params = recalling.init(jax.random.key(0), H, recall)
    assert np.isfinite(recalling.loss(params, FEATURES, recall, MASK)[0])
    assert recalling.loss(params, FEATURES, recall, np.zeros_like(MASK))[0] == 0


def test_choices_of_zeros_are_not_asked():
    params = recalling.init(jax.random.key(0), H, RECALL)
    loss = jax.grad(recalling.loss, has_aux=True)
    none = RECALL._replace(choices=tuple(map(np.zeros_like, RECALL.choices)))
    grads, metrics = loss(params, FEATURES, none, MASK)
    assert not np.any(grads["kernel"][:, 2:])
    assert np.any(grads["kernel"][:, :2])
    assert metrics["recall_accuracy"] == 0
