"""The memory table as pure JAX functions: thousands of environments in parallel."""

import functools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vla_jax.config import checked
from vla_jax.envs.memory_table import memory_rules, motions, scenery, tasks
from vla_jax.envs.memory_table.memory_rules import is_acting
from vla_jax.envs.memory_table.memory_table_config import MemoryTableConfig
from vla_jax.envs.memory_table.memory_task import Contacts, Display, MemoryState
from vla_jax.envs.table import quasi_static, rules
from vla_jax.envs.table.quasi_static import TableState
from vla_jax.types import Env, Key, Observation, Transition

_CONTACT = 0.002  # m above the top of an object at which a fingertip touches it


@dataclass(frozen=True)
@checked()
class JaxMemoryConfig(MemoryTableConfig):
    """A memory task on the JAX table."""

    kind: Literal["memory_jax"] = "memory_jax"

    def __post_init__(self):
        """Checks that the task exists and has so many items."""
        tasks.check(self)


@functools.cache  # the same functions for the same config, so that jit compiles them once
def make(config: MemoryTableConfig) -> Env:
    """Returns a memory table as an `Env`.

    Observations are those of the table, with further numbers behind the 22 of `environment_state`,
    named in `memory_state.STATE_NAMES`, and two images if `image_size > 0`. An instruction stands
    for a sentence and a group of results, such as the number of swaps, so that some sentences occur
    twice.
    """
    sentences, groups = zip(*tasks.get(config.task).instructions(config), strict=True)
    return Env(
        reset=functools.partial(_reset, config),
        step=functools.partial(_step, config),
        expert=functools.partial(memory_rules.expert, config),
        instructions=sentences,
        tasks=groups,
        instruction_index=lambda state: state.table.instruction,
        max_steps=tasks.max_steps(config),
        is_acting=is_acting,
        recall=functools.partial(tasks.get(config.task).recall, config),
    )


def start(
    config: MemoryTableConfig, layout_key: Key, cue_key: Key
) -> tuple[MemoryState, Observation]:
    """Starts an episode.

    Args:
      config: of the memory table.
      layout_key: consumed, for the places of objects and hand, and the delay.
      cue_key: consumed, for what must be remembered; two cues with one layout give two episodes
        whose observations differ only until the cue has gone.

    Returns:
      The state and the first observation.
    """
    state = memory_rules.start(config, layout_key, cue_key)
    return state, _observe(config, state)


def _reset(config: MemoryTableConfig, key: Key) -> tuple[MemoryState, Observation]:
    return start(config, *jax.random.split(key))


def _step(
    config: MemoryTableConfig, state: MemoryState, action: Array | np.ndarray
) -> tuple[MemoryState, Transition]:
    if action.shape != (7,):
        raise ValueError(
            f"action must be 7 numbers {rules.ACTION_NAMES}, got shape {action.shape}; "
            "vmap the step over environments."
        )
    display = memory_rules.display(config, state)
    moved = _move(config, state, display, *memory_rules.usable_action(config, jnp.asarray(action)))
    state, judgement = memory_rules.advance(config, state, *moved)
    return state, Transition(
        observation=_observe(config, state),
        reward=judgement.success.astype(jnp.float32),
        terminated=judgement.terminated,
        truncated=judgement.truncated,
        success=judgement.success,
    )


def _move(
    config: MemoryTableConfig, state: MemoryState, display: Display, arm: Array, opens: Array
) -> tuple[TableState, Contacts]:
    """Applies an action of the acting part."""
    table, hit = quasi_static.move(config, state.table, arm)
    reach = motions.CUP_RADIUS + rules.FINGER_HALF_WIDTH
    from_cups = jnp.linalg.norm(table.tool[None, :2] - display.cups, axis=1)
    over_cup = (from_cups < reach) & jnp.any(display.cups != 0, axis=1)
    over_button = jnp.linalg.norm(table.tool[:2] - display.button) < motions.BUTTON_RADIUS
    over_button &= jnp.any(display.button != 0) & ~jnp.any(table.held)
    stop = jnp.where(over_button, motions.BUTTON_HEIGHT, 0.0)
    stop = jnp.maximum(stop, jnp.max(jnp.where(over_cup, motions.CUP_HEIGHT, 0.0)))
    tip = jnp.maximum(table.tool[2] - quasi_static.TIP, stop)
    table = table._replace(tool=table.tool.at[2].set(tip + quasi_static.TIP))
    table = quasi_static.settle(quasi_static.grip(table, opens))
    return table, Contacts(
        blocks=hit | table.held,
        cups=over_cup & (tip < motions.CUP_HEIGHT + _CONTACT),
        button=over_button & (tip < motions.BUTTON_HEIGHT + _CONTACT),
    )


def _observe(config: MemoryTableConfig, state: MemoryState) -> Observation:
    numbers = memory_rules.numbers(config, state)
    if not config.image_size:
        return numbers
    primary, wrist = scenery.pictures(
        state,
        memory_rules.display(config, state),
        image_size=config.image_size,
        has_dots=tasks.get(config.task).has_dots,
    )
    return numbers._replace(image_primary=primary, image_wrist=wrist)
