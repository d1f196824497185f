"""Types of the features of a TFDS data set, from its `features.json`.

Source: tensorflow_datasets/core/features and core/proto/feature.proto (4.9.10).
"""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from vla_jax.data.readers.rlds.rlds_layout import FEATURES, read_description

STEPS = "steps"
_DTYPES = {
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "bfloat16", "float32", "float64", "string",
}  # fmt: skip
_LEGACY = {  # class -> field of the present format; TFDS before 4.7 wrote {"type", "content"}
    "FeaturesDict": "featuresDict", "Sequence": "sequence", "Dataset": "sequence",
    "Tensor": "tensor", "Scalar": "tensor", "Text": "text", "Image": "image",
    "ClassLabel": "classLabel", "Video": "video",
}  # fmt: skip
_MAX_DEPTH = 20


class TfFeature(NamedTuple):
    """Type of one feature inside a step, or of an episode."""

    kind: Literal["number", "text", "image", "array", "unknown"]  # array: encoded as bytes
    dtype: str  # NumPy's name, "string" for texts
    shape: tuple[int, ...]  # of one element; -1 = varies
    outer: tuple[int, ...] = ()  # lengths of sequences inside the step; -1 = ragged
    encoding: str = "none"  # of "array": "bytes" or "zlib"

    @property
    def is_ragged(self) -> bool:
        """True if the number of elements differs from step to step."""
        return -1 in self.outer

    @property
    def is_dynamic(self) -> bool:
        """True if shape and bytes are stored under two keys."""
        return self.kind == "array" and self.shape.count(-1) > 1

    @property
    def varies(self) -> bool:
        """True if the elements are arrays of different shapes."""
        return self.kind in ("array", "image") and -1 in self.shape and not self.is_camera

    @property
    def is_camera(self) -> bool:
        """True if every step has one RGB image of 8 bits."""
        is_rgb = len(self.shape) == 3 and self.shape[-1] == 3
        return self.kind == "image" and is_rgb and self.dtype == "uint8" and not self.outer


def read_features(
    root: pathlib.Path,
) -> tuple[dict[str, TfFeature], dict[str, TfFeature]]:
    """Reads the types of all features.

    Args:
      root: folder of the version.

    Returns:
      The features of a step by key without "steps/", and those of an episode by key.

    Raises:
      FileNotFoundError: there is no `features.json`.
      ValueError: it is damaged, or does not describe episodes of steps.
    """
    path = root / FEATURES
    try:
        top = _members(_content(read_description(path), path)[1], path)
        kind, content = _content(top[STEPS], path, STEPS) if STEPS in top else ("", {})
        if kind != "sequence":
            raise ValueError(
                f"{path}: expected a sequence '{STEPS}' (RLDS: one record per episode), got "
                f"{', '.join(top) or 'nothing'}; convert the data set to RLDS."
            )
        steps = dict(_walk(content.get("feature"), "", (), path))
        rest = {
            key: feature
            for name, value in top.items()
            if name != STEPS
            for key, feature in _walk(value, name, (), path)
        }
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply; restore the file.") from error
    return steps, rest


def _walk(
    value: Any, key: str, outer: tuple[int, ...], path: pathlib.Path
) -> Iterator[tuple[str, TfFeature]]:
    """Yields the leaves below a feature, keys joined by "/"."""
    kind, content = _content(value, path, key)
    if key.count("/") + len(outer) > _MAX_DEPTH:
        raise ValueError(f"{path}: feature {key[:60]} is nested too deeply; restore the file.")
    if kind == "featuresDict":
        for name, member in _members(content, path).items():
            yield from _walk(member, f"{key}/{name}" if key else name, outer, path)
    elif kind == "sequence":
        length = _size(content.get("length", -1), key, path)
        yield from _walk(content.get("feature"), key, (*outer, length), path)
    elif kind == "tensor":
        yield key, _tensor(content, key, outer, path)
    elif kind == "text":
        yield key, TfFeature("text", "string", (), outer)
    elif kind == "classLabel":
        yield key, TfFeature("number", "int64", (), outer)
    elif kind in ("image", "video"):
        shape = _shape(content, key, path) or (-1,) * (kind == "video") + (-1, -1, 3)
        if kind == "video":
            outer, shape = (*outer, shape[0]), shape[1:]
        if len(shape) != 3:
            raise ValueError(f"{path}: image {key} must have 3 axes, got {shape}; restore it.")
        yield key, TfFeature("image", _dtype(content, key, path, "uint8"), shape, outer)
    else:
        yield key, TfFeature("unknown", kind, (), outer)


def _tensor(
    content: Mapping[str, Any], key: str, outer: tuple[int, ...], path: pathlib.Path
) -> TfFeature:
    dtype, shape = _dtype(content, key, path), _shape(content, key, path)
    encoding = content.get("encoding") or "none"
    if str(encoding) not in ("none", "bytes", "zlib"):
        raise ValueError(
            f"{path}: encoding of {key} must be none, bytes or zlib, got {encoding!r}; restore it."
        )
    if encoding != "none":
        return TfFeature("array", dtype, shape, outer, encoding)
    return TfFeature("text" if dtype == "string" else "number", dtype, shape, outer)


def _content(value: Any, path: pathlib.Path, key: str = "") -> tuple[str, Mapping[str, Any]]:
    """Returns the kind of a feature and its description."""
    if isinstance(value, dict) and "type" in value:
        name = str(value["type"]).rpartition(".")[2]
        content = value.get("content")
        if isinstance(content, str):
            content = _parse(content)
        if name == "FeaturesDict" and isinstance(content, dict) and "features" not in content:
            content = {"features": content}
        value = {"pythonClassName": name, _LEGACY.get(name, name): content}
    if isinstance(value, dict):
        for kind, content in value.items():
            if isinstance(content, dict):
                return kind, content
    where = f"feature {key}" if key else "the description"
    raise ValueError(
        f"{path}: {where} must be an object that names its kind, got {str(value)[:60]!r}; "
        "restore the file."
    )


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # refused by the caller, with the file's name
        return None


def _members(content: Mapping[str, Any], path: pathlib.Path) -> dict[str, Any]:
    members = content.get("features")
    if not isinstance(members, dict) or not members:
        raise ValueError(
            f"{path}: featuresDict must have features, got {str(members)[:60]!r}; restore the file."
        )
    return members


def _dtype(
    content: Mapping[str, Any], key: str, path: pathlib.Path, default: str | None = None
) -> str:
    dtype = content.get("dtype") or default
    name = dtype.removeprefix("tf.") if isinstance(dtype, str) else dtype
    name = "string" if name in ("object", "str") else name
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(
            f"{path}: dtype of {key} must be one of {', '.join(sorted(_DTYPES))}, got {dtype!r}; "
            "restore the file."
        )
    return name


def _shape(content: Mapping[str, Any], key: str, path: pathlib.Path) -> tuple[int, ...]:
    shape = content.get("shape") or {}
    dimensions = shape.get("dimensions") or [] if isinstance(shape, dict) else shape
    if not isinstance(dimensions, list) or len(dimensions) > 8:
        raise ValueError(f"{path}: shape of {key} must be a list of sizes, got {shape!r}.")
    return tuple(_size(size, key, path) for size in dimensions)


def _size(size: Any, key: str, path: pathlib.Path) -> int:
    """Returns a size; -1 or null is one that varies."""
    if size is None or size == "-1":
        return -1
    text = str(size)
    is_number = text.isascii() and text.isdigit() and len(text) <= 9
    if isinstance(size, bool | float) or not (is_number or size == -1):
        raise ValueError(
            f"{path}: sizes of {key} must be integers or -1, got {size!r}; restore the file."
        )
    return int(text)
