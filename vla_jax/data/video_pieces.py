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

from vla_jax.data.video_files import FrameIndex, damaged, open_video, read_index, to_rgb
from vla_jax.types import Resampling

MAX_OPEN = 8  # files that a thread keeps open
MAX_BACK = 2  # decoding of a frame starts at most this many pieces before its own


class VideoPieces:
    """Decoder of single pieces; safe to share by threads, each of which opens its own files.

    It stores frame indices and open files, never images.
    """

    def __init__(self) -> None:
        """Creates a decoder without open files."""
        self._indices: dict[pathlib.Path, FrameIndex] = {}
        self._local = threading.local()

    def index(self, path: pathlib.Path) -> FrameIndex:
        """Returns the frame index of a file.

        Raises:
          ValueError: the file is damaged.
        """
        if path not in self._indices:
            self._open(path)
        return self._indices[path]

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
        container, index = self._open(path), self._indices[path]
        stream = container.streams.video[0]
        container.seek(int(index.times[start]), stream=stream)
        has_key = False
        for frame in container.decode(stream):
            has_key |= frame.key_frame  # frames before it refer to frames that were skipped
            if has_key:
                yield int(np.searchsorted(index.times, frame.pts)), frame

    def _open(self, path: pathlib.Path) -> Any:
        """Returns this thread's open container of a file."""
        containers: OrderedDict[pathlib.Path, Any] = self._local.__dict__.setdefault(
            "containers", OrderedDict()
        )
        if path not in containers:
            container = open_video(path)
            if path not in self._indices:
                self._indices[path] = read_index(container)
            container.streams.video[0].codec_context.thread_count = 1  # threads decode other files
            containers[path] = container
            if len(containers) > MAX_OPEN:
                containers.popitem(last=False)[1].close()
        containers.move_to_end(path)
        return containers[path]

    def __reduce__(self) -> tuple[type["VideoPieces"], tuple[()]]:
        """Pickles nothing: open files cannot move to another process."""
        return VideoPieces, ()
