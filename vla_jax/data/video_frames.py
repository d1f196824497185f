"""Videos decoded once into memory-mapped images that every later run shares."""

import contextlib
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from vla_jax.data.dataset import digest
from vla_jax.files import replacing


class Segment(NamedTuple):
    """The frames of one episode inside a video file."""

    path: pathlib.Path  # MP4 file
    start: int  # first frame inside the file
    length: int  # frames


def read_frames(
    cameras: Mapping[str, Sequence[Segment]],
    root: pathlib.Path,
    *,
    cache_dir: pathlib.Path | None = None,
    image_size: tuple[int, int] | None = None,
) -> dict[str, np.ndarray]:
    """Images of all episodes, one after the other, as memory maps.

    The first call decodes every video once, several files at a time, into `root/.frames`; later
    calls open what is there, unless the videos changed.

    Args:
      cameras: camera -> segment of every episode.
      root: folder of the data set.
      cache_dir: folder for the decoded images; None means `root/.frames`, or the user's cache
        folder where `root` cannot be written.
      image_size: (h, w) in pixels to resize to; None keeps the videos' size.

    Returns:
      Camera -> `[F, h, w, 3]` uint8, read-only memory map.

    Raises:
      FileNotFoundError: a video is missing.
      ValueError: a video is damaged, or holds fewer frames than promised.
      OSError: the disk is full.
    """
    if not cameras:
        return {}
    folder = _cache_folder(root, cache_dir)
    paths = {
        name: folder / f"{name}-{_fingerprint(segments, root, image_size)}.npy"
        for name, segments in cameras.items()
    }
    with contextlib.ExitStack() as files:
        jobs = []
        for name, path in paths.items():
            if not path.exists():
                part = files.enter_context(replacing(path))
                images = _create(part, cameras[name], image_size)
                jobs += _plan(cameras[name], images)
        _decode_all(jobs)
    return {name: np.load(path, mmap_mode="r") for name, path in paths.items()}


def video_size(path: pathlib.Path) -> tuple[int, int]:
    """Height and width of a video in pixels."""
    with _open(path) as container:
        stream = container.streams.video[0]
        return stream.height, stream.width


def decode(path: pathlib.Path, images: np.ndarray, rows: np.ndarray) -> None:
    """Decodes a video from its start; frame i goes to `images[rows[i]]`, or nowhere if -1.

    Args:
      path: MP4 file.
      images: `[F, h, w, 3]` uint8, written to; frames are resized to h, w.
      rows: `[n]` for the first n frames of the file.

    Raises:
      ValueError: the file is damaged or has fewer than n frames.
    """
    from av.error import FFmpegError
    from av.video.reformatter import VideoReformatter

    scaler = VideoReformatter()  # one for all frames: 4x faster than one for each
    height, width = images.shape[1:3]
    found = 0
    with _open(path) as container:
        try:
            for frame in container.decode(video=0):
                if found == len(rows):
                    break
                if rows[found] >= 0:
                    size = frame.format.name, frame.height, frame.width
                    if size != ("gbrp", height, width):  # planes of colours: no scaler, 2x faster
                        frame = scaler.reformat(frame, width, height, "rgb24", interpolation="AREA")
                    images[rows[found]] = frame.to_ndarray()
                found += 1
        except FFmpegError as error:
            raise _damaged(path, f"frame {found} of {len(rows)}: {error.strerror}") from error
    if found < len(rows):
        raise ValueError(
            f"video {path} must hold {len(rows)} frames, got {found}; the file is cut short or "
            "its episodes were recorded at another fps: copy or record it again."
        )


def _open(path: pathlib.Path) -> Any:
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
        raise _damaged(path, str(error.strerror)) from error


def _damaged(path: pathlib.Path, detail: str) -> ValueError:
    return ValueError(
        f"video {path} cannot be decoded, the file is damaged or cut short ({detail}); copy or "
        "record it again."
    )


def _create(
    path: pathlib.Path, segments: Sequence[Segment], image_size: tuple[int, int] | None
) -> np.ndarray:
    height, width = image_size or video_size(segments[0].path)
    shape = (sum(segment.length for segment in segments), height, width, 3)
    try:
        images = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        if hasattr(os, "posix_fallocate"):
            # Writing to a map on a full disk kills the process: claim the space beforehand.
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, images.offset + images.nbytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"decoded images need {np.prod(shape, dtype=np.int64) / 1e6:.0f} MB in {path.parent} "
            f"({error.strerror}); free space or give another cache_dir.",
        ) from error
    return images


def _plan(
    segments: Sequence[Segment], images: np.ndarray
) -> list[tuple[pathlib.Path, np.ndarray, np.ndarray]]:
    """One decoding job per file: path, destination, row of every frame of the file."""
    ends = np.cumsum([segment.length for segment in segments])
    jobs = []
    for path in dict.fromkeys(segment.path for segment in segments):
        inside = [(s, end) for s, end in zip(segments, ends, strict=True) if s.path == path]
        rows = np.full(max(s.start + s.length for s, _ in inside), -1)
        for segment, end in inside:
            frames = slice(segment.start, segment.start + segment.length)
            rows[frames] = np.arange(end - segment.length, end)
        jobs.append((path, images, rows))
    return jobs


def _decode_all(jobs: Sequence[tuple[pathlib.Path, np.ndarray, np.ndarray]]) -> None:
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for done in [pool.submit(decode, *job) for job in jobs]:
            done.result()


def _fingerprint(
    segments: Sequence[Segment], root: pathlib.Path, image_size: tuple[int, int] | None
) -> str:
    """Names the decoded content: episodes, files, and the size and age of every file."""
    missing = next((s.path for s in segments if not s.path.is_file()), None)
    if missing:
        raise FileNotFoundError(f"video {missing} is missing; copy the data set again.")
    stats = {path: path.stat() for path in {segment.path for segment in segments}}
    files = [(p.relative_to(root).as_posix(), s.st_size, s.st_mtime_ns) for p, s in stats.items()]
    places = [(s.path.relative_to(root).as_posix(), s.start, s.length) for s in segments]
    return digest(sorted(files), places, image_size)


def _cache_folder(root: pathlib.Path, cache_dir: pathlib.Path | None) -> pathlib.Path:
    if cache_dir is None and not os.access(root, os.W_OK):
        base = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
        cache_dir = base / "vla_jax" / "frames"
        warnings.warn(f"{root} cannot be written; decoded images go to {cache_dir}", stacklevel=3)
    folder = pathlib.Path(cache_dir) if cache_dir else root / ".frames"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
