"""Actions, observations, images and success flags of Gymnasium environments, converted exactly.

What cannot be converted without a loss is refused.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

_LARGEST_WHOLE = 2**53  # all integers up to it are float64 numbers


def check_box(box: Any, name: str) -> None:
    """Raises a ValueError unless actions in [-1, 1] reach every value of a `Box`.

    Args:
      box: a `gymnasium.spaces.Box`, the action space.
      name: of the environment, for the message.
    """
    low, high = np.asarray(box.low, np.float64), np.asarray(box.high, np.float64)
    if not low.size:
        raise ValueError(f"action_space of {name} must have at least 1 number, got {box}.")
    with np.errstate(over="ignore", invalid="ignore"):
        has_width = np.isfinite(high - low).all()
    if not has_width:
        raise ValueError(
            f"action_space of {name} must have finite bounds, got {box}; use "
            "gymnasium.wrappers.RescaleAction or a Box with bounds."
        )
    if box.dtype.kind in "iu" and max(np.abs(low).max(), np.abs(high).max()) > _LARGEST_WHOLE:
        raise ValueError(
            f"action_space of {name} must have integers up to 2^53, got {box}; put a "
            "gymnasium.ActionWrapper with smaller bounds around the environment."
        )


def scale_action(box: Any, action: np.ndarray) -> np.ndarray:
    """Returns the value of a `Box` for an action in [-1, 1]: -1 is its low, 1 its high bound.

    Integers are rounded; of a bool, numbers above 0 are True.

    Args:
      box: the action space, which passed `check_box`.
      action: `[A]`, finite; clipped to [-1, 1].

    Returns:
      An array of the shape and dtype of the Box, inside its bounds whatever the rounding.
    """
    low, high = np.asarray(box.low, np.float64), np.asarray(box.high, np.float64)
    fraction = (np.clip(np.asarray(action, np.float64), -1, 1).reshape(box.shape) + 1) / 2
    scaled = np.asarray(low + fraction * (high - low))
    if box.dtype.kind == "b":
        scaled = scaled > 0.5
    elif box.dtype.kind in "iu":
        scaled = np.rint(scaled)
    # The bound itself, since a rounded sum may be next to it.
    ends = np.where(fraction <= 0, box.low, box.high)
    inside = np.clip(np.asarray(scaled).astype(box.dtype), box.low, box.high)
    return np.asarray(np.where((fraction <= 0) | (fraction >= 1), ends, inside), box.dtype)


def to_float32(values: Any, name: str) -> np.ndarray:
    """Returns the numbers of an observation as float32.

    Args:
      values: numbers of any dtype.
      name: of the environment, for the message.

    Raises:
      ValueError: a number is not finite in float32; a policy would remember it.
    """
    with np.errstate(over="ignore"):
        numbers = np.asarray(values).astype(np.float32)
    if not np.isfinite(numbers).all():
        place = int(np.argmin(np.isfinite(numbers).ravel()))
        raise ValueError(
            f"observation of {name} must be finite numbers in float32, got "
            f"{np.ravel(values)[place]} at index {place}; put a gymnasium.ObservationWrapper "
            "around the environment."
        )
    return numbers


def to_rgb(image: Any, name: str) -> np.ndarray:
    """Returns a rendered image as RGB `[h, w, 3]` uint8.

    Args:
      image: uint8: RGB `[h, w, 3]`, opaque RGBA `[h, w, 4]`, or grey `[h, w]` or `[h, w, 1]`.
      name: of the environment, for the message.

    Raises:
      ValueError: another shape or dtype, or a transparent image.
    """
    pixels = np.asarray(image)
    channels = pixels.shape[-1] if pixels.ndim == 3 else 1
    fits = pixels.ndim in (2, 3) and channels in (1, 3, 4) and pixels.size and image is not None
    if not fits or pixels.dtype != np.uint8:
        raise ValueError(
            f"render() of {name} must return uint8 [h, w, 3], [h, w, 4], [h, w, 1] or [h, w], got "
            f"{type(image).__name__} {pixels.dtype} {list(pixels.shape)}; put a gymnasium.Wrapper "
            "whose render() converts it around the environment."
        )
    if channels == 4:
        if (pixels[..., 3] != 255).any():
            raise ValueError(
                f"render() of {name} must return opaque images, got alpha values down to "
                f"{pixels[..., 3].min()}; put a gymnasium.Wrapper whose render() blends them "
                "around the environment."
            )
        return pixels[..., :3]
    if channels == 3:
        return pixels
    return np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, axis=-1)


def is_success(info: Mapping[str, Any], reward: float) -> bool:
    """Returns the success flag of `info` ("is_success" or "success"); False if there is none.

    Raises:
      ValueError: the flag is not 0 or 1, such as a fraction or NaN, which would count as a success.
    """
    del reward
    if not has_flag(info):
        return False
    flag = info.get("is_success", info.get("success"))
    number = np.asarray(flag)
    if number.size != 1 or number.dtype.kind not in "biuf" or number.item() not in (0, 1):
        raise ValueError(
            f"the success flag of a step must be True or False, 1 or 0, got {flag!r}; put a "
            "gymnasium.Wrapper that sets info['success'] around the environment."
        )
    return bool(number.item())


def has_flag(info: Mapping[str, Any]) -> bool:
    """Returns True if `info` has a success flag that `is_success` reads."""
    return info.get("is_success", info.get("success")) is not None


def check_rate(fps: Any, name: str) -> float:
    """Returns the actions per second of an environment.

    Args:
      fps: of its metadata.
      name: of the environment, for the message.

    Raises:
      ValueError: it is not a finite number above 0.
    """
    is_number = isinstance(fps, int | float | np.number)
    if not is_number or not (np.isfinite(fps) and fps > 0):
        raise ValueError(
            f"metadata['render_fps'] of {name} must be a finite number above 0, got {fps!r}."
        )
    return float(fps)
