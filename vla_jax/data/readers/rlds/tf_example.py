"""Parser of the wire format of `tf.train.Example`, the message that holds one episode.

    Example  { Features features = 1; }
    Features { map<string, Feature> feature = 1; }         an entry: key = 1, value = 2
    Feature  { BytesList = 1 | FloatList = 2 | Int64List = 3; }    each list: repeated value = 1

A message is a buffer with a range [start, stop); nothing is copied until values are read.

Source: protobuf.dev, "Encoding"; tensorflow/core/example/{example,feature}.proto.
"""

from collections.abc import Collection, Iterator
from typing import Literal, NamedTuple

import numpy as np

Buffer = bytes | memoryview
Span = tuple[int, int]  # [start, stop) in the buffer, bytes
_VARINT, _EIGHT_BYTES, _DELIMITED, _FOUR_BYTES = 0, 1, 2, 5  # wire types
_KINDS: dict[int, Literal["bytes", "float", "int"]] = {1: "bytes", 2: "float", 3: "int"}


class Values(NamedTuple):
    """Values of one feature, still encoded."""

    kind: Literal["bytes", "float", "int"]
    spans: tuple[Span, ...]  # messages BytesList, FloatList or Int64List; values in this order


def parse_example(data: Buffer) -> dict[str, Values]:
    """Returns the features of an `Example` by key; of a repeated key the last, as in protobuf.

    Raises:
      ValueError: `data` is not such a message.
    """
    return dict(_entries(data))


def find_feature(data: Buffer, keys: Collection[bytes]) -> tuple[str, Values] | None:
    """Returns the first feature of an `Example` whose key is one of `keys`; reads only headers.

    Raises:
      ValueError: `data` is not such a message.
    """
    return next(_entries(data, keys), None)


def floats(data: Buffer, values: Values) -> np.ndarray:
    """Returns the numbers `[n]` float32 of a feature of kind "float"."""
    parts = [
        np.frombuffer(data, "<f4", (stop - start) // 4, start)
        for start, stop in _chunks(data, values, _FOUR_BYTES, multiple=4)
    ]
    joined = np.concatenate(parts) if parts else np.empty(0, np.float32)
    return joined.astype(np.float32, copy=False)


def integers(data: Buffer, values: Values) -> np.ndarray:
    """Returns the numbers `[n]` int64 of a feature of kind "int"."""
    parts = [
        decode_varints(np.frombuffer(data, np.uint8, stop - start, start))
        for start, stop in _chunks(data, values, _VARINT)
    ]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def pieces(data: Buffer, values: Values) -> list[Span]:
    """Returns the ranges of the byte strings of a feature of kind "bytes"."""
    return [
        (start, stop)
        for span in values.spans
        for number, wire, start, stop in _fields(data, *span)
        if number == 1 and _is(wire, _DELIMITED)
    ]


def count(data: Buffer, values: Values) -> int:
    """Returns the number of values of a feature."""
    if values.kind == "bytes":
        return len(pieces(data, values))
    if values.kind == "float":
        chunks = _chunks(data, values, _FOUR_BYTES, multiple=4)
        return sum(stop - start for start, stop in chunks) // 4
    return len(integers(data, values))


def decode_varints(encoded: np.ndarray) -> np.ndarray:
    """Returns the numbers `[n]` int64 of packed variable-length integers.

    Args:
      encoded: `[num_bytes]` uint8; seven bits per byte, lowest first, the highest bit set in all
        bytes of a number but the last.

    Raises:
      ValueError: the last number is cut, or one has more than ten bytes.
    """
    is_last = encoded < 0x80
    if is_last.all():
        return encoded.astype(np.int64)
    ends = np.flatnonzero(is_last)
    if not len(ends) or ends[-1] != len(encoded) - 1:
        raise ValueError("an integer is cut")
    starts = np.concatenate([[0], ends[:-1] + 1])
    widths = ends - starts + 1
    if widths.max() > 10:
        raise ValueError("an integer has more than ten bytes")
    numbers = np.zeros(len(ends), np.uint64)
    for place in range(widths.max()):
        has = widths > place
        bits = (encoded[starts[has] + place] & 0x7F).astype(np.uint64)
        numbers[has] |= bits << np.uint64(7 * place)
    return numbers.view(np.int64)


def _entries(data: Buffer, keys: Collection[bytes] | None = None) -> Iterator[tuple[str, Values]]:
    """Yields the features of all keys, or of `keys`, in the order of the buffer."""
    for number, wire, start, stop in _fields(data, 0, len(data)):
        if number != 1 or not _is(wire, _DELIMITED):
            continue
        for inner, inner_wire, begin, end in _fields(data, start, stop):
            if inner == 1 and _is(inner_wire, _DELIMITED):
                entry = _entry(data, begin, end, keys)
                if entry is not None:
                    yield entry


def _entry(
    data: Buffer, start: int, stop: int, keys: Collection[bytes] | None
) -> tuple[str, Values] | None:
    """Returns key and values of an entry of the map; None if the key is not one of `keys`."""
    key, feature = b"", (0, 0)
    for number, wire, begin, end in _fields(data, start, stop):
        if number == 1 and _is(wire, _DELIMITED):
            key = bytes(data[begin:end])
            if keys is not None and key not in keys:
                return None  # before its values are looked at
        elif number == 2 and _is(wire, _DELIMITED):
            feature = begin, end
    if keys is not None and key not in keys:
        return None
    kind, spans = None, []
    for number, wire, begin, end in _fields(data, *feature):
        if number in _KINDS and _is(wire, _DELIMITED):
            if _KINDS[number] != kind:  # members of a oneof: the last kind counts
                kind, spans = _KINDS[number], []
            spans.append((begin, end))
    try:
        name = key.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the key {key[:40]!r} is not UTF-8") from error
    return name, Values(kind or "bytes", tuple(spans))


def _chunks(data: Buffer, values: Values, single: int, multiple: int = 1) -> Iterator[Span]:
    """Yields the ranges of numbers: a packed list is one range, others are one per number."""
    for span in values.spans:
        for number, wire, start, stop in _fields(data, *span):
            if number != 1:
                continue
            if wire not in (_DELIMITED, single) or (stop - start) % multiple:
                raise ValueError(f"a list of numbers has wire type {wire}, {stop - start} bytes")
            yield start, stop


def _fields(data: Buffer, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields (number, wire type, start, stop) of the fields of a message."""
    at = start
    while at < stop:
        tag = data[at]  # nearly always one byte
        tag, at = (tag, at + 1) if tag < 0x80 else _varint(data, at, stop)
        wire, end = tag & 7, at
        if wire == _DELIMITED:
            size = data[at] if at < stop else 0x80
            size, at = (size, at + 1) if size < 0x80 else _varint(data, at, stop)
            end = at + size
        elif wire == _VARINT:
            end = _varint(data, at, stop)[1]
        elif wire in (_FOUR_BYTES, _EIGHT_BYTES):
            end = at + (4 if wire == _FOUR_BYTES else 8)
        else:
            raise ValueError(f"unknown wire type {wire}")
        if end > stop:
            raise ValueError("a field is longer than the message")
        yield tag >> 3, wire, at, end
        at = end


def _varint(data: Buffer, at: int, stop: int) -> tuple[int, int]:
    """Returns an integer and the position behind it."""
    number = shift = 0
    while at < stop and shift < 70:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
    raise ValueError("an integer is cut or has more than ten bytes")


def _is(wire: int, expected: int) -> bool:
    if wire != expected:
        raise ValueError(f"a field has wire type {wire}, expected {expected}")
    return True
