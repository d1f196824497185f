"""Partially observed worlds: what is hidden, and that nothing else changes."""

import jax
import numpy as np
import pytest

from vla_jax.envs import cartpole, grid, partially_observed
from vla_jax.envs.cartpole import CartPoleConfig
from vla_jax.envs.grid import GridConfig
from vla_jax.envs.table import discrete_table
from vla_jax.envs.table.discrete_table import TableChoicesConfig
from vla_jax.envs.table.jax_env import TableConfig
from vla_jax.rl import actor

T, B = 12, 4
TABLE = TableChoicesConfig(table=TableConfig(image_size=0, max_steps=5))
WORLDS = {  # world, the numbers that stay, how many of them only at the first step
    "cartpole": (cartpole.make(CartPoleConfig(max_steps=5)), [0, 2], 0),
    "grid": (grid.make(GridConfig(num_obstacles=1, max_steps=5)), [0, 1, 3, 4, 5, 7], 0),
    "table": (discrete_table.make(TABLE), list(range(34)), 4),
}


def random(carry, observation, reset, key):
    return carry, jax.random.randint(key, observation.shape[:1], 0, 2)


def unroll(world):
    """The same random choices in the same episodes, some of which end."""
    first = actor.start(world, jax.random.key(0), B, {})
    return actor.unroll(world, random, first, jax.random.key(1), T)[1]


@pytest.mark.parametrize("name", WORLDS)
def test_the_speeds_are_gone_and_the_instruction_is_shown_once_an_episode(name):
    world, kept, num_told = WORLDS[name]
    blind = partially_observed.partially_observe(world)
    whole, partly = jax.jit(lambda: (unroll(world), unroll(blind)))()
    expected = np.array(whole.observation)[..., kept]
    once = len(kept) - num_told
    expected[..., once:] *= np.asarray(whole.reset)[..., None]
    np.testing.assert_array_equal(partly.observation, expected)
    assert blind.observation_shape == (len(kept),)
    assert (world.object_size, blind.object_size) == ((4, 3) if name == "grid" else (0, 0))
    same = partly._replace(observation=whole.observation)
    jax.tree.map(np.testing.assert_array_equal, same, whole)
    told = expected[..., once:].sum(axis=-1)  # one word is one-hot
    np.testing.assert_array_equal(told, np.asarray(whole.reset) * (num_told > 0))
    assert whole.reset.sum() > B  # new episodes within the rollout


def test_it_is_the_same_world_each_time_so_that_jit_compiles_once():
    world = WORLDS["cartpole"][0]
    assert partially_observed.partially_observe(world) is partially_observed.partially_observe(
        world
    )


@pytest.mark.parametrize("world", [grid.make(GridConfig(observation="pixels")), "twice"])
def test_what_has_nothing_to_hide_is_refused(world):
    world = partially_observed.partially_observe(WORLDS["table"][0]) if world == "twice" else world
    with pytest.raises(ValueError, match="must name features to hide, got none"):
        partially_observed.partially_observe(world)
