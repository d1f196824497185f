"""Plan of a conversion to LeRobot v3.0: names and types of all columns and cameras."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from vla_jax.data.raw import Feature, RawDataset
from vla_jax.data.readers.field_columns import field_names
from vla_jax.data.readers.fields import FieldMap
from vla_jax.data.readers.lerobot.layout import FEATURE_KEYS, INDEX_KEYS

CAMERA_PREFIX = "observation.images."
MAX_AXES = 5  # of one step of a column, in lerobot


class Plan(NamedTuple):
    """Content of a converted data set; picklable."""

    columns: Mapping[str, tuple[str, ...]]  # key on disk -> the source's keys, side by side
    features: Mapping[str, Feature]  # key on disk -> type of a column, with lerobot's dtypes
    cameras: Mapping[str, str]  # key on disk -> the source's camera
    image_features: Mapping[str, Feature]  # key on disk -> type of a camera
    rotate_images: bool  # images are stored rotated by 180 degrees
    fps: float  # Hz
    fields: FieldMap  # of the converted data set
    omitted: tuple[str, ...]  # columns of the source that LeRobot cannot hold


def make_plan(
    raw: RawDataset,
    fields: FieldMap,
    *,
    fps: float | None = None,
    names: Mapping[str, str] | None = None,
) -> Plan:
    """Returns the plan of a conversion.

    Fields that have a key in LeRobot (`action`, `proprio`, `environment_state`) are stored under
    it; other columns keep their name with "." for "/". Cameras become `observation.images.<name>`.
    Columns that every LeRobot data set has, such as `timestamp`, are made anew.

    Args:
      raw: the source.
      fields: its fields.
      fps: rate, Hz; None takes that of the source.
      names: source's key of a column or camera -> key on disk.

    Raises:
      ValueError: no rate; unknown or repeated names; a camera without a fixed size.
    """
    fps = fps or raw.fps
    if fps is None:
        raise ValueError(f"{raw.path} does not state its rate; give it with --fps (Hz).")
    names = dict(names or {})
    _check_names(raw, names)
    columns = {
        FEATURE_KEYS[field]: keys for field, keys in fields.columns.items() if field in FEATURE_KEYS
    }
    used = {key for keys in columns.values() for key in keys}
    omitted = [key for key, feature in raw.columns.items() if not _can_hold(feature)]
    for key in raw.columns:
        if key not in used and key not in INDEX_KEYS and key not in omitted:
            wanted = names.get(key, key.replace("/", "."))
            columns[_free(wanted, [*columns, *INDEX_KEYS], prefix="source.")] = (key,)
    cameras: dict[str, str] = {}
    for key, feature in raw.images.items():
        if min(feature.shape) < 1:
            raise ValueError(
                f"camera {key!r} of {raw.path} must have one image size, got {feature.shape}; "
                "resize its images first."
            )
        wanted = names.get(key, _camera_key(key, fields))
        cameras[_free(wanted, [*columns, *cameras], suffix="_2")] = key
    return Plan(
        columns=columns,
        features={key: _feature(raw, keys) for key, keys in columns.items()},
        cameras=cameras,
        image_features={key: raw.images[camera] for key, camera in cameras.items()},
        rotate_images=fields.rotate_images,
        fps=float(fps),
        fields=_converted_fields(fields, columns, cameras),
        omitted=tuple(omitted),
    )


def to_json(plan: Plan) -> dict[str, Any]:
    """Returns a plan as JSON values, to compare plans."""
    return {
        **plan._asdict(),
        "features": {key: feature._asdict() for key, feature in plan.features.items()},
        "image_features": {key: feature._asdict() for key, feature in plan.image_features.items()},
        "fields": plan.fields._asdict(),
    }


def _check_names(raw: RawDataset, names: Mapping[str, str]) -> None:
    known = [*raw.columns, *raw.images]
    for key, name in names.items():
        if key not in known:
            raise ValueError(f"names must be of {sorted(known)}, got {key!r}; correct it.")
        if "/" in name or not name or name in INDEX_KEYS:
            raise ValueError(
                f"the name of {key} must be a LeRobot feature without '/' and none of "
                f"{sorted(INDEX_KEYS)}, got {name!r}; choose another."
            )
    if len(set(names.values())) < len(names):
        raise ValueError(f"names must differ, got {sorted(names.values())}; correct them.")


def _can_hold(feature: Feature) -> bool:
    """Returns True if LeRobot can hold a column: numbers of a fixed shape, or one text."""
    size = int(np.prod(feature.shape))
    is_fixed = min(feature.shape, default=1) > 0 and len(feature.shape) <= MAX_AXES
    return is_fixed and (size == 1 if feature.dtype == "str" else _dtype(feature) is not None)


def _dtype(feature: Feature) -> str | None:
    """Returns lerobot's dtype of a column, None if it has no such type."""
    if feature.dtype == "str":
        return "string"
    kinds = {"f": "float32", "i": "int64", "u": "int64", "b": "bool"}
    return kinds.get(np.dtype(feature.dtype).kind)


def _feature(raw: RawDataset, keys: tuple[str, ...]) -> Feature:
    """Returns the type of columns side by side: that of one, or a vector of their numbers."""
    if len(keys) == 1 and keys[0] in raw.columns:
        feature = raw.columns[keys[0]]
        shape = feature.shape if np.prod(feature.shape) > 1 else (1,)
        names = feature.names if len(feature.names) == np.prod(shape) else ()
        return Feature(_dtype(feature) or "", shape, names)
    names = field_names(raw.columns, keys)
    return Feature("float32", (len(names),), names)


def _camera_key(key: str, fields: FieldMap) -> str:
    if key.startswith(CAMERA_PREFIX):
        return key
    field = {camera: field for field, camera in fields.cameras.items()}.get(key)
    name = field.removeprefix("image_") if field else key.rpartition("/")[2]
    return CAMERA_PREFIX + name.replace("/", ".")


def _free(name: str, taken: Collection[str], *, prefix: str = "", suffix: str = "") -> str:
    """Returns the name, changed until it is not taken."""
    while name in taken:
        name = prefix + name + suffix
    return name


def _converted_fields(
    fields: FieldMap, columns: Mapping[str, object], cameras: Mapping[str, str]
) -> FieldMap:
    """Returns the fields of the converted data set."""
    on_disk = {camera: key for key, camera in cameras.items()}
    return fields._replace(
        cameras={field: on_disk[key] for field, key in fields.cameras.items()},
        columns={
            field: (key,)
            for field, key in FEATURE_KEYS.items()
            if key in columns and field in fields.columns
        },
        rotate_images=False,
    )
