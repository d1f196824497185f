"""The decoders compared with RoboVLMs' heads and with pooling in NumPy; properties of a window.

`golden/*.safetensors` hold the outputs of RoboVLMs' `LSTMDecoder`, `GPTDecoder` and `FCDecoder`
(PyTorch, float32) for random weights and inputs; the weights follow from the seed in the file.
"""

import dataclasses
import json
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from vla_jax import convert
from vla_jax.policies import decoders, gpt_trunk, trunks
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.policies.decoder_fields import pooled_size
from vla_jax.policies.trunk import Mode
from vla_jax.training import losses
from vla_jax.types import BinChunk

B, W, N, D, K, H = 2, 5, 4, 3, 2, 6
SMALL = DecoderConfig(
    token_dim=D,
    num_tokens=N,
    window_size=W,
    action_horizon=K,
    hidden_size=H,
    num_layers=2,
    num_heads=3,
    segment_size=3,
    num_memory_tokens=2,
    head_sizes=(8,),
)
POOLINGS = ("max", "mean", "attention", "none")
KINDS = trunks.names()
ATTENDING = ("gpt", "rotary_gpt")  # without a carry

apply = jax.jit(decoders.apply, static_argnames="config")


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_close(one, other, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), one, other)


# --- RoboVLMs ---------------------------------------------------------------------------------


def read_golden(path):
    """Returns the decoder's config, its params, and the stored arrays."""
    case = json.loads(safe_open(path, "np").metadata()["case"])
    random = np.random.RandomState(case["seed"])
    weights = {
        name: (
            random.uniform(-1, 1, shape) * (0.3 if len(shape) == 1 else shape[1] ** -0.5)
        ).astype(np.float32)
        for name, shape in sorted(case["shapes"].items())
    }
    config, params = convert.from_robovlms(weights, window_size=case["window_size"])
    return config, params, load_file(path)


@pytest.fixture(params=["lstm_pooling", "lstm_none", "fc_pooling", "gpt_pooling"])
def original(request, golden):
    return read_golden(golden / f"{request.param}.safetensors")


def test_the_outputs_equal_those_of_robovlms(original):
    config, params, stored = original
    chunk = apply(params, config, stored["in.tokens"])
    assert_close(chunk.arm, stored["out.arm"], 1e-5)
    assert_close(chunk.gripper_logit[..., None], stored["out.gripper"], 1e-5)


@pytest.mark.sampled
@pytest.mark.parametrize("masked", ["", "_masked"])
def test_losses_and_gradients_equal_those_of_robovlms(original, masked):
    config, params, stored = original
    labels = (stored["in.arm_label"], stored["in.gripper_label"][..., None] * 2 - 1)
    mask = stored["in.mask"] if masked else np.ones_like(stored["in.mask"])

    def loss_fn(params, tokens):
        chunk = decoders.apply(params, config, tokens)
        return losses.action_loss(chunk, np.concatenate(labels, axis=-1), mask)

    gradient = jax.jit(jax.value_and_grad(loss_fn, (0, 1), has_aux=True))
    (_, metrics), (by_params, by_tokens) = gradient(params, stored["in.tokens"])
    for name in ("loss_arm", "loss_gripper", "acc_gripper"):
        assert_close(metrics[name], stored[f"out.{name}{masked}"], 1e-5)
    assert_close(by_tokens, stored[f"out.grad_tokens{masked}"], 1e-6)
    if masked:
        assert_params_gradient(convert.to_robovlms(config, by_params), stored)


def assert_params_gradient(by_params, stored):
    norms = {}
    for name, leaf in by_params.items():
        norms[f"out.grad_norm.{name}"] = np.linalg.norm(leaf)
        if f"out.grad.{name}" in stored:
            assert_close(leaf, stored[f"out.grad.{name}"], 1e-6)
    expected = {name: x for name, x in stored.items() if name.startswith("out.grad_norm.")}
    assert set(norms) == set(expected)
    for name, norm in norms.items():
        np.testing.assert_allclose(norm, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, mode) for name in ("lstm_pooling", "lstm_none") for mode in get_args(Mode)),
        ("gpt_pooling", "refresh"),
        ("gpt_pooling", "periodic"),
    ],
)
def test_streaming_equals_robovlms_in_refresh_mode_beyond_the_window_else_up_to_its_end(
    name, mode, golden
):
    config, params, stored = read_golden(golden / f"{name}.safetensors")
    tokens = stored["in.stream_tokens"]
    step = jax.jit(decoders.step, static_argnames="config")
    state = decoders.init_stream(params, config, tokens.shape[0], mode=mode)
    assert tokens.shape[1] > 2 * config.window_size
    for t in range(tokens.shape[1] if mode == "refresh" else config.window_size):
        state, chunk = step(params, config, state, tokens[:, t])
        assert_close(chunk.arm, stored["out.stream_arm"][:, t], 1e-5)
        assert_close(chunk.gripper_logit[..., None], stored["out.stream_gripper"][:, t], 1e-5)


# --- pooling ----------------------------------------------------------------------------------


def configured(**changes):
    return dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize(
    ("num_tokens", "num_latents", "bins"),
    [
        (5, 1, [[0, 1, 2, 3, 4]]),
        (5, 2, [[0, 1, 2], [2, 3, 4]]),
        (7, 3, [[0, 1, 2], [2, 3, 4], [4, 5, 6]]),
        (4, 4, [[0], [1], [2], [3]]),
    ],
)
def test_bins_equal_those_of_adaptive_pooling(num_tokens, num_latents, bins):
    """Bins as documented for torch.nn.AdaptiveMaxPool1d, in NumPy."""
    tokens = draw(0, B, W, num_tokens, D)
    for pooling, reduce in (("max", np.max), ("mean", np.mean)):
        config = configured(num_tokens=num_tokens, num_latents=num_latents, pooling=pooling)
        expected = np.concatenate([reduce(tokens[..., b, :], axis=-2) for b in bins], axis=-1)
        pooled = decoders.pool({}, config, tokens)
        assert pooled.shape[-1] == pooled_size(config)
        assert_close(pooled, expected)


def test_attention_is_a_softmax_over_the_tokens(key):
    config, tokens = configured(pooling="attention", num_latents=2), draw(0, B, W, N, D)
    params = decoders.init(key, config)
    queries = np.asarray(params["pooling"]["queries"])
    weights = np.exp(np.einsum("bwnd,qd->bwqn", tokens, queries) / np.sqrt(D))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bwqn,bwnd->bwqd", weights, tokens).reshape(B, W, -1)
    assert_close(decoders.pool(params, config, tokens), expected)


def test_none_concatenates_all_tokens():
    tokens = draw(0, B, W, N, D)
    pooled = decoders.pool({}, configured(pooling="none"), tokens)
    assert_close(pooled, tokens.reshape(B, W, N * D), 0)


@pytest.mark.parametrize("pooling", ["max", "mean", "attention"])
def test_a_decoder_for_any_number_of_tokens_equals_one_for_that_number(pooling, key):
    anything, tokens = configured(pooling=pooling, num_tokens=0, num_latents=2), draw(0, B, W, 7, D)
    seven = dataclasses.replace(anything, num_tokens=7)
    params = decoders.init(key, anything)
    assert_close(params, decoders.init(key, seven), 0)
    assert_close(apply(params, anything, tokens), apply(params, seven, tokens), 0)


@pytest.mark.parametrize("pooling", ["max", "mean", "attention"])
def test_masked_tokens_have_no_effect(pooling, key):
    config = configured(pooling=pooling)
    params, tokens = decoders.init(key, config), draw(0, B, W, N, D)
    mask = np.broadcast_to(np.array([True, False, True, False]), (B, W, N))
    cut = configured(pooling=pooling, num_tokens=2)
    tokens[~mask] = np.nan
    pooled = decoders.pool(params, config, tokens, token_mask=mask)
    assert_close(pooled, decoders.pool(params, cut, tokens[..., [0, 2], :]))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_step_without_tokens_gives_zeros_and_finite_gradients(pooling, key):
    config = configured(pooling=pooling)
    params, tokens = decoders.init(key, config), draw(0, B, W, N, D)
    mask = np.ones((B, W, N), bool)
    mask[0, 1] = False

    def total(params, tokens):
        pooled = decoders.pool(params, config, tokens, token_mask=mask)
        return jnp.square(pooled).sum(), pooled

    gradient, pooled = jax.grad(total, (0, 1), has_aux=True)(params, tokens)
    assert not pooled[0, 1].any()
    assert pooled[0, 0].any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert not gradient[1][0, 1].any()


# --- windows ----------------------------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_padded_window_equals_a_cut_one_and_every_step_has_an_action(kind, pooling, key):
    config = configured(kind=kind, pooling=pooling, num_latents=2)
    params, tokens = decoders.init(key, config), draw(0, B, W, N, D)
    mask = np.tile(np.arange(W) >= 2, (B, 1))
    chunk = apply(params, config, tokens, timestep_mask=mask)
    assert chunk.arm.shape == (B, W, K, 6)
    assert chunk.gripper_logit.shape == (B, W, K)
    cut = apply(params, config, tokens[:, 2:])
    assert_close(jax.tree.map(lambda leaf: leaf[:, 2:], chunk), cut)
    _, features = decoders.run_trunk(params, config, tokens, timestep_mask=mask)
    assert features.shape == (B, W, H)
    assert not features[:, :2].any()


@pytest.mark.sampled
@pytest.mark.parametrize("kind", KINDS)
def test_every_step_has_bins_and_only_the_heads_differ_from_continuous_actions(kind, key):
    config, tokens = configured(kind=kind, head="discrete", num_bins=16), draw(0, B, W, N, D)
    params, numbers = decoders.init(key, config), decoders.init(key, configured(kind=kind))
    mask = np.tile(np.arange(W) >= 2, (B, 1))
    prediction = apply(params, config, tokens, timestep_mask=mask)
    assert isinstance(prediction, BinChunk)
    assert prediction.logits.shape == (B, W, K, 7, 16)
    assert_close(prediction.logits[:, 2:], apply(params, config, tokens[:, 2:]).logits)
    assert params.pop("heads").keys() == {"bins"}
    assert numbers.pop("heads").keys() == {"arm", "gripper"}
    assert_close(params, numbers, 0)


@pytest.mark.sampled
@pytest.mark.parametrize("kind", KINDS)
def test_every_param_has_a_finite_nonzero_gradient_with_bins(kind, key):
    config = configured(kind=kind, pooling="none", head="discrete", num_bins=16)
    tokens = draw(0, B, W, N, D)
    action, mask = np.tanh(draw(1, B, W, K, 7)), np.ones((B, W, K), bool)
    action[0], mask[0] = np.nan, False

    def loss_fn(params):
        return losses.action_loss(decoders.apply(params, config, tokens), action, mask)[0]

    gradient = jax.jit(jax.grad(loss_fn))(decoders.init(key, config))
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(gradient))


@pytest.mark.sampled
@pytest.mark.parametrize("kind", KINDS)
def test_only_a_decoder_with_memory_depends_on_earlier_frames(kind, key):
    config = configured(kind=kind)
    params, tokens = decoders.init(key, config), draw(0, B, W, N, D)
    other = np.concatenate([-tokens[:, :1], tokens[:, 1:]], axis=1)
    one, two = (apply(params, config, t).arm[:, -1] for t in (tokens, other))
    assert np.array_equal(one, two) == (kind == "fc")


@pytest.mark.sampled
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ATTENDING])
def test_features_continue_from_the_carry_of_the_previous_window(kind, key):
    config = configured(kind=kind)
    params, tokens = decoders.init(key, config), draw(0, B, 6, N, D)
    _, whole = decoders.run_trunk(params, config, tokens)
    carry, first = decoders.run_trunk(params, config, tokens[:, :3])
    _, second = decoders.run_trunk(params, config, tokens[:, 3:], carry=carry)
    assert_close(np.concatenate([first, second], axis=1), whole)


@pytest.mark.sampled
@pytest.mark.parametrize("kind", KINDS)
def test_a_reset_inside_the_window_starts_a_new_episode(kind, key):
    config = configured(kind=kind)
    params, tokens = decoders.init(key, config), draw(0, B, W, N, D)
    reset = np.tile(np.arange(W) == 2, (B, 1))
    chunk = apply(params, config, tokens, reset=reset)
    cut = apply(params, config, tokens[:, 2:])
    assert_close(jax.tree.map(lambda leaf: leaf[:, 2:], chunk), cut)


@pytest.mark.sampled
@pytest.mark.parametrize("kind", KINDS)
def test_jit_and_vmap_change_nothing(kind, key):
    config = configured(kind=kind, pooling="attention")
    params, tokens = decoders.init(key, config), draw(0, B, W, N, D)
    expected = decoders.apply(params, config, tokens)
    assert_close(apply(params, config, tokens), expected)
    mapped = jax.vmap(lambda t: decoders.apply(params, config, t[None]))(tokens)
    assert_close(jax.tree.map(lambda leaf: leaf[:, 0], mapped), expected)


@pytest.mark.sampled
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_products_give_float32_actions_and_gradients(kind, key):
    config = configured(kind=kind)
    params, tokens = decoders.init(key, config), draw(0, B, W, N, D)
    half = configured(kind=kind, dtype="bfloat16")
    chunk = apply(params, half, tokens.astype(jnp.bfloat16))
    assert_close(chunk, apply(params, config, tokens), 0.1)
    gradient = jax.grad(lambda p: apply(p, half, tokens).arm.sum())(params)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((chunk, gradient))}
    assert dtypes == {jnp.dtype("float32")}


@pytest.mark.parametrize("kind", ["lstm", "gpt", "rotary_gpt", "memory_gpt"])
def test_dropout_needs_a_key(kind, key):
    config = configured(kind=kind, dropout=0.5)
    params, tokens = decoders.init(key, config), draw(0, B, W, N, D)
    plain = apply(params, configured(kind=kind), tokens)
    assert_close(apply(params, config, tokens), plain, 0)
    assert np.abs(apply(params, config, tokens, key=key).arm - plain.arm).max() > 1e-4


@pytest.mark.parametrize("num_latents", [1, 2])
def test_a_gpt_projects_features_of_another_size(num_latents, key):
    """D' = 3 features of a pooled step, of which 2 latents make H = 6."""
    config = configured(kind="gpt", num_latents=num_latents)
    params, pooled = decoders.init(key, config), draw(0, B, W, pooled_size(config))
    projected = gpt_trunk.project(params, config, pooled)
    if pooled_size(config) == H:
        assert "projection" not in params
        assert_close(projected, pooled, 0)
    else:
        kernel = np.asarray(params["projection"]["kernel"], np.float64)
        params["projection"]["bias"] = draw(1, H)
        projected = gpt_trunk.project(params, config, pooled)
        assert_close(projected, pooled @ kernel + draw(1, H))


# --- wrong input ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(B, W, D), (B, W, N + 1, D), (B, W, N, D + 1)])
def test_tokens_of_another_size_raise_one_sentence(shape, key):
    params = decoders.init(key, SMALL)
    with pytest.raises(
        ValueError, match=r"tokens must be \[B, W, N, D\] with N = 4 and D = 3, got"
    ):
        decoders.apply(params, SMALL, np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("pooling", "num_tokens", "least"), [("max", 1, 2), ("mean", 1, 2), ("attention", 0, 1)]
)
def test_any_number_of_tokens_must_suffice_for_every_latent(pooling, num_tokens, least, key):
    config = configured(pooling=pooling, num_tokens=0, num_latents=2)
    with pytest.raises(ValueError, match=rf"tokens must be \[B, W, N, D\] with N ≥ {least} and D"):
        decoders.apply(decoders.init(key, config), config, draw(0, B, W, num_tokens, D))


@pytest.mark.parametrize("wrong", [{"timestep_mask": (B, W + 1)}, {"token_mask": (B, W)}])
@pytest.mark.parametrize("kind", ["lstm", "fc", "gpt"])
def test_masks_of_another_size_are_refused(wrong, kind, key):
    config = configured(kind=kind)
    masks = {name: np.ones(shape, bool) for name, shape in wrong.items()}
    with pytest.raises(AssertionError, match="assert_shape"):
        decoders.apply(decoders.init(key, config), config, draw(0, B, W, N, D), **masks)


@pytest.mark.parametrize("kind", ATTENDING)
def test_a_carry_for_a_gpt_raises_one_sentence(kind, key):
    config, tokens = configured(kind=kind), draw(0, B, W, N, D)
    params = decoders.init(key, config)
    carry, _ = decoders.run_trunk(params, config, tokens)
    with pytest.raises(
        ValueError, match=rf"carry must be None for a decoder of kind '{kind}', .* dict"
    ):
        decoders.run_trunk(params, config, tokens, carry=carry)


def test_a_window_longer_than_the_positions_of_a_gpt_raises_one_sentence(key):
    config = configured(kind="gpt")
    params = decoders.init(key, config)
    with pytest.raises(ValueError, match="at most num_positions = 5 steps, got 6; shorten the"):
        decoders.apply(params, config, draw(0, B, W + 1, N, D))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"kind": "lsm"}, "unknown kind 'lsm'; .* Did you mean 'lstm'"),
        ({"pooling": "avg"}, "unknown pooling 'avg'; choose from max, mean, attention, none"),
        ({"head": "bins"}, "unknown head 'bins'; choose from continuous, discrete"),
        ({"num_bins": 2}, "num_bins must be at least 3 .* got 2"),
        ({"token_dim": 0}, "token_dim must be at least 1, got 0"),
        ({"num_tokens": -1}, "num_tokens must be at least 0, got -1"),
        ({"num_tokens": 0, "pooling": "none"}, "num_tokens must be at least 1, got 0"),
        ({"window_size": 0}, "window_size must be at least 1, got 0"),
        ({"action_dim": 1}, "action_dim must be at least 2"),
        ({"num_latents": 9}, "num_latents must be at most num_tokens = 4 with pooling='max'"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"kind": "fc", "hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"kind": "gpt", "num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"kind": "fc", "dtype": "float16"}, "unknown dtype 'float16'; .* Did you mean"),
        ({"kind": "fc", "dropout": 0.1}, "dropout must be 0 for .* kind 'fc', .* got 0.1"),
        ({"kind": "gpt", "dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"kind": "gru", "remat_chunk": -1}, "remat_chunk must be a number of steps .* got -1"),
        ({"kind": "rotary_gpt", "num_heads": 4}, "hidden_size must be a multiple of num_heads = 4"),
        (
            {"kind": "rotary_gpt", "num_kv_heads": 2},
            "num_kv_heads must divide num_heads = 3, got 2",
        ),
        ({"kind": "memory_gpt", "segment_size": 0}, "segment_size must be at least 1, got 0"),
        ({"attention_span": -1}, "attention_span must be at least 0, got -1"),
        ({"kind": "gpt", "num_heads": 4}, "hidden_size must be a multiple of num_heads = 4, got 6"),
    ],
)
def test_a_wrong_config_raises_one_sentence(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        configured(**fields)
