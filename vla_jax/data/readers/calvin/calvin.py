"""CALVIN data sets: `training/` and `validation/`, one `.npz` file per frame.

An episode is one language segment. Its last frame is `end` of `info.indx`, **included**, because
the windows of the original loader reach it (`DiskDataset`, calvin fa03f01), although CALVIN's
annotator writes `(first, first + number of frames)`: readers that exclude `end` have one step less.
Numbers keep the type on disk. The gripper's action is +1 open, -1 closed; `rel_actions` are scaled
by 50 (position) and 20 (angle) and clipped to [-1, 1]. 30 frames per second.
"""

import functools
import os
import pathlib
import re
from typing import NamedTuple

import numpy as np

from vla_jax.data.dataset import digest
from vla_jax.data.raw import Feature, Lazy, LazyEpisodes, RawDataset, RawEpisode
from vla_jax.data.readers.calvin.annotations import (
    PLAY,
    Spans,
    annotation_file,
    read_play,
    read_segments,
)
from vla_jax.data.readers.calvin.npz_frames import ArrayType, frame_types, read_array
from vla_jax.data.readers.fields import FieldMap, GripperRange
from vla_jax.data.still_images import StillImages

PARTS = ("training", "validation")
FPS = 30.0  # Hz


class Part(NamedTuple):
    """`training` or `validation`; can be pickled."""

    name: str
    folder: pathlib.Path
    prefix: str  # of the names of the frames' files
    digits: int  # of the frame's number
    types: dict[str, ArrayType]  # key -> type, of the first frame
    spans: Spans


def probe(path: pathlib.Path) -> bool:
    """Returns True for a CALVIN data set, or one part of it."""
    try:
        return any(_is_part(folder) for folder in _folders(path).values())
    except OSError:  # refused where no reader fits
        return False


def open(path: pathlib.Path, *, split: str | None = None) -> RawDataset:
    """Opens the raw view; episodes are named `training/segment0`, as the annotations order them.

    Args:
      path: folder with `training`, `validation` or both, or one of these folders.
      split: "training" or "validation"; None means those that exist. With "/play" behind it, or
        "play" alone, the episodes are the unlabelled recordings of `ep_start_end_ids.npy`, in the
        order of its rows, with empty instructions: `training/play0`.

    Raises:
      FileNotFoundError: annotations or frames are missing.
      ValueError: unknown split; damaged annotations; no segments.
    """
    folders = _folders(path)
    wanted, _, behind = (split or "").partition("/")
    is_play = "play" in (wanted, behind)
    known = ["play", *(f"{name}{end}" for name in folders for end in ("", "/play"))]
    if split is not None and split not in known:
        raise ValueError(f"{path}: split must be one of {known}, got {split!r}.")
    chosen = [name for name in folders if wanted in ("", "play", name)]
    parts = tuple(_open_part(name, folders[name], is_play=is_play) for name in chosen)
    spans = np.concatenate([part.spans.frames for part in parts])
    if not len(spans):
        raise ValueError(f"{path} must hold at least one episode, got none in {chosen}.")
    content = _content(parts)
    sizes = tuple((part.name, part.spans.file.stat().st_size) for part in parts)
    texts = tuple(part.spans.instructions for part in parts)
    return RawDataset(
        kind="calvin",
        path=path,
        episodes=LazyEpisodes(len(spans), functools.partial(_make_episode, parts)),
        lengths=spans[:, 1] - spans[:, 0] + 1,
        columns=content[0],
        images=content[1],
        fps=FPS,
        fingerprint=digest("calvin", sizes, spans, texts, tuple(map(repr, content))),
    )


def _folders(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns name -> folder of the parts; the path itself if it is one."""
    found = {name: path / name for name in PARTS if (path / name).is_dir()}
    return found or {path.resolve().name: path}


def _is_part(folder: pathlib.Path) -> bool:
    return folder.is_dir() and ((folder / PLAY).is_file() or annotation_file(folder) is not None)


def _open_part(name: str, folder: pathlib.Path, *, is_play: bool) -> Part:
    if is_play:
        spans = read_play(folder / PLAY)
    else:
        file = annotation_file(folder)
        if file is None:
            raise FileNotFoundError(
                f"{folder} must hold lang_annotations/auto_lang_ann.npy, got none; choose the "
                f"split '{name}/play' to read the recordings without instructions, or another part."
            )
        spans = read_segments(file)
    prefix, digits, example = _naming(folder)
    first = folder / f"{prefix}{int(spans.frames[0, 0]) if len(spans.frames) else 0:0{digits}}.npz"
    types = _types(first if first.is_file() else folder / example, folder / example)
    return Part(name, folder, prefix, digits, types, spans)


def _types(path: pathlib.Path, other: pathlib.Path) -> dict[str, ArrayType]:
    """Returns the types of the arrays in a frame, checked against the keys of another frame."""
    types, others = frame_types(path), frame_types(other)
    if set(types) != set(others):
        raise ValueError(
            f"{path} must hold the same arrays as {other.name}, got a difference in "
            f"{sorted(set(types) ^ set(others))}; restore the file."
        )
    for key, kind in types.items():
        if kind.dtype.kind not in "biufU":
            raise ValueError(
                f"{path}: {key} must hold numbers or texts, got {kind.dtype}; restore the file."
            )
    return types


def _naming(folder: pathlib.Path) -> tuple[str, int, str]:
    """Returns prefix, number of digits and an example of the frames' names.

    The folder may hold millions of files: the search ends at the first that fits, as CALVIN's
    `lookup_naming_pattern` does.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            found = re.fullmatch(r"(episode_|[A-Za-z_]*)(\d{1,12})\.npz", entry.name)
            if found:
                return found[1], len(found[2]), entry.name
    raise FileNotFoundError(
        f"{folder} must hold one file per frame, such as episode_0000000.npz, got none; copy the "
        "frames too."
    )


def _is_image(kind: ArrayType) -> bool:
    return kind.dtype == np.uint8 and len(kind.shape) == 3 and kind.shape[2] == 3


def _content(parts: tuple[Part, ...]) -> tuple[dict[str, Feature], dict[str, Feature]]:
    """Returns the types of columns and images, of the first part."""
    columns, images = {}, {}
    for key, kind in parts[0].types.items():
        if _is_image(kind):
            images[key] = Feature("uint8", kind.shape)
        elif kind.dtype.kind in "biufU":
            name = "str" if kind.dtype.kind == "U" else kind.dtype.name
            columns[key] = Feature(name, kind.shape)
    return columns, images


def _make_episode(parts: tuple[Part, ...], index: int) -> RawEpisode:
    """Returns the episode at an index over all parts."""
    row = index
    for part in parts:
        if row < len(part.spans.frames):
            break
        row -= len(part.spans.frames)
    first, last = (int(frame) for frame in part.spans.frames[row])
    length = last - first + 1
    columns, images = _content((part,))
    return RawEpisode(
        name=f"{part.name}/{part.spans.name}{row}",
        columns=Lazy(list(columns), functools.partial(_column, part, first, length)),
        images=Lazy(list(images), functools.partial(_images, part, first, length)),
        instructions=(part.spans.instructions[row],) * length,
        timestamps=np.arange(length) / FPS,
    )


def _read(part: Part, first: int, key: str, steps: np.ndarray) -> np.ndarray:
    """Returns the arrays `[n, …]` of a key at steps of an episode."""
    kind = part.types[key]
    names = (f"{part.prefix}{first + int(step):0{part.digits}}.npz" for step in steps)
    rows = [read_array(part.folder / name, key, kind) for name in names]
    return np.stack(rows) if rows else np.empty((0, *kind.shape), kind.dtype)


def _column(part: Part, first: int, length: int, key: str) -> np.ndarray:
    return _read(part, first, key, np.arange(length))


def _images(part: Part, first: int, length: int, key: str) -> StillImages:
    height, width, _ = part.types[key].shape
    return StillImages(length, (height, width), functools.partial(_read, part, first, key))


def fields(raw: RawDataset) -> FieldMap:
    """Returns the fields of CALVIN: relative actions, `robot_obs`, static and gripper camera."""
    names = {"rgb_static": "image_primary", "rgb_gripper": "image_wrist"}
    action = "rel_actions" if "rel_actions" in raw.columns else "actions"
    return FieldMap(
        cameras={names.get(key, f"image_{key.removeprefix('rgb_')}"): key for key in raw.images},
        columns={
            "action": (action,),
            **({"proprio": ("robot_obs",)} if "robot_obs" in raw.columns else {}),
        },
        grippers=(-1,),
        gripper_range=GripperRange(closed=-1.0, opened=1.0),
        robot="calvin",
    )
