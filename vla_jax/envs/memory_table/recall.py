"""Labels of what must be remembered in a memory task, for a loss that trains memory.

The expert of a task knows what no observation shows any more: where to go, in which order, how
often. A policy that clones its actions learns to remember this only as far as it changes an action.
Nothing is asked before it is shown.
"""

import jax
import jax.numpy as jnp
from jax import Array

from vla_jax.envs.memory_table.memory_task import MemoryState
from vla_jax.envs.table import rules
from vla_jax.types import Recall

_UNIT = 0.1  # m, so that most offsets are about 1 in size


def offset(state: MemoryState, place: Array) -> Array:
    """Returns the offset `[2]` from the hand to a place `[2]` in metres, in units of 0.1 m."""
    return (place - state.table.tool[:2]) / _UNIT


def block(state: MemoryState, colour: Array) -> Recall:
    """Returns where the block of a colour `[]` is, and the colour."""
    place = state.table.blocks[colour, :2]
    return Recall(offset(state, place), (jax.nn.one_hot(colour, rules.NUM_BLOCKS),))


def from_when(is_known: Array, recall: Recall) -> Recall:
    """Returns the labels, zeros until they are known, `[]` bool."""
    return jax.tree.map(lambda part: part * is_known, recall)


def each_of(items: Array, size: int, num_shown: Array) -> tuple[Array, ...]:
    """Returns a choice for each item `[n]` below `size`; the first `num_shown` `[]` are asked."""
    is_shown = jnp.arange(len(items)) < num_shown
    return tuple(jax.nn.one_hot(items, size) * is_shown[:, None])
