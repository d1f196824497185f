"""The actor of Gymnasium environments, compared with the actor of JAX environments."""

import contextlib
from functools import partial

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax import trees
from vla_jax.envs import cartpole
from vla_jax.envs.cartpole import CartPoleConfig, CartPoleState
from vla_jax.envs.discrete_worlds import DiscreteGymnasiumConfig
from vla_jax.rl import actor, gymnasium_actor
from vla_jax.rl.gymnasium_actor import EpisodeError

B, T, MAX_STEPS = 3, 40, 15
FLAGS = ("reset", "terminated", "truncated", "mask", "reward", "return_", "action")


class Counter(gymnasium.Env):
    """Counts the steps of all its episodes; each episode ends after `length` steps."""

    observation_space = gymnasium.spaces.Dict(
        {"count": gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float64)}
    )
    action_space = gymnasium.spaces.Discrete(3, start=-1)

    def __init__(self, length=1, late=False, fault=None):
        self.length, self.late, self.fault, self.count = length, late, fault, 0

    def reset(self, *, seed=None, options=None):
        self.steps, self.count = 0, self.count if seed is None else 0
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.steps, self.count = self.steps + 1, self.count + 1
        if self.fault == self.count:
            raise OSError("the wire broke")
        over, in_time = self.steps >= self.length, not self.late
        return (
            self.observe(),
            2.0 + action,
            over and in_time,
            over and not in_time,
            {"success": over},
        )

    def observe(self):
        return {"count": np.array([float(self.count)])}


gymnasium.register("Counter-v0", Counter, max_episode_steps=50)


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


def counters(stack, **options):
    """`B` environments of type `Counter` with these options."""
    group = gymnasium_actor.open_envs(DiscreteGymnasiumConfig(env_id="Counter-v0"), B, stack)
    for env in group.envs:
        env.unwrapped.__init__(**options)
    return group


@jax.jit
def ones(state, key):
    return state.carry + 1, jnp.ones(state.ended.shape, jnp.int32)


@jax.jit
def at_random(state, key):
    return state.carry, jax.random.randint(key, state.ended.shape, 0, 2)


def unroll(group, act, num_steps=T):
    first = gymnasium_actor.start(group, jnp.zeros(B), key=jax.random.key(0))
    return gymnasium_actor.unroll(group, act, first, num_steps, key=jax.random.key(1))


def test_its_rollouts_equal_those_of_the_jax_actor_in_cartpole(stack):
    """With the same states and actions; new episodes start from Gymnasium's initial states."""
    group = gymnasium_actor.open_envs(DiscreteGymnasiumConfig(max_steps=MAX_STEPS), B, stack)
    _, rollout = unroll(group, at_random)
    observation = np.asarray(rollout.observation)
    env = cartpole.make(CartPoleConfig(max_steps=MAX_STEPS))
    state = actor.start(env, B, {}, key=jax.random.key(0))
    advance = jax.jit(actor.advance, static_argnums=0)
    steps = []
    for t in range(T):
        new = CartPoleState(*observation[:, t].T, np.zeros(B, np.int32))
        state = state._replace(
            env_state=trees.select(state.reset, new, state.env_state),
            observation=trees.select(state.reset, observation[:, t], state.observation),
        )
        state, step = advance(env, state, rollout.action[:, t], key=jax.random.key(t))
        steps.append(step)
    expected = jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *steps)
    for name in FLAGS:
        values = getattr(rollout, name)[:, :T]
        np.testing.assert_array_equal(values, getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(observation[:, :T], expected.observation, atol=1e-4)
    assert rollout.terminated.any()
    assert rollout.truncated.any()
    shapes = jax.eval_shape(lambda: jax_rollout(env))
    assert jax.tree.map(jnp.shape, rollout) == jax.tree.map(jnp.shape, shapes)


def jax_rollout(env):
    policy = lambda carry, observation, reset, key: (carry, jnp.zeros(B, jnp.int32))  # noqa: E731
    first = actor.start(env, B, jnp.zeros(B), key=jax.random.key(0))
    return actor.unroll(env, policy, first, T, key=jax.random.key(0))[1]


@pytest.mark.parametrize(("length", "late"), [(1, False), (3, False), (2, True)])
def test_the_end_of_an_episode_is_followed_by_a_step_that_only_resets(stack, length, late):
    last, rollout = unroll(counters(stack, length=length, late=late), ones, 12)
    place = np.arange(12) % (length + 1)
    np.testing.assert_array_equal(rollout.reset[0], np.arange(13) % (length + 1) == 0)
    np.testing.assert_array_equal(rollout.mask[0], place != length)
    ends = {"terminated": not late, "truncated": late, "success": True}
    for name, happens in ends.items():
        np.testing.assert_array_equal(getattr(rollout, name)[0], (place == length - 1) & happens)
    np.testing.assert_array_equal(rollout.reward[0], np.where(place == length, 0, 2))
    np.testing.assert_array_equal(rollout.return_[0], 2 * np.minimum(place + 1, length))
    steps = np.cumsum(place != length)
    np.testing.assert_array_equal(rollout.observation[0, 1:, 0], steps)
    np.testing.assert_array_equal(rollout.carry, np.zeros(B))
    np.testing.assert_array_equal(last.carry, np.full(B, 12))


def test_two_rollouts_equal_one_of_their_total_length(stack):
    """Episodes continue from one rollout to the next."""
    _, whole = unroll(counters(stack, length=4), ones, 9)
    group = counters(stack, length=4)
    first = gymnasium_actor.start(group, jnp.zeros(B), key=jax.random.key(0))
    middle, one = gymnasium_actor.unroll(group, ones, first, 3, key=jax.random.key(1))
    _, two = gymnasium_actor.unroll(group, ones, middle, 6, key=jax.random.key(2))
    joined = jax.tree.map(
        lambda a, b: np.concatenate([a[:, :3], b], axis=1),
        *(rollout._replace(carry=None) for rollout in (one, two)),
    )
    jax.tree.map(np.testing.assert_array_equal, joined, whole._replace(carry=None))


def test_a_key_determines_the_episodes_and_environments_differ(stack):
    group = gymnasium_actor.open_envs(DiscreteGymnasiumConfig(), B, stack)
    start = partial(gymnasium_actor.start, group, {})
    one, same, other = (np.asarray(start(key=jax.random.key(s)).observation) for s in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).min() > 0
    assert np.abs(one[0] - one[1]).min() > 0


def test_play_counts_one_episode_per_environment(stack):
    group = counters(stack)
    for length, env in enumerate(group.envs, start=1):
        env.unwrapped.length = length
    metrics = gymnasium_actor.play(group, ones, jnp.zeros(B), key=jax.random.key(0))
    np.testing.assert_array_equal(metrics["return"], [2, 4, 6])
    np.testing.assert_array_equal(metrics["success"], [1, 1, 1])


def test_an_exception_of_an_environment_becomes_one_sentence(stack):
    message = r"env Counter-v0 raised in mid-episode \(OSError: the wire broke\)"
    with pytest.raises(EpisodeError, match=message):
        unroll(counters(stack, length=5, fault=7), ones)
