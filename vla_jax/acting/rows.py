"""Rows of acting state: the robots of a batch, or the sessions of a table, selected by index.

All functions take any tree whose leaves are `[B, ...]`, such as an `AgentState`. They are pure and
can be jitted. To pad a batch to a fixed size, use the index B: `gather_rows` returns the last row
for it, and `scatter_rows` ignores the row written to it.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp

from vla_jax.types import Array

State = TypeVar("State")


def gather_rows(state: State, index: Array) -> State:
    """Returns the rows `index` of every leaf.

    Args:
      state: leaves `[B, ...]`.
      index: `[R]` int in [0, B], rows to read.

    Returns:
      Leaves `[R, ...]`.
    """
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).at[index].get(mode="clip"), state)


def scatter_rows(state: State, index: Array, rows: State) -> State:
    """Returns the state with the rows `index` replaced.

    Args:
      state: leaves `[B, ...]`.
      index: `[R]` int in [0, B], rows to write; those below B without repetition.
      rows: leaves `[R, ...]`, or `[1, ...]` for the same row everywhere.

    Returns:
      Leaves `[B, ...]`.
    """

    def write(leaf: Array, row: Array) -> Array:
        return jnp.asarray(leaf).at[index].set(row, mode="drop")

    return jax.tree.map(write, state, rows)


def reset_rows(state: State, index: Array, initial: State) -> State:
    """Returns the state with the rows `index` as at the start of an episode.

    Args:
      state: leaves `[B, ...]`.
      index: `[R]` int in [0, B], rows to reset.
      initial: leaves `[1, ...]`, from `Agent.init(params, 1)`.

    Returns:
      Leaves `[B, ...]`.
    """
    return scatter_rows(state, index, initial)
