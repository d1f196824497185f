"""Rules of the memory tables, the same for both twins: start, schedule, display, judgement.

An episode has three parts: something is shown, then time passes, and the arm is held still in both;
then the robot acts. Only the third part has actions that count.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from vla_jax.envs.memory_table import memory_state, motions, tasks
from vla_jax.envs.memory_table.memory_table_config import MemoryTableConfig
from vla_jax.envs.memory_table.memory_task import (
    Contacts,
    Display,
    MemoryState,
    Progress,
    TablePlaces,
    items,
)
from vla_jax.envs.memory_table.scenery import FAR
from vla_jax.envs.table import quasi_static, rules
from vla_jax.envs.table.quasi_static import TableState
from vla_jax.types import Key, Observation

_HAND_LOW, _HAND_HIGH = (-0.06, -0.06, 0.16), (0.06, 0.06, 0.20)  # m, where the hand starts
_OVER_BUTTON = 0.06  # m, height of a hand that starts above the button
# The button and cups need as much room as a hand beside them.
_SPACING = (rules.PLATE_SPACING, rules.LAYOUT_SPACING, *[rules.PLATE_SPACING] * rules.NUM_BLOCKS)


class Judgement(NamedTuple):
    """Result of one step."""

    success: Array  # [] bool
    terminated: Array  # [] bool
    truncated: Array  # [] bool


def start(config: MemoryTableConfig, layout_key: Key, cue_key: Key) -> MemoryState:
    """Returns the first state of an episode.

    Args:
      config: of the memory table.
      layout_key: consumed, for the places of objects and hand, and the delay.
      cue_key: consumed, for what must be remembered.
    """
    task = tasks.get(config.task)
    place_key, hand_key, delay_key = jax.random.split(layout_key, 3)
    least, most = tasks.delay_range(config)
    cue = task.draw(config, cue_key)
    cue = cue._replace(delay=jax.random.randint(delay_key, (), least, most + 1))
    places = quasi_static.sample_places(_SPACING, place_key)
    blocks = places[2:]
    if task.has_cups:  # so that the number of a place follows from the visible positions
        num_cups = items(task, config)
        order = jnp.argsort(blocks[:num_cups, 0])
        blocks = blocks.at[:num_cups].set(blocks[order])
    layout = TablePlaces(blocks=blocks, plate=places[0], button=places[1])
    tool = jax.random.uniform(
        hand_key, (3,), minval=jnp.array(_HAND_LOW), maxval=jnp.array(_HAND_HIGH)
    )
    if task.hand_over_button:
        tool = jnp.append(layout.button, _OVER_BUTTON)
    blocks = layout.blocks[cue.places] if task.has_blocks else jnp.full((rules.NUM_BLOCKS, 2), FAR)
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
    return MemoryState(table, layout, cue, progress)


def is_acting(state: MemoryState) -> Array:
    """Returns `[]` bool: whether the robot acts now, not only watches."""
    return state.table.num_steps >= state.cue.shown + state.cue.delay


def usable_action(config: MemoryTableConfig, action: Array) -> tuple[Array, Array]:
    """Returns the part of an action `[7]` that a task allows: arm `[6]`, and `[]` bool "opens"."""
    task = tasks.get(config.task)
    action = jnp.clip(action, -1, 1)
    moves = jnp.array([1, 1, 1, 0, 0, 0]) * (not task.hand_over_button)
    opens = action[6] > 0 if task.uses_gripper else jnp.zeros((), bool)
    return action[:6] * moves, opens


def display(config: MemoryTableConfig, state: MemoryState) -> Display:
    """Returns the visible state of everything but the hand, the blocks' poses and the plate."""
    shown = tasks.get(config.task).display(config, state)
    return shown._replace(seen=shown.seen & (state.table.blocks[:, 0] < FAR))


def advance(
    config: MemoryTableConfig, state: MemoryState, table: TableState, contacts: Contacts
) -> tuple[MemoryState, Judgement]:
    """Returns the state after one step, and its judgement.

    Args:
      config: of the memory table.
      state: before the step.
      table: after the motion; it counts only if the robot acts.
      contacts: of the motion.
    """
    task, acts = tasks.get(config.task), is_acting(state)
    table = jax.tree.map(lambda new, old: jnp.where(acts, new, old), table, state.table)
    table = table._replace(num_steps=state.table.num_steps + 1)
    progress = state.progress._replace(since=state.progress.since + 1)
    state = state._replace(table=table, progress=progress)
    verdict = task.judge(config, state, contacts)
    progress = jax.tree.map(lambda new, old: jnp.where(acts, new, old), verdict.progress, progress)
    state = state._replace(progress=progress)
    # The blocks below the cups are gone, so that the hand meets only the cups.
    are_gone = task.display(config, state).cups_down
    places = jnp.where(are_gone, FAR, table.blocks[:, :2])
    state = state._replace(table=table._replace(blocks=table.blocks.at[:, :2].set(places)))
    success = acts & verdict.success
    terminated = success | (acts & verdict.failed)
    truncated = ~terminated & (table.num_steps >= tasks.max_steps(config))
    return state, Judgement(success, terminated, truncated)


def numbers(config: MemoryTableConfig, state: MemoryState) -> Observation:
    """Returns the observation without images."""
    return Observation(
        proprio=quasi_static.proprio(state.table),
        environment_state=memory_state.environment_state(state, display(config, state)),
    )


def expert(config: MemoryTableConfig, state: MemoryState) -> Array:
    """Returns the expert's action `[7]`; it keeps still while the robot only watches."""
    task = tasks.get(config.task)
    action = task.expert(config, state)
    held_still = motions.send(config, motions.stay(), opens=task.uses_gripper)
    return jnp.where(is_acting(state), action, held_still)
