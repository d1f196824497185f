"""Folder of a TFDS version: where it is, its splits, and the files of each."""

import contextlib
import itertools
import os
import pathlib
import re
from typing import Any, NamedTuple

from vla_jax.data.readers.rlds.record_files import RECORD_FORMATS
from vla_jax.files import read_json

INFO, FEATURES = "dataset_info.json", "features.json"
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
_MAX_DEPTH = 3  # levels below the path: name / config / version
_MAX_FOLDERS = 300  # folders that are looked at
_MAX_ENTRIES = 20_000  # entries of each
_MAX_SHARDS = 10**6
_SHARD = re.compile(r"\.(tfrecord|array_record)-\d{5,}-of-\d{5,}$")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


class Split(NamedTuple):
    """One split of a data set."""

    name: str  # such as "train"
    paths: tuple[pathlib.Path, ...]  # files in order
    num_episodes: tuple[int, ...]  # of every file


class Version(NamedTuple):
    """One version of a data set, as its description gives it."""

    root: pathlib.Path  # folder that holds the files
    name: str  # of the data set, such as "bridge_dataset"
    file_format: str  # key of RECORD_FORMATS
    splits: tuple[Split, ...]


def version_folders(path: pathlib.Path) -> list[pathlib.Path]:
    """Returns the folders with a TFDS description at or below `path`, without descending far."""
    found, level, budget = [], [path], _MAX_FOLDERS
    for _ in range(_MAX_DEPTH + 1):
        looked_at, budget = level[:budget], budget - len(level[:budget])
        below = []
        for folder in looked_at:
            is_version, folders = _look_at(folder)
            found += [folder] * is_version
            below += [] if is_version else folders
        level = below
    return sorted(found)


def find_version(path: pathlib.Path) -> pathlib.Path:
    """Returns the folder of the newest version of the one data set at or below `path`.

    Raises:
      ValueError: there is no data set, or there are several.
    """
    found = version_folders(path)
    if not found:
        where = f"{path} is a file; give the folder" if path.is_file() else f"none below {path}"
        raise ValueError(
            f"an RLDS data set is a folder with {INFO}, {FEATURES} and record files, got {where}."
        )
    are_versions = all(_VERSION.fullmatch(folder.name) for folder in found)
    if len(found) > 1 and (len({folder.parent for folder in found}) > 1 or not are_versions):
        names = ", ".join(str(folder.relative_to(path)) for folder in found[:8])
        raise ValueError(f"{path} holds several data sets ({names}); give the path of one.")
    return max(found, key=_version_number)


def read_version(root: pathlib.Path) -> Version:
    """Reads the description of a version, `dataset_info.json`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a field is missing or has a wrong value.
    """
    path = root / INFO
    info = read_description(path)
    name = _field(path, info, "name", str)
    file_format = _field(path, info, "fileFormat", str) if "fileFormat" in info else "tfrecord"
    if file_format not in RECORD_FORMATS:
        raise ValueError(
            f"{path}: fileFormat must be one of {', '.join(RECORD_FORMATS)}, got "
            f"{file_format!r}; convert the data set with tfds.beam or write it again."
        )
    splits = tuple(
        _split(path, split, name, file_format) for split in _field(path, info, "splits", list)
    )
    names = [split.name for split in splits]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{path}: splits must have distinct names, got {names}; restore the file.")
    return Version(root, name, file_format, splits)


def read_description(path: pathlib.Path) -> dict[str, Any]:
    """Returns a JSON description of TFDS.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a JSON object.
    """
    try:
        return read_json(path, "the description that tensorflow-datasets writes")
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply; restore the file.") from error


def check_present(split: Split) -> None:
    """Checks that every file of a split that should hold episodes is there.

    Raises:
      FileNotFoundError: a file is missing.
    """
    used = [p for p, count in zip(split.paths, split.num_episodes, strict=True) if count]
    missing = [path for path in used if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{missing[0]} is missing ({len(missing)} of the {len(used)} files of split "
            f"'{split.name}'); download them, or choose another split."
        )


def _look_at(path: pathlib.Path) -> tuple[bool, list[pathlib.Path]]:
    """Returns whether a folder looks like that of a version, and some folders in it."""
    folders: list[pathlib.Path] = []
    has_info = False
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        # not a folder that can be read: not ours
        for entry in itertools.islice(entries, _MAX_ENTRIES):
            if entry.name == FEATURES or _SHARD.search(entry.name):
                return True, []
            has_info = has_info or entry.name == INFO
            if len(folders) < _MAX_FOLDERS and entry.name[0] != "." and entry.is_dir():
                folders.append(path / entry.name)
    return has_info and bool(_VERSION.fullmatch(path.name)), sorted(folders)


def _version_number(folder: pathlib.Path) -> tuple[int, ...]:
    is_version = _VERSION.fullmatch(folder.name)
    return tuple(int(part) for part in folder.name.split(".")) if is_version else (-1,)


def _split(path: pathlib.Path, split: Any, name: str, file_format: str) -> Split:
    """Returns a split from its entry in `dataset_info.json`."""
    if not isinstance(split, dict):
        raise ValueError(f"{path}: splits must hold objects, got {split!r}; restore the file.")
    split_name = _field(path, split, "name", str)
    if not re.fullmatch(r"\w[\w.-]*", split_name):
        raise ValueError(f"{path}: split name {split_name!r} is not a word; restore the file.")
    counts = tuple(
        _count(path, split_name, count) for count in _field(path, split, "shardLengths", list)
    )
    if not 0 < len(counts) <= _MAX_SHARDS:
        raise ValueError(
            f"{path}: split '{split_name}' must have 1 to {_MAX_SHARDS} shardLengths, got "
            f"{len(counts)}; restore the file."
        )
    template = split.get("filepathTemplate") or _TEMPLATE
    if not isinstance(template, str) or "/" in template or "\\" in template:
        raise ValueError(
            f"{path}: filepathTemplate of split '{split_name}' must be a file name such as "
            f"{_TEMPLATE}, got {template!r}; restore the file."
        )
    words = {"DATASET": name, "SPLIT": split_name, "FILEFORMAT": file_format}
    paths = tuple(
        path.parent / _file_name(template, words, shard, len(counts))
        for shard in range(len(counts))
    )
    return Split(split_name, paths, counts)


def _file_name(template: str, words: dict[str, str], shard: int, num_shards: int) -> str:
    shards = {
        "SHARD_X_OF_Y": f"{shard:05d}-of-{num_shards:05d}",
        "SHARD_INDEX": f"{shard:05d}",
        "NUM_SHARDS": f"{num_shards:05d}",
    }
    for key, value in {**words, **shards}.items():
        template = template.replace(f"{{{key}}}", value)
    return template


def _count(path: pathlib.Path, split: str, count: Any) -> int:
    """Returns a number of episodes; 64-bit integers are texts in protobuf's JSON."""
    text = str(count)
    if isinstance(count, bool | float) or not re.fullmatch(r"[0-9]{1,12}", text):
        raise ValueError(
            f"{path}: shardLengths of split '{split}' must be numbers of episodes, got {count!r}; "
            "restore the file."
        )
    return int(text)


def _field(path: pathlib.Path, data: dict[str, Any], key: str, kind: type) -> Any:
    value = data.get(key)
    if not isinstance(value, kind):
        got = "nothing" if key not in data else repr(value)[:80]
        names = {str: "a text", list: "a list", dict: "an object"}
        raise ValueError(f"{path}: {key} must be {names[kind]}, got {got}; restore the file.")
    return value
