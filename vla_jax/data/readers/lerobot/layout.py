"""Layout of a LeRobot v3.0 folder: paths, feature keys, and checks of `meta/info.json`.

A folder holds `meta/info.json`, `meta/stats.json`, `meta/tasks.parquet`, `meta/episodes/`,
`data/` and `videos/<camera>/`; the last three contain `chunk-000/file-000` files with many
episodes each.
"""

import difflib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vla_jax.data.dataset import CAMERAS, COLUMNS

VERSION = "v3.0"
INFO_PATH = "meta/info.json"
STATS_PATH = "meta/stats.json"
TASKS_PATH = "meta/tasks.parquet"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
INDEX_KEYS = ("timestamp", "frame_index", "episode_index", "index", "task_index")  # in every set
FEATURE_KEYS = {  # field -> the feature's key on disk
    "image_primary": "observation.images.primary",
    "image_wrist": "observation.images.wrist",
    "proprio": "observation.state",
    "environment_state": "observation.environment_state",
    "action": "action",
}


def read_info(root: pathlib.Path) -> dict[str, Any]:
    """Reads `meta/info.json` and checks its version.

    Raises:
      FileNotFoundError: the file is missing; the message names an interrupted recording, if any.
      ValueError: not JSON, another version, or a field is missing.
    """
    partial = root.with_name(root.name + ".tmp")
    if not (root / INFO_PATH).is_file():
        remedy = (
            f"its recording was interrupted ({partial} remains), record it again"
            if partial.exists()
            else "give the folder that holds meta/, data/ and videos/"
        )
        raise FileNotFoundError(
            f"data set {root} must hold {INFO_PATH}, which is missing; {remedy}."
        )
    try:
        info = json.loads((root / INFO_PATH).read_text())
    except ValueError as error:
        raise ValueError(f"{root / INFO_PATH} must be JSON: {error}; copy it again.") from error
    version = info.get("codebase_version")
    if version != VERSION:
        raise ValueError(
            f"data set {root} must have LeRobot's version {VERSION}, got {version}; convert it "
            "with lerobot's convert_dataset_v21_to_v30 script."
        )
    missing = {"fps", "features", "total_frames", "total_episodes"} - info.keys()
    if missing:
        raise ValueError(f"{root / INFO_PATH} must hold {sorted(missing)}; copy it again.")
    return info


def check_fps(root: pathlib.Path, info: Mapping[str, Any], expected: float | None) -> None:
    """Checks the frame rate (Hz) of a data set against an expected one, if given."""
    if expected is not None and not np.isclose(info["fps"], expected):
        raise ValueError(
            f"fps of {root} must be {expected:g} Hz (expected_fps), got {info['fps']:g} Hz; set "
            "expected_fps to the rate of the data or record it again."
        )


def feature_keys(
    root: pathlib.Path,
    info: Mapping[str, Any],
    chosen: Mapping[str, str] | None,
    cameras: Sequence[str] | None,
    columns: Sequence[str] | None,
) -> dict[str, str]:
    """Returns field -> key on disk for the fields to read; every key exists.

    Args:
      root: folder, for messages.
      info: from `read_info`.
      chosen: field -> key on disk, where it differs from `FEATURE_KEYS`.
      cameras: image fields to read; None means all that have a key.
      columns: numeric fields to read besides "action"; None means all that have a key.

    Returns:
      Field -> key; always contains "action".

    Raises:
      ValueError: an unknown field or key (the message suggests the nearest known one); images
        where numbers are expected, or the reverse.
    """
    features = info["features"]
    chosen = chosen or {}
    known = {**FEATURE_KEYS, **chosen}
    requested = [*(cameras if cameras is not None else CAMERAS), "action"]
    requested += columns if columns is not None else COLUMNS
    for name in (*chosen, *(cameras or ()), *(columns or ()), "action"):
        if name not in FEATURE_KEYS:
            raise ValueError(f"{_unknown('field', name, FEATURE_KEYS)}.")
        if known[name] not in features:
            raise ValueError(
                f"{_unknown('feature', known[name], features)} in {root}; name the key of "
                f"{name} in feature_keys."
            )
    keys = {name: key for name, key in known.items() if name in requested and key in features}
    for name, key in keys.items():
        expected = "video" if name in CAMERAS else "float32"
        stored = features[key]["dtype"]
        if (stored == "video") != (name in CAMERAS) or stored in ("image", "string"):
            raise ValueError(
                f"feature {key!r} must be stored as {expected} to serve as {name}, got {stored}; "
                "choose another key or convert the data set."
            )
    return keys


def dimension_names(info: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """Returns the names of a feature's dimensions: a list, or lists in groups such as "motors"."""
    names = info["features"][key].get("names") or ()
    if isinstance(names, Mapping):
        names = [name for group in names.values() for name in group]
    return tuple(str(name) for name in names)


def file_path(
    info: Mapping[str, Any], field: str, default: str, chunk: int, file: int, key: str = ""
) -> str:
    """Returns the path of a data or video file in the data set, from the template in `info`."""
    template = info.get(field) or default
    return template.format(video_key=key, chunk_index=int(chunk), file_index=int(file))


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0)
    hint = f", did you mean {near[0]!r}" if near else ""
    return f"{kind} must be one of {sorted(known)}, got {name!r}{hint}"
