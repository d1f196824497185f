"""Resizing of pictures with Pillow on the host, and with JAX on the device."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.types import Array, Resampling

DEVICE_METHODS = {"bilinear": "linear", "bicubic": "cubic", "lanczos": "lanczos3"}


def resize(image: np.ndarray, size: tuple[int, int], resampling: Resampling) -> np.ndarray:
    """Returns a picture resized with Pillow, which always antialiases.

    Args:
      image: uint8 `[h, w, 3]`.
      size: (height, width), pixels.
      resampling: method of resizing.

    Raises:
      TypeError, ValueError: `image` is not a picture, see `check_picture`.
      ImportError: Pillow is missing.
    """
    check_picture(image)
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "preparing images needs Pillow; install it with `pip install 'vla-jax[vlm]'`."
        ) from error
    filters = {
        "area": Image.Resampling.BOX,
        "bilinear": Image.Resampling.BILINEAR,
        "bicubic": Image.Resampling.BICUBIC,
        "lanczos": Image.Resampling.LANCZOS,
    }
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.array(picture.resize((size[1], size[0]), filters[resampling]))


def resize_on_device(image: Array, size: tuple[int, int], resampling: Resampling) -> jax.Array:
    """Returns pictures resized with antialias by `jax.image.resize`, nearly as Pillow does it.

    The width is resized first, then the height; each result is rounded to uint8, as in Pillow.
    Over the reference pictures and noise, made smaller and larger, a value differs from Pillow's by
    at most 2 of 255, and by 0.02 in the mean; without the first rounding, by up to 44 and 0.28.

    Args:
      image: uint8 `[..., h, w, 3]`.
      size: (height, width), pixels; static under `jit`.
      resampling: `bilinear`, `bicubic` or `lanczos`.

    Returns:
      uint8 `[..., height, width, 3]`.

    Raises:
      TypeError: `image` is not uint8.
      ValueError: another method, or the last axis is not 3 colours.
    """
    if resampling not in DEVICE_METHODS:
        raise ValueError(
            f"resampling on the device must be one of {', '.join(DEVICE_METHODS)}, got "
            f"'{resampling}'; choose one of them, or resize on the host."
        )
    check_colours("image", image)
    x = jnp.asarray(image)
    for axis, side in ((-2, size[1]), (-3, size[0])):
        shape = list(x.shape)
        shape[axis] = side
        x = jax.image.resize(x.astype(jnp.float32), shape, DEVICE_METHODS[resampling])
        x = jnp.clip(jnp.floor(x + 0.5), 0, 255).astype(jnp.uint8)
    return x


def check_picture(image: np.ndarray, name: str = "image") -> tuple[int, int]:
    """Returns the height and width of a picture uint8 `[h, w, 3]`.

    Args:
      image: the picture.
      name: of the picture, for the messages.

    Raises:
      TypeError: it is not uint8.
      ValueError: it is empty, grey, has an alpha channel, or the colours come first.
    """
    check_colours(name, image)
    if image.ndim != 3:
        raise ValueError(
            f"{name} must be one picture [h, w, 3], got {list(image.shape)}; pass pictures one by "
            "one."
        )
    height, width, _ = image.shape
    return height, width


def check_colours(name: str, image: Any) -> None:
    """Checks that `image` is uint8 `[..., h, w, 3]` and not empty; errors as `check_picture`."""
    if not hasattr(image, "dtype") or image.dtype != np.uint8:
        found = getattr(image, "dtype", type(image).__name__)
        raise TypeError(f"{name} must be uint8 in 0 … 255, got {found}; convert it.")
    shape = image.shape
    if len(shape) >= 3 and shape[-1] == 3 and 0 not in shape:
        return
    remedy = "give it one RGB picture"
    if 0 in shape:
        remedy = "it is empty: check the camera or the file"
    elif len(shape) == 2 or shape[-1] == 1:
        remedy = "repeat the grey channel three times"
    elif shape[-1] == 4:
        remedy = "drop the alpha channel"
    elif len(shape) >= 3 and shape[-3] == 3:
        remedy = "move the colours to the last axis"
    raise ValueError(f"{name} must be [..., h, w, 3], got {list(shape)}; {remedy}.")
