"""Shards of a cache: folders that are complete or absent, with the checksums of their files.

A shard is the folder `shard_00000`; its `files.json` has size and CRC-32 of each of its files, and
its place: the name of the cache's folder, which has the hash of what the cache depends on, the
shard and its frames. A shard in the place of another one is refused: its frames are those of
another moment, or of other data.
"""

import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from vla_jax.files import crc32_of_file, read_json, write_json

_INDEX, _PLACE = "files.json", "place"


def shard_folder(folder: pathlib.Path, shard: int) -> pathlib.Path:
    """Returns the folder of a shard."""
    return folder / f"shard_{shard:05d}"


def missing(folder: pathlib.Path, num_shards: int) -> list[int]:
    """Returns the shards that are not written yet.

    Args:
      folder: folder of the shards, which may be absent.
      num_shards: of the whole cache.
    """
    return [shard for shard in range(num_shards) if not shard_folder(folder, shard).exists()]


def write_index(
    part: pathlib.Path, path: pathlib.Path, frames: range, checksums: Mapping[str, int]
) -> None:
    """Writes place of a shard, and sizes and checksums of its files.

    Args:
      part: folder of the files.
      path: folder of the shard, whose name `part` takes.
      frames: of the shard.
      checksums: name of each file -> CRC-32.
    """
    index: dict[str, Any] = {_PLACE: _place(path, frames)}
    index |= {
        name: {"bytes": (part / name).stat().st_size, "crc32": checksum}
        for name, checksum in checksums.items()
    }
    write_json(part / _INDEX, index)


def _place(path: pathlib.Path, frames: range) -> str:
    return f"{path.parent.name}/{path.name}, frames {frames.start} to {frames.stop - 1}"


def check_files(
    path: pathlib.Path, frames: range, names: Sequence[str], *, checksums: bool
) -> None:
    """Raises an error if a file of a shard is not the one that was written.

    A warning says so if the shard is of an earlier version, whose place is unknown.

    Args:
      path: folder of the shard.
      frames: that it must hold.
      names: its files.
      checksums: whether to read the files and compare their checksums, not only their sizes.

    Raises:
      ValueError: the shard was written in another place; a file has another size or checksum; the
        index is damaged.
      OSError, KeyError, TypeError: a file is missing; the index is damaged.
    """
    index = read_json(path / _INDEX, "sizes and checksums")
    place = _place(path, frames)
    if _PLACE not in index:
        warnings.warn(
            f"{path.parent} was written by an earlier version, without the places of its shards: "
            "shards that were exchanged are not noticed; delete the folder to write it again",
            stacklevel=2,
        )
    elif index[_PLACE] != place:
        raise ValueError(f"it was written as {index[_PLACE]}, instead of {place}")
    for name in names:
        found, expected = (path / name).stat().st_size, index[name]["bytes"]
        if found != expected:
            raise ValueError(f"{name} has {found} bytes instead of {expected}")
        if checksums and crc32_of_file(path / name) != index[name]["crc32"]:
            raise ValueError(f"the checksum of {name} differs")
