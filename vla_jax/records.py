"""Records in JSON files: a `NamedTuple` per line or per file, read back with its types.

    class Score(NamedTuple):
        policy: str
        average: list[float]

    scores = [record for record in records.read_lines(Score, "results.jsonl")]

Fields are typed as str, bool, int, float, Any, another record, and lists, tuples and dicts of
these, or None. Numbers are finite, and not negative unless `bounds` say so. Everything else is
refused with file, line and field: a damaged result must not appear in a table.
"""

import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from vla_jax.files import Path, read_json, read_json_lines

Record = TypeVar("Record", bound=NamedTuple)
Bounds = Mapping[str, tuple[float, float]]  # field -> least and greatest value of its numbers
_LARGEST = 1e300  # finite, and the comparisons refuse NaN
SIGNED = (-_LARGEST, _LARGEST)
_NOT_NEGATIVE = (0.0, _LARGEST)
_NONE: Bounds = types.MappingProxyType({})


def read_lines(
    cls: type[Record],
    path: Path,
    *,
    bounds: Bounds = _NONE,
    select: Callable[[Mapping[str, Any]], bool] = lambda line: True,
    fault: Callable[[Record], str] = lambda record: "",
) -> Iterator[Record]:
    """Yields the records of a file with one JSON object per line; none if the file is missing.

    Args:
      cls: type of the records.
      path: the file; a last line that a killed program did not finish is ignored.
      bounds: of the numbers of a field, also inside lists and dicts.
      select: returns False for a line that is passed over, such as one of other settings.
      fault: returns what is wrong with a record, "" if nothing is.

    Raises:
      ValueError: a line is damaged.
    """
    for number, line in enumerate(read_json_lines(path), 1):
        try:
            if not select(line):
                continue
            record = read(cls, line, bounds=bounds)
            _refuse(fault(record))
        except ValueError as error:
            raise ValueError(
                f"{path} has a damaged line {number} ({error}); delete that line."
            ) from error
        yield record


def read_file(
    cls: type[Record],
    path: Path,
    content: str,
    *,
    bounds: Bounds = _NONE,
    fault: Callable[[Record], str] = lambda record: "",
) -> Record:
    """Returns the record in a JSON file.

    Args:
      cls: type of the record.
      path: the file.
      content: what it should hold, for the error messages.
      bounds: as for `read_lines`, like the next one.
      fault: returns what is wrong with the record.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged.
    """
    data = read_json(path, content)
    try:
        record = read(cls, data, bounds=bounds)
        _refuse(fault(record))
    except ValueError as error:
        raise ValueError(
            f"{path} must hold {content}, but {error}; restore it, or delete it and run the same "
            "command again."
        ) from error
    return record


def read(cls: type[Record], data: Any, *, bounds: Bounds = _NONE) -> Record:
    """Returns a record from what JSON holds of it.

    Args:
      cls: type of the record.
      data: its `_asdict()`, with lists for tuples.
      bounds: as for `read_lines`.

    Raises:
      ValueError: a field is missing, unknown or damaged.
    """
    return _read_record(cls, data, "", bounds)


def get(line: Mapping[str, Any], name: str, kind: type) -> Any:
    """Returns a field of a line, for `select`.

    Raises:
      ValueError: the line lacks the field, or its value is of another type.
    """
    return _read_value(kind, _present(line, [name], "")[name], name, _NOT_NEGATIVE, _NONE)


def _refuse(reason: str) -> None:
    if reason:
        raise ValueError(reason)


def _present(data: Mapping[str, Any], names: Collection[str], where: str) -> Mapping[str, Any]:
    missing = ", ".join(f"{where}{name}" for name in names if name not in data)
    _refuse(missing and f"{missing} is missing")
    return data


def _read_record(cls: Any, data: Any, where: str, bounds: Bounds) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{where.rstrip('.') or 'it'} must be an object, got {_shown(data)}")
    hints = typing.get_type_hints(cls)
    _present(data, [name for name in hints if name not in cls._field_defaults], where)
    unknown = ", ".join(f"{where}{name}" for name in data if name not in hints)
    _refuse(unknown and f"{unknown} is unknown")
    values = {
        name: _read_value(hints[name], value, where + name, bounds.get(name, _NOT_NEGATIVE), bounds)
        for name, value in data.items()
    }
    return cls(**values)


def _read_value(
    annotation: Any, value: Any, name: str, within: tuple[float, float], bounds: Bounds
) -> Any:
    """Returns a value with the type of the annotation.

    Args:
      annotation: of the field, or of a part of it.
      value: from JSON.
      name: for the error message.
      within: bounds of the field's numbers.
      bounds: of the fields of records inside it.
    """
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin in (typing.Union, types.UnionType):  # with None
        if value is None:
            return None
        (annotation,) = (arg for arg in args if arg is not type(None))
        return _read_value(annotation, value, name, within, bounds)
    if hasattr(annotation, "_field_defaults"):
        return _read_record(annotation, value, f"{name}.", bounds)
    if origin in (list, tuple) and isinstance(value, list | tuple):
        is_fixed = origin is tuple and args[-1] is not Ellipsis
        if is_fixed and len(value) != len(args):
            raise ValueError(f"{name} must have {len(args)} items, got {len(value)}")
        members = args if is_fixed else args[:1] * len(value)
        return origin(
            _read_value(member, item, f"{name}[{index}]", within, bounds)
            for index, (member, item) in enumerate(zip(members, value, strict=True))
        )
    if origin is dict and isinstance(value, dict):
        return {
            _read_key(args[0], key, name): _read_value(
                args[1], each, f"{name}.{key}", within, bounds
            )
            for key, each in value.items()
        }
    if annotation in (int, float) and type(value) in (int, annotation):
        return annotation(_in_bounds(value, name, within))
    if type(value) is not annotation:
        kind = list if origin is tuple else origin or annotation  # JSON has lists alone
        expected = getattr(kind, "__name__", str(kind))
        raise ValueError(f"{name} must be {expected}, got {_shown(value)}")
    return value


def _read_key(kind: Any, key: str, name: str) -> Any:
    if kind is int and not key.isdecimal():
        raise ValueError(f"{name} must have whole numbers as names, got {_shown(key)}")
    return kind(key)


def _in_bounds(value: float, name: str, within: tuple[float, float]) -> float:
    low, high = within
    if not low <= value <= high:
        limits = "" if within == SIGNED else f" and in [{low:g}, {high:g}]"
        limits = " and not negative" if within == _NOT_NEGATIVE else limits
        raise ValueError(f"{name} must be finite{limits}, got {value!r:.40}")
    return value


def _shown(value: Any) -> str:
    return f"{value!r:.40} ({type(value).__name__})"
