"""Values of one feature of a record as arrays, with the dtypes and shapes that TFDS gives them."""

import io
import math
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

from vla_jax.data.readers.rlds import tf_example
from vla_jax.data.readers.rlds.tf_example import Buffer, Span, Values
from vla_jax.data.readers.rlds.tf_features import TfFeature

_MAX_PIXELS = 2**26  # of an image whose size features.json does not give
_MAX_BYTES = 2**28  # of a decompressed array whose size features.json does not give


def decode_values(
    data: Buffer, values: Values | None, feature: TfFeature, num_elements: int | None
) -> np.ndarray:
    """Returns all elements of a feature.

    Args:
      data: the record.
      values: the feature's values in it; None if it has none.
      feature: its type, of one element.
      num_elements: n, expected number of elements; None if any number is right.

    Returns:
      `[n, ...]`; texts as NumPy's str; arrays whose shape is not fixed as objects `[n]`.

    Raises:
      ValueError: the values are of another type or number, or damaged; the message is the part
        of a sentence behind the name of the feature.
    """
    if feature.kind not in FEATURE_KINDS:
        raise ValueError(f"is a {feature.dtype}, which this reader does not read")
    return FEATURE_KINDS[feature.kind].decode(data, values, feature, num_elements)


def bytes_spans(data: Buffer, values: Values | None, num_elements: int | None) -> list[Span]:
    """Returns the ranges of the byte strings of a feature; arguments as in `decode_values`."""
    spans = tf_example.pieces(data, _checked(values, "bytes"))
    if num_elements not in (None, len(spans)):
        raise ValueError(f"holds {len(spans)} values, expected {num_elements}")
    return spans


def decode_image(encoded: Buffer, feature: TfFeature) -> np.ndarray:
    """Returns an image `[h, w, c]` from a PNG, JPEG, BMP or GIF file.

    Args:
      encoded: content of the file.
      feature: dtype and shape of the image; 16 bits and floats are stored as PNG.

    Raises:
      ValueError: the file is damaged, or of another size than the feature.
    """
    image = _open_image(encoded, feature.shape)
    channels, dtype = feature.shape[-1], feature.dtype
    try:
        if dtype == "float32" and channels == 1:  # the four bytes of a float as RGBA
            return np.asarray(image.convert("RGBA")).view(np.float32)
        if dtype == "uint16" and channels == 1:
            wide = np.asarray(image if image.mode.startswith("I") else image.convert("L"))
            scale = 1 if image.mode.startswith("I") else 257
            return wide.astype(np.uint16)[..., None] * np.uint16(scale)
        if dtype == "uint8" and channels in (1, 3, 4):
            return _eight_bits(image, channels)
    except Exception as error:  # Pillow raises nearly anything on damaged files
        raise ValueError(f"has a damaged image ({error})") from error
    raise ValueError(f"has images of {channels} channels of {dtype}, which this reader cannot read")


def image_size(encoded: Buffer) -> tuple[int, int]:
    """Returns (h, w) of an encoded image; decodes no pixels.

    Raises:
      ValueError: the file is damaged.
    """
    width, height = _open_image(encoded, (-1, -1, -1)).size
    return height, width


def decode_text(encoded: Buffer) -> str:
    r"""Returns a text; bytes that are no UTF-8 as `\xNN`."""
    return bytes(encoded).decode("utf-8", "backslashreplace")


def object_array(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Returns `[n]` objects, one per array."""
    objects = np.empty(len(arrays), object)
    for place, array in enumerate(arrays):
        objects[place] = array
    return objects


def numpy_dtype(name: str) -> np.dtype:
    """Returns the dtype of numbers of a name in features.json."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _checked(values: Values | None, expected: Literal["bytes", "float", "int"]) -> Values:
    """Returns the values, none if the record has none; raises if they are of another type."""
    if values is None or not values.spans:
        return Values(expected, ())
    if values.kind != expected:
        raise ValueError(f"holds values of type {values.kind}, expected {expected}")
    return values


def _open_image(encoded: Buffer, shape: tuple[int, ...]) -> Any:
    """Returns an opened Pillow image of the given (h, w, ...), whose pixels are not decoded."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "reading images needs Pillow; install the extra: pip install 'vla-jax[data]'"
        ) from error
    try:
        image = Image.open(io.BytesIO(encoded))
    except Exception as error:  # Pillow raises nearly anything on damaged files
        raise ValueError(f"has a damaged image ({error})") from error
    width, height = image.size
    expected = tuple(size for size in shape[:2])
    if any(want not in (-1, got) for want, got in zip(expected, (height, width), strict=True)):
        raise ValueError(f"has an image of {height}x{width} pixels, expected {expected}")
    if width * height > _MAX_PIXELS:
        raise ValueError(f"has an image of {height}x{width} pixels, more than {_MAX_PIXELS}")
    return image


def _eight_bits(image: Any, channels: int) -> np.ndarray:
    """Returns `[h, w, channels]` uint8; alpha is dropped, 16 bits are cut, as TensorFlow does."""
    if image.mode.startswith("I"):  # 16 bits, gray
        gray = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)[..., None]
        opaque = np.full_like(gray, 255)
        return np.concatenate([gray] * min(channels, 3) + [opaque] * (channels == 4), axis=-1)
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels[..., None] if channels == 1 else pixels


def _cast(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """Returns float32 or int64 numbers as the feature's dtype, as TFDS does."""
    if dtype == "uint64":
        return numbers.view(np.uint64)
    with np.errstate(over="ignore", invalid="ignore"):  # infinity beyond float16's range
        return numbers.astype(numpy_dtype(dtype), copy=False)


def _numbers(
    data: Buffer, values: Values | None, feature: TfFeature, num_elements: int | None
) -> np.ndarray:
    if "float" in feature.dtype:
        numbers = tf_example.floats(data, _checked(values, "float"))
    else:
        numbers = tf_example.integers(data, _checked(values, "int"))
    return _shaped(_cast(numbers, feature.dtype), feature.shape, num_elements)


def _texts(
    data: Buffer, values: Values | None, feature: TfFeature, num_elements: int | None
) -> np.ndarray:
    spans = tf_example.pieces(data, _checked(values, "bytes"))
    texts = np.array([decode_text(data[start:stop]) for start, stop in spans], np.str_)
    return _shaped(texts, feature.shape, num_elements)


def _each(
    decode: Callable[[Buffer, TfFeature], np.ndarray],
    data: Buffer,
    values: Values | None,
    feature: TfFeature,
    num_elements: int | None,
) -> np.ndarray:
    """Returns elements that are one byte string each."""
    spans = bytes_spans(data, values, num_elements)
    return _stacked([decode(data[start:stop], feature) for start, stop in spans], feature)


def _decode_array(encoded: Buffer, feature: TfFeature) -> np.ndarray:
    """Returns an array `shape` that is stored as bytes; unknown sizes make it one axis."""
    dtype = numpy_dtype(feature.dtype)
    fixed = -1 not in feature.shape
    limit = math.prod(feature.shape) * dtype.itemsize if fixed else _MAX_BYTES
    raw = bytes(encoded)
    if feature.encoding == "zlib":
        try:
            raw = zlib.decompressobj().decompress(raw, limit + 1)
        except zlib.error as error:
            raise ValueError(f"has damaged bytes ({error})") from error
    if len(raw) > limit or (fixed and len(raw) < limit) or len(raw) % dtype.itemsize:
        raise ValueError(f"has an array of {len(raw)} bytes, expected {limit}")
    array = np.frombuffer(raw, dtype)
    if feature.shape.count(-1) > 1:
        return array
    return _shaped(array, feature.shape, None, is_single=True)


def _stacked(arrays: list[np.ndarray], feature: TfFeature) -> np.ndarray:
    """Returns arrays as one; as an array of objects `[n]` if their shape is not fixed."""
    if feature.varies:
        return object_array(arrays)
    empty = np.empty((0, *feature.shape), numpy_dtype(feature.dtype))
    return np.stack(arrays) if arrays else empty


def _shaped(
    flat: np.ndarray, shape: tuple[int, ...], num_elements: int | None, is_single: bool = False
) -> np.ndarray:
    """Returns values `[m]` as `[n, *shape]`, or as `shape` of a single element.

    At most one size may be -1; it is computed if the number of elements is known.
    """
    known = math.prod(size for size in shape if size != -1)
    if -1 not in shape and not is_single:
        if num_elements is None:
            if len(flat) % known if known else len(flat):
                raise ValueError(f"holds {len(flat)} values, expected a multiple of {known}")
            num_elements = len(flat) // known if known else 0
        if len(flat) != num_elements * known:
            raise ValueError(f"holds {len(flat)} values, expected {num_elements} x {known}")
        return flat.reshape(num_elements, *shape)
    number = 1 if is_single else num_elements
    if not number or not known or shape.count(-1) > 1 or len(flat) % (known * number):
        if len(flat) or shape.count(-1) != 1:
            raise ValueError(f"holds {len(flat)} values, which do not have the shape {shape}")
        empty = tuple(max(size, 0) for size in shape)
        return flat.reshape(empty if is_single else (number or 0, *empty))
    size = len(flat) // (known * number)
    sizes = tuple(size if each == -1 else each for each in shape)
    return flat.reshape(sizes if is_single else (number, *sizes))


class FeatureKind(NamedTuple):
    """Storage of the elements of one kind of feature."""

    # decodes all elements; arguments and errors as `decode_values`
    decode: Callable[[Buffer, Values | None, TfFeature, int | None], np.ndarray]
    is_bytes: bool  # an element is one value, of bytes, whatever its shape


# in the order in which they tell the number of steps: what is read fastest first
FEATURE_KINDS = {
    "number": FeatureKind(_numbers, is_bytes=False),
    "text": FeatureKind(_texts, is_bytes=False),
    "image": FeatureKind(partial(_each, decode_image), is_bytes=True),
    "array": FeatureKind(partial(_each, _decode_array), is_bytes=True),
}
