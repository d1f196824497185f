"""Images inside the Parquet files of a LeRobot data set: PNG or JPEG bytes, or names of files."""

import io
import pathlib
from typing import Any, NoReturn

import numpy as np

MAX_BYTES = 2**28  # of one encoded image


def decode_stills(
    values: Any, size: tuple[int, int], key: str, path: pathlib.Path, root: pathlib.Path
) -> np.ndarray:
    """Decodes a column of images.

    Args:
      values: Arrow array of `n` records with `bytes` and `path`, or of bytes.
      size: (h, w) in pixels as `meta/info.json` states.
      key: the column, for messages.
      path: its file, for messages.
      root: folder of the data set, in which images stored as files lie.

    Returns:
      `[n, h, w, 3]` uint8; grey images have three equal channels.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: an image is missing, damaged, of another size, or has no 8-bit channels.
      ImportError: Pillow is missing.
    """
    images = np.empty((len(values), *size, 3), np.uint8)
    for place, value in enumerate(values):
        data = _encoded(value.as_py(), key, path, root)
        images[place] = _decode(data, size, f"image {place} of {key!r} in {path}")
    return images


def _encoded(value: Any, key: str, path: pathlib.Path, root: pathlib.Path) -> bytes:
    """Returns the bytes of an encoded image."""
    if isinstance(value, dict):
        name, value = value.get("path"), value.get("bytes")
        if value is None and isinstance(name, str):
            file = root / name
            if pathlib.PurePath(name).is_absolute() or ".." in pathlib.PurePath(name).parts:
                _refuse(f"path of {key!r} in {path}", "inside the data set", repr(name[:100]))
            if not file.is_file():
                raise FileNotFoundError(f"image {file} is missing; copy the data set again.")
            if file.stat().st_size > MAX_BYTES:
                _refuse(f"image {file}", f"smaller than {MAX_BYTES} bytes", "more")
            value = file.read_bytes()
    if not isinstance(value, bytes):
        _refuse(f"image of {key!r} in {path}", "PNG or JPEG bytes", type(value).__name__)
    return value


def _decode(data: bytes, size: tuple[int, int], what: str) -> np.ndarray:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError(
            "reading images needs Pillow; install it with `pip install 'vla-jax[data]'`."
        ) from error
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            if (image.height, image.width) != size:
                got = f"{image.height} x {image.width}"
                _refuse(what, f"{size[0]} x {size[1]} pixels as meta/info.json states", got)
            if image.mode not in ("RGB", "L", "RGBA", "P", "1", "LA", "CMYK"):
                _refuse(what, "of 8 bits per channel", f"mode {image.mode}")
            return np.asarray(image.convert("RGB"))
    except (
        UnidentifiedImageError,
        OSError,
        SyntaxError,
        EOFError,
        Image.DecompressionBombError,
    ) as e:
        raise ValueError(
            f"{what} cannot be decoded, it is damaged or no PNG or JPEG ({str(e)[:100]}); copy the "
            "data set again."
        ) from e


def _refuse(what: str, expected: str, got: str) -> NoReturn:
    raise ValueError(f"{what} must be {expected}, got {got}; record or convert it again.")
