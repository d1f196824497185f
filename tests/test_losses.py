"""The losses compared with NumPy, PyTorch and finite differences; masks; several devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from vla_jax.training import losses
from vla_jax.types import ActionChunk, BinChunk

B, W, K, A, V = 4, 3, 2, 4, 9

each_head = pytest.mark.parametrize("head", ["continuous", "discrete"])


def draw_batch(head="continuous"):
    random = np.random.default_rng(0)
    arm = random.uniform(-1, 1, (B, W, K, A - 1)).astype(np.float32)
    chunk = ActionChunk(arm, random.normal(size=(B, W, K)).astype(np.float32))
    if head == "discrete":
        chunk = BinChunk(random.normal(size=(B, W, K, A, V)).astype(np.float32))
    action = random.uniform(-3, 3, (B, W, K, A)).astype(np.float32)  # both branches of Huber
    action[..., -1] = np.sign(action[..., -1])
    mask = random.random((B, W, K)) < 0.6
    mask[0] = False  # a device with this row only has no unmasked target
    return chunk, action, mask


def assert_close(one, other, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), one, other)


def test_a_masked_mean_is_the_mean_of_the_unmasked_values():
    values, mask = draw_batch()[1], draw_batch()[2]
    assert_close(losses.masked_mean(values, mask), values[mask].mean())
    assert_close(losses.masked_mean(values[..., 0], mask), values[..., 0][mask].mean())


def test_the_loss_is_huber_and_cross_entropy_over_the_unmasked_targets():
    chunk, action, mask = draw_batch()
    error = np.abs(chunk.arm - action[..., :-1])
    huber = np.where(error < 1, error**2 / 2, error - 0.5)[mask].mean()
    probability = 1 / (1 + np.exp(-chunk.gripper_logit))
    is_open = action[..., -1] > 0
    entropy = -np.log(np.where(is_open, probability, 1 - probability))[mask].mean()
    loss, metrics = losses.action_loss(chunk, action, mask, gripper_weight=0.1)
    assert_close(loss, huber + 0.1 * entropy)
    expected = {
        "loss_arm": huber,
        "loss_gripper": entropy,
        "acc_gripper": ((probability > 0.5) == is_open)[mask].mean(),
        "arm_l1": error[mask].mean(),
    }
    assert_close(metrics, expected)


def test_the_default_weight_of_the_gripper_is_one_hundredth():
    loss, metrics = losses.action_loss(*draw_batch())
    assert_close(loss, metrics["loss_arm"] + 0.01 * metrics["loss_gripper"], 1e-7)


@pytest.mark.slow
def test_the_loss_of_bins_is_torchs_cross_entropy_of_the_bins_of_the_unmasked_targets():
    prediction, action, mask = draw_batch("discrete")
    edges = np.linspace(-1, 1, V)
    bins = np.digitize(np.clip(action, -1, 1), edges) - 1
    ignored = np.where(mask[..., None], bins, -100)
    logits = torch.from_numpy(prediction.logits).requires_grad_()
    expected = torch.nn.functional.cross_entropy(
        logits.reshape(-1, V), torch.from_numpy(ignored).reshape(-1), ignore_index=-100
    )
    expected.backward()
    value_and_grad = jax.value_and_grad(losses.action_loss, has_aux=True)
    (loss, metrics), gradient = value_and_grad(prediction, action, mask)
    assert_close(loss, expected.item())
    assert_close(gradient.logits, logits.grad)
    likeliest = prediction.logits.argmax(-1)
    centres = (edges[:-1] + edges[1:]) / 2
    arm = centres[np.minimum(likeliest[..., :-1], V - 2)]
    weights = np.exp(prediction.logits[..., -1, :])
    says_open = weights[..., V // 2 :].sum(-1) > weights[..., : V // 2].sum(-1)
    by_hand = {
        "loss_bins": expected.item(),
        "acc_arm": (likeliest == bins)[..., :-1][mask].mean(),
        "acc_gripper": (says_open == (action[..., -1] > 0))[mask].mean(),
        "arm_l1": np.abs(arm - action[..., :-1])[mask].mean(),
    }
    assert_close(metrics, by_hand)


def test_predicted_bins_equal_to_the_targets_have_zero_loss_and_full_accuracy():
    _, action, mask = draw_batch("discrete")
    bins = np.digitize(np.clip(action, -1, 1), np.linspace(-1, 1, V)) - 1
    said = BinChunk(100 * np.eye(V, dtype=np.float32)[bins])
    _, metrics = losses.action_loss(said, np.clip(action, -1, 1), mask)
    assert_close(metrics["loss_bins"], 0)
    assert metrics["acc_arm"] == metrics["acc_gripper"] == 1
    assert 0 < metrics["arm_l1"] <= 1 / (V - 1)


@pytest.mark.slow
@each_head
def test_a_fully_masked_batch_has_zero_loss_and_gradient(head):
    chunk, action, mask = draw_batch(head)
    value_and_grad = jax.value_and_grad(losses.action_loss, has_aux=True)
    (loss, metrics), gradient = value_and_grad(chunk, action, np.zeros_like(mask))
    assert loss == 0
    assert all(metric == 0.0 for metric in metrics.values())
    assert not any(leaf.any() for leaf in gradient)


@each_head
def test_masked_values_have_no_effect(head):
    chunk, action, mask = draw_batch(head)
    value_and_grad = jax.value_and_grad(losses.action_loss, has_aux=True)
    expected = value_and_grad(chunk, action, mask)
    for anything in (np.nan, np.inf, -7.0):
        changed = np.where(mask[..., None], action, np.float32(anything))
        assert_close(value_and_grad(chunk, changed, mask), expected, 0)
    gradient = expected[1]
    assert not any(leaf[~mask].any() for leaf in gradient)
    assert all(leaf[mask].all() for leaf in gradient)


def test_extreme_logits_stay_finite():
    chunk, action, mask = draw_batch()
    chunk = chunk._replace(gripper_logit=np.where(action[..., -1] > 0, -1e4, 1e4))
    (loss, _), gradient = jax.value_and_grad(losses.action_loss, has_aux=True)(chunk, action, mask)
    assert_close(loss, losses.action_loss(chunk, action, mask)[1]["loss_arm"] + 100, 1e-3)
    assert all(np.isfinite(leaf).all() for leaf in gradient)


def test_gradients_equal_finite_differences():
    chunk, action, mask = draw_batch()

    def loss(chunk):
        return losses.action_loss(chunk, action, mask, gripper_weight=1.0)[0]

    check_grads(loss, (chunk,), order=1, modes=["rev"], rtol=2e-2, atol=1e-3)


def test_bfloat16_predictions_give_a_float32_loss():
    values = jnp.ones((600,), jnp.bfloat16)  # 257 is not representable in bfloat16
    mean = losses.masked_mean(values, np.arange(600) < 500)
    assert mean.dtype == jnp.float32
    assert mean == 1.0
    chunk, action, mask = draw_batch()
    chunk = jax.tree.map(lambda part: jnp.asarray(part, jnp.bfloat16), chunk)
    exact = jax.tree.map(lambda part: part.astype(jnp.float32), chunk)
    loss, _ = losses.action_loss(chunk, action, mask)
    assert loss.dtype == jnp.float32
    assert_close(loss, losses.action_loss(exact, action, mask)[0], 0)


def parameter_loss(scale, chunk, action, mask, axis_name=None):
    chunk = jax.tree.map(lambda part: part * scale, chunk)
    return losses.action_loss(chunk, action, mask, axis_name=axis_name)


GRADIENT = partial(jax.value_and_grad, has_aux=True)


@each_head
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_the_loss_of_a_sharded_batch_under_jit_equals_that_of_the_whole_batch(axis_type, head):
    batch = draw_batch(head)
    expected = GRADIENT(parameter_loss)(0.7, *batch)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        shared = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
        assert_close(jax.jit(GRADIENT(parameter_loss))(0.7, *shared), expected)


@each_head
def test_the_loss_of_a_sharded_batch_under_pmap_equals_that_of_the_whole_batch(head):
    """Devices have different numbers of unmasked targets, one of them none."""
    batch = draw_batch(head)
    (loss, metrics), gradient = GRADIENT(parameter_loss)(0.7, *batch)

    def share(scale, chunk, action, mask):
        local = partial(parameter_loss, axis_name="data")
        values, own = GRADIENT(local)(scale, chunk, action, mask)
        return values, jax.lax.pmean(own, "data")

    shares = jax.tree.map(lambda leaf: leaf[:, None], batch)
    mapped = jax.pmap(share, "data", in_axes=(None, 0, 0, 0))(0.7, *shares)
    for device in range(4):
        own = jax.tree.map(lambda leaf, device=device: leaf[device], mapped)
        assert_close(own, ((loss, metrics), gradient))


def draw_sentences():
    random = np.random.default_rng(1)
    logits = random.normal(size=(B, W, V)).astype(np.float32)
    return logits, random.integers(0, V, (B, W)), random.random((B, W)) < 0.6


@pytest.mark.slow
def test_the_loss_of_a_language_model_with_shifted_labels_equals_torchs():
    logits, ids, mask = draw_sentences()
    labels = np.where(mask, ids, -100)
    theirs = torch.from_numpy(logits).requires_grad_()
    expected = torch.nn.functional.cross_entropy(
        theirs[:, :-1].reshape(-1, V), torch.from_numpy(labels)[:, 1:].reshape(-1)
    )
    expected.backward()

    def loss_fn(logits):
        return losses.token_loss(logits[..., :-1, :], labels[..., 1:], labels[..., 1:] != -100)

    (loss, metrics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(logits)
    assert_close(loss, expected.item())
    assert_close(gradient, theirs.grad)
    right = (logits.argmax(-1)[:, :-1] == ids[:, 1:])[mask[:, 1:]].mean()
    assert_close(metrics, {"loss_tokens": loss, "acc_tokens": right})


@pytest.mark.slow
def test_sentences_without_unmasked_tokens_have_zero_loss_and_gradient():
    logits, ids, mask = draw_sentences()
    value_and_grad = jax.value_and_grad(losses.token_loss, has_aux=True)
    (loss, metrics), gradient = value_and_grad(logits, ids, np.zeros_like(mask))
    assert loss == metrics["acc_tokens"] == 0
    assert not gradient.any()


def test_the_loss_of_sentences_on_many_devices_equals_that_on_one():
    batch = draw_sentences()
    shares = jax.tree.map(lambda leaf: leaf[:, None], batch)
    mapped = jax.pmap(partial(losses.token_loss, axis_name="data"), "data")(*shares)
    for device in range(4):
        own = jax.tree.map(lambda leaf, device=device: leaf[device], mapped)
        assert_close(own, losses.token_loss(*batch))


VOCABULARY = {"vocab_size": 60, "num_special": 3, "offset": 4}  # logits have V = 64
NUM_TOKENS = 24  # text, actions of A tokens, text again


def draw_action_tokens(num_bins=V):
    """Logits `[B, S, V]`, some of them correct, and labels, with -100 where masked."""
    random = np.random.default_rng(2)
    labels = random.integers(0, 20, (B, NUM_TOKENS))
    bins = random.integers(0, num_bins, (B, 3 * A))
    bins[0, :2] = 0, num_bins - 1
    labels[:, 8 : 8 + 3 * A] = 60 - 3 - 4 - (bins + 1)
    labels[:, :5] = labels[-1, 8:16] = -100  # the prompt; two missing actions
    logits = random.normal(size=(B, NUM_TOKENS, 64)).astype(np.float32)
    right = np.argwhere((random.random(labels.shape) < 0.6) & (labels >= 0))
    for row, place in right[right[:, 1] > 0]:
        logits[row, place - 1, labels[row, place]] += 9  # shifted by one position
    return logits, labels


def robovlms_discrete_decoder(logits, labels, num_bins=V):
    """RoboVLMs' `DiscreteDecoder` in PyTorch and NumPy: shift, cross-entropy, actions of 7."""
    logits, labels = torch.from_numpy(logits)[:, :-1], torch.from_numpy(labels)[:, 1:]
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, 64), labels.reshape(-1), ignore_index=-100
    )
    last = 60 - 3 - 4
    is_action = (labels > last - (num_bins + 1)) & (labels < last)
    predicted, label = logits.argmax(-1)[is_action].numpy(), labels[is_action].numpy()
    edges = np.linspace(-1, 1, num_bins)
    centres = (edges[:-1] + edges[1:]) / 2
    decoded = [centres[np.clip(last - ids - 1, 0, num_bins - 2)] for ids in (predicted, label)]
    right = (predicted == label).reshape(-1, A)
    return {
        "loss_tokens": loss.item(),
        "action_l1": np.abs(decoded[0] - decoded[1]).mean(),
        "acc_arm": right[:, :-1].mean(),
        "acc_gripper": right[:, -1].mean(),
    }


def token_loss(logits, labels, axis_name=None):
    ids = labels[..., 1:]
    return losses.action_token_loss(
        logits[..., :-1, :],
        ids,
        ids != -100,
        **VOCABULARY,
        action_dim=A,
        num_bins=V,
        axis_name=axis_name,
    )


@pytest.mark.slow
def test_the_loss_of_action_tokens_equals_that_of_robovlms_discrete_decoder():
    logits, labels = draw_action_tokens()
    loss, metrics = token_loss(logits, labels)
    expected = robovlms_discrete_decoder(logits, labels)
    assert metrics.pop("acc_tokens") > 0
    assert_close(metrics, expected)
    assert_close(loss, expected["loss_tokens"])
    assert 0.3 < expected["acc_arm"] != expected["acc_gripper"] > 0.3
    assert expected["action_l1"] > 0.1


def test_every_unmasked_token_has_a_gradient_text_included():
    logits, labels = draw_action_tokens()
    slope = jax.grad(lambda logits: token_loss(logits, labels)[0])(logits)
    np.testing.assert_array_equal((slope != 0).any(-1)[:, :-1], labels[:, 1:] != -100)


def test_correct_action_tokens_have_full_accuracy():
    _, labels = draw_action_tokens()
    said = np.roll(np.eye(64, dtype=np.float32)[np.maximum(labels, 0)], -1, axis=1)
    _, metrics = token_loss(100 * said, labels)
    assert metrics["acc_arm"] == metrics["acc_gripper"] == metrics["acc_tokens"] == 1
    assert metrics["action_l1"] == 0


def test_without_action_tokens_the_metrics_are_zero():
    logits, labels = draw_action_tokens()
    for no_actions in (np.minimum(labels, 19), np.full_like(labels, -100)):
        _, metrics = token_loss(logits, no_actions)
        assert metrics["action_l1"] == metrics["acc_arm"] == metrics["acc_gripper"] == 0


def test_the_loss_of_action_tokens_on_many_devices_equals_that_on_one():
    batch = draw_action_tokens()
    shares = jax.tree.map(lambda leaf: leaf[:, None], batch)
    mapped = jax.pmap(partial(token_loss, axis_name="data"), "data")(*shares)
    for device in range(4):
        own = jax.tree.map(lambda leaf, device=device: leaf[device], mapped)
        assert_close(own, token_loss(*batch))


@pytest.mark.parametrize(
    ("head", "part"),
    [("continuous", "arm"), ("continuous", "gripper_logit"), ("discrete", "logits")],
)
def test_a_chunk_of_another_shape_is_refused(head, part):
    """A gripper logit [..., 1] would otherwise broadcast against all targets."""
    chunk, action, mask = draw_batch(head)
    wrong = chunk._replace(**{part: getattr(chunk, part)[..., None]})
    with pytest.raises(AssertionError, match="assert_shape"):
        losses.action_loss(wrong, action, mask)


def test_a_mask_of_another_shape_is_refused():
    _, action, mask = draw_batch()
    with pytest.raises(AssertionError, match="assert_tree_shape_prefix"):
        losses.masked_mean(action, mask[:, :1])


def draw_logits():
    random = np.random.default_rng(1)
    logits, reference = random.normal(0, 3, (2, B, W, K, 5)).astype(np.float32)
    mask = random.random((B, W)) < 0.6
    mask[0] = False
    return logits, reference, mask


def test_the_divergence_from_a_reference_policy_and_its_gradient_equal_torchs():
    logits, reference, mask = draw_logits()
    distance, gradient = jax.value_and_grad(losses.categorical_kl)(logits, reference, mask)
    policy = torch.tensor(logits, requires_grad=True)
    expected = (
        torch.nn.functional.kl_div(
            torch.tensor(reference).log_softmax(-1),
            policy.log_softmax(-1),
            reduction="none",
            log_target=True,
        )
        .sum(-1)[mask]
        .mean()
    )
    expected.backward()
    assert policy.grad is not None
    assert_close(distance, expected.item(), 1e-5)
    assert_close(gradient, policy.grad.numpy())


def test_the_divergence_of_a_policy_from_itself_is_zero_and_the_reference_gets_no_gradient():
    logits, reference, mask = draw_logits()
    assert_close(losses.categorical_kl(logits, logits, mask), 0.0)
    assert losses.categorical_kl(logits, reference, mask) > 0
    assert not jax.grad(losses.categorical_kl, 1)(logits, reference, mask).any()


def test_masked_policies_have_no_effect_on_the_divergence():
    logits, reference, mask = draw_logits()
    spoilt = [np.where(mask[..., None, None], part, np.nan) for part in (logits, reference)]
    value_and_grad = jax.value_and_grad(losses.categorical_kl)
    assert_close(value_and_grad(*spoilt, mask), value_and_grad(logits, reference, mask), 0)
    distance, gradient = value_and_grad(*spoilt, np.zeros_like(mask))
    assert distance == 0
    assert not gradient.any()
