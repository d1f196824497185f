"""Index of a split: place and number of steps of every episode; built once and kept.

It is kept beside the record files, or in the user's cache folder where those are read-only.
"""

import contextlib
import os
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from vla_jax.data.dataset import digest
from vla_jax.data.readers.rlds.record_files import RECORD_FORMATS, RecordFormat
from vla_jax.data.readers.rlds.rlds_layout import Split, Version, check_present
from vla_jax.data.readers.rlds.tf_example import count, find_feature
from vla_jax.files import replacing

_MIN_EPISODES = 64  # the index of a smaller split is not kept
_MIN_BYTES = 2**26  # nor that of smaller files
_MAX_STEPS_PER_BYTE = 2**10  # of files that may be compressed


class RecordIndex(NamedTuple):
    """Episodes of a split, in the order of the files."""

    shards: np.ndarray  # [E] int32, number of the file
    positions: np.ndarray  # [E] int64, position of the record in its file
    lengths: np.ndarray  # [E] int64, steps


def read_index(version: Version, split: Split, step_sizes: Mapping[str, int]) -> RecordIndex:
    """Returns the index of a split; builds it where none is kept, or its files have changed.

    Args:
      version: description of the data set.
      split: one of its splits.
      step_sizes: keys with a fixed number of values per step -> that number; cheapest first.

    Raises:
      FileNotFoundError: a file of the split is missing.
      ValueError: a file is damaged, or does not hold the declared number of episodes.
    """
    check_present(split)
    used = [
        (shard, path)
        for shard, path in enumerate(split.paths)
        if split.num_episodes[shard] or path.is_file()
    ]
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for _, path in used]
    state = digest(sorted(stats), split.num_episodes, list(step_sizes.items()))
    for path in _index_paths(version, split):
        index = _load(path, state, split, sum(size for _, size, _ in stats))
        if index is not None:
            return index
    index = _build(version, split, used, step_sizes)
    if len(index.lengths) >= _MIN_EPISODES or sum(size for _, size, _ in stats) >= _MIN_BYTES:
        _save(version, split, index, state)
    return index


def _build(
    version: Version,
    split: Split,
    used: list[tuple[int, pathlib.Path]],
    step_sizes: Mapping[str, int],
) -> RecordIndex:
    """Scans the files; of each record only what is needed to count its steps."""
    record_format = RECORD_FORMATS[version.file_format]
    shards, positions, lengths = [], [], []
    for shard, path in used:
        places, steps = _scan(record_format, path, step_sizes)
        if len(places) != split.num_episodes[shard]:
            raise ValueError(
                f"{path} holds {len(places)} episodes, expected {split.num_episodes[shard]} as in "
                f"dataset_info.json (shardLengths of split '{split.name}'); download the file "
                "again, or restore the description."
            )
        shards.append(np.full(len(places), shard, np.int32))
        positions.append(np.array(places, np.int64))
        lengths.append(np.array(steps, np.int64))
    empty = np.empty(0, np.int64)
    return RecordIndex(
        np.concatenate([empty.astype(np.int32), *shards]),
        np.concatenate([empty, *positions]),
        np.concatenate([empty, *lengths]),
    )


def _scan(
    record_format: RecordFormat, path: pathlib.Path, step_sizes: Mapping[str, int]
) -> tuple[list[int], list[int]]:
    """Returns position and number of steps of every record of a file."""
    positions: list[int] = []
    steps: list[int] = []
    wanted = {f"steps/{key}".encode(): size for key, size in step_sizes.items()}
    for position, data in record_format.scan(path):
        try:
            found = find_feature(data, wanted)
            total = 0 if found is None else count(data, found[1])
            size = 1 if found is None else wanted[found[0].encode()]
        except ValueError as error:
            raise ValueError(
                f"{path}: record {len(positions)} is no tf.train.Example ({error}); download or "
                "write the file again."
            ) from error
        if total % size:
            raise ValueError(
                f"{path}: {found and found[0]} of record {len(positions)} must have {size} values "
                f"per step, got {total} values; write the file again."
            )
        positions.append(position)
        steps.append(total // size)
    return positions, steps


def _index_paths(version: Version, split: Split) -> list[pathlib.Path]:
    """Returns the places of the kept index, best first."""
    caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
    return [
        version.root / f".{split.name}.index.npz",
        caches / "vla_jax" / "rlds" / f"{digest(str(version.root.resolve()), split.name)}.npz",
    ]


def _load(path: pathlib.Path, state: str, split: Split, num_bytes: int) -> RecordIndex | None:
    """Returns a kept index; None if there is none, it is damaged, or it is of other files."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            if str(arrays["state"]) != state:
                return None
            index = RecordIndex(*(arrays[name] for name in RecordIndex._fields))
    except Exception:  # whatever is wrong with it, the index is made again
        return None
    dtypes = [np.int32, np.int64, np.int64]
    is_whole = all(
        array.shape == (sum(split.num_episodes),) and array.dtype == dtype
        for array, dtype in zip(index, dtypes, strict=True)
    )
    limits = [len(split.paths) - 1, 2**62, _MAX_STEPS_PER_BYTE * num_bytes]
    is_valid = is_whole and all(
        not array.size or (array.min() >= 0 and array.max() <= limit)
        for array, limit in zip(index, limits, strict=True)
    )
    return index if is_valid else None


def _save(version: Version, split: Split, index: RecordIndex, state: str) -> None:
    """Keeps the index in the first folder that can be written; not at all if there is none."""
    for path in _index_paths(version, split):
        with contextlib.suppress(OSError):  # the next place; without one it costs time only
            with replacing(path) as part, open(part, "wb") as file:
                np.savez(file, state=np.array(state), **index._asdict())
            return
