"""Dense layers, MLPs, dropout, layer norm and masked softmax, compared with NumPy and PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vla_jax.nn import layers

H = 5


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_close(actual, expected, atol=1e-6):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def test_an_mlp_has_relu_between_its_layers_and_none_after_the_last(key):
    params, inputs = layers.init_mlp(key, (H, 8, 6, 2)), draw(0, 2, 6, H)
    params["layers_1"]["bias"] += 0.3
    expected = inputs
    for index in range(3):
        expected = np.maximum(expected, 0) if index > 0 else expected
        dense = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params[f"layers_{index}"])
        expected = expected @ dense["kernel"] + dense["bias"]
    outputs = layers.apply_mlp(params, inputs)
    assert_close(outputs, expected)
    assert np.min(outputs) < 0


def test_kernels_are_xavier_uniform_and_biases_zero(key):
    params = layers.init_dense(key, 100, 50)
    bound = np.sqrt(6 / 150)
    assert 0.98 * bound < np.abs(params["kernel"]).max() <= bound
    np.testing.assert_allclose(np.std(params["kernel"]), bound / np.sqrt(3), rtol=0.05)
    assert not params["bias"].any()


def test_gradients_of_bfloat16_products_are_summed_over_time_in_float32():
    """1 + 255 · 2⁻⁹ is not representable in bfloat16, whose spacing there is 2⁻⁷."""
    weights = jnp.full((256,), 2.0**-9).at[0].set(1.0)

    def total(kernel):
        def add(carry, weight):
            return carry, weight * layers.dense(jnp.ones(1), kernel, jnp.zeros(1), dtype="bfloat16")

        return jax.lax.scan(add, 0.0, weights)[1].sum()

    assert_close(jax.grad(total)(jnp.ones((1, 1))), np.full((1, 1), 1 + 255 * 2.0**-9))


def test_dropout_zeroes_inputs_at_the_given_rate_and_keeps_their_mean(key):
    inputs = jnp.asarray(draw(0, 100, 100) + 3.0)
    dropped = np.asarray(layers.dropout(key, inputs, 0.2))
    kept = dropped != 0
    np.testing.assert_allclose(kept.mean(), 0.8, atol=0.02)
    assert_close(dropped[kept], inputs[kept] / 0.8, 1e-5)
    assert_close(layers.dropout(None, inputs, 0.2), inputs, 0)
    assert_close(layers.dropout(key, inputs, 0.0), inputs, 0)


@pytest.mark.parametrize("has_bias", [False, True])
def test_layer_norm_equals_that_of_pytorch(has_bias):
    inputs, scale, bias = draw(0, 3, 4, H), draw(1, H), draw(2, H)
    bias = bias if has_bias else None
    expected = torch.nn.functional.layer_norm(
        torch.from_numpy(inputs),
        (H,),
        torch.from_numpy(scale),
        torch.from_numpy(bias) if has_bias else None,
        eps=1e-5,
    )
    assert_close(layers.layer_norm(inputs, scale, bias), expected.numpy(), 2e-6)


def test_masked_softmax_is_the_softmax_over_the_unmasked_positions():
    scores, mask = 3 * draw(0, 4, 6), np.array([[1, 1, 0, 1, 0, 1]], bool)
    weights = layers.masked_softmax(jnp.asarray(scores), mask)
    expected = np.zeros_like(scores)
    expected[:, mask[0]] = torch.from_numpy(scores[:, mask[0]]).softmax(dim=-1).numpy()
    assert_close(weights, expected)
    assert not weights[:, ~mask[0]].any()


def test_masked_softmax_without_unmasked_positions_is_zero_with_zero_gradients():
    scores, mask = jnp.asarray(draw(0, 2, 4)), np.array([[True] * 4, [False] * 4])
    gradient, weights = jax.grad(
        lambda s: (jnp.sum(layers.masked_softmax(s, mask) ** 2), layers.masked_softmax(s, mask)),
        has_aux=True,
    )(scores)
    assert not weights[1].any()
    assert not gradient[1].any()
    assert gradient[0].all()
