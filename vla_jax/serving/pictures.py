"""Images that arrive as PNG or JPEG files inside a message."""

import contextlib
import io
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

_MAX_PIXELS = 4096 * 4096
MAX_BYTES = 512 * 2**20  # of all pictures of a message, decoded
_MARK = "__image__"


def is_picture(value: Any) -> bool:
    """Returns True for a map that holds an image file, in the form of AI2's harness."""
    return isinstance(value, Mapping) and _MARK in value


def check_sizes(values: Iterable[Any]) -> None:
    """Raises a ValueError if the pictures of a message are too large together.

    A picture of a few kB can hold thousands of times as many pixels; only the heads of the files
    are read here.

    Args:
      values: of a message; those that are no pictures are ignored.
    """
    total = 0
    for value in filter(is_picture, values):
        if value.get("format") in ("png", "jpeg"):
            with _opened(value) as file:
                total += 3 * file.width * file.height
        if total > MAX_BYTES:
            raise ValueError(
                f"images of a message must have at most {MAX_BYTES} bytes when decoded, got more; "
                "send smaller ones, or fewer frames."
            )


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
    with _opened(value) as file:
        if file.width * file.height > _MAX_PIXELS:
            raise ValueError(
                f"an image must have at most {_MAX_PIXELS} pixels, got {file.width} x "
                f"{file.height}."
            )
        return np.asarray(file.convert("RGB"))


@contextlib.contextmanager
def _opened(value: Mapping[str, Any]) -> Iterator[Any]:
    """Yields a picture whose head has been read; errors are one sentence."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "images in PNG or JPEG need Pillow; pip install 'vla-jax[serve]' on the server."
        ) from error
    kind, data = value["format"], value.get("data")
    if not isinstance(data, bytes):
        raise ValueError(f"data of an image must be bytes, got {type(data).__name__}.")
    try:
        with Image.open(io.BytesIO(data), formats=(kind.upper(),)) as file:
            yield file
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
