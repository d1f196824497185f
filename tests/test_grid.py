"""The grid environment: comparison with a Python implementation; observations; errors."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.benchmark.grid_gymnasium import GridEnv
from vla_jax.envs import grid
from vla_jax.envs.grid import GridConfig

STAY, UP, DOWN, LEFT, RIGHT = range(5)
each_config = pytest.mark.parametrize(
    "config",
    [GridConfig(), GridConfig(size=4, num_obstacles=5, speed=2, max_steps=6)],
    ids=["default", "fast"],
)


def state_of(config, agent, goal, obstacles=((4, 0),), velocities=(1,)):
    shape = (config.num_obstacles, 2)
    return grid.GridState(
        jnp.array(agent), jnp.array(goal), jnp.array(obstacles, jnp.int32).reshape(shape),
        jnp.array(velocities, jnp.int32), jnp.int32(0),
    )  # fmt: skip


def step(config, state, action):
    return grid.make(config).step(state, jnp.int32(action))


@pytest.mark.slow
@each_config
def test_it_equals_the_python_implementation(config):
    env, num_envs, num_steps = grid.make(config), 8, 12
    state, observation = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), num_envs))
    actions = np.random.default_rng(0).integers(0, 5, (num_steps, num_envs))

    @jax.jit
    def play(state):
        return jax.lax.scan(jax.vmap(env.step), state, jnp.asarray(actions))[1]

    transitions, ended = jax.device_get(play(state)), 0
    for i in range(num_envs):
        python_env = GridEnv(config)
        python_env.agent, python_env.goal = (
            tuple(state.agent[i].tolist()),
            tuple(state.goal[i].tolist()),
        )
        obstacles = np.concatenate([state.obstacles[i], state.velocities[i][:, None]], axis=1)
        python_env.obstacles = [tuple(obstacle) for obstacle in obstacles.tolist()]
        np.testing.assert_array_equal(python_env.observe(), observation[i])
        for t in range(num_steps):
            expected, reward, terminated, truncated, info = python_env.step(actions[t, i])
            step = jax.tree.map(lambda leaf, t=t, i=i: leaf[t, i], transitions)
            np.testing.assert_array_equal(step.observation, expected)
            outcome = (step.reward, step.terminated, step.truncated, step.success)
            assert outcome == (reward, terminated, truncated, info["is_success"])
            ended += terminated
    assert ended  # some episodes ended


@pytest.mark.slow
@each_config
def test_an_episode_starts_without_a_hit_or_a_success(config):
    env = grid.make(config)
    state, _ = jax.vmap(env.reset)(jax.random.split(jax.random.key(1), 500))
    assert not jnp.all(state.agent == state.goal, axis=1).any()
    assert not (state.obstacles[..., 0] == state.agent[:, :1]).any()  # not in the same row
    for cells in (state.agent, state.goal, state.obstacles):
        assert np.unique(cells).tolist() == list(range(config.size))
    assert np.unique(state.velocities).tolist() == [-config.speed, config.speed]


def test_the_goal_gives_a_reward_of_one_and_ends_the_episode():
    config = GridConfig(num_obstacles=1)
    _, transition = step(config, state_of(config, [2, 2], [1, 2]), UP)
    assert (transition.reward, transition.terminated, transition.success) == (1, True, True)
    _, transition = step(config, state_of(config, [2, 2], [1, 2]), DOWN)
    assert (transition.reward, transition.terminated, transition.success) == (0, False, False)


def test_a_hit_costs_one_and_ends_the_episode_at_the_goal_too():
    config = GridConfig(num_obstacles=1)
    for goal in ([4, 4], [2, 3]):
        start = state_of(config, [2, 3], goal, [[2, 2]], [1])
        _, transition = step(config, start, STAY)
        assert (transition.reward, transition.terminated, transition.success) == (-1, True, False)


def test_an_obstacle_reverses_at_the_wall():
    config, columns = GridConfig(num_obstacles=1, speed=3), []
    state = state_of(config, [0, 0], [4, 4], [[2, 1]], [3])
    for _ in range(5):
        state, _ = step(config, state, STAY)
        columns.append((int(state.obstacles[0, 1]), int(state.velocities[0])))
    assert columns == [(4, 3), (1, -3), (2, 3), (3, -3), (0, -3)]


def test_the_time_limit_truncates_unless_the_episode_terminates():
    config = GridConfig(num_obstacles=1, max_steps=2)
    state, transition = step(config, state_of(config, [0, 0], [0, 2]), RIGHT)
    assert not transition.truncated
    _, late = step(config, state, LEFT)
    assert (late.terminated, late.truncated) == (False, True)
    _, done = step(config, state, RIGHT)
    assert (done.terminated, done.truncated) == (True, False)


def test_features_are_relative_positions_velocities_and_rewards():
    config = GridConfig(num_obstacles=2)
    state = state_of(config, [1, 2], [4, 0], [[2, 2], [0, 4]], [-1, 1])
    expected = [[1, 0, -1, -1], [-1, 2, 1, -1], [3, -2, 0, 1]]
    np.testing.assert_array_equal(grid.features(config, state).reshape(3, 4), expected)
    assert grid.make(config).velocities == (2, 6, 10)


def test_pixels_show_the_agent_the_goal_and_every_obstacle():
    config = GridConfig(num_obstacles=1, cell_size=3, observation="pixels")
    state = state_of(config, [1, 2], [4, 0], [[2, 2]], [1])
    image = np.asarray(grid.pixels(config, state))
    assert image.shape == grid.make(config).observation_shape == (15, 15, 3)
    assert image.dtype == np.uint8
    cells = image[1::3, 1::3].reshape(25, 3)
    _, count = np.unique(cells, axis=0, return_counts=True)
    assert sorted(count.tolist()) == [1, 1, 1, 22]
    assert len({tuple(cells[i]) for i in (7, 20, 12)}) == 3
    np.testing.assert_array_equal(image[0::3, 0::3], image[2::3, 2::3])
    assert grid.make(config).draw(state).shape == (160, 160, 3)


def test_every_state_has_a_unique_number():
    config = GridConfig(size=2, num_obstacles=1, observation="index")
    numbers = set()
    for places in np.ndindex(2, 2, 2, 2, 2, 2, 2):
        *cells, direction = places
        state = state_of(config, cells[:2], cells[2:4], [cells[4:6]], [2 * direction - 1])
        numbers.add(int(grid.index(config, state)))
    assert numbers == set(range(grid.num_states(config)))


@pytest.mark.parametrize("observation", ["features", "pixels", "index"])
def test_observations_have_the_declared_shape(observation):
    env = grid.make(GridConfig(observation=observation))
    state, first = jax.eval_shape(env.reset, jax.random.key(0))
    _, transition = jax.eval_shape(env.step, state, jnp.int32(0))
    assert first.shape == transition.observation.shape == env.observation_shape
    assert first.dtype == transition.observation.dtype


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 1}, "size must be >= 2 cells, got 1"),
        ({"num_obstacles": 0}, "num_obstacles must be >= 1, got 0"),
        ({"speed": 5}, r"speed must be in 1 … size - 1 = 4 cells per step, got 5"),
        ({"max_steps": 0}, "max_steps must be >= 1, got 0"),
    ],
)
def test_a_wrong_config_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GridConfig(), **wrong)


@pytest.mark.parametrize("action", [jnp.zeros(2, jnp.int32), jnp.float32(1), jnp.zeros((3, 5))])
def test_a_wrong_action_is_refused(action, key):
    env = grid.make(GridConfig())
    state, _ = env.reset(key)
    with pytest.raises(ValueError, match=r"action must be one integer in 0 … 4 .* vmap"):
        jax.eval_shape(partial(env.step, state), action)
