"""`meta/modality.json` of GR00T: names for parts of state and action, and for cameras."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from vla_jax.data.raw import Feature
from vla_jax.data.readers.lerobot.info import is_integer, read_json, wrong

MODALITY_PATH = "meta/modality.json"


class NamedSlice(NamedTuple):
    """Neighbouring dimensions of a column under a name of their own."""

    name: str
    key: str  # column
    start: int
    end: int  # exclusive


class Modality(NamedTuple):
    """Checked content of `meta/modality.json`; empty if a data set has none."""

    state: tuple[NamedSlice, ...] = ()
    action: tuple[NamedSlice, ...] = ()
    cameras: Mapping[str, str] = {}  # camera's key -> name
    annotations: tuple[str, ...] = ()  # columns that hold task indices


def read_modality(
    root: pathlib.Path, columns: Mapping[str, Feature], images: Mapping[str, Feature]
) -> Modality:
    """Reads `meta/modality.json`, if there is one.

    Args:
      root: folder of the data set.
      columns: its columns.
      images: its cameras.

    Raises:
      ValueError: not JSON, a part outside of its column, an unknown column or camera.
    """
    path = root / MODALITY_PATH
    if not path.is_file():
        return Modality()
    data = read_json(path)
    return Modality(
        state=_parts(path, data, "state", "observation.state", columns),
        action=_parts(path, data, "action", "action", columns),
        cameras={
            _original(path, f"video[{name!r}]", entry, f"observation.images.{name}", images): name
            for name, entry in _group(path, data, "video").items()
        },
        annotations=tuple(
            _original(path, f"annotation[{name!r}]", entry, f"annotation.{name}", columns)
            for name, entry in _group(path, data, "annotation").items()
        ),
    )


def _group(path: pathlib.Path, data: Mapping[str, Any], field: str) -> dict[str, Any]:
    group = data.get(field)
    if group is not None and not isinstance(group, dict):
        wrong(path, field, "an object with names", group)
    return group or {}


def _parts(
    path: pathlib.Path,
    data: Mapping[str, Any],
    field: str,
    default: str,
    columns: Mapping[str, Feature],
) -> tuple[NamedSlice, ...]:
    parts = []
    for name, entry in _group(path, data, field).items():
        what = f"{field}[{name!r}]"
        key = _original(path, what, entry, default, columns)
        size = columns[key].shape[0] if columns[key].shape else 1
        start, end = (entry.get(bound) for bound in ("start", "end"))
        if not (is_integer(start) and is_integer(end, 1) and start < end <= max(size, 1)):
            wrong(path, what, f"start < end <= {size}, the size of {key!r}", (start, end))
        parts.append(NamedSlice(name, key, start, end))
    return tuple(parts)


def _original(
    path: pathlib.Path, what: str, entry: object, default: str, known: Mapping[str, Feature]
) -> str:
    """Returns the key of the data set that an entry stands for."""
    if not isinstance(entry, dict):
        wrong(path, what, "an object", entry)
    key = entry.get("original_key") or default
    if not isinstance(key, str) or key not in known:
        wrong(path, f"original_key of {what}", f"one of {', '.join(known)}", key)
    return key
