"""Observations of clients: names, layouts and dtypes of any robot to those of the policy.

A part of the observation has several names in the messages of known clients; exactly one may be
present. Images become uint8 `[h, w, 3]` in the policy's size, resized on the host as training
resizes those of data sets; numbers become float32. What cannot be meant is refused: NaN, floats
outside [0, 1] as an image, another aspect ratio.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from vla_jax.acting.agent import AgentConfig
from vla_jax.acting.observation_spec import COLUMNS, observation_spec
from vla_jax.backbones import registry
from vla_jax.backbones.resizing import check_colours
from vla_jax.config import checked
from vla_jax.data import still_images
from vla_jax.data.normalize import NormStats
from vla_jax.serving.requests import Refused, shown
from vla_jax.types import Resampling

ResizeRule = Literal["same_aspect", "pad"]
# part of an observation -> its names in messages; nested maps are joined by "/"
NAMES: Mapping[str, tuple[str, ...]] = {
    "image_primary": (
        "image_primary",
        "observation/image",
        "observation/exterior_image_0_left",
        "observation/exterior_image_1_left",
    ),
    "image_wrist": ("image_wrist", "observation/wrist_image", "observation/wrist_image_left"),
    "proprio": ("proprio", "state", "observation/state", "observation/joint_position"),
    "environment_state": ("environment_state", "observation/environment_state"),
}
MAX_BYTES = 512 * 2**20  # of the images of one request, in the policy's size
_MAX_ASPECT_RATIO = 8  # of an image that is padded
_GRIPPER = "observation/gripper_position"  # appended to the joint positions


@dataclass(frozen=True)
@checked()
class KeysConfig:
    """Names of the observation's parts in the messages, if not those of known clients."""

    image_primary: str | None = None  # key of the outside camera's image
    image_wrist: str | None = None  # key of the image of the camera on the hand
    proprio: str | None = None  # key of the robot's own state
    environment_state: str | None = None  # key of the simulator's privileged state


class ImagePart(NamedTuple):
    """An image that the policy takes."""

    name: str  # field of Observation, or name of a further camera
    keys: tuple[str, ...]  # names in messages
    height: int  # pixels
    width: int  # pixels
    resampling: Resampling  # method of resizing


class ColumnPart(NamedTuple):
    """Numbers that the policy takes."""

    name: str  # field of Observation
    keys: tuple[str, ...]  # names in messages
    size: int  # of the column


class ObservationSpec(NamedTuple):
    """Parts of the observation that a policy takes, besides the instruction."""

    images: tuple[ImagePart, ...]
    columns: tuple[ColumnPart, ...]
    resize: ResizeRule  # images of another aspect ratio: refused, or padded with black


def make_spec(
    config: AgentConfig,
    norm_stats: Mapping[str, NormStats],
    keys: KeysConfig | None = None,
    *,
    resize: ResizeRule = "same_aspect",
) -> ObservationSpec:
    """Returns what the observations of a policy must hold.

    Args:
      config: of the agent.
      norm_stats: of the training data; give the sizes of the columns.
      keys: names that replace those of known clients.
      resize: rule for images of another aspect ratio.

    Raises:
      ValueError: the backbone does not say what it takes.
    """
    parts = observation_spec(config, norm_stats)
    backbone = config.policy.backbone
    spec = registry.get(backbone).image_spec(backbone)
    images = [
        ImagePart(name, _keys(name, keys), spec.height, spec.width, spec.resampling)
        for name, part in parts.items()
        if len(part.shape) == 3 and spec is not None
    ]
    columns = [
        ColumnPart(name, _keys(name, keys), parts[name].shape[0])
        for name in COLUMNS
        if name in parts
    ]
    return ObservationSpec(tuple(images), tuple(columns), resize)


def _keys(name: str, keys: KeysConfig | None) -> tuple[str, ...]:
    chosen = getattr(keys, name, None)
    return (chosen,) if chosen else NAMES.get(name, (name, f"observation/{name}"))


def blank(spec: ObservationSpec) -> dict[str, np.ndarray]:
    """Returns an observation of zeros: part -> uint8 `[h, w, 3]` or float32 `[P]`."""
    images = {part.name: np.zeros((part.height, part.width, 3), np.uint8) for part in spec.images}
    return images | {part.name: np.zeros(part.size, np.float32) for part in spec.columns}


def read(spec: ObservationSpec, fields: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns one observation in the policy's layout.

    Args:
      spec: of the policy.
      fields: of a message, from `requests.Request.frames`.

    Returns:
      Part -> uint8 `[h, w, 3]` or float32 `[P]`, as `blank`.

    Raises:
      Refused: a part is missing, given twice, or has another layout or size.
    """
    flat = _flatten(fields)
    images = {part.name: _image(part, flat, spec.resize) for part in spec.images}
    return images | {part.name: _column(part, flat) for part in spec.columns}


def read_all(
    spec: ObservationSpec, frames: Sequence[Mapping[str, Any]]
) -> list[dict[str, np.ndarray]]:
    """Returns the observations of a request in the policy's layout.

    Args:
      spec: of the policy.
      frames: of `requests.Request`.

    Raises:
      Refused: as `read`; or they would take too much memory together.
    """
    size = sum(3 * part.height * part.width for part in spec.images)
    if len(frames) * size > MAX_BYTES:
        raise Refused(
            f"frames must be at most {MAX_BYTES // size}, got {len(frames)}; send them in several "
            "requests."
        )
    return [read(spec, fields) for fields in frames]


def unknown_keys(spec: ObservationSpec, fields: Mapping[str, Any]) -> list[str]:
    """Returns the keys of a message that no part of the observation uses, sorted."""
    known = {_GRIPPER, *(key for part in (*spec.images, *spec.columns) for key in part.keys)}
    return sorted(set(_flatten(fields)) - known)


def _flatten(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields with those of nested maps joined by "/", one level deep."""
    flat = {}
    for key, value in fields.items():
        inner = value.items() if isinstance(value, Mapping) else None
        flat |= {key: value} if inner is None else {f"{key}/{name}": v for name, v in inner}
    return flat


def _find(part: ImagePart | ColumnPart, flat: Mapping[str, Any]) -> Any:
    found = [key for key in part.keys if flat.get(key) is not None]
    if not found:
        raise Refused(
            f"{part.name} must be in the observation as {' or '.join(part.keys)}, got "
            f"{_names(sorted(flat))}; send it, or start the server with --keys.*."
        )
    if len(found) > 1:
        raise Refused(
            f"{part.name} must be in the observation once, got {_names(found)}; send one, or choose"
            " one when starting the server, with --keys.*."
        )
    return flat[found[0]]


def _names(keys: Sequence[str]) -> str:
    return ", ".join(key[:60] for key in keys[:12]) or "no fields"


def _image(part: ImagePart, flat: Mapping[str, Any], resize: ResizeRule) -> np.ndarray:
    image = _find(part, flat)
    if not isinstance(image, np.ndarray) or image.ndim not in (2, 3):
        raise Refused(f"{part.name} must be an array [h, w, 3], got {shown(image)}.")
    if image.ndim == 3 and image.shape[0] == 3 != image.shape[-1]:
        image = image.transpose(1, 2, 0)
    if image.dtype.kind == "f":
        image = _from_floats(part.name, image)
    try:
        check_colours(part.name, image)
    except (TypeError, ValueError) as error:
        raise Refused(str(error)) from None
    size = (part.height, part.width)
    if image.shape[:2] == size:
        return image
    image = _fit_aspect(part, image, resize)
    try:
        return still_images.resize(image[None], size, part.resampling)[0]
    except ImportError:
        raise Refused(
            f"{part.name} must be {part.height} × {part.width} pixels, got {image.shape[0]} × "
            f"{image.shape[1]}; resize it, or pip install 'vla-jax[data]' for the server."
        ) from None


def _from_floats(name: str, image: np.ndarray) -> np.ndarray:
    """Returns floats in [0, 1] as uint8."""
    low, high = (image.min(), image.max()) if image.size else (0, 0)
    if not (low >= 0 and high <= 1):  # True for NaN
        raise Refused(
            f"{name} must be uint8, or floats in [0, 1], got floats in [{low:.3g}, {high:.3g}]; "
            "send the camera's uint8."
        )
    return np.rint(image.astype(np.float32) * 255).astype(np.uint8)


def _fit_aspect(part: ImagePart, image: np.ndarray, resize: ResizeRule) -> np.ndarray:
    """Returns the image in the policy's aspect ratio, with black borders if the rule is "pad"."""
    height, width = image.shape[:2]
    if height * part.width == width * part.height:
        return image
    if resize == "same_aspect" or max(height, width) > _MAX_ASPECT_RATIO * min(height, width):
        raise Refused(
            f"{part.name} must have the aspect ratio of {part.height} × {part.width} pixels, got "
            f"{height} × {width}; crop it, or start the server with --resize pad."
        )
    new = max(height, round(width * part.height / part.width))
    padded = np.zeros((new, max(width, round(new * part.width / part.height)), 3), np.uint8)
    top, left = (padded.shape[0] - height) // 2, (padded.shape[1] - width) // 2
    padded[top : top + height, left : left + width] = image
    return padded


def _column(part: ColumnPart, flat: Mapping[str, Any]) -> np.ndarray:
    values = _numbers(part.name, _find(part, flat))
    if part.name == "proprio" and _GRIPPER in flat and "observation/joint_position" in flat:
        values = np.concatenate([values, _numbers(part.name, flat[_GRIPPER])])
    if len(values) != part.size:
        raise Refused(
            f"{part.name} must have {part.size} numbers as in training, got {len(values)}; send "
            "those of the training data."
        )
    return values


def _numbers(name: str, value: Any) -> np.ndarray:
    """Returns numbers as float32 `[D]`."""
    if isinstance(value, float | int | np.number):
        value = [value]
    if isinstance(value, list) and all(isinstance(v, int | float) for v in value):
        value = np.asarray(value, np.float64)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf" or value.ndim != 1:
        raise Refused(f"{name} must be numbers [P], got {shown(value)}; send a flat array.")
    with np.errstate(over="ignore"):
        numbers = value.astype(np.float32)
    if not np.isfinite(numbers).all():
        wrong = value[~np.isfinite(numbers)][0]
        raise Refused(f"{name} must be finite numbers in float32, got {wrong}; check the sensor.")
    return numbers
