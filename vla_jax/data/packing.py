"""Sequence packing: several episodes per row of `W` steps, so that little of a batch is padding.

A recurrence that is reset where an episode starts gives the same outputs for packed episodes as
for separate rows, but short episodes do not cost `W` steps each.
"""

from typing import Any

import numpy as np

from vla_jax.data.dataset import episode_starts
from vla_jax.data.windows import Windows, gather
from vla_jax.types import Batch


class Packed:
    """A source for `make_loader`, like `Windows`; item i is row i.

    An episode longer than `W` is cut into pieces of `W` steps, each starting from a zero carry.
    Nothing changes after construction.
    """

    def __init__(self, windows: Windows) -> None:
        """Packs the episodes of `windows` into rows of its `window_size`."""
        self.windows = windows
        self.frame, self.step, self.mask = pack(
            windows.dataset.episode_ends, windows.config.window_size
        )
        self.identity = {**windows.identity, "stride": "packed"}
        self.sizes = (len(self.frame),)
        self.weights = (1.0,)
        self.names = ()

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.frame)

    def __getitem__(self, index: Any) -> Batch:
        """Returns the row at an index, or the batch of rows at an array of indices."""
        windows, config = self.windows, self.windows.config
        rows, step, mask = self.frame[index], self.step[index], self.mask[index]
        batch = gather(
            windows.dataset,
            config,
            np.searchsorted(windows.dataset.episode_ends, rows, side="right"),
            step,
            mask,
            instructions=windows.instructions,
            tokens=windows.tokens,
        )
        return batch._replace(reset=mask & (step % config.window_size == 0))


def pack(episode_ends: np.ndarray, row_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packs episodes into rows: longest first, each into the fullest row that fits (best fit).

    Args:
      episode_ends: `[E]`, exclusive.
      row_size: W, steps of a row.

    Returns:
      frame `[R, W]` of the data set, step `[R, W]` within its episode, mask `[R, W]` True where
      the step is real.
    """
    pieces = [
        (start + first, first, min(row_size, end - start - first))
        for start, end in zip(episode_starts(episode_ends), episode_ends, strict=True)
        for first in range(0, end - start, row_size)
    ]
    rows: list[list] = []
    with_room: list[list[int]] = [[] for _ in range(row_size + 1)]  # rows by free steps
    for piece in sorted(pieces, key=lambda piece: -piece[2]):
        room = next((r for r in range(piece[2], row_size + 1) if with_room[r]), None)
        row = len(rows) if room is None else with_room[room].pop()
        if room is None:
            rows.append([])
            room = row_size
        rows[row].append(piece)
        with_room[room - piece[2]].append(row)
    frame, step = np.zeros((2, len(rows), row_size), np.int64)
    mask = np.zeros(frame.shape, bool)
    for row, row_pieces in enumerate(rows):
        place = 0
        for start, first, length in row_pieces:
            places = slice(place, place + length)
            frame[row, places] = np.arange(start, start + length)
            step[row, places] = np.arange(first, first + length)
            mask[row, places] = True
            place += length
    return frame, step, mask
