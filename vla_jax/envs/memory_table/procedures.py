"""Procedure: several places in the order shown. Members of the family `tasks`."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vla_jax.envs.memory_table import lit_blocks, memory_task, motions, recall, task_captions
from vla_jax.envs.memory_table.dots import NUM_DOTS, dots
from vla_jax.envs.memory_table.memory_task import (
    Contacts,
    Cue,
    Display,
    MemoryState,
    MemoryTask,
    Verdict,
)
from vla_jax.envs.table import rules
from vla_jax.types import Key, Recall

DOT_DISTANCE = 0.02  # m from a dot within which the tool visits it
_LOW = 0.06  # m, height of the tool below which it visits dots
_MARKER_STEPS = 4  # steps for which the marker stays over a dot


# sequence ---------------------------------------------------------------------------------------


def _judge_order(num_items: int, state: MemoryState, touched: Array, expected: Array) -> Verdict:
    """Judges a new contact: it must be the next of the order."""
    begins, which, progress = memory_task.new_contact(state, touched)
    right = begins & (which == expected)
    progress = memory_task.count_event(progress, right)
    return Verdict(progress, right & (progress.done == num_items), begins & ~right)


def _next(state: MemoryState) -> Array:
    """Returns the next block or dot of the order, `[]` int32."""
    return state.cue.order[jnp.minimum(state.progress.done, len(state.cue.order) - 1)]


def _recall_order(
    state: MemoryState, num_items: int, num_choices: int, num_shown: Array, place: Array
) -> Recall:
    """Returns the order, how much of it is done, and the place `[2]` of the next item."""
    order = recall.each_of(state.cue.order[:num_items], num_choices, num_shown)
    done = jax.nn.one_hot(state.progress.done, num_items + 1)
    return Recall(recall.offset(state, place) * (num_shown > 0), (*order, done))


def _judge_sequence(config: Any, state: MemoryState, contacts: Contacts) -> Verdict:
    num_items = memory_task.items(SEQUENCE, config)
    return _judge_order(num_items, state, contacts.blocks, _next(state))


def _touch_in_order(config: Any, state: MemoryState) -> Array:
    touch = motions.touch_block(state, _next(state))
    return motions.send(config, motions.touch_again(state, touch))


def _recall_sequence(config: Any, state: MemoryState) -> Recall:
    num_items, place = memory_task.items(SEQUENCE, config), state.table.blocks[_next(state), :2]
    num_shown = lit_blocks.num_shown(num_items, state)
    return _recall_order(state, num_items, rules.NUM_BLOCKS, num_shown, place)


def _sequence_chance(config: Any) -> float:
    """Returns 1 / the number of orders of n of the 4 blocks.

    The position of the hand may tell how far the order has come, but not the order.
    """
    return 1 / math.perm(rules.NUM_BLOCKS, memory_task.items(SEQUENCE, config))


# path -------------------------------------------------------------------------------------------


@functools.cache
def paths(num_items: int) -> np.ndarray:
    """Returns all paths `[n, num_items]` over neighbouring dots that visit no dot twice.

    Neighbours may be diagonal, so that no straight line between two passes over a third.
    """
    found = [(start,) for start in range(NUM_DOTS)]
    for _ in range(num_items - 1):
        found = [
            (*path, dot)
            for path in found
            for dot in range(NUM_DOTS)
            if dot not in path and _are_neighbours(path[-1], dot)
        ]
    return np.array(found, np.int32)


def _are_neighbours(one: int, other: int) -> bool:
    (x, y), (u, v) = divmod(one, 3), divmod(other, 3)
    return max(abs(x - u), abs(y - v)) == 1


def _draw_path(config: Any, key: Key) -> Cue:
    possible = jnp.asarray(paths(memory_task.items(PATH, config)))
    chosen = possible[jax.random.randint(key, (), 0, len(possible))]
    return memory_task.make_cue(shown=_path_steps(config), order=chosen)


def _path_steps(config: Any) -> int:
    return 1 + _MARKER_STEPS * memory_task.items(PATH, config)


def _show_path(config: Any, state: MemoryState) -> Display:
    num_items = memory_task.items(PATH, config)
    turn = memory_task.turn_of(state, first=1, steps=_MARKER_STEPS)
    is_on = (state.table.num_steps >= 1) & (turn < num_items)
    dot = jnp.asarray(dots(), jnp.float32)[state.cue.order[jnp.clip(turn, 0, num_items - 1)]]
    marker = jnp.where(is_on, jnp.append(dot, 1.0), 0.0)
    return memory_task.plain_display(marker=marker)


def _judge_path(config: Any, state: MemoryState, contacts: Contacts) -> Verdict:
    del contacts
    tool = state.table.tool
    away = jnp.linalg.norm(tool[None, :2] - jnp.asarray(dots(), jnp.float32), axis=1)
    visited = (away < DOT_DISTANCE) & (tool[2] < _LOW)
    return _judge_order(memory_task.items(PATH, config), state, visited, _next(state))


def _follow_path(config: Any, state: MemoryState) -> Array:
    dot = jnp.asarray(dots(), jnp.float32)[_next(state)]
    return motions.send(config, motions.reach(state, dot, motions.DOT_HEIGHT))


def _recall_path(config: Any, state: MemoryState) -> Recall:
    num_items, place = memory_task.items(PATH, config), jnp.asarray(dots())[_next(state)]
    turn = memory_task.turn_of(state, first=1, steps=_MARKER_STEPS)
    return _recall_order(state, num_items, NUM_DOTS, jnp.clip(turn + 1, 0, num_items), place)


SEQUENCE = MemoryTask(
    suite="procedure",
    instructions=lambda config: (("touch the blocks in the order shown", "sequence"),),
    draw=lambda config, key: lit_blocks.draw_order(
        memory_task.items(SEQUENCE, config),
        lit_blocks.order_steps(memory_task.items(SEQUENCE, config)),
        key,
    ),
    instruction=lambda config, cue: jnp.zeros((), jnp.int32),
    max_shown=lambda config: lit_blocks.order_steps(memory_task.items(SEQUENCE, config)),
    act_steps=lambda config: 20 + 18 * memory_task.items(SEQUENCE, config),
    display=lambda config, state: lit_blocks.show_order(memory_task.items(SEQUENCE, config), state),
    judge=_judge_sequence,
    expert=_touch_in_order,
    recall=_recall_sequence,
    chance=_sequence_chance,
    items=3,
    cue_text=lambda config, state: task_captions.colours(
        state, memory_task.items(SEQUENCE, config)
    ),
    result_text=task_captions.in_order,
)
PATH = MemoryTask(
    suite="procedure",
    instructions=lambda config: (("pass over the dots as shown", "path"),),
    draw=_draw_path,
    instruction=lambda config, cue: jnp.zeros((), jnp.int32),
    max_shown=_path_steps,
    act_steps=lambda config: 24 + 14 * memory_task.items(PATH, config),
    display=_show_path,
    judge=_judge_path,
    expert=_follow_path,
    recall=_recall_path,
    chance=lambda config: 1 / len(paths(memory_task.items(PATH, config))),
    items=4,
    has_blocks=False,
    has_dots=True,
    cue_text=lambda config, state: (
        "the dots "
        + " → ".join(str(dot + 1) for dot in state.cue.order[: memory_task.items(PATH, config)])
    ),
    result_text=task_captions.in_order,
    most_items=5,
)
MEMBERS = {"sequence": SEQUENCE, "path": PATH}
