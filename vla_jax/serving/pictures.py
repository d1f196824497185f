"""Images that arrive as PNG or JPEG files inside a message."""

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

_MAX_PIXELS = 4096 * 4096
_MARK = "__image__"


def is_picture(value: Any) -> bool:
    """Returns True for a map that holds an image file, in the form of AI2's harness."""
    return isinstance(value, Mapping) and _MARK in value


def read_picture(value: Mapping[str, Any]) -> np.ndarray:
    """Returns the image `[h, w, 3]` uint8 of a map with `format` (png, jpeg or raw) and `data`.

    The size is checked before anything is decoded.

    Raises:
      ValueError: the file is damaged, too large, or of another format.
      ImportError: Pillow is missing.

    Source: vla-eval 0.8.0, `protocol/image_codec.py`.
    """
    kind, data = value.get("format"), value.get("data")
    if not isinstance(data, bytes):
        raise ValueError(f"data of an image must be bytes, got {type(data).__name__}.")
    if kind == "raw":
        return _read_raw(data, value)
    if kind not in ("png", "jpeg"):
        raise ValueError(f"format of an image must be png, jpeg or raw, got {str(kind)[:40]!r}.")
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "images in PNG or JPEG need Pillow; pip install 'vla-jax[serve]' on the server."
        ) from error
    try:
        with Image.open(io.BytesIO(data), formats=(kind.upper(),)) as file:
            width, height = file.size
            if width * height > _MAX_PIXELS:
                raise ValueError(
                    f"an image must have at most {_MAX_PIXELS} pixels, got {width} x {height}."
                )
            return np.asarray(file.convert("RGB"))
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"an image must be a complete {kind} file, got {len(data)} bytes that are damaged."
        ) from error


def _read_raw(data: bytes, value: Mapping[str, Any]) -> np.ndarray:
    dtype, shape = value.get("dtype"), value.get("shape")
    sizes = list(shape) if isinstance(shape, list | tuple) else []
    is_image = len(sizes) == 3 and all(type(size) is int and size > 0 for size in sizes)
    if dtype != "|u1" or not is_image:
        raise ValueError(
            f"a raw image must be |u1 of shape [h, w, 3], got {str(dtype)[:40]} of shape "
            f"{str(shape)[:40]}."
        )
    if math.prod(sizes) != len(data):
        raise ValueError(f"a raw image of shape {sizes} must fill its data, got {len(data)} bytes.")
    return np.frombuffer(data, np.uint8).reshape(sizes)
