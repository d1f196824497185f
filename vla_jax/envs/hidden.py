"""Worlds of which one does not see all: who can remember has an advantage."""

import functools
from typing import Any

import numpy as np

from vla_jax.types import Array, Key, Transition, World


@functools.cache  # the same functions for the same world, so that jit compiles them once
def hide_velocities(world: World) -> World:
    """Returns the world without the speeds in its observations; all else stays.

    Args:
      world: whose observations are features, with `velocities` among them.

    Raises:
      ValueError: no feature of the world is a speed.
    """
    if not world.velocities:
        raise ValueError(
            "velocities of the world must name features to hide, got none; choose a world whose "
            "observations are features."
        )
    (size,) = world.observation_shape
    kept = np.setdiff1d(np.arange(size), world.velocities)

    def reset(key: Key) -> tuple[Any, Array]:
        state, observation = world.reset(key)
        return state, observation[kept]

    def step(state: Any, action: Array) -> tuple[Any, Transition]:
        state, transition = world.step(state, action)
        return state, transition._replace(observation=transition.observation[kept])

    return world._replace(reset=reset, step=step, observation_shape=(len(kept),), velocities=())
