"""Decoding of all videos of a data set, once, into memory-mapped images."""

import contextlib
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from vla_jax.data.dataset import digest
from vla_jax.data.video_files import (
    damaged,
    frames_at,
    open_video,
    read_index,
    to_rgb,
    video_size,
)
from vla_jax.files import replacing
from vla_jax.types import Resampling


class Segment(NamedTuple):
    """The frames of one episode inside a video file; segments may share frames."""

    path: pathlib.Path  # MP4 file
    times: np.ndarray  # [T] float64, seconds in the file at which it shows the steps


def read_frames(
    cameras: Mapping[str, Sequence[Segment]],
    root: pathlib.Path,
    *,
    decoded_dir: pathlib.Path | None = None,
    image_size: tuple[int, int] | None = None,
    resampling: Resampling = "area",
) -> dict[str, np.ndarray]:
    """Reads the images of all episodes, concatenated, as memory maps.

    The first call decodes every video once, several files at a time, into `root/.frames`; later
    calls open the result, unless the videos have changed.

    Args:
      cameras: camera -> segment of every episode.
      root: folder of the data set.
      decoded_dir: folder for the decoded images; None means `root/.frames`, or the user's cache
        folder if `root` is not writable.
      image_size: (h, w) in pixels to resize to; None keeps the size of the videos.
      resampling: how to resize.

    Returns:
      Camera -> `[F, h, w, 3]` uint8, read-only memory map.

    Raises:
      FileNotFoundError: a video is missing.
      ValueError: a video is damaged, or shows no frame at the time of a step.
      OSError: the disk is full.
    """
    if not cameras:
        return {}
    folder = _decoded_folder(root, decoded_dir)
    paths = {
        name: folder / f"{name}-{_fingerprint(segments, root, image_size, resampling)}.npy"
        for name, segments in cameras.items()
    }
    with contextlib.ExitStack() as files:
        jobs = []
        for name, path in paths.items():
            if not path.exists():
                part = files.enter_context(replacing(path))
                images = _create(part, cameras[name], image_size)
                jobs += _plan(cameras[name], images)
        _decode_all(jobs, resampling)
    return {name: np.load(path, mmap_mode="r") for name, path in paths.items()}


def check_present(segments: Sequence[Segment]) -> None:
    """Checks that every video exists.

    Raises:
      FileNotFoundError: a video is missing.
    """
    for path in dict.fromkeys(segment.path for segment in segments):
        if not path.is_file():
            raise FileNotFoundError(f"video {path} is missing; copy the data set again.")


def decode(
    path: pathlib.Path,
    images: np.ndarray,
    rows: np.ndarray,
    seconds: np.ndarray,
    resampling: Resampling = "area",
) -> None:
    """Decodes a video from its first frame; the frame at `seconds[i]` goes to `images[rows[i]]`.

    Args:
      path: MP4 file.
      images: `[F, h, w, 3]` uint8, written to; frames are resized to h, w.
      rows: `[n]` int64.
      seconds: `[n]` times in the video, in any order; several may have the same frame.
      resampling: how to resize.

    Raises:
      ValueError: the file is damaged, or shows no frame at one of the times.
    """
    from av.error import FFmpegError
    from av.video.reformatter import VideoReformatter

    scaler, size, num_done = VideoReformatter(), images.shape[1:3], 0
    with open_video(path) as container:
        index = read_index(path, container)
        frames = frames_at(path, index, seconds)
        order = np.argsort(frames, kind="stable")
        frames, rows = frames[order], rows[order]
        container.seek(0)  # the index may have been read from the whole file
        try:
            for frame in container.decode(video=0):
                number = int(np.searchsorted(index.times, frame.pts))
                if num_done == len(frames) or number > frames[num_done]:
                    break
                end = num_done + int(np.searchsorted(frames[num_done:], number, side="right"))
                if end > num_done:
                    images[rows[num_done:end]] = to_rgb(frame, size, scaler, resampling=resampling)
                num_done = end
        except FFmpegError as error:
            raise damaged(path, f"frame {frames[num_done]}: {error.strerror}") from error
    if num_done < len(frames):
        raise damaged(path, f"frame {frames[num_done]} is missing")


def _create(
    path: pathlib.Path, segments: Sequence[Segment], image_size: tuple[int, int] | None
) -> np.ndarray:
    """Creates the array file of one camera with its full size on disk."""
    height, width = image_size or video_size(segments[0].path)
    shape = (sum(len(segment.times) for segment in segments), height, width, 3)
    try:
        images = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        if hasattr(os, "posix_fallocate"):
            # Writing to a map on a full disk kills the process: allocate the space beforehand.
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, images.offset + images.nbytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"decoded images need {np.prod(shape, dtype=np.int64) / 1e6:.0f} MB in {path.parent} "
            f"({error.strerror}); free space, give another decoded_dir, or decode on demand.",
        ) from error
    return images


def _plan(
    segments: Sequence[Segment], images: np.ndarray
) -> list[tuple[pathlib.Path, np.ndarray, np.ndarray, np.ndarray]]:
    """Returns one decoding job per file: path, destination, rows and times in the file."""
    rows: dict[pathlib.Path, list[np.ndarray]] = {}
    times: dict[pathlib.Path, list[np.ndarray]] = {}
    end = 0
    for path, seconds in segments:
        rows.setdefault(path, []).append(np.arange(end, end + len(seconds)))
        times.setdefault(path, []).append(seconds)
        end += len(seconds)
    return [(p, images, np.concatenate(rows[p]), np.concatenate(times[p])) for p in rows]


def _decode_all(
    jobs: Sequence[tuple[pathlib.Path, np.ndarray, np.ndarray, np.ndarray]], resampling: Resampling
) -> None:
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for future in [pool.submit(decode, *job, resampling) for job in jobs]:
            future.result()


def _fingerprint(
    segments: Sequence[Segment],
    root: pathlib.Path,
    image_size: tuple[int, int] | None,
    resampling: Resampling,
) -> str:
    """Returns a hash of the segments, and of size and modification time of every file."""
    check_present(segments)
    stats = {path: path.stat() for path in {segment.path for segment in segments}}
    files = [(p.relative_to(root).as_posix(), s.st_size, s.st_mtime_ns) for p, s in stats.items()]
    places = [(s.path.relative_to(root).as_posix(), len(s.times)) for s in segments]
    times = np.concatenate([segment.times for segment in segments])
    return digest(sorted(files), places, times, image_size, resampling)


def _decoded_folder(root: pathlib.Path, decoded_dir: pathlib.Path | None) -> pathlib.Path:
    if decoded_dir is None and not os.access(root, os.W_OK):
        base = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
        decoded_dir = base / "vla_jax" / "frames"
        warnings.warn(f"{root} is not writable; decoded images go to {decoded_dir}", stacklevel=3)
    folder = pathlib.Path(decoded_dir) if decoded_dir else root / ".frames"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
