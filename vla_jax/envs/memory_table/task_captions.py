"""Words for what an episode of a memory task shows and what was done in it, for films and pages.

States are the last of an episode, as NumPy arrays.
"""

from collections.abc import Callable

import numpy as np

from vla_jax.envs.memory_table.memory_task import MemoryState
from vla_jax.envs.table import rules
from vla_jax.types import Array


def colour(block: Array | int) -> str:
    """Returns the colour of a block, an index `[]`."""
    return rules.COLOURS[int(block)]


def number(count: Array | int, one: str, many: str) -> str:
    """Returns a number with its noun, such as "1 press" or "2 presses"."""
    return f"{int(count)} {one if int(count) == 1 else many}"


def times(count: Array | int) -> str:
    """Returns a number of repetitions, such as "once" or "2 times"."""
    return "once" if int(count) == 1 else f"{int(count)} times"


def block(text: str) -> Callable[[object, MemoryState], str]:
    """Returns a `cue_text` with the colour of the cue's block in place of {}."""
    return lambda config, state: text.format(colour(state.cue.colour))


def colours(state: MemoryState, num_items: int) -> str:
    """Returns the colours of the cue's order, such as "red → blue"."""
    return " → ".join(map(colour, state.cue.order[:num_items]))


def events(one: str, many: str) -> Callable[[MemoryState], str]:
    """Returns a `result_text` that counts the events of the progress."""
    return lambda state: number(state.progress.done, one, many)


def in_order(state: MemoryState) -> str:
    """Returns how many items were done in order; a `result_text`."""
    return f"{int(state.progress.done)} in order"


def nearest(state: MemoryState) -> str:
    """Returns the block at the hand, whose touch ended the episode; a `result_text`."""
    away = np.linalg.norm(state.table.blocks[:, :2] - state.table.tool[:2], axis=1)
    return f"the hand at the {colour(int(np.argmin(away)))} block"
