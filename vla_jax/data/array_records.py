"""Files of ArrayRecord: random access to records, each with a hash that reading checks.

Source: github.com/google/array_record.
"""

import errno
import os
import pathlib
from collections.abc import Iterable
from typing import Any

# One record per chunk, as random access needs; a single chunk waits in memory to be written.
_WRITING = "group_size:1,uncompressed,max_parallelism:1"
_READING = "readahead_buffer_size:0,max_parallelism:0"
_BUFFER = 2**15  # bytes that an open file buffers
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def open_reader(path: pathlib.Path) -> Any:
    """Returns an `ArrayRecordReader` without read-ahead; safe to share by threads.

    Raises:
      ImportError: array_record is missing.
      RuntimeError: the file is missing or damaged.
    """
    return _package().ArrayRecordReader(str(path), _READING, file_reader_buffer_size=_BUFFER)


def write_records(path: pathlib.Path, records: Iterable[bytes]) -> int:
    """Writes a file of records.

    Args:
      path: file to write.
      records: in order.

    Returns:
      The number of records.

    Raises:
      ImportError: array_record is missing.
      OSError: the disk is full.
    """
    writer, count = _package().ArrayRecordWriter(str(path), _WRITING), 0
    try:
        for record in records:
            writer.write(record)
            count += 1
        writer.close()
    except RuntimeError as error:
        raise _disk_error(path, str(error)) from error
    return count


def _disk_error(path: pathlib.Path, message: str) -> OSError:
    """Returns the error of the system that the package has put into a text."""
    for code in _DISK_ERRORS:
        if os.strerror(code) in message:
            return OSError(code, os.strerror(code), str(path))
    return OSError(f"{path} could not be written ({message}); choose another folder.")


def _package() -> Any:
    try:
        from array_record.python import (
            array_record_module,  # pyright: ignore[reportAttributeAccessIssue]
        )
    except ImportError as error:
        raise ImportError(
            "files of ArrayRecord need array_record; install the extra: pip install 'vla-jax[data]'"
        ) from error
    return array_record_module
