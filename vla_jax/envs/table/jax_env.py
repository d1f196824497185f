"""The table as pure JAX functions: thousands of environments in parallel.

It is the counterpart of `table_mujoco`: same instructions, layouts, actions, observations and
rules, with the motion of `quasi_static` instead of contact forces.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vla_jax.config import checked
from vla_jax.envs.table import expert, renderer, rules
from vla_jax.envs.table.quasi_static import (
    TableState,
    environment_state,
    grip,
    move,
    proprio,
    sample_layout,
    settle,
)
from vla_jax.envs.table.table_config import TableConfig
from vla_jax.types import Env, Key, Observation, Transition


@dataclass(frozen=True)
@checked()
class JaxTableConfig(TableConfig):
    """The JAX table; it is hundreds of times slower with images than without."""

    kind: Literal["table_jax"] = "table_jax"


@functools.cache  # the same functions for the same config, so that jit compiles them once
def make(config: JaxTableConfig) -> Env:
    """Returns the table as an `Env`.

    Observations are those of `table_mujoco`: `environment_state [22]` and `proprio [8]` (names in
    `rules.STATE_NAMES` and `rules.PROPRIO_NAMES`), and two images if `image_size > 0`. They do not
    contain the instruction: `instruction_index` returns it, and the caller decides when the policy
    sees it.
    """
    return Env(
        reset=functools.partial(_reset, config),
        step=functools.partial(_step, config),
        expert=functools.partial(expert_action, config),
        instructions=tuple(instruction.text for instruction in rules.INSTRUCTIONS),
        tasks=tuple(instruction.task for instruction in rules.INSTRUCTIONS),
        instruction_index=lambda state: state.instruction,
        max_steps=config.max_steps,
    )


def _reset(config: JaxTableConfig, key: Key) -> tuple[TableState, Observation]:
    layout_key, tool_key, instruction_key = jax.random.split(key, 3)
    plate, places, yaws = sample_layout(config.rotated_share, layout_key)
    low, high = jnp.array([-0.06, -0.06, 0.16]), jnp.array([0.06, 0.06, 0.20])
    state = TableState(
        tool=jax.random.uniform(tool_key, (3,), minval=low, maxval=high),
        turns=jnp.zeros(3),
        opening=jnp.ones(()),
        blocks=jnp.pad(places, ((0, 0), (0, 1)), constant_values=rules.BLOCK_HALF_SIZE[2]),
        yaws=yaws,
        held=jnp.zeros(rules.NUM_BLOCKS, bool),
        plate=plate,
        instruction=jax.random.randint(instruction_key, (), 0, len(rules.INSTRUCTIONS)),
        num_steps=jnp.zeros((), jnp.int32),
    )
    return state, observe(config, state)


def _step(
    config: JaxTableConfig, state: TableState, action: Array | np.ndarray
) -> tuple[TableState, Transition]:
    state, touching = advance(config, state, action)
    return state, _judge(config, state, touching)


def advance(
    config: JaxTableConfig, state: TableState, action: Array | np.ndarray
) -> tuple[TableState, Array]:
    """Returns the state after an action `[7]`, and the blocks `[4]` bool that the hand touches."""
    if action.shape != (7,):
        raise ValueError(
            f"action must be 7 numbers {rules.ACTION_NAMES}, got shape {action.shape}; "
            "vmap the step over environments."
        )
    action = jnp.clip(action, -1, 1)
    state, hit = move(config, state, action[:6])
    state = grip(state, action[6] > 0)
    state = settle(state)._replace(num_steps=state.num_steps + 1)
    return state, hit | state.held


def finished(state: TableState, touching: Array) -> Array:
    """Returns the blocks with which each task is done now.

    Args:
      state: of one environment.
      touching: `[4]` bool, blocks that the hand touches.

    Returns:
      `[3, 4]` bool, one row per task of `rules.TASKS`.
    """
    height = state.blocks[:, 2] - rules.BLOCK_HALF_SIZE[2]
    away = jnp.linalg.norm(state.blocks[:, :2] - state.plate[None], axis=-1)
    placed = (away < rules.PLACE_DISTANCE) & (height < 0.02) & ~touching
    return jnp.stack([touching, height > rules.LIFT_HEIGHT, placed])


def _judge(config: JaxTableConfig, state: TableState, touching: Array) -> Transition:
    """Returns the transition; doing the task with a wrong block also terminates the episode."""
    task, target = jnp.divmod(state.instruction, rules.NUM_BLOCKS)
    done = finished(state, touching)[task]
    success, terminated = done[target], jnp.any(done)
    return Transition(
        observation=observe(config, state),
        reward=success.astype(jnp.float32),
        terminated=terminated,
        truncated=~terminated & (state.num_steps >= config.max_steps),
        success=success,
    )


def observe(config: JaxTableConfig, state: TableState) -> Observation:
    """Returns the observation of a state."""
    primary = wrist = None
    if config.image_size:
        primary, wrist = renderer.render(
            state.tool, state.turns, state.opening, state.blocks, state.yaws, state.plate,
            image_size=config.image_size,
        )  # fmt: skip
    return Observation(primary, wrist, proprio(state), environment_state(state))


def expert_action(config: JaxTableConfig, state: TableState) -> Array:
    """Returns the scripted expert's action `[7]` for the instruction of a state."""
    task, target = jnp.divmod(state.instruction, rules.NUM_BLOCKS)
    return expert.act(
        environment_state(state),
        proprio(state),
        task,
        target,
        step_size=config.step_size,
        turn_size=config.turn_size,
    )
