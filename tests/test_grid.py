"""The grid world: its plain-Python twin, step by step; what it shows; what it refuses."""

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


@each_config
def test_it_plays_by_the_rules_of_its_python_twin(config):
    world, num_worlds, num_steps = grid.make(config), 8, 12
    state, observation = jax.vmap(world.reset)(jax.random.split(jax.random.key(0), num_worlds))
    actions = np.random.default_rng(0).integers(0, 5, (num_steps, num_worlds))

    @jax.jit
    def play(state):
        return jax.lax.scan(jax.vmap(world.step), state, jnp.asarray(actions))[1]

    transitions, ended = jax.device_get(play(state)), 0
    for i in range(num_worlds):
        twin = GridEnv(config)
        twin.agent, twin.goal = tuple(state.agent[i].tolist()), tuple(state.goal[i].tolist())
        obstacles = np.concatenate([state.obstacles[i], state.velocities[i][:, None]], axis=1)
        twin.obstacles = [tuple(obstacle) for obstacle in obstacles.tolist()]
        np.testing.assert_array_equal(twin.observe(), observation[i])
        for t in range(num_steps):
            seen, reward, terminated, truncated, info = twin.step(actions[t, i])
            found = jax.tree.map(lambda leaf, t=t, i=i: leaf[t, i], transitions)
            np.testing.assert_array_equal(found.observation, seen)
            told = (found.reward, found.terminated, found.truncated, found.success)
            assert told == (reward, terminated, truncated, info["is_success"])
            ended += terminated
    assert ended  # some episodes did end


@each_config
def test_an_episode_starts_where_nothing_has_happened_yet(config):
    world = grid.make(config)
    state, _ = jax.vmap(world.reset)(jax.random.split(jax.random.key(1), 500))
    assert not jnp.all(state.agent == state.goal, axis=1).any()
    assert not (state.obstacles[..., 0] == state.agent[:, :1]).any()  # rows
    for cells in (state.agent, state.goal, state.obstacles):
        assert np.unique(cells).tolist() == list(range(config.size))
    assert np.unique(state.velocities).tolist() == [-config.speed, config.speed]


def test_a_goal_is_worth_one_and_ends_the_episode():
    config = GridConfig(num_obstacles=1)
    _, transition = step(config, state_of(config, [2, 2], [1, 2]), UP)
    assert (transition.reward, transition.terminated, transition.success) == (1, True, True)
    _, transition = step(config, state_of(config, [2, 2], [1, 2]), DOWN)
    assert (transition.reward, transition.terminated, transition.success) == (0, False, False)


def test_an_obstacle_costs_one_at_the_goal_too():
    config = GridConfig(num_obstacles=1)
    for goal in ([4, 4], [2, 3]):
        start = state_of(config, [2, 3], goal, [[2, 2]], [1])
        _, transition = step(config, start, STAY)
        assert (transition.reward, transition.terminated, transition.success) == (-1, True, False)


def test_an_obstacle_turns_round_at_the_wall():
    config, columns = GridConfig(num_obstacles=1, speed=3), []
    state = state_of(config, [0, 0], [4, 4], [[2, 1]], [3])
    for _ in range(5):
        state, _ = step(config, state, STAY)
        columns.append((int(state.obstacles[0, 1]), int(state.velocities[0])))
    assert columns == [(4, 3), (1, -3), (2, 3), (3, -3), (0, -3)]


def test_time_runs_out_apart_from_the_true_end():
    config = GridConfig(num_obstacles=1, max_steps=2)
    state, transition = step(config, state_of(config, [0, 0], [0, 2]), RIGHT)
    assert not transition.truncated
    _, late = step(config, state, LEFT)
    assert (late.terminated, late.truncated) == (False, True)
    _, done = step(config, state, RIGHT)
    assert (done.terminated, done.truncated) == (True, False)


def test_features_say_where_things_are_how_fast_and_what_they_are_worth():
    config = GridConfig(num_obstacles=2)
    state = state_of(config, [1, 2], [4, 0], [[2, 2], [0, 4]], [-1, 1])
    expected = [[1, 0, -1, -1], [-1, 2, 1, -1], [3, -2, 0, 1]]
    np.testing.assert_array_equal(grid.features(config, state).reshape(3, 4), expected)
    assert grid.make(config).velocities == (2, 6, 10)


def test_pixels_show_the_agent_the_goal_and_every_obstacle():
    config = GridConfig(num_obstacles=1, cell_size=3, observation="pixels")
    state = state_of(config, [1, 2], [4, 0], [[2, 2]], [1])
    picture = np.asarray(grid.pixels(config, state))
    assert picture.shape == grid.make(config).observation_shape == (15, 15, 3)
    assert picture.dtype == np.uint8
    cells = picture[1::3, 1::3].reshape(25, 3)
    _, count = np.unique(cells, axis=0, return_counts=True)
    assert sorted(count.tolist()) == [1, 1, 1, 22]
    assert len({tuple(cells[i]) for i in (7, 20, 12)}) == 3
    np.testing.assert_array_equal(picture[0::3, 0::3], picture[2::3, 2::3])
    assert grid.make(config).draw(state).shape == (160, 160, 3)


def test_every_state_has_a_number_of_its_own():
    config = GridConfig(size=2, num_obstacles=1, observation="index")
    numbers = set()
    for places in np.ndindex(2, 2, 2, 2, 2, 2, 2):
        *cells, direction = places
        state = state_of(config, cells[:2], cells[2:4], [cells[4:6]], [2 * direction - 1])
        numbers.add(int(grid.index(config, state)))
    assert numbers == set(range(grid.num_states(config)))


@pytest.mark.parametrize("observation", ["features", "pixels", "index"])
def test_what_it_shows_has_the_shape_that_it_says(observation):
    world = grid.make(GridConfig(observation=observation))
    state, first = jax.eval_shape(world.reset, jax.random.key(0))
    _, transition = jax.eval_shape(world.step, state, jnp.int32(0))
    assert first.shape == transition.observation.shape == world.observation_shape
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
def test_what_makes_no_grid_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GridConfig(), **wrong)


@pytest.mark.parametrize("action", [jnp.zeros(2, jnp.int32), jnp.float32(1), jnp.zeros((3, 5))])
def test_a_wrong_action_is_one_sentence(action, key):
    world = grid.make(GridConfig())
    state, _ = world.reset(key)
    with pytest.raises(ValueError, match=r"action must be one whole number in 0 … 4 .* vmap"):
        jax.eval_shape(partial(world.step, state), action)
