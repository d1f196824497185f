"""Files that are complete or absent: atomic writes, JSON, and JSON lines.

A program that is killed while it writes leaves the previous file as it was. The next program on the
same host that writes the file deletes what was left (`NAME.HOST.PID.part`, beside the target).
"""

import contextlib
import errno
import glob
import json
import os
import pathlib
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vla_jax import processes

Path = str | os.PathLike[str]
_NOT_WRITTEN = "could not be written"
_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "allow larger files (ulimit -f)",
    errno.EROFS: "choose another folder",
    errno.EACCES: "choose another folder, or change its permissions",
    errno.EPERM: "choose another folder, or change its permissions",
}


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Names the file and a remedy in the error of a full disk, or of a folder without permission.

    Args:
      path: file or folder that the block writes.

    Raises:
      OSError: the same error with one sentence; all others are unchanged.
    """
    try:
        yield
    except OSError as error:
        is_here = not isinstance(error.filename, str) or _related(error.filename, path)
        if error.errno not in _REMEDIES or not is_here or _NOT_WRITTEN in str(error):
            raise
        reason, remedy = os.strerror(error.errno), _REMEDIES[error.errno]
        sentence = f"{path} {_NOT_WRITTEN} ({reason}); {remedy}, and run the same command again."
        raise OSError(error.errno, sentence) from error


def _related(first: Path, second: Path) -> bool:
    """Returns True if one of two paths is in the folder of the other, or in one below it."""
    folders = [os.path.dirname(os.path.abspath(path)) for path in (first, second)]
    return os.path.commonpath(folders) in folders


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path, which replaces `path` when the block ends without an error.

    The block creates a file or a folder at the temporary path. After an error it is deleted, and
    `path` is unchanged. Readers never see a partial file; an existing folder is deleted just
    before the new one takes its name.

    Args:
      path: file or folder to write; its parent folder is created if necessary.

    Raises:
      OSError: the parent folder cannot be created, or the replacement fails.
    """
    path = pathlib.Path(path)
    with named_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = _part(path)
        try:
            yield part
            if path.is_dir():
                shutil.rmtree(path)
            os.replace(part, path)
        finally:
            delete(part)


def _part(path: pathlib.Path) -> pathlib.Path:
    """Returns the temporary path of this process; deletes those of processes that have ended."""
    prefix = f"{path.name}.{_host()}."
    part = path.with_name(f"{prefix}{os.getpid()}.part")
    for left in path.parent.glob(f"{glob.escape(prefix)}*.part"):
        pid = left.name.removeprefix(prefix).removesuffix(".part")
        if left == part or (pid.isdecimal() and processes.start_of(int(pid)) is None):
            delete(left)
    return part


def write_json(path: Path, data: Any) -> None:
    """Writes `data` as indented JSON; the file is complete or unchanged.

    Args:
      path: file to write; its parent folder is created if necessary.
      data: what `json.dumps` accepts.

    Raises:
      TypeError: `data` contains something that JSON cannot hold.
      OSError: the file cannot be written.
    """
    text = json.dumps(data, indent=2) + "\n"
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def read_json(path: Path, content: str) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Args:
      path: file to read.
      content: what the file should hold, as it appears in the error messages.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not JSON, or holds something other than an object.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected {content} as JSON; check the folder.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # invalid JSON or invalid UTF-8, nested brackets
        raise ValueError(f"{path} is not valid JSON ({error}); restore the file.") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(data).__name__}; restore it.")
    return data


def crc32_of_file(path: Path) -> int:
    """Returns the CRC-32 of a file's content.

    Raises:
      OSError: the file cannot be read.
    """
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def write_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object per line; the file is complete or unchanged.

    Args:
      path: file to write; its parent folder is created if necessary.
      records: the lines.
    """
    text = "".join(json.dumps(record) + "\n" for record in records)
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def check_space(path: Path, num_bytes: int, remedy: str) -> None:
    """Raises an OSError if a disk is too small for what is to be written.

    Args:
      path: file or folder to write; its parents need not exist yet.
      num_bytes: that it will take.
      remedy: what helps besides free space.
    """
    path = pathlib.Path(path).absolute()
    existing = next(each for each in (path, *path.parents) if each.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise OSError(
            errno.ENOSPC,
            f"{path} needs {num_bytes / 1e6:,.1f} MB, but its disk has {free / 1e6:,.1f} MB left; "
            f"free some space, or {remedy}.",
        )


def append_json_line(path: Path, record: Mapping[str, Any]) -> None:
    """Appends one JSON object as a line, which is in the file when this returns.

    Text after the last line feed is deleted: a killed program did not finish that line.

    Args:
      path: file to append to; created if necessary, in an existing folder.
      record: the line.
    """
    with named_errors(path), open(path, "a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        if file.read(1) not in (b"", b"\n"):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(record).encode() + b"\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a file with one JSON object per line; none if the file is missing.

    Text after the last line feed is ignored: a killed program did not finish that line.

    Args:
      path: file to read.

    Raises:
      ValueError: a line is not a JSON object.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [_read_line(path, number, line) for number, line in enumerate(lines, 1)]


def _read_line(path: pathlib.Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode())
        reason = f"expected an object, got {type(record).__name__}"
    except (ValueError, RecursionError) as error:
        record, reason = None, str(error)
    if not isinstance(record, dict):
        raise ValueError(f"{path} has a damaged line {number} ({reason}); delete that line.")
    return record


def delete_folder(path: Path) -> None:
    """Deletes a folder with all it holds, if it exists.

    Args:
      path: the folder.

    Raises:
      OSError: a part of it cannot be deleted.
    """
    with named_errors(path):
        try:
            shutil.rmtree(path)
        except FileNotFoundError:  # that of the folder, or another process has deleted a part
            if os.path.lexists(path):
                raise


def _host() -> str:
    """Returns a name of all processes that this one sees; containers may share a host's name."""
    host, namespace = processes.place()
    return f"{host}{re.sub(r'[^0-9]', '', namespace)}"


def delete(path: pathlib.Path) -> None:
    """Deletes a file, or a folder with all it holds; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
