"""Files with the groups `data/demo_<i>`: what robomimic, LIBERO and Isaac Lab share."""

import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vla_jax.data.lazy_lengths import LazyLengths
from vla_jax.data.raw import RawDataset
from vla_jax.data.readers.hdf5.hdf5_files import OpenFiles, hdf5_paths, import_h5py
from vla_jax.data.readers.hdf5.hdf5_objects import (
    MAX_LENGTH,
    attribute,
    by_number,
    child,
    names_of,
    num_rows,
    read_all,
    short_list,
    text,
)
from vla_jax.data.readers.hdf5.stored_episodes import (
    ONE_DATA_SET_PER_KEY,
    EpisodeIndex,
    EpisodePlace,
    make_source,
)


def open_demos(
    path: pathlib.Path,
    kind: str,
    *,
    split: str | None,
    numbered: bool,
    skip: tuple[str, ...] = (),
    instruction: Callable[[Any, pathlib.Path], str] | None = None,
    rate: Callable[[dict[str, Any]], Any],
    usual_fps: float | None,
) -> RawDataset:
    """Opens the raw view of files with the groups `data/demo_<i>`.

    Args:
      path: file or folder.
      kind: key of READERS.
      split: filter key, a list of demos in `mask/<split>`; None means all demos.
      numbered: names begin with the index of the file: `0/demo_0`.
      skip: children of a demo that are not per step.
      instruction: returns the text of the demos of a file, from its group `data`; None = "".
      rate: returns the steps per second from the JSON object `env_args`, None if not stated.
      usual_fps: steps per second where `env_args` does not state them, Hz.

    Raises:
      FileNotFoundError: there is no HDF5 file.
      ValueError: damaged files; unknown split; no demos.
      ImportError: h5py is missing.
    """
    files = hdf5_paths(path)
    if not files:
        raise FileNotFoundError(f"{path} must hold HDF5 files (.hdf5, .h5), got none.")
    opened, places, rates = OpenFiles(), [], []
    for number, file in enumerate(files):
        root = opened.get(file)
        data = child(root, "data", file)
        names = _demos(root, data, file, split)
        prefix = f"{number}/" if numbered else ""
        words = instruction(data, file) if instruction else ""
        places += [EpisodePlace(prefix + name, number, f"data/{name}", words) for name in names]
        rates.append(_fps(data, file, rate) or usual_fps)
    if not places:
        raise ValueError(f"{path} must hold at least one demo, got none; record some first.")
    if len(set(rates)) > 1:
        raise ValueError(
            f"{path}: all files must have one rate, got {sorted(map(str, set(rates)))} Hz; read "
            "them as several data sets."
        )
    lengths = functools.partial(_lengths, tuple(files), places, opened)
    index = EpisodeIndex(
        kind, tuple(files), places, LazyLengths(len(places), lengths), rates[0], "actions", skip,
        opened,
    )  # fmt: skip
    return make_source(path, index, ONE_DATA_SET_PER_KEY)


def _demos(root: Any, data: Any, file: pathlib.Path, split: str | None) -> list[str]:
    """Returns the names of the demos to read, sorted by number as robomimic sorts them."""
    names = by_number(names_of(data, file), "demo_", file, "data")
    if split is None:
        return names
    has_mask = "mask" in names_of(root, file)
    keys = names_of(child(root, "mask", file), file) if has_mask else []
    if split not in keys:
        raise ValueError(
            f"{file}: split must be a filter key of the file ({short_list(keys) or 'it has none'})"
            f", got {split!r}; choose one of these or none."
        )
    mask = child(root, f"mask/{split}", file)
    chosen = [str(name) for name in np.atleast_1d(read_all(mask, file)).astype(str).reshape(-1)]
    known = set(names)
    if not known.issuperset(chosen) or len(set(chosen)) != len(chosen):
        raise ValueError(
            f"{file}: mask/{split} must list demos of the file, each once, got "
            f"{short_list(sorted(set(chosen) - known) or chosen)}; correct the list."
        )
    return by_number(chosen, "demo_", file, f"mask/{split}")


def _lengths(
    files: Sequence[pathlib.Path],
    places: Sequence[EpisodePlace],
    opened: OpenFiles,
    episodes: Sequence[int],
) -> np.ndarray:
    """Returns the number of steps of some demos; 0 for a demo that cannot be read.

    It is the attribute `num_samples`, as for robomimic, else the number of actions; whether these
    agree is checked when the demo is read. Demos are visited in the order in which HDF5 stores
    their names.
    """
    lengths = np.zeros(len(episodes), np.int64)
    order = sorted(range(len(episodes)), key=lambda row: places[episodes[row]][1:3])
    for number, rows in itertools.groupby(order, key=lambda row: places[episodes[row]].file):
        try:
            data = child(opened.get(files[number]), "data", files[number])
        except (OSError, ValueError):  # reading these demos raises the error
            continue
        for row in rows:
            name = places[episodes[row]].group.removeprefix("data/")
            lengths[row] = _length(data, name, files[number])
    return lengths


def _length(data: Any, name: str, file: pathlib.Path) -> int:
    try:
        length = _num_samples(data.id, name.encode()) or num_rows(data, f"{name}/actions", file)
    except ValueError:  # reading the demo raises the error
        return 0
    return length if 0 < length < MAX_LENGTH else 0


def _num_samples(data: Any, name: bytes) -> int:
    """Returns the attribute `num_samples` of a demo in a group; 0 if missing, or no integer.

    The low-level calls take 25 µs per demo. A link that may lead to another file is not followed.
    """
    h5py = import_h5py()
    try:
        if data.links.get_info(name).type != h5py.h5l.TYPE_HARD:
            return 0
        found = h5py.h5a.open(data, b"num_samples", obj_name=name)
        value = np.zeros(8, np.int64)  # h5py writes whatever number of values is stored
        if found.get_storage_size() <= 8:
            found.read(value, mtype=h5py.h5t.NATIVE_INT64)
        return int(value[0])
    except (OSError, RuntimeError, LookupError, ValueError, TypeError):
        # the actions are counted instead
        return 0


def env_args(data: Any, file: pathlib.Path) -> dict[str, Any]:
    """Returns the JSON object in the attribute `env_args` of the group `data`; {} if missing."""
    return json_attribute(data, "env_args", file) or {}


def json_attribute(data: Any, name: str, file: pathlib.Path) -> dict[str, Any] | None:
    """Returns the JSON object in an attribute; None if the attribute is missing.

    Raises:
      ValueError: the attribute is not a JSON object.
    """
    value = attribute(data, name, file)
    if value is None:
        return None
    place = f"the attribute {name} of {data.name}"
    try:
        found = json.loads(text(value, file, place))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file}: {place} must be JSON, got {value!r:.60}; restore or delete it."
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: {place} must be a JSON object, got {found!r:.60}; restore it.")
    return found


def _fps(data: Any, file: pathlib.Path, rate: Callable[[dict[str, Any]], Any]) -> float | None:
    value = rate(env_args(data, file))
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < 1e6:
        raise ValueError(
            f"{file}: the rate in the attribute env_args of data must be a positive number of Hz, "
            f"got {value!r:.40}; correct it."
        )
    return float(value)


def member(value: Any, *keys: str) -> Any:
    """Returns an entry of nested JSON objects; None if a level is missing or no object."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
