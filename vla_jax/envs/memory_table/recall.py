"""What the robot must remember in a memory task, said directly, for a loss that trains memory.

The expert of a task knows what no observation shows any more: where to go, in which order, how
often. A policy that clones its actions learns to remember this only as far as it changes an action.
"""

import jax
from jax import Array

from vla_jax.envs.memory_table.memory_task import MemoryState
from vla_jax.envs.table import rules
from vla_jax.types import Recall

_UNIT = 0.1  # m, so that most offsets are about 1 in size


def offset(state: MemoryState, place: Array) -> Array:
    """Returns the way `[2]` from the hand to a place `[2]` in metres, in units of 0.1 m."""
    return (place - state.table.tool[:2]) / _UNIT


def block(state: MemoryState, colour: Array, *others: Array) -> Recall:
    """Returns where the block of a colour `[]` is, the colour, and other choices."""
    place = state.table.blocks[colour, :2]
    return Recall(offset(state, place), (jax.nn.one_hot(colour, rules.NUM_BLOCKS), *others))


def each_of(indices: Array, size: int) -> tuple[Array, ...]:
    """Returns every one of the indices `[n]` below `size` as a choice."""
    return tuple(jax.nn.one_hot(indices, size))
