"""Hashes of large files, remembered as long as a file's size and time of change stay the same."""

import contextlib
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

from vla_jax.files import read_json, write_json


def hash_files(files: Mapping[str, pathlib.Path], memory: pathlib.Path) -> str:
    """Returns the SHA-256 of names and contents, in hexadecimal digits.

    Args:
      files: name -> path; where the files are does not matter.
      memory: JSON file of hashes computed before; written if there are new ones.
    """
    known = _read(memory)
    found = {str(path.resolve()): _entry(path, known) for path in files.values()}
    if not found.items() <= known.items():
        with contextlib.suppress(OSError):  # a folder that is read-only costs time only
            write_json(memory, known | found)
    contents = {name: found[str(path.resolve())]["sha256"] for name, path in files.items()}
    return hashlib.sha256(repr(sorted(contents.items())).encode()).hexdigest()


def _entry(path: pathlib.Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """Returns size, time of change and hash of a file."""
    status = path.stat()
    state = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    entry = known.get(str(path.resolve()), {})
    if {**entry, **state} == entry and "sha256" in entry:
        return entry
    with path.open("rb") as file:
        return {**state, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _read(memory: pathlib.Path) -> dict[str, Any]:
    try:
        return read_json(memory, "hashes of files")
    except (FileNotFoundError, ValueError):  # hashes are computed again
        return {}
