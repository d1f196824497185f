"""Recorded frames: the resized images of one camera in files of ArrayRecord, for fast training.

    folder/frames.json                       number, size and format of the images
    folder/shard_00000/frames.array_record   one image per record
    folder/shard_00000/files.json            size and CRC-32 of that file, and its place
    folder/shard_00000.lock                  while a process writes the shard

A shard is complete or absent, so that an interrupted program continues after its last one. Every
record has a hash, which is checked when the record is read.
"""

import io
import pathlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from vla_jax.data import array_records, shard_files
from vla_jax.data.dataset import digest
from vla_jax.data.raw import steps_of
from vla_jax.data.raw_frames import RawFrames, decoded_folder
from vla_jax.data.shard_files import shard_folder
from vla_jax.files import read_json

FrameFormat = Literal["raw", "jpeg"]
JPEG_QUALITY = 95  # with full chroma resolution
MAX_OPEN = 128  # shards that a process keeps open, about 0.1 MB each
_READ_BYTES = 2**18  # bytes of images whose records are read at once
RECORDS, ABOUT = "frames.array_record", "frames.json"  # of a shard, of a camera
_COMMAND = "python -m train.cache --frames"
_AGAIN = f"{_COMMAND} with the same options writes it again"


class FrameCoding(NamedTuple):
    """One way to store an image as a record."""

    encode: Callable[[np.ndarray], bytes]  # [h, w, 3] uint8
    decode: Callable[[bytes, tuple[int, int]], np.ndarray]  # record and (h, w) -> [h, w, 3]
    fingerprint: Callable[[str], str]  # of the decoded images, from that of the originals


class FrameSizes(NamedTuple):
    """Sizes and format of the recorded images of a camera: the content of `frames.json`."""

    num_frames: int  # F
    height: int  # pixels
    width: int  # pixels
    format: FrameFormat
    frames_per_shard: int  # of every shard but the last

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.num_frames // self.frames_per_shard)

    @property
    def frame_bytes(self) -> int:
        """Bytes of an image in memory."""
        return self.height * self.width * 3

    def frames(self, shard: int) -> range:
        """Returns the frames of a shard."""
        first = shard * self.frames_per_shard
        return range(first, min(first + self.frames_per_shard, self.num_frames))


class RecordedFrames:
    """All images of one camera, `[F, h, w, 3]` uint8, read from records when indexed.

    In memory are the images that are returned, and the records that are read at once (256 kB, or
    one image). Safe to share by threads; pickled without its open files.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, folder: pathlib.Path, sizes: FrameSizes, fingerprint: str) -> None:
        """Stores the arguments; opens nothing.

        Args:
          folder: with all shards.
          sizes: of the images.
          fingerprint: of the images.
        """
        self.folder, self.sizes, self.fingerprint = folder, sizes, fingerprint
        self.shape: tuple[int, ...] = (sizes.num_frames, sizes.height, sizes.width, 3)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state without open files."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_readers", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores the state."""
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self._readers: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Returns F, the number of frames."""
        return self.sizes.num_frames

    def __getitem__(self, index: Any) -> np.ndarray:
        """Reads images.

        Args:
          index: an integer, a slice, or an array of integers `[...]`, negative ones from the end.

        Returns:
          Images `[..., h, w, 3]` uint8, a new array.

        Raises:
          IndexError: an index is out of range, or not an integer.
          ValueError: a shard is damaged.
        """
        rows = steps_of(index, len(self))
        unique, first, places = np.unique(rows, return_index=True, return_inverse=True)
        images = np.empty((rows.size, *self.shape[1:]), np.uint8)
        at_once = max(1, _READ_BYTES // self.sizes.frame_bytes)
        shards, records = np.divmod(unique, self.sizes.frames_per_shard)
        for shard in np.unique(shards):
            inside = np.flatnonzero(shards == shard)
            for start in range(0, len(inside), at_once):
                chosen = inside[start : start + at_once]
                self._read(int(shard), records[chosen], first[chosen], images)
        repeated = np.ones(rows.size, bool)
        repeated[first] = False
        images[repeated] = images[first[places.reshape(-1)[repeated]]]
        return images.reshape(*rows.shape, *self.shape[1:])

    def _read(
        self, shard: int, records: np.ndarray, places: np.ndarray, images: np.ndarray
    ) -> None:
        """Writes the images of some records of a shard to `images[places]`."""
        decode, size = FORMATS[self.sizes.format].decode, (self.sizes.height, self.sizes.width)
        try:
            found = self._open(shard).read(records.tolist())
            for place, record in zip(places, found, strict=True):
                images[place] = decode(record, size)
        except (RuntimeError, ValueError, OSError) as error:
            raise _damaged(shard_folder(self.folder, shard), error) from error

    def _open(self, shard: int) -> Any:
        """Returns the reader of a shard; it is closed when no thread uses it any more."""
        with self._lock:
            reader = self._readers.get(shard)
        if reader is None:
            reader = array_records.open_reader(shard_folder(self.folder, shard) / RECORDS)
            expected = len(self.sizes.frames(shard))
            if reader.num_records() != expected:
                raise ValueError(f"it has {reader.num_records()} records instead of {expected}")
        with self._lock:
            self._readers[shard] = reader
            self._readers.move_to_end(shard)
            if len(self._readers) > MAX_OPEN:
                self._readers.popitem(last=False)
        return reader


def records_folder(images: RawFrames, name: str, folder: str | None) -> pathlib.Path:
    """Returns the folder of the recorded frames of a camera, which may be absent.

    Args:
      images: the same images, decoded on demand.
      name: of the camera.
      folder: for all cameras; None means as in `raw_frames.decode_all`.
    """
    own = f"{name}-{images.fingerprint}"
    home = images.root if images.root.is_dir() else images.root.parent
    existing = home / ".frames" / own
    if folder is None and existing.exists():  # also where the data set cannot be written
        return existing
    return decoded_folder(images.root, folder) / own


def open_records(folder: pathlib.Path, images: RawFrames, name: str) -> RecordedFrames:
    """Returns the recorded frames of a camera; sizes and places of the files are compared.

    Args:
      folder: with all shards.
      images: the same images, decoded on demand.
      name: of the camera, for messages.

    Raises:
      FileNotFoundError: frames are missing.
      ValueError: the folder holds other frames, or a file is damaged.
    """
    if not (folder / ABOUT).exists():
        height, width = images.shape[1:3]
        raise FileNotFoundError(
            f"the {len(images)} frames of {name} in {height} × {width} pixels are not recorded in "
            f"{folder.parent}{_others(folder, name)}; write them with {_COMMAND} raw "
            "and the same options, or use --dataset.decode on_demand."
        )
    sizes = read_sizes(folder, images.shape)
    absent = shard_files.missing(folder, sizes.num_shards)
    if absent:
        raise FileNotFoundError(
            f"{folder} has {sizes.num_shards - len(absent)} of {sizes.num_shards} shards; "
            f"{_COMMAND} {sizes.format} with the same options writes the others."
        )
    for shard in range(sizes.num_shards):
        check_shard(folder, shard, sizes, checksums=False)
    return RecordedFrames(folder, sizes, FORMATS[sizes.format].fingerprint(images.fingerprint))


def read_sizes(folder: pathlib.Path, shape: tuple[int, ...]) -> FrameSizes:
    """Returns the content of `frames.json`, which must be that of images of a shape.

    Args:
      folder: of one camera.
      shape: (F, h, w, 3).

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: it is damaged, or describes other images.
    """
    about = read_json(folder / ABOUT, "sizes of recorded frames")
    try:
        sizes = FrameSizes(**about)
        is_right = (*sizes[:3], 3) == shape and sizes.format in FORMATS
        if not is_right or not sizes.frames_per_shard >= 1:
            raise ValueError(f"{about} instead of {[*shape[:3]]}")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / ABOUT} does not describe these frames ({error}); delete {folder}, and "
            f"{_AGAIN}."
        ) from error
    return sizes


def _others(folder: pathlib.Path, name: str) -> str:
    """Returns a description of other recorded frames of a camera, beside a folder."""
    texts = []
    for file in sorted(folder.parent.glob(f"{name}-*/{ABOUT}")):
        about = read_json(file, "sizes of recorded frames")
        texts.append("{num_frames} in {height} × {width}".format_map({**_UNKNOWN, **about}))
    return f" (recorded for other settings or data: {', '.join(texts)})" if texts else ""


def check_shard(folder: pathlib.Path, shard: int, sizes: FrameSizes, *, checksums: bool) -> None:
    """Raises a ValueError if a written shard is damaged, or belongs to another place.

    Args:
      folder: of one camera.
      shard: index of a written shard.
      sizes: of all images.
      checksums: whether to read the file and compare its checksum, not only its size.
    """
    path = shard_folder(folder, shard)
    try:
        shard_files.check_files(path, sizes.frames(shard), [RECORDS], checksums=checksums)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: pathlib.Path, error: Exception) -> ValueError:
    reason = str(error).splitlines()[0] if str(error) else "unknown reason"
    return ValueError(f"{path} is damaged ({reason}); delete this folder, and {_AGAIN}.")


def _to_jpeg(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    _pillow().fromarray(image).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return file.getvalue()


def _from_jpeg(record: bytes, size: tuple[int, int]) -> np.ndarray:
    del size  # the assignment of the caller checks it
    with _pillow().open(io.BytesIO(record), formats=("JPEG",)) as image:
        return np.asarray(image)


def _from_raw(record: bytes, size: tuple[int, int]) -> np.ndarray:
    return np.frombuffer(record, np.uint8).reshape(*size, 3)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "frames of format jpeg need Pillow; install the extra: pip install 'vla-jax[data]'"
        ) from error
    return Image


_UNKNOWN = dict.fromkeys(FrameSizes._fields, "?")
FORMATS: dict[str, FrameCoding] = {
    "raw": FrameCoding(np.ndarray.tobytes, _from_raw, lambda original: original),
    "jpeg": FrameCoding(
        _to_jpeg, _from_jpeg, lambda original: digest(original, "jpeg", JPEG_QUALITY)
    ),
}
