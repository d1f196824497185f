"""Shards of a cache: folders that are complete or absent, with the checksums of their files.

A shard is the folder `shard_00000`; its `files.json` has size and CRC-32 of each of its files.
"""

import pathlib
from collections.abc import Mapping, Sequence

from vla_jax.files import crc32_of_file, read_json, write_json

_INDEX = "files.json"


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


def write_index(part: pathlib.Path, checksums: Mapping[str, int]) -> None:
    """Writes sizes and checksums of the files of a shard.

    Args:
      part: folder of the files.
      checksums: name of each file -> CRC-32.
    """
    index = {
        name: {"bytes": (part / name).stat().st_size, "crc32": checksum}
        for name, checksum in checksums.items()
    }
    write_json(part / _INDEX, index)


def check_files(path: pathlib.Path, names: Sequence[str], *, checksums: bool) -> None:
    """Raises an error if a file of a shard is not the one that was written.

    Args:
      path: folder of the shard.
      names: its files.
      checksums: whether to read the files and compare their checksums, not only their sizes.

    Raises:
      ValueError: a file has another size or checksum; the index is damaged.
      OSError, KeyError, TypeError: a file is missing; the index is damaged.
    """
    index = read_json(path / _INDEX, "sizes and checksums")
    for name in names:
        found, expected = (path / name).stat().st_size, index[name]["bytes"]
        if found != expected:
            raise ValueError(f"{name} has {found} bytes instead of {expected}")
        if checksums and crc32_of_file(path / name) != index[name]["crc32"]:
            raise ValueError(f"the checksum of {name} differs")
