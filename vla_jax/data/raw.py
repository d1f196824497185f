"""Raw view of a data set: what the original tool would read, under the original names.

Every reader returns a `RawDataset`; `readers.training_data` makes a `Dataset` for training of it.
It opens no more than indices: numbers and images are read when they are indexed, so that its
memory grows with the episodes and not with their frames.
"""

import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from vla_jax.data.dataset import Frames
from vla_jax.data.lazy_lengths import LazyLengths
from vla_jax.types import Resampling

Value = TypeVar("Value", covariant=True)


class RawImages(Frames, Protocol):
    """Images `[T, h, w, 3]` uint8 of one camera in one episode, decoded when indexed."""

    def read(
        self, steps: np.ndarray, size: tuple[int, int], resampling: Resampling = "area"
    ) -> np.ndarray:
        """Decodes and resizes some images.

        Args:
          steps: `[n]` steps of the episode in [0, T), ascending.
          size: (h, w) in pixels.
          resampling: how to resize.

        Returns:
          `[n, h, w, 3]` uint8.
        """
        ...


class RawEpisode(NamedTuple):
    """One episode of `T` steps; its mappings compute a value at every access and keep nothing."""

    name: str  # the original tool's: "3", "train/2", "demo_10", "training/segment1", "1/demo_3"
    columns: Mapping[str, np.ndarray]  # original key -> [T, ...] with the original reader's dtype
    images: Mapping[str, RawImages]  # original key -> [T, h, w, 3] uint8
    instructions: Sequence[str]  # T texts; "" where the data set has none
    timestamps: np.ndarray  # [T] float64, seconds from the episode's first step


class Feature(NamedTuple):
    """Type of one column or camera, as the data set's own description gives it."""

    dtype: str  # NumPy's name, "str" for texts
    shape: tuple[int, ...]  # of one step: () for a number, (h, w, 3) for an image; -1 = varies
    names: tuple[str, ...] = ()  # of each dimension, where known


class EpisodeBlock(NamedTuple):
    """Numbers and texts of some consecutive episodes, of `n` steps together."""

    name: str  # for messages, such as "episode 3"
    columns: Mapping[str, np.ndarray]  # original key -> [n, ...] as in `RawEpisode`
    texts: Sequence[str]  # different instructions
    text_index: np.ndarray  # [n] int64 into `texts`
    timestamps: np.ndarray  # [n] float64, seconds from each episode's first step


class Blocks(NamedTuple):
    """Episodes that are read faster together than one by one."""

    ends: np.ndarray  # [num_blocks] int64, exclusive; the last is E
    # reads some columns of the episodes [start, stop); a ValueError where something is unusual, and
    # then they are read one by one, which finds the one that is wrong
    read: Callable[[int, int, Sequence[str]], EpisodeBlock]


class RawDataset(NamedTuple):
    """A data set as it is on disk; can be pickled, and shared by threads."""

    kind: str  # key of READERS
    path: pathlib.Path
    episodes: Sequence[RawEpisode]  # in the original reader's order; made when indexed
    lengths: np.ndarray | LazyLengths  # [E] int64, steps of every episode; 0 = cannot be read
    columns: Mapping[str, Feature]  # original key -> type; of numbers and texts
    images: Mapping[str, Feature]  # original key -> type; of cameras
    fps: float | None  # steps per second, Hz; None if the data set does not state it
    # hash of what identifies the content: names and sizes of files, names or lengths of episodes
    fingerprint: str
    blocks: Blocks | None = None  # None: every episode is read by itself


class Lazy(Mapping[str, Value]):
    """Mapping of fixed keys whose values are computed by a function at every access."""

    def __init__(self, keys: Sequence[str], get: Callable[[str], Value]) -> None:
        """Stores the arguments.

        Args:
          keys: all keys, in order.
          get: computes the value of a key; must be picklable, such as a `functools.partial`.
        """
        self._keys = tuple(keys)
        self._get = get

    def __getitem__(self, key: str) -> Value:
        """Computes the value of a key; KeyError if it is not one of the keys."""
        if key not in self._keys:
            raise KeyError(key)
        return self._get(key)

    def __contains__(self, key: object) -> bool:
        """Returns True for a key, without computing its value."""
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        """Iterates over the keys."""
        return iter(self._keys)

    def __len__(self) -> int:
        """Returns the number of keys."""
        return len(self._keys)


class LazyEpisodes(Sequence[RawEpisode]):
    """Sequence of episodes, each made by a function when it is indexed."""

    def __init__(self, count: int, make: Callable[[int], RawEpisode]) -> None:
        """Stores the arguments.

        Args:
          count: E, number of episodes.
          make: returns the episode at an index in [0, E); must be picklable.
        """
        self._count = count
        self._make = make

    def __len__(self) -> int:
        """Returns E."""
        return self._count

    def __getitem__(self, index: Any) -> Any:
        """Returns the episode at an index, or a list of those of a slice."""
        if isinstance(index, slice):
            return [self._make(each) for each in range(self._count)[index]]
        return self._make(range(self._count)[index])


def steps_of(index: Any, length: int) -> np.ndarray:
    """Returns the steps `[...]` that an index selects, each in [0, `length`).

    Args:
      index: an integer, a slice, or an array of integers `[...]`, negative ones from the end.
      length: T.

    Raises:
      IndexError: an index is out of range, or not an integer.
    """
    if isinstance(index, slice):
        return np.arange(*index.indices(length))
    steps = np.asarray(index)
    if steps.size and not np.issubdtype(steps.dtype, np.integer):
        raise IndexError(f"index must be integers or a slice, got {steps.dtype}.")
    steps = np.where(steps < 0, steps + length, steps).astype(np.int64)
    if np.any((steps < 0) | (steps >= length)):
        raise IndexError(f"index must be within {length} frames, got {index}.")
    return steps
