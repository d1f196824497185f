"""PPO over rollouts of a recurrent policy: stored carries, minibatches, ends of episodes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import ppo
from train.ppo import PPOConfig
from vla_jax.envs import discrete_worlds
from vla_jax.envs.grid import GridConfig
from vla_jax.rl import actor, actor_critic, network, passes, policy_gradient
from vla_jax.rl.learner import SeedsConfig, zero_carry
from vla_jax.rl.network import NetworkConfig
from vla_jax.rl.passes import PassesConfig
from vla_jax.training.optim import OptimConfig

B, T = 8, 12
CONFIG = PPOConfig(
    world=GridConfig(size=3, num_obstacles=1, max_steps=5),
    network=NetworkConfig(
        kind="gru", hidden_sizes=(8,), memory_size=8, gate_span=8, joint_sizes=(8,)
    ),
    gamma=0.9,
    seeds=SeedsConfig(num_envs=B, num_steps=T),
    passes=PassesConfig(num_epochs=1, num_minibatches=1),
    optim=OptimConfig(warmup_steps=0),
)
ENV = discrete_worlds.make(CONFIG.world)
ALGORITHM = ppo.make_algorithm(CONFIG)


@pytest.fixture(scope="module")
def params():
    """Params whose policy is far from uniform."""
    heads = ALGORITHM.heads(ENV.num_actions)
    params = network.init(jax.random.key(0), CONFIG.network, ENV.observation_shape, heads)
    return params | {"heads": jax.tree.map(lambda leaf: 100 * leaf, params["heads"])}


@pytest.fixture(scope="module")
def rollouts(params):
    """Two rollouts, one after the other, and the carry at the start of each."""
    policy = ALGORITHM.explore(params, jnp.int32(0))
    state = actor.start(ENV, B, zero_carry(ALGORITHM, B), key=jax.random.key(1))
    unroll = jax.jit(partial(actor.unroll, ENV, policy, num_steps=T))
    parts = []
    for i in range(2):
        carry = state.carry
        state, rollout = unroll(state, key=jax.random.key(2 + i))
        parts.append((rollout, carry))
    return parts


@pytest.fixture(scope="module")
def segments(params, rollouts):
    """The second rollout, prepared for the loss."""
    return jax.jit(ALGORITHM.prepare)(params, rollouts[1][0])


def loss_of(config, params, segments):
    return ppo._loss(config, params, (segments, jnp.int32(0)), jax.random.key(0))


def test_a_segment_starts_from_the_carry_with_which_it_was_played(params, rollouts, segments):
    rollout, carry = rollouts[1]
    jax.tree.map(np.testing.assert_array_equal, rollout.carry, carry)
    assert any(np.abs(leaf).max() > 0.01 for leaf in jax.tree.leaves(carry))
    assert not np.asarray(rollout.reset[:, 0]).all()  # some episodes run on from the segment before

    def step(state, inputs):
        observation, reset, action = inputs
        state, outputs = network.step(params, CONFIG.network, state, observation, reset)
        return state, policy_gradient.log_probability(outputs["logits"], action)

    inputs = rollout.observation[:, :T], rollout.reset[:, :T], rollout.action
    inputs = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), inputs)
    _, acted = jax.jit(partial(jax.lax.scan, step))(carry, inputs)
    np.testing.assert_allclose(segments.log_probability, acted.T, atol=1e-5)


def test_before_the_first_update_the_policies_are_the_same(params, segments):
    _, metrics = jax.jit(partial(loss_of, CONFIG))(params, segments)
    assert metrics["clipped"] == 0
    np.testing.assert_allclose(metrics["divergence"], 0, atol=1e-9)
    _, other = loss_of(CONFIG, jax.tree.map(lambda leaf: 1.5 * leaf, params), segments)
    assert other["divergence"] > 1e-3


def test_the_gradients_of_minibatches_average_to_that_of_the_whole_batch(params, segments):
    # Advantages are normalised per minibatch; equal ones stay what they are.
    one = segments._replace(advantage=jnp.zeros_like(segments.advantage))
    grad = jax.jit(jax.grad(lambda params, part: loss_of(CONFIG, params, part)[0]))
    envs = passes.draw(PassesConfig(num_minibatches=4), B, key=jax.random.key(0))
    parts = [grad(params, jax.tree.map(lambda leaf, i=i: leaf[i], one)) for i in envs]
    mean = jax.tree.map(lambda *leaves: jnp.mean(jnp.stack(leaves), axis=0), *parts)
    close = partial(np.testing.assert_allclose, atol=1e-5)
    jax.tree.map(close, mean, grad(params, one))


def test_truncated_episodes_bootstrap_and_terminated_ones_do_not(rollouts):
    rollout, _ = rollouts[0]
    terminated, truncated = np.asarray(rollout.terminated), np.asarray(rollout.truncated)
    assert terminated.any()
    assert truncated.any()
    value = np.random.default_rng(0).normal(size=(B, T + 1)).astype(np.float32)
    found = actor_critic.rollout_advantages(rollout, value, 0.9, 0.8)
    expected = np.zeros((B, T + 1))
    for b in range(B):
        for t in reversed(range(T)):
            reward = 0.1 * float(rollout.reward[b, t])
            after = 0.0 if terminated[b, t] else 0.9 * value[b, t + 1]
            later = 0.0 if terminated[b, t] or truncated[b, t] else 0.9 * 0.8 * expected[b, t + 1]
            expected[b, t] = reward + after - value[b, t] + later
    real = np.asarray(rollout.mask)
    np.testing.assert_allclose(np.asarray(found)[real], expected[:, :T][real], atol=1e-5)


def test_annealing_ends_at_zero(params, segments):
    annealed = PPOConfig(**{**vars(CONFIG), "annealing": True})
    other = jax.tree.map(lambda leaf: 1.1 * leaf, params)
    done = jnp.int32(annealed.loop.num_updates)
    loss, metrics = ppo._loss(annealed, other, (segments, done), jax.random.key(0))
    terms = metrics["loss_policy"] + CONFIG.baseline_weight * metrics["loss_baseline"]
    np.testing.assert_allclose(loss, terms, rtol=1e-6)
    weight = np.asarray(segments.rollout.mask, np.float32)
    np.testing.assert_allclose(metrics["clipped"], weight.mean(), rtol=1e-6)


def test_a_limited_baseline_is_not_nearer_to_the_returns(params, segments):
    other = jax.tree.map(lambda leaf: 1.1 * leaf, params)
    limited = PPOConfig(**{**vars(CONFIG), "value_clip_range": 1e-4})
    free, bound = (loss_of(config, other, segments)[1] for config in (CONFIG, limited))
    assert bound["loss_baseline"] >= free["loss_baseline"]


def test_the_joint_layers_see_the_observation_and_the_memory(params):
    observation = jnp.ones((2, *ENV.observation_shape))
    reset, zero = jnp.zeros(2, bool), zero_carry(ALGORITHM, 2)
    full = jax.tree.map(jnp.ones_like, zero)
    step = partial(network.step, params, CONFIG.network)
    outputs = [
        step(carry, inputs, reset)[1]["logits"]
        for carry, inputs in ((zero, observation), (full, observation), (zero, 0 * observation))
    ]
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3
    assert np.abs(outputs[0] - outputs[2]).max() > 1e-3


def test_a_gate_span_keeps_the_other_params():
    plain = NetworkConfig(kind="gru", hidden_sizes=(8,), memory_size=8)
    spread = NetworkConfig(kind="gru", hidden_sizes=(8,), memory_size=8, gate_span=50)
    first, second = (network.init(jax.random.key(0), c, (3,), {"q": 2}) for c in (plain, spread))
    cells = [part.pop("recurrence")["layers_0"]["forward"] for part in (first, second)]
    jax.tree.map(np.testing.assert_array_equal, first, second)
    update = slice(8, 16)
    assert (np.asarray(cells[1]["input_bias"])[update] > np.log(0.9)).all()
    np.testing.assert_array_equal(cells[0]["input_kernel"], cells[1]["input_kernel"])
