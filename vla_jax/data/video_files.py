"""Access to MP4 files with PyAV: opening, size, frame index, conversion of frames to RGB."""

import pathlib
from typing import Any, NamedTuple

import numpy as np

from vla_jax.types import Resampling

TIME_TOLERANCE = 1e-4  # seconds between a step and its frame at most, lerobot's `tolerance_s`


class FrameIndex(NamedTuple):
    """Presentation times of a video's frames, and the frames at which decoding can start."""

    times: np.ndarray  # [num_frames] int64, in units of the stream's time base, ascending
    starts: np.ndarray  # [num_pieces] int64, first frame of each piece, ascending from 0
    unit: float  # seconds of one unit of `times`


def open_video(path: pathlib.Path) -> Any:
    """Opens a video for reading.

    Raises:
      FileNotFoundError: the file is missing.
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
    if not path.is_file():
        raise FileNotFoundError(f"video {path} is missing; copy the data set again.")
    try:
        container = av.open(str(path), metadata_errors="replace")
    except FFmpegError as error:
        raise damaged(path, str(error.strerror)) from error
    video = container.streams.video
    if not video or not video[0].time_base or video[0].codec_context is None:
        container.close()
        raise damaged(path, "no video stream of a known codec")
    return container


def video_size(path: pathlib.Path) -> tuple[int, int]:
    """Returns height and width of a video in pixels."""
    with open_video(path) as container:
        stream = container.streams.video[0]
        return stream.height, stream.width


def read_index(path: pathlib.Path, container: Any) -> FrameIndex:
    """Returns the frame index of an open video.

    A piece begins at a key frame. Times and key frames come from the header if it lists every
    frame at a constant rate (MP4), else from the packets of the whole file, which are not decoded.

    Raises:
      ValueError: the file is damaged.
    """
    from av.error import FFmpegError

    stream = container.streams.video[0]
    entries = list(getattr(stream, "index_entries", ()))
    steps = np.diff([entry.timestamp for entry in entries])
    is_listed = len(entries) == stream.frames > 0 and not any(e.is_discard for e in entries)
    if is_listed and np.all(steps == steps[:1]):
        step = int(steps[0]) if len(steps) else 1
        times = (stream.start_time or 0) + step * np.arange(len(entries))
        starts = np.flatnonzero([entry.is_keyframe for entry in entries])
    else:
        try:
            demuxed = container.demux(stream)
            packets = [(p.pts, p.is_keyframe) for p in demuxed if p.pts is not None]
        except FFmpegError as error:
            raise damaged(path, str(error.strerror)) from error
        times = np.sort(np.array([time for time, _ in packets], np.int64))
        starts = np.searchsorted(times, sorted(time for time, is_key in packets if is_key))
    return FrameIndex(times, np.union1d([0], starts), float(stream.time_base))


def frames_at(path: pathlib.Path, index: FrameIndex, seconds: np.ndarray) -> np.ndarray:
    """Returns the frames that a video shows at given times.

    The frame of a time is the nearest one. It may be `TIME_TOLERANCE` away, and the rounding of
    a float32 time, but not half a frame.

    Args:
      path: the video, for messages.
      index: its frames.
      seconds: `[n]` times in the video.

    Returns:
      `[n]` int64 frame numbers.

    Raises:
      ValueError: no frame is near enough.
    """
    times, unit = index.times, index.unit
    if not len(times):
        raise damaged(path, "no frames")
    # whole numbers: NumPy would convert all times for a search of others
    ticks = np.ceil(np.clip(seconds / unit, -(2.0**62), 2.0**62)).astype(np.int64)
    after = np.minimum(np.searchsorted(times, ticks), len(times) - 1)
    before = np.maximum(after - 1, 0)
    is_after = np.abs(times[after] * unit - seconds) < np.abs(times[before] * unit - seconds)
    frames = np.where(is_after, after, before)
    half_frame = (times[-1] - times[0]) * unit / max(len(times) - 1, 1) / 2 or np.inf
    rounding = np.abs(seconds) * 2.0**-23  # of a float32
    far = np.abs(times[frames] * unit - seconds) > np.minimum(TIME_TOLERANCE + rounding, half_frame)
    if np.any(far):
        first, last, nearest = times[[0, -1, frames[far][0]]] * unit
        raise _no_frame(path, len(times), (first, last), float(seconds[far][0]), nearest)
    return frames


def _no_frame(
    path: pathlib.Path, count: int, span: tuple[float, float], wanted: float, nearest: float
) -> ValueError:
    """Returns the error of a step whose time no frame of the video has."""
    if span[0] <= wanted <= span[1]:
        found = f"the nearest at {nearest:.6g} s"
    else:
        found = f"{count} frames from {span[0]:.6g} s to {span[1]:.6g} s"
    return ValueError(
        f"video {path} must hold a frame at {wanted:.6g} s (within {TIME_TOLERANCE:g} s), got "
        f"{found}; the file is cut short, or its episodes' timestamps are wrong: copy or record "
        "it again."
    )


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
