"""Images of a data set that are decoded when they are indexed."""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vla_jax.data.frame_cache import FrameCache
from vla_jax.data.video_files import frames_at, video_size
from vla_jax.data.video_frames import Segment, check_present
from vla_jax.data.video_pieces import VideoPieces
from vla_jax.types import Resampling

RUN_PIECES = 16  # neighbouring pieces that are decoded in one pass


class FramesOnDemand:
    """All images of one camera, `[F, h, w, 3]` uint8, indexed like an array.

    Indexing decodes the needed pieces of the videos that are not in the cache. It returns the
    same images as decoding the whole videos. Safe to share by threads; pickled without its
    images and open files.
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self,
        segments: Sequence[Segment],
        cache: FrameCache,
        *,
        image_size: tuple[int, int] | None = None,
        resampling: Resampling = "area",
    ) -> None:
        """Reads the size of the first video; decodes nothing.

        Args:
          segments: video segment of every episode.
          cache: cache of decoded images; may be shared by several cameras.
          image_size: (h, w) in pixels to resize to; None keeps the size of the first video.
          resampling: how to resize.

        Raises:
          FileNotFoundError: a video is missing.
          ValueError: the first video is damaged.
        """
        check_present(segments)
        self._size = image_size or video_size(segments[0].path)
        self._paths = list(dict.fromkeys(segment.path for segment in segments))
        path_index = {path: index for index, path in enumerate(self._paths)}
        self._files = np.array([path_index[segment.path] for segment in segments])  # [E]
        self._ends = np.cumsum([len(segment.times) for segment in segments])  # [E]
        self._times = np.concatenate([segment.times for segment in segments])  # [F] s in the file
        self._cache = cache
        self._resampling: Resampling = resampling
        self._videos = VideoPieces()

    @property
    def shape(self) -> tuple[int, ...]:
        """(F, h, w, 3)."""
        return int(self._ends[-1]), *self._size, 3

    def __len__(self) -> int:
        """Returns F, the number of frames."""
        return int(self._ends[-1])

    def __getitem__(self, index: Any) -> np.ndarray:
        """Decodes frames.

        Args:
          index: an integer, a slice, or an array of integers `[...]`, negative ones from the end.

        Returns:
          Images `[..., h, w, 3]` uint8, a new array.

        Raises:
          IndexError: an index is out of range, or not an integer.
          ValueError: a video is damaged, or shows no frame at the time of a step.
        """
        rows = self._rows(index)
        unique, places = np.unique(rows, return_inverse=True)
        files = self._files[np.searchsorted(self._ends, unique, side="right")]
        images = np.empty((len(unique), *self._size, 3), np.uint8)
        for file in np.unique(files):
            inside = np.flatnonzero(files == file)
            path = self._paths[file]
            frames = frames_at(path, self._videos.index(path), self._times[unique[inside]])
            frames, order = np.unique(frames, return_inverse=True)
            images[inside] = self._read(path, frames)[order]
        return images[places.reshape(rows.shape)]

    def _rows(self, index: Any) -> np.ndarray:
        """Returns the frames `[...]` that an index selects, each in [0, F)."""
        if isinstance(index, slice):
            return np.arange(*index.indices(len(self)))
        rows = np.asarray(index)
        if rows.size and not np.issubdtype(rows.dtype, np.integer):
            raise IndexError(f"index must be integers or a slice, got {rows.dtype}.")
        rows = np.where(rows < 0, rows + len(self), rows).astype(np.int64)
        if np.any((rows < 0) | (rows >= len(self))):
            raise IndexError(f"index must be within {len(self)} frames, got {index}.")
        return rows

    def _read(self, path: pathlib.Path, frames: np.ndarray) -> np.ndarray:
        """Returns frames of one file, ascending and distinct, `[n, h, w, 3]`."""
        starts = self._videos.index(path).starts
        pieces = np.searchsorted(starts, frames, side="right") - 1
        images = np.empty((len(frames), *self._size, 3), np.uint8)
        missing = []
        for piece in np.unique(pieces):
            cached = self._cache.get((path, self._size, int(piece)))
            if cached is None:
                missing.append(int(piece))
            else:
                inside = pieces == piece
                images[inside] = cached[frames[inside] - starts[piece]]
        for run in _runs(missing):
            self._decode(path, run, frames, images)
        return images

    def _decode(
        self, path: pathlib.Path, run: list[int], frames: np.ndarray, images: np.ndarray
    ) -> None:
        """Decodes neighbouring pieces, writes the needed frames and caches what fits."""
        times, starts, _ = self._videos.index(path)
        bounds = np.append(starts, len(times))
        frame_bytes = int(np.prod(self._size)) * 3
        piece_frames = []
        for piece in run:
            first, stop = bounds[piece : piece + 2]
            fits_cache = (stop - first) * frame_bytes <= self._cache.capacity
            inside = frames[(frames >= first) & (frames < stop)]
            piece_frames.append(np.arange(first, stop) if fits_cache else inside)
        numbers = np.concatenate(piece_frames)
        decoded = self._videos.decode(path, numbers, self._size, self._resampling)
        needed = (frames >= bounds[run[0]]) & (frames < bounds[run[-1] + 1])
        images[needed] = decoded[np.searchsorted(numbers, frames[needed])]
        parts = np.split(decoded, np.cumsum([len(part) for part in piece_frames])[:-1])
        for piece, part in zip(run, parts, strict=True):
            if len(part) == bounds[piece + 1] - bounds[piece]:
                self._cache.put((path, self._size, piece), part.copy())


def _runs(pieces: list[int]) -> Iterator[list[int]]:
    """Yields groups of at most `RUN_PIECES` consecutive numbers of an ascending list."""
    run: list[int] = []
    for piece in pieces:
        if run and (piece != run[-1] + 1 or len(run) == RUN_PIECES):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run
