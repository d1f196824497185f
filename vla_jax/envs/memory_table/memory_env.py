"""The memory table as pure JAX functions: thousands of environments in parallel.

An episode has three parts: something is shown, then time passes, and the arm is held still in both;
then the robot acts. Only the third part has actions that count.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vla_jax.config import checked
from vla_jax.envs.memory_table import memory_state, motions, tasks
from vla_jax.envs.memory_table.memory_config import MemoryTableConfig
from vla_jax.envs.memory_table.memory_task import (
    Contacts,
    Display,
    MemoryState,
    MemoryTask,
    Progress,
    TablePlaces,
)
from vla_jax.envs.table import quasi_static, rules
from vla_jax.envs.table.quasi_static import TableState
from vla_jax.types import Env, Key, Observation, Transition

_FAR = 9.0  # m, place of blocks that are not on the table
_HAND_LOW, _HAND_HIGH = (-0.06, -0.06, 0.16), (0.06, 0.06, 0.20)  # m, where the hand starts
_OVER_BUTTON = 0.06  # m, height of a hand that starts above the button
_CONTACT = 0.002  # m above the top of an object at which a fingertip touches it
# The button and cups need as much room as a hand beside them.
_SPACING = (rules.PLATE_SPACING, rules.LAYOUT_SPACING, *[rules.PLATE_SPACING] * rules.NUM_BLOCKS)


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
    named in `memory_state.STATE_NAMES`. An instruction stands for a sentence and a group of
    results, such as the number of swaps, so that some sentences occur twice.
    """
    sentences, groups = zip(*tasks.get(config.task).instructions(config), strict=True)
    return Env(
        reset=functools.partial(_reset, config),
        step=functools.partial(_step, config),
        expert=functools.partial(_expert, config),
        instructions=sentences,
        tasks=groups,
        instruction_index=lambda state: state.table.instruction,
        max_steps=tasks.max_steps(config),
        is_acting=is_acting,
    )


def is_acting(state: MemoryState) -> Array:
    """Returns `[]` bool: whether the robot acts now, not only watches."""
    return state.table.num_steps >= state.cue.shown + state.cue.delay


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
    task = tasks.get(config.task)
    place_key, hand_key, delay_key = jax.random.split(layout_key, 3)
    least, most = tasks.delay_range(config)
    cue = task.draw(config, cue_key)
    cue = cue._replace(delay=jax.random.randint(delay_key, (), least, most + 1))
    places = quasi_static.sample_places(_SPACING, place_key)
    layout = TablePlaces(blocks=places[2:], plate=places[0], button=places[1])
    tool = jax.random.uniform(
        hand_key, (3,), minval=jnp.array(_HAND_LOW), maxval=jnp.array(_HAND_HIGH)
    )
    if task.hand_over_button:
        tool = jnp.append(layout.button, _OVER_BUTTON)
    blocks = layout.blocks[cue.places] if task.has_blocks else jnp.full((rules.NUM_BLOCKS, 2), _FAR)
    height = jnp.full((rules.NUM_BLOCKS, 1), rules.BLOCK_HALF_SIZE[2])
    table = TableState(
        tool=tool,
        turns=jnp.zeros(3),
        opening=jnp.float32(task.uses_gripper),
        blocks=jnp.concatenate([blocks, height], axis=1),
        yaws=jnp.zeros(rules.NUM_BLOCKS),
        held=jnp.zeros(rules.NUM_BLOCKS, bool),
        plate=layout.plate,
        instruction=jnp.int32(task.instruction(config, cue)),
        num_steps=jnp.zeros((), jnp.int32),
    )
    zero = jnp.zeros((), jnp.int32)
    progress = Progress(zero, zero, jnp.ones((), bool), zero - 1, jnp.zeros((), bool))
    state = MemoryState(table, layout, cue, progress)
    return state, _observe(config, state, _display(task, config, state))


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
    task, acts = tasks.get(config.task), is_acting(state)
    display = _display(task, config, state)
    table, contacts = _move(task, config, state, display, jnp.clip(action, -1, 1))
    table = jax.tree.map(lambda new, old: jnp.where(acts, new, old), table, state.table)
    table = table._replace(num_steps=state.table.num_steps + 1)
    progress = state.progress._replace(since=state.progress.since + 1)
    state = state._replace(table=table, progress=progress)
    verdict = task.judge(config, state, contacts)
    progress = jax.tree.map(lambda new, old: jnp.where(acts, new, old), verdict.progress, progress)
    state = state._replace(progress=progress)
    display = _display(task, config, state)
    # The blocks below the cups are gone, so that the hand meets only the cups.
    far = jnp.where(display.cups_down, _FAR, table.blocks[:, :2])
    state = state._replace(table=table._replace(blocks=table.blocks.at[:, :2].set(far)))
    success = acts & verdict.success
    terminated = success | (acts & verdict.failed)
    return state, Transition(
        observation=_observe(config, state, display),
        reward=success.astype(jnp.float32),
        terminated=terminated,
        truncated=~terminated & (table.num_steps >= tasks.max_steps(config)),
        success=success,
    )


def _move(
    task: MemoryTask, config: MemoryTableConfig, state: MemoryState, display: Display, action: Array
) -> tuple[TableState, Contacts]:
    """Applies an action of the acting part."""
    arm = jnp.zeros(6) if task.hand_over_button else action[:6] * jnp.array([1, 1, 1, 0, 0, 0])
    opens = action[6] > 0 if task.uses_gripper else jnp.zeros((), bool)
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


def _display(task: MemoryTask, config: MemoryTableConfig, state: MemoryState) -> Display:
    display = task.display(config, state)
    return display._replace(seen=display.seen & (state.table.blocks[:, 0] < _FAR))


def _observe(config: MemoryTableConfig, state: MemoryState, display: Display) -> Observation:
    return Observation(
        proprio=quasi_static.proprio(state.table),
        environment_state=memory_state.environment_state(state, display),
    )


def _expert(config: MemoryTableConfig, state: MemoryState) -> Array:
    task = tasks.get(config.task)
    action = task.expert(config, state)
    held_still = motions.send(config, motions.stay(), opens=task.uses_gripper)
    return jnp.where(is_acting(state), action, held_still)
