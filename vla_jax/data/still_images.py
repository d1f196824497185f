"""Images that are stored one by one: arrays, or JPEG and PNG files inside a data set."""

from collections.abc import Callable
from typing import Any

import numpy as np

from vla_jax.data.raw import steps_of
from vla_jax.types import Resampling


class StillImages:
    """Images `[T, h, w, 3]` uint8 of one camera in one episode; see `raw.RawImages`."""

    dtype = np.dtype(np.uint8)

    def __init__(
        self, length: int, size: tuple[int, int], load: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        """Stores the arguments; reads nothing.

        Args:
          length: T.
          size: (h, w) of the images on disk, in pixels.
          load: returns the images `[n, h, w, 3]` uint8 of ascending distinct steps `[n]`; must be
            picklable.
        """
        self._length = length
        self._size = size
        self._load = load

    @property
    def shape(self) -> tuple[int, ...]:
        """(T, h, w, 3)."""
        return self._length, *self._size, 3

    def __len__(self) -> int:
        """Returns T."""
        return self._length

    def __getitem__(self, index: Any) -> np.ndarray:
        """Returns the images at an integer, a slice, or an array of integers `[...]`."""
        steps = steps_of(index, self._length)
        unique, places = np.unique(steps, return_inverse=True)
        return self._load(unique)[places.reshape(steps.shape)]

    def read(
        self, steps: np.ndarray, size: tuple[int, int], resampling: Resampling = "area"
    ) -> np.ndarray:
        """Decodes and resizes some images; see `raw.RawImages.read`."""
        return resize(self._load(steps), size, resampling)


def resize(images: np.ndarray, size: tuple[int, int], resampling: Resampling) -> np.ndarray:
    """Resizes images as the frames of videos are resized, with FFmpeg's scaler.

    Args:
      images: `[n, h, w, 3]` uint8.
      size: (h, w) of the result, in pixels.
      resampling: how to resize.

    Returns:
      `[n, h, w, 3]` uint8; `images` themselves if they have this size.
    """
    if images.shape[1:3] == tuple(size):
        return images
    from av.video.frame import VideoFrame
    from av.video.reformatter import VideoReformatter

    from vla_jax.data.video_files import to_rgb

    scaler = VideoReformatter()
    frames = (VideoFrame.from_ndarray(np.ascontiguousarray(i), format="rgb24") for i in images)
    resized = [to_rgb(frame, size, scaler, resampling=resampling) for frame in frames]
    return np.stack(resized) if resized else np.empty((0, *size, 3), np.uint8)
