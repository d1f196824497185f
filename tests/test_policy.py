"""From observations to action chunks: streamed = windowed, frozen parts, and outputs."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from vla_jax.backbones.perceiver import PerceiverConfig
from vla_jax.backbones.state import StateConfig
from vla_jax.policies import decoders, policy
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.policies.policy import PolicyConfig
from vla_jax.training import optim
from vla_jax.training.update import init_train_state, make_update
from vla_jax.types import Observation

B, T, W, S = 2, 7, 3, 4
BACKBONES = {
    "perceiver": PerceiverConfig(
        image_size=16, width=16, num_latents=2, token_dim=8, num_heads=2, vocab_size=64, max_words=S
    ),
    "state": StateConfig(token_dim=8, vocab_size=64, max_words=S),
}
DECODER = DecoderConfig(
    kind="lstm",
    window_size=W,
    action_horizon=2,
    hidden_size=6,
    num_layers=1,
    pooling="none",
    head_sizes=(8,),
)
GPT = dataclasses.replace(DECODER, kind="gpt", num_heads=2)
CONFIGS = {name: policy.connect(backbone, DECODER) for name, backbone in BACKBONES.items()}
each = pytest.mark.parametrize("name", CONFIGS)


def observe(name, seed=0):
    random = np.random.default_rng(seed)
    parts = {
        "proprio": random.normal(size=(B, T, 8)).astype(np.float32),
        "instruction": random.integers(0, 64, (B, T, S)).astype(np.int32),
    }
    if name == "perceiver":
        for camera in ("image_primary", "image_wrist"):
            parts[camera] = random.integers(0, 256, (B, T, 16, 16, 3), np.uint8)
    else:
        parts["environment_state"] = random.normal(size=(B, T, 22)).astype(np.float32)
    return Observation(**parts)


def select_steps(observation, steps):
    return jax.tree.map(lambda part: part[:, steps], observation)


@functools.cache
def init(config):
    return jax.jit(policy.init, static_argnums=1)(jax.random.key(0), config)


def params(name):
    return init(CONFIGS[name])


apply = jax.jit(policy.apply, static_argnums=1)


def assert_close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "decoder"), [("perceiver", DECODER), ("state", DECODER), ("state", GPT)]
)
def test_streamed_equals_windowed_from_observations(name, decoder):
    config, observation = policy.connect(BACKBONES[name], decoder), observe(name)
    step = jax.jit(policy.step, static_argnums=1)
    state = policy.init_stream(init(config), config, B)
    for t in range(T):
        state, chunk = step(init(config), config, state, select_steps(observation, t))
        if t >= W - 1:
            window = apply(init(config), config, select_steps(observation, slice(t + 1 - W, t + 1)))
            assert_close(chunk, jax.tree.map(lambda part: part[:, -1], window))


@pytest.mark.slow
@each
def test_precomputed_tokens_give_the_same_chunks(name):
    config, observation = CONFIGS[name], select_steps(observe(name), slice(W))
    tokens = policy.encode(params(name), config, observation)
    assert tokens.tokens.shape == (B, W, config.backbone.num_tokens, 8)
    assert tokens.mask.shape == (B, W, config.backbone.num_tokens)
    blind = Observation()
    assert_close(
        apply(params(name), config, blind, tokens=tokens), apply(params(name), config, observation)
    )


@pytest.mark.sampled
@each
def test_outputs_are_tokens_features_and_prediction(name):
    config, observation = CONFIGS[name], select_steps(observe(name), slice(W))
    outputs = policy.outputs(params(name), config, observation)
    assert_close(outputs.tokens, policy.encode(params(name), config, observation))
    assert outputs.features.shape == (B, W, DECODER.hidden_size)
    chunk = decoders.predict(params(name)["decoder"], config.decoder, outputs.features)
    assert_close(chunk, outputs.prediction)
    assert_close(chunk, apply(params(name), config, observation))


def test_a_reset_inside_a_window_starts_an_episode():
    config, observation = CONFIGS["state"], observe("state")
    reset = np.zeros((B, T), bool)
    reset[:, 4] = True
    together = apply(params("state"), config, observation, reset=reset)
    alone = apply(params("state"), config, select_steps(observation, slice(4, T)))
    assert_close(jax.tree.map(lambda part: part[:, 4:], together), alone)


@each
def test_connect_adapts_the_decoder_to_the_backbone(name):
    backbone, config = BACKBONES[name], CONFIGS[name]
    assert config.backbone == backbone
    assert config.decoder.num_tokens == backbone.num_tokens
    assert config.decoder.token_dim == backbone.token_dim
    assert config.decoder.hidden_size == DECODER.hidden_size


def test_a_decoder_that_does_not_fit_the_backbone_is_refused():
    with pytest.raises(
        ValueError, match=r"decoder must expect .* \[3, 8\], got .* use policy\.connect"
    ):
        PolicyConfig(BACKBONES["state"], DECODER)


def test_a_decoder_for_any_number_of_tokens_fits_every_backbone_of_its_token_dim():
    decoder = dataclasses.replace(CONFIGS["state"].decoder, num_tokens=0, pooling="max")
    assert PolicyConfig(BACKBONES["state"], decoder).decoder.num_tokens == 0
    with pytest.raises(ValueError, match="decoder must expect the backbone's tokens"):
        PolicyConfig(BACKBONES["state"], dataclasses.replace(decoder, token_dim=9))


@pytest.mark.parametrize("frozen", ["backbone", "decoder"])
def test_a_frozen_half_is_bitwise_unchanged_and_the_other_is_trained(frozen):
    config, observation = CONFIGS["state"], select_steps(observe("state"), slice(W))
    optim_config = optim.OptimConfig(warmup_steps=0, freeze=(f"{frozen}/*",))
    optimizer = optim.make_optimizer(optim_config, 4, params("state"))

    def loss_fn(params, batch, key):
        del key
        chunk = policy.apply(params, config, batch)
        return (chunk.arm**2).mean() + (chunk.gripper_logit**2).mean(), {}

    update = jax.jit(make_update(loss_fn, optimizer, freeze=optim_config.freeze))
    train_state = init_train_state(params("state"), optimizer)
    for _ in range(2):
        train_state, _ = update(train_state, observation, jax.random.key(0))
    for half in ("backbone", "decoder"):
        before, after = params("state")[half], train_state.params[half]
        same = jax.tree.leaves(jax.tree.map(np.array_equal, before, after))
        assert all(same) == (half == frozen)
