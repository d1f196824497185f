"""History "window": a vision-language model sees all steps of a window in one causal sequence."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_vlm

from vla_jax.backbones import kosmos2, kosmos_decoder, registry
from vla_jax.backbones.sequence import PADDING
from vla_jax.policies import policy
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.types import Observation

B, W, T = 2, 3, 7
KINDS = ("kosmos2", "paligemma", "smolvlm")
LAYOUT = {"kosmos2": "robovlms", "paligemma": "native"}
DECODER = DecoderConfig(
    kind="fc", window_size=W, action_horizon=2, hidden_size=8, pooling="none", head_sizes=(8,)
)
TEXTS = ("pick up the block", "go")  # of different lengths: the second one is padded


@functools.cache
def make(kind, **changes):
    config = tiny_vlm.CONFIGS[kind]
    options = dataclasses.replace(
        config.options, history="window", layout=LAYOUT.get(kind, "native"), prompt="{instruction}"
    )
    fields = ({"prefix": "none"} if kind == "paligemma" else {}) | changes
    config = dataclasses.replace(config, options=options, **fields)
    return policy.connect(config, DECODER)


@functools.cache
def make_params(kind):
    config = make(kind)
    params = policy.init(jax.random.key(0), config)
    return {**params, "backbone": tiny_vlm.params(config.backbone)}


@functools.cache
def observe(kind, num_steps=T):
    backbone = make(kind).backbone
    random, member = np.random.default_rng(0), registry.get(backbone)
    shape = (B, num_steps, *backbone.image_shape, 3)
    images = {name: random.integers(0, 256, shape, np.uint8) for name in backbone.options.cameras}
    ids = np.stack([member.tokenize(backbone, text) for text in TEXTS])
    proprio = random.normal(size=(B, num_steps, backbone.options.proprio_dim))
    return Observation(
        **images,
        proprio=proprio.astype(np.float32),
        instruction=np.tile(ids[:, None], (1, num_steps, 1)),
    )


def select(tree, steps):
    return jax.tree.map(lambda part: part[:, steps], tree)


def assert_close(one, other, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), one, other)


apply_policy = jax.jit(policy.apply, static_argnums=1)
encode = jax.jit(policy.encode_window, static_argnums=1)


@pytest.mark.sampled
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_equals_windowed(kind):
    config, params, observation = make(kind), make_params(kind), observe(kind)
    step = jax.jit(policy.step, static_argnums=1)
    state = policy.init_stream(params, config, B)
    reset = np.zeros((B, T), bool)
    reset[:, 0] = reset[1, 2] = reset[0, 5] = True
    for t in range(T):
        state, chunk = step(params, config, state, select(observation, t), reset=reset[:, t])
        times = np.arange(t + 1 - W, t + 1)
        started = [np.flatnonzero(row[: t + 1])[-1] for row in reset]
        mask = times >= np.array(started)[:, None]
        window = select(observation, np.maximum(times, 0))
        expected = apply_policy(params, config, window, timestep_mask=mask)
        assert_close(chunk, select(expected, -1))


@pytest.mark.sampled
@pytest.mark.parametrize("kind", KINDS)
def test_masked_steps_and_earlier_episodes_are_not_seen(kind):
    config, params = make(kind), make_params(kind)
    window = select(observe(kind), slice(0, W))
    alone = encode(params, config, select(window, slice(1, W)))
    masked = np.arange(W)[None].repeat(B, 0) > 0
    hidden = encode(params, config, window, timestep_mask=masked)
    assert_close(select(hidden, slice(1, W)), alone)
    reset = np.arange(W)[None].repeat(B, 0) == 1
    assert_close(select(encode(params, config, window, reset=reset), slice(1, W)), alone)
    seen = encode(params, config, window)
    assert abs(seen.tokens[:, 1:] - alone.tokens).max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_has_the_tokens_of_one_step(kind):
    config, params = make(kind), make_params(kind)
    window = select(observe(kind), slice(0, W))
    options = dataclasses.replace(config.backbone.options, history="step")
    single = policy.connect(dataclasses.replace(config.backbone, options=options), DECODER)
    alone = jax.jit(policy.encode, static_argnums=1)(params, single, select(window, 0))
    assert_close(select(encode(params, config, window), 0), alone)


def test_the_sequence_written_by_hand():
    """W·S tokens of Kosmos-2 without padding, positions from 2, read at every learned token."""
    config, params = make("kosmos2"), make_params("kosmos2")
    backbone, weights = config.backbone, params["backbone"]
    window = select(observe("kosmos2"), slice(0, W))
    parts, columns = [], []
    embed = jax.jit(kosmos2.embed, static_argnums=1)
    for t in range(W):
        ids = window.instruction[0, t]
        images = np.stack([getattr(window, name)[0, t] for name in backbone.options.cameras])
        embeddings = embed(weights, backbone, ids[None], images[None])[0]
        parts.append(embeddings[ids != PADDING])
        columns.append(sum(map(len, parts)) - 2)  # before the last real token
    sequence = jnp.concatenate(parts)[None]
    positions = 2 + jnp.arange(sequence.shape[1])[None]
    causal = jnp.tri(sequence.shape[1], dtype=bool)[None]
    language = weights["language"]
    hidden = kosmos_decoder.apply(language, backbone.language, sequence, positions, causal)
    tokens = encode(params, config, window)
    assert_close(tokens.tokens[0, :, 0], hidden[0, np.array(columns)])


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"kind of the decoder must be 'fc' .* got 'lstm'"):
        policy.connect(make("kosmos2").backbone, dataclasses.replace(DECODER, kind="lstm"))
    with pytest.raises(ValueError, match="history must be 'step' for backbone 'qwen3_vl'"):
        make("qwen3_vl")
    with pytest.raises(ValueError, match="prefix must be 'none' with history 'window'"):
        make("paligemma", prefix="prompt")
    params = make_params("kosmos2")
    with pytest.raises(ValueError, match=r"must be 'step' to encode steps one by one"):
        policy.encode(params, make("kosmos2"), observe("kosmos2"))
    with pytest.raises(ValueError, match=r"at most window_size = 3 steps .* got 7"):
        policy.apply(params, make("kosmos2"), observe("kosmos2"))
