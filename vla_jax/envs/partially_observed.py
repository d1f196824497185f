"""Partially observed versions of environments, in which memory is an advantage."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from vla_jax.types import Array, DiscreteEnv, Key, Transition


@functools.cache  # the same functions for the same environment, so that jit compiles them once
def partially_observe(env: DiscreteEnv) -> DiscreteEnv:
    """Returns the environment with velocities and, after the first step, the instruction hidden.

    Velocities are removed from the observation; the instruction is replaced by zeros from the
    second observation of an episode on. States, rewards and ends of episodes do not change.

    Args:
      env: environment whose observation `[D]` has `velocities` or an `instruction`.

    Raises:
      ValueError: the observation has neither.
    """
    if not (env.velocities or env.instruction):
        raise ValueError(
            "velocities or instruction of the environment must name features to hide, got none; "
            "choose an environment whose observations are features."
        )
    (size,) = env.observation_shape
    visible = np.setdiff1d(np.arange(size), env.velocities)
    first_only = np.isin(visible, env.instruction)

    def reset(key: Key) -> tuple[Any, Array]:
        state, observation = env.reset(key)
        return state, observation[visible]

    def step(state: Any, action: Array) -> tuple[Any, Transition]:
        state, transition = env.step(state, action)
        observation = jnp.where(first_only, 0.0, transition.observation[visible])
        return state, transition._replace(observation=observation)

    return env._replace(
        reset=reset,
        step=step,
        observation_shape=(len(visible),),
        velocities=(),
        instruction=(),
        object_size=env.object_size * len(visible) // size,  # equally many velocities per object
    )
