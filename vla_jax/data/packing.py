"""Sequence packing: several episodes per row of `W` steps, so that little of a batch is padding.

A recurrence that is reset where an episode starts gives the same outputs for packed episodes as
for separate rows, but short episodes do not cost `W` steps each.
"""

from typing import Any, NamedTuple

import numpy as np

from vla_jax.data.raw import steps_of
from vla_jax.data.windows import Windows, gather
from vla_jax.types import Batch


class Rows(NamedTuple):
    """Pieces of episodes in rows of W steps; in the order of rows and places, `P` pieces."""

    begin: np.ndarray  # [P] int64, row · W + first step of the piece in its row
    frame: np.ndarray  # [P] int64, first frame of the data set
    step: np.ndarray  # [P] int64, its step within the episode
    size: np.ndarray  # [P] int64, steps
    num_rows: int
    row_size: int  # W

    def steps(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the steps of some rows.

        Args:
          rows: `[...]`.

        Returns:
          Frame `[..., W]` of the data set, step `[..., W]` within its episode, and mask
          `[..., W]`, True where the step is real; others are 0.
        """
        wanted = rows[..., None] * self.row_size + np.arange(self.row_size)
        piece = np.searchsorted(self.begin, wanted, side="right") - 1
        offset = wanted - self.begin[piece]
        mask = offset < self.size[piece]
        return (
            np.where(mask, self.frame[piece] + offset, 0),
            np.where(mask, self.step[piece] + offset, 0),
            mask,
        )


class Packed:
    """A source for `make_loader`, like `Windows`; item i is row i.

    An episode longer than `W` is cut into pieces of `W` steps, each starting from a zero carry.
    Nothing changes after construction.
    """

    def __init__(self, windows: Windows) -> None:
        """Packs the episodes of `windows` into rows of its `window_size`."""
        self.windows = windows
        self.rows = pack(windows.dataset.episode_ends, windows.config.window_size)
        self.identity = {**windows.identity, "stride": "packed"}
        self.sizes = (self.rows.num_rows,)
        self.weights = (1.0,)
        self.names = ()

    def __len__(self) -> int:
        """Returns the number of rows."""
        return self.sizes[0]

    def __getitem__(self, index: Any) -> Batch:
        """Returns the row at an index, or the batch of rows at an array of indices."""
        windows, config = self.windows, self.windows.config
        rows, step, mask = self.rows.steps(steps_of(index, len(self)))
        batch = gather(
            windows.dataset,
            config,
            np.searchsorted(windows.dataset.episode_ends, rows, side="right"),
            step,
            mask,
            instructions=windows.instructions,
            tokens=windows.tokens,
            scale=windows.scale,
        )
        return batch._replace(reset=mask & (step % config.window_size == 0))


def pack(episode_ends: np.ndarray, row_size: int) -> Rows:
    """Packs episodes into rows: longest first, each into the fullest row that fits (best fit).

    Args:
      episode_ends: `[E]`, exclusive.
      row_size: W, steps of a row.
    """
    lengths = np.diff(episode_ends, prepend=0)
    counts = -(-lengths // row_size)
    first = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    first *= row_size
    sizes = np.minimum(np.repeat(lengths, counts) - first, row_size)
    frame = np.repeat(episode_ends - lengths, counts) + first
    begin = np.empty(len(sizes), np.int64)
    with_room: list[list[int]] = [[] for _ in range(row_size + 1)]  # rows by free steps
    num_rows = 0
    longest_first = np.argsort(-sizes, kind="stable")
    for piece, size in zip(longest_first.tolist(), sizes[longest_first].tolist(), strict=True):
        room = next((r for r in range(size, row_size + 1) if with_room[r]), row_size)
        row = with_room[room].pop() if with_room[room] else num_rows
        num_rows = max(num_rows, row + 1)
        begin[piece] = row * row_size + row_size - room
        with_room[room - size].append(row)
    order = np.argsort(begin)
    return Rows(begin[order], frame[order], first[order], sizes[order], num_rows, row_size)
