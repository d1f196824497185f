"""Writes recorded frames (`vla_jax.data.frame_records`) in bounded memory."""

import contextlib
import os
import pathlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from vla_jax import folder_lock
from vla_jax.data import array_records, shard_files
from vla_jax.data.frame_records import (
    ABOUT,
    FORMATS,
    RECORDS,
    FrameFormat,
    FrameSizes,
    check_shard,
    read_sizes,
)
from vla_jax.data.raw_frames import STEPS_PER_PASS, RawFrames
from vla_jax.data.shard_files import shard_folder
from vla_jax.files import crc32_of_file, replacing, write_json

SHARD_BYTES = 2**30  # bytes of the images of a shard, at most
FIXED_BYTES = 2**24  # code of the codecs, buffers of files, stacks of threads; 4 to 12 MB measured
DECODER_IMAGES = 32  # that a thread's decoders of videos hold: eight files, eight frames, 12 bits
Done = Callable[[int], None]


def prepare(folder: pathlib.Path, images: RawFrames, form: FrameFormat) -> FrameSizes:
    """Returns the sizes of a camera's records, which are written if they are new.

    Raises:
      ValueError: the folder holds other frames, or frames of another format.
      OSError: the folder cannot be written.
    """
    num_frames, height, width = images.shape[:3]
    per_shard = max(1, SHARD_BYTES // (height * width * 3))
    if not (folder / ABOUT).exists():
        sizes = FrameSizes(num_frames, height, width, form, per_shard)
        write_json(folder / ABOUT, sizes._asdict())
    found = read_sizes(folder, images.shape)
    if found.format != form:
        raise ValueError(
            f"{folder} holds frames of format {found.format!r}, expected {form!r}; use --frames "
            f"{found.format}, delete the folder, or give another --dataset.decoded-dir."
        )
    return found


def check_shards(shards: Sequence[tuple[pathlib.Path, int, FrameSizes]]) -> None:
    """Reads written shards once, several at a time, and compares their checksums.

    Args:
      shards: folder of the camera, index and sizes of each.

    Raises:
      ValueError: a shard is damaged, or belongs to another place.
    """
    with ThreadPoolExecutor(max_workers=4) as pool:
        for _ in pool.map(lambda shard: check_shard(*shard, checksums=True), shards):
            pass


def write_shard(
    folder: pathlib.Path,
    shard: int,
    sizes: FrameSizes,
    images: RawFrames,
    *,
    max_bytes: int,
    done: Done = lambda count: None,
) -> None:
    """Writes a shard, which is complete or absent; one that exists by now is left as it is.

    Args:
      folder: folder of the shards, with their sizes.
      shard: index of the shard.
      sizes: of all images.
      images: to decode.
      max_bytes: limit of the memory that is taken meanwhile.
      done: called with the number of images, after some have been written.

    Raises:
      BlockingIOError: another process writes this shard.
      OSError: the disk is full.
      ValueError: `max_bytes` is less than one image takes; an image or video is damaged.
    """
    path = shard_folder(folder, shard)
    lock = path.with_name(f"{path.name}.lock")
    with folder_lock.hold(lock, str(path), "give another --dataset.decoded-dir"):
        if path.exists():
            return
        with replacing(path) as part:
            part.mkdir()
            frames = sizes.frames(shard)
            encoded = _encode(images, frames, FORMATS[sizes.format].encode, max_bytes, done)
            with contextlib.closing(encoded) as records:
                array_records.write_records(part / RECORDS, records)
            checksums = {RECORDS: crc32_of_file(part / RECORDS)}
            shard_files.write_index(part, path, frames, checksums)


def _encode(
    images: RawFrames,
    frames: range,
    encode: Callable[[np.ndarray], bytes],
    max_bytes: int,
    done: Done,
) -> Generator[bytes, None, None]:
    """Yields the records of some frames, which threads decode a little ahead."""
    decoder = DECODER_IMAGES * images.source_bytes
    needed = FIXED_BYTES + decoder + images.bytes_per_image
    if max_bytes < needed:
        raise ValueError(
            f"dataset.cache_bytes must be at least {needed}, which decoding and resizing takes, "
            f"got {max_bytes}; raise --dataset.cache-bytes."
        )
    left = max_bytes - FIXED_BYTES
    num_threads = min(os.cpu_count() or 1, left // (decoder + images.bytes_per_image))
    per_job = min(STEPS_PER_PASS, (left // num_threads - decoder) // images.bytes_per_image)

    def job(rows: range) -> list[bytes]:
        return [encode(image) for image in images[np.asarray(rows)]]

    jobs = (frames[start : start + per_job] for start in range(0, len(frames), per_job))
    running: deque[Future[list[bytes]]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for rows in jobs:
                if len(running) == num_threads:  # also those that wait to be written
                    yield from _take(running, done)
                running.append(pool.submit(job, rows))
            while running:
                yield from _take(running, done)
        finally:
            pool.shutdown(cancel_futures=True)


def _take(running: deque[Future[list[bytes]]], done: Done) -> Iterator[bytes]:
    records = running.popleft().result()
    yield from records
    done(len(records))
