"""Partially observed environments hide the documented features and change nothing else."""

import jax
import numpy as np
import pytest

from vla_jax.envs import cartpole, grid
from vla_jax.envs.cartpole import CartPoleConfig
from vla_jax.envs.grid import GridConfig
from vla_jax.envs.partially_observed import partially_observe
from vla_jax.envs.table import discrete_table
from vla_jax.envs.table.discrete_table import TableChoicesConfig
from vla_jax.envs.table.jax_env import JaxTableConfig
from vla_jax.rl import actor

T, B = 12, 4
TABLE = TableChoicesConfig(table=JaxTableConfig(image_size=0, max_steps=5))
ENVS = {  # environment, visible features, number of features visible at the first step only
    "cartpole": (cartpole.make(CartPoleConfig(max_steps=5)), [0, 2], 0),
    "grid": (grid.make(GridConfig(num_obstacles=1, max_steps=5)), [0, 1, 3, 4, 5, 7], 0),
    "table": (discrete_table.make(TABLE), list(range(34)), 4),
}


def random(carry, observation, reset, key):
    return carry, jax.random.randint(key, observation.shape[:1], 0, 2)


def unroll(env):
    """Unrolls the same random actions and episodes, some of which end."""
    first = actor.start(env, B, {}, key=jax.random.key(0))
    return actor.unroll(env, random, first, T, key=jax.random.key(1))[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ENVS)
def test_velocities_are_hidden_and_the_instruction_is_shown_once_per_episode(name):
    env, visible, num_once = ENVS[name]
    partial_env = partially_observe(env)
    full, hidden = jax.jit(lambda: (unroll(env), unroll(partial_env)))()
    expected = np.array(full.observation)[..., visible]
    once = len(visible) - num_once
    expected[..., once:] *= np.asarray(full.reset)[..., None]
    np.testing.assert_array_equal(hidden.observation, expected)
    assert partial_env.observation_shape == (len(visible),)
    assert (env.object_size, partial_env.object_size) == ((4, 3) if name == "grid" else (0, 0))
    same = hidden._replace(observation=full.observation)
    jax.tree.map(np.testing.assert_array_equal, same, full)
    shown = expected[..., once:].sum(axis=-1)  # the instruction is one-hot
    np.testing.assert_array_equal(shown, np.asarray(full.reset) * (num_once > 0))
    assert full.reset.sum() > B  # new episodes within the rollout


def test_the_same_environment_object_is_returned_so_that_jit_compiles_once():
    env = ENVS["cartpole"][0]
    assert partially_observe(env) is partially_observe(env)


@pytest.mark.parametrize("env", [grid.make(GridConfig(observation="pixels")), "twice"])
def test_an_environment_without_hidden_features_is_refused(env):
    env = partially_observe(ENVS["table"][0]) if env == "twice" else env
    with pytest.raises(ValueError, match="must name features to hide, got none"):
        partially_observe(env)
