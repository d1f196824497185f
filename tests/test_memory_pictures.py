"""Pictures of the JAX memory table: two cues leave no trace, and each object is drawn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.envs.memory_table import memory_env, scenery, tasks
from vla_jax.envs.memory_table.films import film_expert
from vla_jax.envs.memory_table.jax_memory import JaxMemory
from vla_jax.envs.memory_table.memory_env import JaxMemoryConfig
from vla_jax.envs.memory_table.memory_task import plain_display
from vla_jax.envs.table import renderer

SIZE = 16
SHOWN = [name for name, task in tasks.TASKS.items() if task.has_delay]


def config_of(name):
    return JaxMemoryConfig(task=name, image_size=SIZE, delay=2)


@functools.cache
def watched(name):
    """Observations and `is_acting` of two cues in one layout, while the arm keeps still."""
    config = config_of(name)
    env = memory_env.make(config)
    num_steps = tasks.get(name).max_shown(config) + tasks.delay_range(config)[1] + 2

    def play(cue_key):
        state, observation = memory_env.start(config, jax.random.key(7), cue_key)

        def step(state, _):
            acts = env.is_acting(state)
            state, transition = env.step(state, jnp.zeros(7))
            return state, (transition.observation, acts)

        _, (seen, acts) = jax.lax.scan(step, state, None, length=num_steps)
        return observation, seen, acts

    keys = jax.random.split(jax.random.key(3), 6)
    return jax.device_get(jax.jit(jax.vmap(play))(keys))


@pytest.mark.sampled
@pytest.mark.parametrize("name", SHOWN)
def test_two_cues_give_equal_pictures_and_states_from_the_first_acting_step(name):
    _, seen, acts = watched(name)
    lasting = acts[0]  # the transition of an acting step
    assert lasting.any()
    assert not lasting.all()
    np.testing.assert_array_equal(acts, np.broadcast_to(lasting, acts.shape))
    # the observation before the first acting step is the last one of the watched steps
    start = np.argmax(lasting) - 1
    for field in ("image_primary", "image_wrist", "environment_state", "proprio"):
        part = getattr(seen, field)[:, start:]
        np.testing.assert_array_equal(part, np.broadcast_to(part[:1], part.shape), err_msg=field)


@pytest.mark.sampled
@pytest.mark.parametrize("name", [name for name in SHOWN if name != "dark"])
def test_the_cue_is_visible_in_the_pictures_while_it_is_shown(name):
    _, seen, acts = watched(name)
    watching = ~acts[0]
    pictures = seen.image_primary[:, watching].astype(int)
    others = [np.abs(pictures[0] - pictures[i]).max() for i in range(1, len(pictures))]
    assert max(others) > 20


@functools.cache
def painter():
    config = config_of("path")
    state, _ = memory_env.start(config, jax.random.key(0), jax.random.key(1))
    blocks = jnp.array([[0.1, 0.1, 0.02], [0.1, -0.1, 0.02], [-0.1, -0.1, 0.02], [-0.1, 0.1, 0.02]])
    table = state.table._replace(
        blocks=blocks, tool=jnp.array([0.0, 0.0, 0.24]), plate=jnp.array([0.2, 0.0])
    )
    state = state._replace(table=table)
    paint = functools.partial(scenery.pictures, state, image_size=32, has_dots=False)
    return state, jax.jit(lambda display: paint(display)[0].astype(jnp.int32))


def test_without_further_objects_the_picture_is_that_of_the_plain_table():
    state, paint = painter()
    table = state.table

    @jax.jit
    def plain():
        poses = (table.tool, table.turns, table.opening, table.blocks, table.yaws, table.plate)
        return renderer.render(*poses, image_size=32)[0]

    picture, expected = paint(plain_display()), plain()
    different = np.abs(np.array(picture) - np.array(expected, int)).max(axis=-1) > 0
    rows, columns = np.nonzero(different)
    assert 0 < different.sum() < 30  # only the lamp, which is off, at the far edge
    assert rows.max() < 10
    assert columns.min() > 20


@pytest.mark.parametrize(
    "change",
    [
        {"lamp": jnp.array([0.1, 0.9, 0.2])},
        {"button": jnp.array([0.05, 0.0])},
        {"cups": jnp.array([[0.1, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])},
        {"marker": jnp.array([0.05, 0.05, 1.0])},
        {"lit": jnp.array([False, True, False, False])},
        {"seen": jnp.array([True, False, True, True])},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_part_of_a_display_changes_a_small_part_of_the_picture(change):
    _, paint = painter()
    before, after = paint(plain_display()), paint(plain_display(**change))
    different = np.abs(np.array(after) - np.array(before)).max(axis=-1) > 20
    assert 3 <= different.sum() < 250


def test_the_dark_is_black():
    _, paint = painter()
    assert not np.any(paint(plain_display(dark=jnp.ones((), bool))))


def test_absent_objects_are_hidden_by_the_table():
    cylinders = scenery.cylinders(plain_display(), has_dots=False)
    assert np.all(cylinders.centre[1:, 2] < -1)
    assert np.all(scenery.cylinders(plain_display(), has_dots=True).centre[7:, 2] == 0)


@pytest.mark.slow
def test_a_film_shows_an_episode_of_the_expert():
    film = film_expert(JaxMemory(config_of("lit")), 3, size=32)
    assert film.success
    assert film.instruction == "touch the block that was lit"
    assert len(film.frames) == len(film.is_acting) > 6
    assert film.frames[0].shape == (32, 32, 3)
    assert film.is_acting[0] is False
    assert film.is_acting[-1] is True
