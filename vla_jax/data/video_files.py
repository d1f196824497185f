"""Access to MP4 files with PyAV: opening, size, frame index, conversion of frames to RGB."""

import pathlib
from typing import Any, NamedTuple

import numpy as np

from vla_jax.types import Resampling


class FrameIndex(NamedTuple):
    """Presentation times of a video's frames, and the frames at which decoding can start."""

    times: np.ndarray  # [num_frames] int64, in units of the stream's time base, ascending
    starts: np.ndarray  # [num_pieces] int64, first frame of each piece, ascending from 0


def open_video(path: pathlib.Path) -> Any:
    """Opens a video for reading.

    Raises:
      ImportError: PyAV is missing.
      ValueError: the file is damaged.
    """
    try:
        import av
        from av.error import FFmpegError
    except ImportError as error:
        raise ImportError(
            "reading videos needs PyAV; install it with `pip install 'vla-jax[data]'`."
        ) from error
    try:
        return av.open(str(path))
    except FFmpegError as error:
        raise damaged(path, str(error.strerror)) from error


def video_size(path: pathlib.Path) -> tuple[int, int]:
    """Returns height and width of a video in pixels."""
    with open_video(path) as container:
        stream = container.streams.video[0]
        return stream.height, stream.width


def read_index(container: Any) -> FrameIndex:
    """Returns the frame index of an open video.

    A piece begins at a key frame. Times and key frames come from the header if it lists every
    frame at a constant rate (MP4), else from the packets of the whole file, which are not decoded.
    """
    stream = container.streams.video[0]
    entries = list(getattr(stream, "index_entries", ()))
    steps = np.diff([entry.timestamp for entry in entries])
    is_listed = len(entries) == stream.frames > 0 and not any(e.is_discard for e in entries)
    if is_listed and np.all(steps == steps[:1]):
        step = int(steps[0]) if len(steps) else 1
        times = (stream.start_time or 0) + step * np.arange(len(entries))
        starts = np.flatnonzero([entry.is_keyframe for entry in entries])
    else:
        packets = [(p.pts, p.is_keyframe) for p in container.demux(stream) if p.pts is not None]
        times = np.sort(np.array([time for time, _ in packets], np.int64))
        starts = np.searchsorted(times, sorted(time for time, is_key in packets if is_key))
    return FrameIndex(times, np.union1d([0], starts))


def to_rgb(
    frame: Any, size: tuple[int, int], scaler: Any, *, resampling: Resampling = "area"
) -> np.ndarray:
    """Returns a decoded frame as `[h, w, 3]` uint8.

    Args:
      frame: PyAV frame.
      size: (h, w) in pixels to resize to.
      scaler: a `VideoReformatter`; reusing it for all frames is 4 times as fast as new ones.
      resampling: how to resize.
    """
    height, width = size
    if (frame.format.name, frame.height, frame.width) != ("gbrp", height, width):
        frame = scaler.reformat(frame, width, height, "rgb24", interpolation=resampling.upper())
    return frame.to_ndarray()  # from gbrp without the scaler: twice as fast


def damaged(path: pathlib.Path, detail: str) -> ValueError:
    """Returns the error of a video that cannot be decoded."""
    return ValueError(
        f"video {path} cannot be decoded, the file is damaged or cut short ({detail}); copy or "
        "record it again."
    )


def too_short(path: pathlib.Path, expected: int, found: int) -> ValueError:
    """Returns the error of a video with fewer frames than its episodes."""
    return ValueError(
        f"video {path} must hold {expected} frames, got {found}; the file is cut short or its "
        "episodes were recorded at another fps: copy or record it again."
    )
