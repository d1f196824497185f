"""Size of a data set on disk, and the version that its description states."""

import json
import os
import pathlib
from typing import NamedTuple


class Usage(NamedTuple):
    """Files of one type."""

    num_files: int
    num_bytes: int


def disk_usage(path: pathlib.Path) -> dict[str, Usage]:
    """Returns file suffix ("" = none) -> number and bytes of the files, the largest first."""
    usage: dict[str, Usage] = {}
    for file in [path] if path.is_file() else _files(path):
        suffix = pathlib.Path(file).suffix
        suffix = "shards" if "-of-" in suffix else suffix  # of TFDS: data.tfrecord-00000-of-00002
        num_files, num_bytes = usage.get(suffix, Usage(0, 0))
        usage[suffix] = Usage(num_files + 1, num_bytes + os.stat(file).st_size)
    return dict(sorted(usage.items(), key=lambda item: -item[1].num_bytes))


def stated_version(path: pathlib.Path) -> str:
    """Returns the version in the data set's description, "" if there is none.

    LeRobot states that of the format in `meta/info.json`, TFDS that of the data in
    `dataset_info.json`.
    """
    for name, key in (("meta/info.json", "codebase_version"), ("dataset_info.json", "version")):
        for file in [
            path / name,
            *sorted(path.glob(f"*/{name}")),
            *sorted(path.glob(f"*/*/{name}")),
        ]:
            try:
                version = json.loads(file.read_text(encoding="utf-8")).get(key)
            except (OSError, ValueError, AttributeError):  # shown only; the reader refuses damage
                continue
            if isinstance(version, str):
                return version
    return ""


def _files(root: pathlib.Path) -> list[str]:
    """Returns the files below a folder, without hidden folders such as caches of ours."""
    found = []
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if not name.startswith(".")]
        found += [os.path.join(folder, file) for file in files]
    return [file for file in found if os.path.isfile(file)]
