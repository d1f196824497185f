"""The auto-resetting actor: ends of episodes, carries and metrics; the networks of agents."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.envs import discrete_worlds, grid
from vla_jax.envs.grid import GridConfig
from vla_jax.rl import actor, network
from vla_jax.rl.network import NetworkConfig
from vla_jax.types import DiscreteEnv, Transition

B, T = 3, 12
KINDS = list(network.MEMORIES)
HEADS = {"q": 5, "value": 1}


def counter(*, end_step=3, late=False):
    """An environment that counts its steps, from a multiple of ten that depends on the key."""

    def reset(key):
        count = 10 * jax.random.randint(key, (), 1, 5)
        return (count, jnp.int32(0)), jnp.float32(count)[None]

    def step(state, action):
        count, steps = state[0] + 1, state[1] + 1
        over, in_time = steps >= end_step, jnp.bool_(not late)
        observation = jnp.float32(count)[None]
        reward = 1.0 + jnp.float32(action)
        return (count, steps), Transition(
            observation, reward, over & in_time, over & ~in_time, over
        )

    return DiscreteEnv(reset, step, lambda state: jnp.zeros((1, 1, 3)), (1,), (), 2, end_step)


def ones(carry, observation, reset, key):
    """Always takes action 1; its carry counts the steps of the policy."""
    return carry + 1, jnp.ones(observation.shape[0], jnp.int32)


@pytest.fixture(scope="module")
def rollout():
    env, key = counter(), jax.random.key(0)
    state = actor.start(env, B, jnp.zeros(B), key=key)
    return jax.jit(lambda state, key: actor.unroll(env, ones, state, T, key=key))(state, key)[1]


def test_the_last_observation_of_an_episode_is_returned_and_then_a_new_episode_starts(rollout):
    flags = np.arange(T) % 4  # three steps, and one that resets the environment
    np.testing.assert_array_equal(rollout.reset[0], np.arange(T + 1) % 4 == 0)
    np.testing.assert_array_equal(rollout.mask[0], flags != 3)
    np.testing.assert_array_equal(rollout.terminated[0], flags == 2)
    np.testing.assert_array_equal(rollout.success[0], flags == 2)
    assert not rollout.truncated.any()
    counts = np.asarray(rollout.observation[:, :T, 0]).reshape(B, -1, 4)
    np.testing.assert_array_equal(counts % 10, np.broadcast_to([0, 1, 2, 3], counts.shape))
    np.testing.assert_array_equal(rollout.reward[0], np.where(flags == 3, 0, 2))
    np.testing.assert_array_equal(rollout.return_[0].reshape(-1, 4), [[2, 4, 6, 6]] * 3)


def test_a_truncation_is_not_a_termination():
    env, key = counter(late=True), jax.random.key(0)
    state = actor.start(env, B, jnp.zeros(B), key=key)
    _, rollout = actor.unroll(env, ones, state, T, key=key)
    assert rollout.truncated.any()
    assert not rollout.terminated.any()
    np.testing.assert_array_equal(actor.discounts(rollout, 0.9), np.full((B, T), np.float32(0.9)))
    np.testing.assert_array_equal(actor.lambdas(rollout, 0.5) == 0, rollout.truncated)


def test_the_discount_is_zero_at_a_termination(rollout):
    np.testing.assert_array_equal(actor.discounts(rollout, 0.9) == 0, rollout.terminated)


def test_metrics_count_whole_episodes(rollout):
    metrics = actor.episode_metrics(rollout)
    assert (metrics["return"], metrics["success"]) == (6, 1)
    unfinished = jax.tree.map(lambda leaf: leaf[:, :2], rollout._replace(carry=None))
    none = actor.episode_metrics(unfinished)
    assert jnp.isnan(none["return"])


@pytest.mark.slow
def test_two_rollouts_equal_one_of_their_total_length():
    env = grid.make(GridConfig())
    net = NetworkConfig(kind="gru", hidden_sizes=(8,), memory_size=8)
    params = network.init(jax.random.key(0), net, env.observation_shape, {"q": 5})

    def policy(carry, observation, reset, key):
        carry, outputs = network.step(params, net, carry, observation, reset)
        return carry, jnp.argmax(outputs["q"], axis=-1)

    carry = network.zero_carry(net, jnp.zeros((B, 1)))
    state = actor.start(env, B, carry, key=jax.random.key(1))
    keys = jax.random.split(jax.random.key(2), T)

    def play(state, keys):
        """Same as `unroll`, with one key per step."""

        def step(state, key):
            carry, action = policy(state.carry, state.observation, state.reset, key)
            return actor.advance(env, state._replace(carry=carry), action, key=key)

        return jax.lax.scan(step, state, keys)

    last, whole = jax.jit(play)(state, keys)
    middle, first = jax.jit(play)(state, keys[:5])
    same, second = jax.jit(play)(middle, keys[5:])
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), last, same)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), whole, both)


def test_play_counts_the_first_episode_of_every_environment():
    env = counter(end_step=3)._replace(max_steps=10)
    rollout = actor.play(env, ones, B, jnp.zeros(B), key=jax.random.key(0))
    np.testing.assert_array_equal(rollout.mask.sum(axis=1), [3] * B)
    np.testing.assert_array_equal(rollout.terminated.sum(axis=1), [1] * B)
    assert actor.episode_metrics(rollout)["return"] == 6


@pytest.mark.sampled
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("object_size", [0, 2])
def test_apply_equals_step_by_step_across_episodes(kind, object_size, key):
    config = NetworkConfig(
        kind=kind, object_size=object_size, object_sizes=(6,), hidden_sizes=(8,), memory_size=5
    )
    params = network.init(key, config, (4,), HEADS)
    random = np.random.default_rng(0)
    observation = random.normal(size=(B, T, 4)).astype(np.float32)
    reset = random.random((B, T)) < 0.3
    carry = network.zero_carry(config, observation)
    last, whole = network.apply(params, config, carry, observation, reset)
    assert {name: leaf.shape for name, leaf in whole.items()} == {
        "q": (B, T, 5),
        "value": (B, T, 1),
    }
    step = jax.jit(network.step, static_argnums=1)
    for t in range(T):
        carry, outputs = step(params, config, carry, observation[:, t], reset[:, t])
        for name, output in outputs.items():
            np.testing.assert_allclose(output, whole[name][:, t], atol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), carry, last)


def test_the_order_of_objects_does_not_change_the_output(key):
    config = NetworkConfig(object_size=3, object_sizes=(8,), hidden_sizes=(8,))
    params = network.init(key, config, (12,), HEADS)
    objects = np.random.default_rng(0).normal(size=(B, 4, 3)).astype(np.float32)
    run = partial(network.step, params, config, {}, reset=np.zeros(B, bool))
    _, one = run(observation=objects.reshape(B, 12))
    _, other = run(observation=objects[:, [2, 0, 3, 1]].reshape(B, 12))
    _, third = run(observation=objects[:, :, [1, 0, 2]].reshape(B, 12))
    np.testing.assert_allclose(one["q"], other["q"], atol=1e-6)
    assert not np.allclose(one["q"], third["q"], atol=1e-6)


def test_images_are_scaled_to_one(key):
    config = NetworkConfig(hidden_sizes=(8,))
    params = network.init(key, config, (2, 2, 3), {"q": 2})
    image = np.random.default_rng(0).integers(0, 256, (B, 2, 2, 3)).astype(np.uint8)
    reset = np.zeros(B, bool)
    _, one = network.step(params, config, {}, image, reset)
    _, other = network.step(params, config, {}, np.float32(image) / 255, reset)
    np.testing.assert_allclose(one["q"], other["q"], atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "lstn"}, "unknown kind 'lstn'; .* Did you mean 'lstm'"),
        ({"hidden_sizes": ()}, "hidden_sizes must hold at least one width"),
        (
            {"object_size": 2, "object_sizes": ()},
            "object_size must be at least 0, and object_sizes not",
        ),
    ],
)
def test_a_wrong_network_config_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        NetworkConfig(**wrong)


def test_objects_of_another_size_are_refused(key):
    with pytest.raises(ValueError, match=r"object_size must divide the 16 numbers .* got 3"):
        network.init(key, NetworkConfig(object_size=3), (16,), HEADS)


def test_an_environment_is_made_from_its_config():
    assert discrete_worlds.make(GridConfig(num_obstacles=2)).observation_shape == (12,)
    assert discrete_worlds.make(
        discrete_worlds.CartPoleConfig(), partially_observed=True
    ).observation_shape == (2,)
