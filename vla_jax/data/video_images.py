"""Images of one camera in one episode that are frames of a video."""

import pathlib
from typing import Any

import numpy as np

from vla_jax.data.raw import steps_of
from vla_jax.data.video_pieces import VideoPieces
from vla_jax.types import Resampling


class VideoImages:
    """Images `[T, h, w, 3]` uint8 of one camera in one episode; see `raw.RawImages`."""

    dtype = np.dtype(np.uint8)

    def __init__(self, path: pathlib.Path, times: np.ndarray, videos: VideoPieces) -> None:
        """Stores the arguments; reads nothing.

        Args:
          path: MP4 file.
          times: `[T]` float64, seconds in the file at which it shows the steps.
          videos: decoder, shared by all episodes of a data set.
        """
        self._path = path
        self._times = times
        self._videos = videos

    @property
    def shape(self) -> tuple[int, ...]:
        """(T, h, w, 3), from the header of the video."""
        return len(self), *self._videos.size(self._path), 3

    def __len__(self) -> int:
        """Returns T."""
        return len(self._times)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Returns the images at an integer, a slice, or an array of integers `[...]`."""
        steps = steps_of(index, len(self))
        images = self._videos.read(self._path, self._times[steps.reshape(-1)])
        return images.reshape(*steps.shape, *images.shape[1:])

    def read(
        self, steps: np.ndarray, size: tuple[int, int], resampling: Resampling = "area"
    ) -> np.ndarray:
        """Decodes and resizes some images; see `raw.RawImages.read`."""
        return self._videos.read(self._path, self._times[steps], size, resampling)
