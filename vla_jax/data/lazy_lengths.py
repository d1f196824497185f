"""Numbers of steps of episodes, read when they are first needed."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np


class LazyLengths(np.lib.mixins.NDArrayOperatorsMixin):
    """Lengths `[E]` int64 that behave as an array; a single one is read without the others.

    All of them are read, once, when more than one is needed: to open an HDF5 file of 100,000
    groups takes a second, to look into each group several.
    """

    def __init__(self, count: int, read: Callable[[Sequence[int]], np.ndarray]) -> None:
        """Stores the arguments.

        Args:
          count: E, number of episodes.
          read: returns the lengths of some episodes, indices in [0, E); must be picklable.
        """
        self.shape = (count,)
        self._read = read
        self._known: np.ndarray | None = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Returns all lengths."""
        if self._known is None:
            known = np.asarray(self._read(range(len(self))), np.int64)
            known.flags.writeable = False
            self._known = known
        return np.array(self._known, dtype) if copy else np.asarray(self._known, dtype)

    def __array_ufunc__(self, function: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """Applies a NumPy function to all lengths."""
        arrays = [np.asarray(x) if isinstance(x, LazyLengths) else x for x in inputs]
        return getattr(function, method)(*arrays, **options)

    def __getitem__(self, index: Any) -> Any:
        """Returns one length, or an array of those that a slice or an array selects."""
        is_single = isinstance(index, int | np.integer) and not isinstance(index, bool)
        if is_single and self._known is None:
            return self._read([range(len(self))[index]])[0]
        return np.asarray(self)[index]

    def __len__(self) -> int:
        """Returns E."""
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        """Iterates over all lengths."""
        return iter(np.asarray(self))

    @property
    def dtype(self) -> np.dtype:
        """int64."""
        return np.dtype(np.int64)

    @property
    def size(self) -> int:
        """E."""
        return self.shape[0]

    def sum(self) -> int:
        """Returns the number of all steps."""
        return int(np.asarray(self).sum())

    def tolist(self) -> list[int]:
        """Returns all lengths as a list."""
        return np.asarray(self).tolist()
