"""Endless shuffled batches of rows of about one length, so that little of them is padding.

Every width is compiled once; batches of different widths come mixed. The order follows from the
seed and the number of batches given, which is all that a resumed training needs.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from vla_jax.data.scan_commands import Ids


class Buckets:
    """An iterator of `Ids`, `target` cut to the narrowest width that its rows fit in.

    In every epoch each row comes once; the last batch of a width is filled up with rows that came
    before it.
    """

    def __init__(self, rows: Ids, *, batch_size: int, width_step: int = 8, seed: int = 0):
        """Sorts the rows.

        Args:
          rows: ids, each target with at least one 0 behind it.
          batch_size: B.
          width_step: widths are its multiples, and that of the longest target with its end.
          seed: of the shuffling.
        """
        lengths = 1 + np.count_nonzero(rows.target, axis=1)  # with the end
        widths = np.minimum(-(-lengths // width_step) * width_step, lengths.max())
        self._groups = {int(width): np.flatnonzero(widths == width) for width in np.unique(widths)}
        self._rows, self._batch_size, self._seed = rows, batch_size, seed
        self._num_batches, self._epoch, self._order = 0, -1, []

    def __iter__(self) -> Iterator[Ids]:
        """The batches themselves: a position is shared by all who iterate."""
        return self

    def __next__(self) -> Ids:
        """The next batch."""
        epoch, place = divmod(self._num_batches, self.batches_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffle(epoch)
        self._num_batches += 1
        width, rows = self._order[place]
        return Ids(self._rows.source[rows], self._rows.target[rows, :width])

    @property
    def batches_per_epoch(self) -> int:
        """How many batches hold all rows once."""
        return sum(-(-len(group) // self._batch_size) for group in self._groups.values())

    def get_state(self) -> dict[str, Any]:
        """The position, JSON-able."""
        return {"num_batches": self._num_batches}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where `get_state` was called, to the bit."""
        self._num_batches = int(state["num_batches"])

    def close(self) -> None:
        """Nothing is open."""

    def _shuffle(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """Returns the batches of an epoch: width, and rows `[B]`."""
        rng = np.random.default_rng([self._seed, epoch])
        order = []
        for width, group in self._groups.items():
            count = -(-len(group) // self._batch_size)
            full = np.resize(rng.permutation(group), (count, self._batch_size))
            order += [(width, rows) for rows in full]
        return [order[i] for i in rng.permutation(len(order))]
