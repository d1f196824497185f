"""CartPole compared with Gymnasium's implementation, step by step."""

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.envs import cartpole
from vla_jax.envs.cartpole import CartPoleConfig

step = jax.jit(cartpole.make(CartPoleConfig()).step)


def state_of(numbers, num_steps=0):
    return cartpole.CartPoleState(*jnp.float32(jnp.array(numbers)), jnp.int32(num_steps))


@pytest.mark.parametrize("seed", range(3))
def test_the_dynamics_equal_gymnasiums(seed):
    env, random = gymnasium.make("CartPole-v1"), np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    terminated, state = False, state_of(observation)
    while not terminated:
        # The state is copied at every step: float32 errors grow exponentially in these dynamics.
        state = state_of(env.unwrapped.state, state.num_steps)
        action = int(random.integers(2))
        observation, reward, terminated, truncated, _ = env.step(action)
        state, transition = step(state, jnp.int32(action))
        np.testing.assert_allclose(transition.observation, observation, atol=2e-6)
        outcome = (transition.reward, transition.terminated, transition.truncated)
        assert outcome == (reward, terminated, truncated)


@pytest.mark.parametrize("numbers", [[2.39, 3, 0, 0], [-2.39, -3, 0, 0], [0, 0, 0.209, 1]])
def test_an_episode_ends_at_gymnasiums_bounds(numbers):
    env = gymnasium.make("CartPole-v1").unwrapped
    env.reset(seed=0)
    for scale in (0.9, 1.0):
        env.state = np.array(numbers) * scale
        _, transition = step(state_of(env.state), jnp.int32(0))
        assert transition.terminated == env.step(0)[2] == (scale == 1.0)
        env.steps_beyond_terminated = None


def test_the_time_limit_is_500_steps_and_counts_as_success():
    _, before = step(state_of([0, 0, 0, 0], 498), jnp.int32(0))
    _, after = step(state_of([0, 0, 0, 0], 499), jnp.int32(0))
    assert gymnasium.make("CartPole-v1").spec.max_episode_steps == 500
    assert (before.truncated, before.success) == (False, False)
    assert (after.truncated, after.terminated, after.success) == (True, False, True)


def test_the_pole_starts_almost_upright():
    keys = jax.random.split(jax.random.key(0), 1000)
    _, observation = jax.vmap(cartpole.make(CartPoleConfig()).reset)(keys)
    np.testing.assert_allclose(observation.min(axis=0), -0.05, atol=1e-3)
    np.testing.assert_allclose(observation.max(axis=0), 0.05, atol=1e-3)


def test_the_image_shows_the_direction_of_the_pole():
    left, right = (np.asarray(cartpole.draw(state_of([0, 0, a, 0]))) for a in (-0.2, 0.2))
    pole = [213, 94, 0]
    assert np.argwhere((left == pole).all(-1))[:, 1].mean() < 79
    assert np.argwhere((right == pole).all(-1))[:, 1].mean() > 81


def test_a_wrong_action_is_refused():
    with pytest.raises(ValueError, match=r"one integer, 0 \(left\) or 1 \(right\), got float"):
        step(state_of([0, 0, 0, 0]), jnp.float32(1))


def test_a_time_limit_of_zero_is_refused():
    with pytest.raises(ValueError, match="max_steps must be >= 1, got 0"):
        CartPoleConfig(max_steps=0)
