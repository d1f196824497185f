"""Files of records, one record per episode: TFRecord and ArrayRecord.

A TFRecord file is a sequence of
    uint64 length | uint32 masked CRC32C of the length | data | uint32 masked CRC32C of the data
in little-endian order. An ArrayRecord file has an index of its own and checks its content.

Source: tensorflow/core/lib/io/record_writer.h; github.com/google/array_record.
"""

import contextlib
import mmap
import os
import pathlib
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from vla_jax.data import array_records

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_CHUNK = 2**20  # bytes hashed at once
_REMEDY = "download or write the file again"


class RecordFormat(NamedTuple):
    """One format of record files."""

    # (position, data) of every record of a file; positions are ascending, the data is unchecked
    scan: Callable[[pathlib.Path], Iterator[tuple[int, memoryview]]]
    # data of the record at a position; checked against its CRC where the flag is set
    read: Callable[[pathlib.Path, int, bool], memoryview]


def crc32c(data: memoryview | bytes) -> int:
    """Returns the CRC32C (Castagnoli) of `data`.

    Raises:
      ImportError: google-crc32c is missing.
    """
    try:
        import google_crc32c
    except ImportError as error:
        raise ImportError(
            "reading TFRecord files needs google-crc32c; install the extra: "
            "pip install 'vla-jax[data]'"
        ) from error
    value = 0
    for start in range(0, len(data), _CHUNK):
        value = google_crc32c.extend(value, bytes(data[start : start + _CHUNK]))
    return value


def masked_crc32c(data: memoryview | bytes) -> int:
    """Returns the CRC32C of `data` as TFRecord files store it: rotated, plus a constant."""
    value = crc32c(data)
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _tfrecord_scan(path: pathlib.Path) -> Iterator[tuple[int, memoryview]]:
    """Yields offset and data of the records; touches the pages that the consumer reads."""
    size = path.stat().st_size
    if not size:
        return
    with open(path, "rb", buffering=0) as file:
        view = memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))
    at = 0
    while at < size:
        length = _tfrecord_length(path, bytes(view[at : at + _HEADER.size]), at, size)
        yield at, view[at + _HEADER.size : at + _HEADER.size + length]
        at += _HEADER.size + length + _FOOTER.size


def _tfrecord_length(path: pathlib.Path, header: bytes, at: int, size: int) -> int:
    """Returns the length of the data of the record at `at` of a file of `size` bytes."""
    if len(header) < _HEADER.size:
        raise ValueError(
            f"{path} is cut: a record starts at byte {at} and needs a header of {_HEADER.size} "
            f"bytes, got {len(header)}; {_REMEDY}."
        )
    length, crc = _HEADER.unpack(header)
    if masked_crc32c(header[:8]) != crc:
        hint = " (it looks like gzip: decompress it)" if header[:2] == b"\x1f\x8b" else ""
        raise ValueError(
            f"{path} is damaged or no TFRecord file{hint}: the CRC of the length at byte {at} is "
            f"wrong; {_REMEDY}."
        )
    if at + _HEADER.size + length + _FOOTER.size > size:
        raise ValueError(
            f"{path} is cut: the record at byte {at} has {length} bytes, got {size - at} to the "
            f"end of the file; {_REMEDY}."
        )
    return length


def _tfrecord_read(path: pathlib.Path, position: int, check: bool) -> memoryview:
    """Returns the data of the record at an offset as a view of the mapped file."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        header = os.pread(file.fileno(), _HEADER.size, position)
        length = _tfrecord_length(path, header, position, size)
        base = position - position % mmap.ALLOCATIONGRANULARITY
        start = position - base + _HEADER.size
        mapped = mmap.mmap(
            file.fileno(), start + length + _FOOTER.size, access=mmap.ACCESS_READ, offset=base
        )
    view = memoryview(mapped)
    data = view[start : start + length]
    if check and masked_crc32c(data) != _FOOTER.unpack(view[start + length :])[0]:
        raise ValueError(
            f"{path} is damaged: the CRC of the record at byte {position} is wrong; {_REMEDY}."
        )
    return data


def _array_record_scan(path: pathlib.Path) -> Iterator[tuple[int, memoryview]]:
    """Yields number and data of the records."""
    with _array_record_reader(path) as reader:
        for number in range(reader.num_records()):
            yield number, memoryview(reader.read([number])[0])


def _array_record_read(path: pathlib.Path, position: int, check: bool) -> memoryview:
    """Returns the data of the record with a number; the package always checks it."""
    del check
    with _array_record_reader(path) as reader:
        count = reader.num_records()
        if position >= count:
            raise ValueError(
                f"{path} has {count} records, expected more than {position}; {_REMEDY}."
            )
        return memoryview(reader.read([position])[0])


@contextlib.contextmanager
def _array_record_reader(path: pathlib.Path) -> Iterator[Any]:
    """Yields an open `ArrayRecordReader` without read-ahead."""
    try:
        reader = array_records.open_reader(path)
        try:
            yield reader
        finally:
            reader.close()
    except RuntimeError as error:
        reason = str(error).splitlines()[0] if str(error) else "unknown reason"
        raise ValueError(
            f"{path} is damaged or no ArrayRecord file ({reason}); {_REMEDY}."
        ) from error


RECORD_FORMATS: dict[str, RecordFormat] = {  # name as in dataset_info.json -> functions
    "tfrecord": RecordFormat(_tfrecord_scan, _tfrecord_read),
    "array_record": RecordFormat(_array_record_scan, _array_record_read),
}
