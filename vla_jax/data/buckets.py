"""Endless shuffled batches of rows of similar length, which need little padding.

Batches of different widths are interleaved; each width compiles once. The order depends only on
the seed and the number of batches drawn, which is the state that a resumed training restores.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from vla_jax.data.scan_commands import Ids


class Buckets:
    """Iterator of `Ids` batches, `target` cut to the smallest width that contains its rows.

    Each epoch contains each row once; the last batch of a width is filled with repeated rows.
    """

    def __init__(
        self,
        rows: Ids,
        *,
        batch_size: int,
        width_step: int = 8,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Groups the rows by width.

        Args:
          rows: ids, each target followed by at least one 0.
          batch_size: B over all processes.
          width_step: widths are multiples of it, but at most the longest target and its final 0.
          seed: random seed of shuffling.
          process_index: place of this process's rows in a batch, 0 … process_count - 1.
          process_count: number of processes; divides `batch_size`.
        """
        size = batch_size // process_count
        self._own = slice(size * process_index, size * (process_index + 1))
        lengths = 1 + np.count_nonzero(rows.target, axis=1)  # including the final 0
        widths = np.minimum(-(-lengths // width_step) * width_step, lengths.max())
        self._groups = {int(width): np.flatnonzero(widths == width) for width in np.unique(widths)}
        self._rows, self._batch_size, self._seed = rows, batch_size, seed
        self._num_batches, self._epoch, self._order = 0, -1, []

    def __iter__(self) -> Iterator[Ids]:
        """Returns the iterator itself: all loops over it share one position."""
        return self

    def __next__(self) -> Ids:
        """Returns the next batch."""
        epoch, place = divmod(self._num_batches, self.batches_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffle(epoch)
        self._num_batches += 1
        width, rows = self._order[place]
        rows = rows[self._own]
        return Ids(self._rows.source[rows], self._rows.target[rows, :width])

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches that contain all rows once."""
        return sum(-(-len(group) // self._batch_size) for group in self._groups.values())

    def metrics(self) -> dict[str, float]:
        """Returns nothing to log."""
        return {}

    def get_state(self) -> dict[str, Any]:
        """Returns the position as a dict for JSON."""
        return {"num_batches": self._num_batches}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restores the position of `get_state`; the following batches are the same."""
        self._num_batches = int(state["num_batches"])

    def close(self) -> None:
        """Does nothing; there are no resources to release."""

    def _shuffle(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """Returns the batches of an epoch: width, and rows `[B]`."""
        rng = np.random.default_rng([self._seed, epoch])
        order = []
        for width, group in self._groups.items():
            count = -(-len(group) // self._batch_size)
            full = np.resize(rng.permutation(group), (count, self._batch_size))
            order += [(width, rows) for rows in full]
        return [order[i] for i in rng.permutation(len(order))]
