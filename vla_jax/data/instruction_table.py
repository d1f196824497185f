"""Token ids of the instructions of a data set, and the instruction of every frame."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vla_jax.data.dataset import Dataset, instruction_starts

Tokenize = Callable[[str], np.ndarray]  # instruction -> token ids [S] int32, from the backbone


class InstructionTable(NamedTuple):
    """Token ids of a data set's instructions, and which of them every frame has."""

    ids: np.ndarray  # [num_texts + 1, S] int32; the last row has those of "", for hidden ones
    index: np.ndarray  # [F] int32 into `ids`
    starts: np.ndarray  # [num_starts] int64, frames at which an episode or an instruction begins

    def age(self, rows: np.ndarray) -> np.ndarray:
        """Returns the steps since the episode or the instruction began, of frames `[...]`."""
        return rows - self.starts[np.searchsorted(self.starts, rows, side="right") - 1]


def instruction_table(dataset: Dataset, tokenize: Tokenize) -> InstructionTable:
    """Returns the token ids of every instruction, and the instruction of every frame.

    Texts with the same ids are one instruction, as for an agent, which sees only ids.
    """
    ids = np.stack([tokenize(text) for text in (*dataset.instructions, "")])
    _, same = np.unique(ids, axis=0, return_inverse=True)
    index = same.reshape(-1).astype(np.int32)[dataset.instruction_index]
    is_start = instruction_starts(dataset._replace(instruction_index=index))
    return InstructionTable(ids, dataset.instruction_index, np.flatnonzero(is_start))
