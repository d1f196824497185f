"""Worlds of which one does not see all: who can remember has an advantage."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from vla_jax.types import Array, Key, Transition, World


@functools.cache  # the same functions for the same world, so that jit compiles them once
def partially_observe(world: World) -> World:
    """Returns the world with less to see; all else stays.

    Its observations are without the speeds, and hold the instruction at the first step of an
    episode only; after that there are zeros in its place.

    Args:
      world: whose observations are features, with `velocities` or an `instruction` among them.

    Raises:
      ValueError: there is nothing to hide.
    """
    if not (world.velocities or world.instruction):
        raise ValueError(
            "velocities or instruction of the world must name features to hide, got none; choose "
            "a world whose observations are features."
        )
    (size,) = world.observation_shape
    kept = np.setdiff1d(np.arange(size), world.velocities)
    once = np.isin(kept, world.instruction)

    def reset(key: Key) -> tuple[Any, Array]:
        state, observation = world.reset(key)
        return state, observation[kept]

    def step(state: Any, action: Array) -> tuple[Any, Transition]:
        state, transition = world.step(state, action)
        seen = jnp.where(once, 0.0, transition.observation[kept])
        return state, transition._replace(observation=seen)

    return world._replace(
        reset=reset,
        step=step,
        observation_shape=(len(kept),),
        velocities=(),
        instruction=(),
        object_size=world.object_size * len(kept) // size,  # each thing has as many speeds
    )
