"""Partially observed versions of environments, in which memory is an advantage."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.types import Array, DiscreteEnv, Key, Transition


class PartialState(NamedTuple):
    """State of one partially observed environment."""

    inner: Any  # state of the environment
    first: Array  # [D] first observation of the episode, with the instruction
    left: Array  # [] int32, further observations that show the instruction


@functools.cache  # the same functions for the same environment, so that jit compiles them once
def partially_observe(env: DiscreteEnv, visible_steps: int = 1) -> DiscreteEnv:
    """Returns the environment with velocities hidden, and later the instruction.

    Velocities are removed from the observation; the instruction is replaced by zeros after the
    first observations of an episode, as many as are drawn from 1 to `visible_steps`; these show the
    instruction of the first one, also where the environment itself hides it earlier. States,
    rewards and ends of episodes do not change.

    Args:
      env: environment whose observation `[D]` has `velocities` or an `instruction`.
      visible_steps: greatest number of observations of an episode that show the instruction. With
        more than 1 a policy learns first what the instruction means, and then to remember it.

    Raises:
      ValueError: the observation has neither, or no instruction to show for several steps.
    """
    if not (env.velocities or env.instruction):
        raise ValueError(
            "velocities or instruction of the environment must name features to hide, got none; "
            "choose an environment whose observations are features."
        )
    if visible_steps > 1 and not env.instruction:
        raise ValueError(
            f"visible_steps must be 1 in an environment without an instruction, got "
            f"{visible_steps}; choose another environment."
        )
    (size,) = env.observation_shape
    visible = np.setdiff1d(np.arange(size), env.velocities)
    is_instruction = np.isin(visible, env.instruction)

    def reset(key: Key) -> tuple[PartialState, Array]:
        state, observation = env.reset(key)
        left = jax.random.randint(jax.random.fold_in(key, 1), (), 0, visible_steps)
        first = jnp.asarray(observation)[visible]
        return PartialState(state, first, left), first

    def step(state: PartialState, action: Array) -> tuple[PartialState, Transition]:
        inner, transition = env.step(state.inner, action)
        instruction = jnp.where(state.left > 0, state.first, 0.0)
        observation = jnp.where(is_instruction, instruction, transition.observation[visible])
        after = PartialState(inner, state.first, state.left - 1)
        return after, transition._replace(observation=observation)

    return env._replace(
        reset=reset,
        step=step,
        draw=lambda state: env.draw(state.inner),
        observation_shape=(len(visible),),
        velocities=(),
        instruction=(),
        object_size=env.object_size * len(visible) // size,  # equally many velocities per object
    )


class CueState(NamedTuple):
    """State of one environment that shows its cue longer."""

    inner: Any  # state of the environment
    shown: Array  # largest values of the cue's features so far
    left: Array  # [] int32, further observations that show them


@functools.cache
def show_cue(env: DiscreteEnv, visible_steps: int) -> DiscreteEnv:
    """Returns the environment with its cue shown longer, to learn first what the cue means.

    In the first observations of an episode, as many as are drawn from 1 to `visible_steps`, what
    was shown stays visible. Afterwards the observation is that of the environment.

    Args:
      env: environment with a `cue`.
      visible_steps: greatest number of observations of an episode that are changed.

    Raises:
      ValueError: the environment has no cue.
    """
    if not env.cue:
        raise ValueError(
            f"visible_steps must be 1 in an environment without a cue, got {visible_steps}; choose "
            "the task lit of the memory table, or partially_observed."
        )
    cue = np.array(env.cue)

    def reset(key: Key) -> tuple[CueState, Array]:
        state, observation = env.reset(key)
        left = jax.random.randint(jax.random.fold_in(key, 1), (), 0, visible_steps)
        return CueState(state, observation[cue], left), observation

    def step(state: CueState, action: Array) -> tuple[CueState, Transition]:
        inner, transition = env.step(state.inner, action)
        now = jnp.asarray(transition.observation)
        shown = jnp.maximum(state.shown, now[cue])
        seen = now.at[cue].set(jnp.where(state.left > 0, shown, now[cue]))
        return CueState(inner, shown, state.left - 1), transition._replace(observation=seen)

    return env._replace(reset=reset, step=step, draw=lambda state: env.draw(state.inner))
