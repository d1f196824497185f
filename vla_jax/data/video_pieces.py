"""Random access to the frames of MP4 files: only the needed pieces are decoded.

A piece is the group of frames from one key frame to the next. To decode frames, a reader seeks to
the key frame before the first one and decodes forward to the last one.
"""

import pathlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np

from vla_jax.data.video_files import (
    FrameIndex,
    damaged,
    frames_at,
    open_video,
    read_index,
    to_rgb,
)
from vla_jax.types import Resampling

MAX_OPEN = 8  # files that a thread keeps open
MAX_BACK = 2  # decoding of a frame starts at most this many pieces before its own
MAX_INDEXED = 2**22  # frames in the stored indices, 8 bytes each


class VideoPieces:
    """Decoder of single pieces; safe to share by threads, each of which opens its own files.

    It stores the frame indices and open files of the last videos, never images.
    """

    def __init__(self) -> None:
        """Creates a decoder without open files."""
        self._indices: OrderedDict[pathlib.Path, FrameIndex] = OrderedDict()
        self._lock = threading.Lock()
        self._local = threading.local()

    def index(self, path: pathlib.Path) -> FrameIndex:
        """Returns the frame index of a file.

        Raises:
          ValueError: the file is damaged.
        """
        with self._lock:
            index = self._indices.get(path)
        return self._open(path)[1] if index is None else index

    def size(self, path: pathlib.Path) -> tuple[int, int]:
        """Returns height and width of a video in pixels.

        Raises:
          ValueError: the file is damaged.
        """
        stream = self._open(path)[0].streams.video[0]
        return stream.height, stream.width

    def read(
        self,
        path: pathlib.Path,
        seconds: np.ndarray,
        size: tuple[int, int] | None = None,
        resampling: Resampling = "area",
    ) -> np.ndarray:
        """Decodes the frames at some times, with one pass per group of neighbouring pieces.

        Args:
          path: MP4 file.
          seconds: `[n]` times in the video, in any order.
          size: (h, w) in pixels to resize to; None keeps the size of the video.
          resampling: how to resize.

        Returns:
          `[n, h, w, 3]` uint8.

        Raises:
          ValueError: the file is damaged, or shows no frame at one of the times.
        """
        index = self.index(path)
        size = size or self.size(path)
        frames, places = np.unique(frames_at(path, index, seconds), return_inverse=True)
        if not len(frames):
            return np.empty((0, *size, 3), np.uint8)
        pieces = np.searchsorted(index.starts, frames, side="right") - 1
        runs = np.split(frames, np.flatnonzero(np.diff(pieces) > 1) + 1)
        images = [self.decode(path, run, size, resampling) for run in runs]
        if len(frames) == len(seconds) and np.all(np.diff(places) > 0):
            return images[0] if len(images) == 1 else np.concatenate(images)
        return np.concatenate(images)[places]

    def decode(
        self,
        path: pathlib.Path,
        frames: np.ndarray,
        size: tuple[int, int],
        resampling: Resampling = "area",
    ) -> np.ndarray:
        """Decodes some frames of a file in one pass.

        Args:
          path: MP4 file.
          frames: `[n]` frame numbers, ascending and without repetition; decoding also passes the
            frames between them.
          size: (h, w) in pixels to resize to.
          resampling: how to resize.

        Returns:
          `[n, h, w, 3]` uint8.

        Raises:
          ValueError: the file is damaged.
        """
        from av.error import FFmpegError
        from av.video.reformatter import VideoReformatter

        images = np.empty((len(frames), *size, 3), np.uint8)
        scaler, num_found = VideoReformatter(), 0
        index = self.index(path)
        piece = int(np.searchsorted(index.starts, frames[0], side="right")) - 1
        try:
            # In an open GOP (group of pictures) the first frames need those of the piece before it.
            for start in index.starts[max(piece - MAX_BACK, 0) : piece + 1][::-1]:
                num_found = 0
                for number, frame in self._frames_from(path, start):
                    if number == frames[num_found]:
                        images[num_found] = to_rgb(frame, size, scaler, resampling=resampling)
                        num_found += 1
                    if num_found == len(frames):
                        return images
                    if number > frames[num_found]:
                        break
        except FFmpegError as error:
            raise damaged(path, f"frame {frames[num_found]}: {error.strerror}") from error
        raise damaged(path, f"frame {frames[num_found]} is missing")

    def _frames_from(self, path: pathlib.Path, start: int) -> Iterator[tuple[int, Any]]:
        """Yields numbers and decoded frames from the key frame at or before frame `start` on."""
        container, index = self._open(path)
        stream = container.streams.video[0]
        container.seek(int(index.times[start]), stream=stream)
        has_key = False
        for frame in container.decode(stream):
            has_key |= frame.key_frame  # frames before it refer to frames that were skipped
            if has_key:
                yield int(np.searchsorted(index.times, frame.pts)), frame

    def _open(self, path: pathlib.Path) -> tuple[Any, FrameIndex]:
        """Returns this thread's open container of a file, and the index of its frames."""
        containers: OrderedDict[pathlib.Path, tuple[Any, FrameIndex]]
        containers = self._local.__dict__.setdefault("containers", OrderedDict())
        if path not in containers:
            container = open_video(path)
            with self._lock:
                index = self._indices.get(path)
            if index is None:
                index = read_index(path, container)
                self._keep(path, index)
            container.streams.video[0].codec_context.thread_count = 1  # threads decode other files
            containers[path] = container, index
            if len(containers) > MAX_OPEN:
                containers.popitem(last=False)[1][0].close()
        containers.move_to_end(path)
        return containers[path]

    def _keep(self, path: pathlib.Path, index: FrameIndex) -> None:
        """Stores an index; removes the first ones of other videos where they are too large."""
        with self._lock:
            self._indices[path] = index
            total = sum(len(index.times) for index in self._indices.values())
            while total > MAX_INDEXED and len(self._indices) > 1:
                total -= len(self._indices.popitem(last=False)[1].times)

    def __reduce__(self) -> tuple[type["VideoPieces"], tuple[()]]:
        """Pickles nothing: open files cannot move to another process."""
        return VideoPieces, ()
