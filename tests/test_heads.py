"""The heads compared with NumPy."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.policies import continuous_head, discrete_head, heads
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.types import ActionChunk, BinChunk

H, K, A = 5, 3, 4


def configured(head="continuous", **fields):
    return DecoderConfig(
        hidden_size=H, action_horizon=K, action_dim=A, head_sizes=(8,), head=head, **fields
    )


def features():
    return np.random.default_rng(0).normal(size=(2, 6, H)).astype(np.float32)


def mlp_in_numpy(params, x):
    for layer in range(len(params)):
        x = np.maximum(x, 0) if layer > 0 else x
        x = x @ np.asarray(params[f"layers_{layer}"]["kernel"], np.float64)
        x = x + np.asarray(params[f"layers_{layer}"]["bias"])
    return x


def test_the_arm_is_chunk_major_and_bounded_and_the_gripper_is_a_logit(key):
    config = configured()
    params = continuous_head.init(key, config)
    chunk = continuous_head.apply(params, config, 10 * features())
    arm = np.tanh(mlp_in_numpy(params["arm"], 10 * features()))
    assert chunk.arm.shape == (2, 6, K, A - 1)
    np.testing.assert_allclose(chunk.arm[..., 1, 2], arm[..., 1 * (A - 1) + 2], atol=1e-5)
    np.testing.assert_allclose(
        chunk.gripper_logit, mlp_in_numpy(params["gripper"], 10 * features()), atol=1e-5
    )
    assert np.abs(chunk.arm).max() <= 1 < np.abs(chunk.gripper_logit).max()


def test_logits_are_chunk_major_then_by_action_dim_then_by_bin(key):
    config = configured("discrete", num_bins=5)
    params = discrete_head.init(key, config)
    prediction = discrete_head.apply(params, config, features())
    expected = mlp_in_numpy(params["bins"], features()).reshape(2, 6, K, A, 5)
    assert isinstance(prediction, BinChunk)
    np.testing.assert_allclose(prediction.logits, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("num_bins", "middle"), [(3, []), (16, [7]), (5, [])])
def test_the_arm_is_the_most_probable_bin_and_the_gripper_compares_the_bins_below_and_above_0(
    num_bins, middle
):
    logits = np.random.default_rng(0).normal(size=(50, K, A, num_bins)).astype(np.float32)
    chunk = heads.actions(BinChunk(logits))
    edges = np.linspace(-1, 1, num_bins)
    centres = np.append((edges[:-1] + edges[1:]) / 2, (edges[-2] + edges[-1]) / 2)
    assert np.flatnonzero(centres == 0).tolist() == middle
    np.testing.assert_allclose(chunk.arm, centres[logits[..., :-1, :].argmax(-1)], atol=1e-6)
    weights = np.exp(logits[..., -1, :].astype(np.float64))
    is_open, is_closed = weights[..., centres > 0].sum(-1), weights[..., centres < 0].sum(-1)
    np.testing.assert_allclose(chunk.gripper_logit, np.log(is_open / is_closed), atol=1e-5)


def test_a_saturated_gripper_has_a_finite_logit():
    logits = np.zeros((2, 1, 2, 16), np.float32)
    logits[0, ..., -1], logits[1, ..., 0] = 1e4, 1e4
    logit = heads.actions(BinChunk(logits)).gripper_logit
    np.testing.assert_allclose(logit[:, 0], [1e4, -1e4], rtol=1e-3)


def test_a_continuous_chunk_is_returned_unchanged(key):
    chunk = continuous_head.apply(continuous_head.init(key, configured()), configured(), features())
    assert heads.actions(chunk) is chunk
    assert isinstance(chunk, ActionChunk)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bin_whose_logit_is_not_finite_makes_its_number_nan_and_no_other(value):
    logits = np.random.default_rng(0).normal(size=(2, K, A, 5)).astype(np.float32)
    expected = heads.actions(BinChunk(logits.copy()))
    for dim in range(A):
        logits[1, 2, dim] = np.where(np.arange(5) == dim % 5, value, 0.0)
    arm, logit = heads.actions(BinChunk(logits))
    assert np.isnan(arm[1, 2]).all()
    assert np.isnan(logit[1, 2])
    np.testing.assert_array_equal(arm[0], expected.arm[0])
    np.testing.assert_array_equal(logit[1, :2], expected.gripper_logit[1, :2])


@pytest.mark.parametrize("name", ["continuous", "discrete"])
def test_bfloat16_products_give_float32_predictions(name, key):
    config, head = configured(name, num_bins=5), heads.HEADS[name]
    params = head.init(key, config)
    half, full = (
        head.apply(params, dataclasses.replace(config, dtype=dtype), features())
        for dtype in ("bfloat16", "float32")
    )
    for one, other in zip(half, full, strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, atol=0.05)
        assert not np.array_equal(one, other)
