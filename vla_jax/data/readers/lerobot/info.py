"""Description of a LeRobot data set: `meta/info.json` of the versions 2.0, 2.1 and 3.0, checked."""

import json
import math
import pathlib
import string
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import numpy as np

from vla_jax.data.raw import Feature
from vla_jax.data.readers.lerobot import layout

VERSIONS = ("v2.0", "v2.1", "v3.0")
PLACEHOLDERS = ("chunk_index", "file_index", "episode_chunk", "episode_index", "video_key")
MAX_JSON = 2**26  # bytes of a JSON file; lerobot writes a few kB
MAX_NAME = 200  # bytes of a part of a path; file systems allow 255
MAX_NUMBERS = 2**28  # numbers of one step of a feature
DTYPES = {  # dtype in info.json -> dtype that lerobot's reader returns
    **dict.fromkeys(("float16", "float32", "float64"), "float32"),
    **dict.fromkeys(("int8", "int16", "int32", "int64"), "int64"),
    **dict.fromkeys(("uint8", "uint16", "uint32", "uint64"), "int64"),
    "bool": "bool",
    "string": "str",
}
V2_DATA = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
V2_VIDEO = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
REPAIR = "copy the data set again or correct the file"


class Info(NamedTuple):
    """Checked content of `meta/info.json`."""

    root: pathlib.Path  # folder of the data set
    version: str  # one of VERSIONS
    fps: float  # Hz
    robot_type: str  # "" where not stated
    columns: Mapping[str, Feature]  # numbers and texts
    images: Mapping[str, Feature]  # cameras
    videos: tuple[str, ...]  # cameras stored as videos, the others lie in Parquet
    data_path: str  # template of the Parquet files
    video_path: str  # template of the videos
    chunks_size: int  # episodes per folder (v2)
    splits: Mapping[str, slice]  # name -> positions of episodes
    num_episodes: int | None  # None where not stated
    num_frames: int | None

    @property
    def has_shared_files(self) -> bool:
        """True in v3, where a file holds many episodes; False in v2, where it holds one."""
        return self.version.startswith("v3")


def read_info(root: pathlib.Path) -> Info:
    """Reads `meta/info.json`.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: not JSON, an unknown version, a missing or wrong field.
    """
    path = root / layout.INFO_PATH
    if not path.is_file():
        raise FileNotFoundError(
            f"data set {root} must hold {layout.INFO_PATH}, which is missing; give the folder that "
            "holds meta/, data/ and videos/."
        )
    data = read_json(path)
    if data.get("codebase_version") not in VERSIONS:
        got = data.get("codebase_version")
        wrong(
            path, "codebase_version", f"one of {', '.join(VERSIONS)}", got, "convert the data set"
        )
    is_v3, robot = data["codebase_version"].startswith("v3"), data.get("robot_type")
    features = {key: _feature(path, key, value) for key, value in _features(path, data).items()}
    info = Info(
        root=root,
        version=data["codebase_version"],
        fps=_fps(path, data.get("fps")),
        robot_type=robot if isinstance(robot, str) else "",
        columns={k: f for k, f in features.items() if f.dtype not in ("image", "video")},
        images={
            k: f._replace(dtype="uint8")
            for k, f in features.items()
            if f.dtype in ("image", "video")
        },
        videos=tuple(k for k, f in features.items() if f.dtype == "video"),
        data_path=_template(path, data, "data_path", layout.DATA_PATH if is_v3 else V2_DATA),
        video_path=_template(path, data, "video_path", layout.VIDEO_PATH if is_v3 else V2_VIDEO),
        chunks_size=_count(path, data, "chunks_size", 1) or 1000,
        splits=_splits(path, data.get("splits")),
        num_episodes=_count(path, data, "total_episodes", 0),
        num_frames=_count(path, data, "total_frames", 0),
    )
    for key in info.videos:
        _check_inside(path, "video_path", info.video_path.replace("{video_key}", key))
    return info


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object; errors are one sentence."""
    try:
        size = path.stat().st_size
        data = json.loads(path.read_text(encoding="utf-8")) if size <= MAX_JSON else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got {str(error)[:100]}; {REPAIR}.") from error
    if not isinstance(data, dict):
        got = type(data).__name__ if size <= MAX_JSON else f"{size} bytes"
        raise ValueError(f"{path} must be a JSON object, got {got}; {REPAIR}.")
    return data


def wrong(
    path: pathlib.Path, field: str, expected: str, got: object, remedy: str = REPAIR
) -> NoReturn:
    """Raises the error of a field with a wrong value."""
    text = repr(got)
    text = text if len(text) <= 100 else f"{text[:97]}..."
    raise ValueError(f"{field} in {path} must be {expected}, got {text}; {remedy}.")


def is_integer(value: object, least: int = 0) -> bool:
    """Returns True for an integer in [`least`, 2⁶²)."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**62


def _fps(path: pathlib.Path, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1e6:
        wrong(path, "fps", "a positive number of frames per second", value)
    return float(value)


def _count(path: pathlib.Path, data: Mapping[str, Any], field: str, least: int) -> int | None:
    value = data.get(field)
    if value is not None and not is_integer(value, least):
        wrong(path, field, f"an integer of at least {least}", value)
    return value


def _splits(path: pathlib.Path, value: object) -> dict[str, slice]:
    """Returns the parts of the data set, given as {"train": "0:50"}."""
    splits = {}
    for name, text in (value if isinstance(value, dict) else {}).items():
        bounds = text.split(":") if isinstance(text, str) else []
        if len(bounds) != 2 or not all(b.isascii() and b.isdigit() and len(b) < 16 for b in bounds):
            wrong(path, f"splits[{name!r}]", "two numbers such as '0:50'", text)
        splits[name] = slice(int(bounds[0]), int(bounds[1]))
    return splits


def _features(path: pathlib.Path, data: Mapping[str, Any]) -> dict[str, Any]:
    features: object = data.get("features")
    if not isinstance(features, dict) or not features:
        wrong(path, "features", "an object with the type of every column", features)
    return features


def _feature(path: pathlib.Path, key: str, value: object) -> Feature:
    """Returns the type of a feature; dtype "image" or "video" for cameras."""
    field = f"features[{key!r}]"
    if not isinstance(value, dict):
        wrong(path, field, "an object with dtype and shape", value)
    dtype, shape = value.get("dtype"), value.get("shape")
    is_camera = dtype in ("image", "video")
    if not isinstance(dtype, str) or not (is_camera or dtype in DTYPES):
        known = ", ".join(["image", "video", *DTYPES])
        wrong(path, f"{field}['dtype']", f"one of {known}", dtype)
    if not isinstance(shape, list) or not all(is_integer(size) for size in shape):
        wrong(path, f"{field}['shape']", "a list of sizes", shape)
    if len(shape) > 5 or math.prod(shape) > MAX_NUMBERS:
        wrong(path, f"{field}['shape']", f"at most 5 sizes, {MAX_NUMBERS} numbers", shape)
    names = dimension_names(value.get("names"))
    if is_camera:
        return Feature(
            dtype, _image_shape(path, field, shape, names), ("height", "width", "channels")
        )
    shape = () if shape == [1] else tuple(shape)  # lerobot returns numbers for shape [1]
    return Feature(DTYPES[dtype], shape, names if len(names) == math.prod(shape) else ())


def _image_shape(
    path: pathlib.Path, field: str, shape: list[int], names: tuple[str, ...]
) -> tuple[int, int, int]:
    """Returns (h, w, channels) of a camera whose sizes may be listed in the order c, h, w."""
    if len(shape) != 3 or 0 in shape:
        wrong(path, f"{field}['shape']", "three sizes: height, width, channels", shape)
    is_first = (
        names[:1] in (("channels",), ("channel",), ("c",)) if names else shape[2] not in (1, 3)
    )
    height, width, channels = (*shape[1:], shape[0]) if is_first else shape
    return height, width, channels


def dimension_names(names: object) -> tuple[str, ...]:
    """Returns the names of a feature's dimensions.

    Recorders write a list, a list inside a group such as {"motors": [...]}, or {name: index}.
    Anything else has no meaning and gives no names, as in lerobot, which only shows them.
    """
    if isinstance(names, Mapping):
        if names and all(is_integer(place) for place in names.values()):
            return tuple(str(name) for name in sorted(names, key=names.__getitem__))
        groups = [dimension_names(group) for group in names.values()]
        return tuple(name for group in groups for name in group)
    if isinstance(names, list):
        nested = [dimension_names(name) if isinstance(name, list) else (name,) for name in names]
        flat = [name for group in nested for name in group]
        return tuple(flat) if all(isinstance(name, str) for name in flat) else ()
    return ()


def _template(path: pathlib.Path, data: Mapping[str, Any], field: str, default: str) -> str:
    """Returns a checked template of file paths: known placeholders, inside the data set."""
    template = default if data.get(field) is None else data[field]
    try:
        parts = list(string.Formatter().parse(template))
    except (ValueError, TypeError):  # `wrong` raises
        wrong(path, field, "a path with placeholders in braces", template)
    for _, name, form, conversion in parts:
        is_known = name is None or (name in PLACEHOLDERS and not conversion)
        digits = (form or "").removesuffix("d")
        if not is_known or (digits and not (digits.isdigit() and len(digits) <= 2)):
            wrong(path, field, f"a path with the placeholders {', '.join(PLACEHOLDERS)}", template)
        if name == "video_key" and form:
            wrong(path, field, "a path with {video_key} without a format", template)
    _check_inside(path, field, template)
    return template


def _check_inside(path: pathlib.Path, field: str, template: str) -> None:
    place = pathlib.PurePosixPath(template)
    is_long = any(len(part.encode(errors="replace")) > MAX_NAME for part in place.parts)
    if place.is_absolute() or ".." in place.parts or "\0" in template or is_long:
        wrong(path, field, "a path inside the data set", template)


def paths_of(
    template: str,
    info: Info,
    episodes: np.ndarray,
    chunks: np.ndarray,
    files: np.ndarray,
    key: str = "",
) -> list[str]:
    """Returns the paths inside the folder that a template gives.

    Args:
      template: `info.data_path` or `info.video_path`.
      info: description of the data set.
      episodes: `[n]` episode indices.
      chunks: `[n]` numbers of folders.
      files: `[n]` numbers of files.
      key: camera.
    """
    values = {
        "video_key": [key] * len(episodes),
        "chunk_index": chunks.tolist(),
        "file_index": files.tolist(),
        "episode_chunk": (episodes // info.chunks_size).tolist(),
        "episode_index": episodes.tolist(),
    }
    text, names = "", []
    for literal, name, form, _ in string.Formatter().parse(template):
        text += literal.replace("%", "%%")
        if name is not None:
            text += "%s" if name == "video_key" else f"%{(form or '').removesuffix('d')}d"
            names.append(name)
    rows = zip(*(values[name] for name in names), strict=True)
    return [text % row for row in rows] if names else [text % ()] * len(episodes)
