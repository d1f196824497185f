"""Fields of a Hugging Face `config.json`; absent ones have the original's defaults."""

import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

Json = Mapping[str, Any]
_LARGEST = 2**31 - 1
_MOST_LAYERS = 1000


def section(data: Json, name: str, *, absent: Json = MappingProxyType({})) -> Json:
    """Returns a nested dict of the config, or `absent`.

    Raises:
      ValueError: it is not a dict.
    """
    value = data.get(name)
    if value is None:
        return absent
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a dict, got {value!r}.")
    return value


def number(data: Json, name: str, default: Any, *, least: int = 0) -> Any:
    """Returns a field of the type of its default; None counts as absent.

    Args:
      data: the dict.
      name: of the field.
      default: value if it is absent, not checked.
      least: smallest value of an integer; a float must be above 0.

    Raises:
      ValueError: the field has another type, or is out of range.
    """
    value = data.get(name)
    if value is None:
        return default
    if isinstance(default, bool) or isinstance(value, bool):
        fits = isinstance(default, bool) and isinstance(value, bool)
    elif isinstance(default, float):
        fits = isinstance(value, int | float)
    else:
        fits = isinstance(value, type(default))
    if not fits:
        raise ValueError(f"{name} must be {type(default).__name__}, got {value!r}.")
    if isinstance(default, float):
        if not 0 < value <= sys.float_info.max:
            raise ValueError(f"{name} must be above 0 and finite, got {value!r}.")
        return float(value)
    if type(value) is int and not least <= value <= _LARGEST:
        raise ValueError(f"{name} must be in {least} … {_LARGEST}, got {value}.")
    return value


def check_num_layers(count: int) -> int:
    """Returns the number of layers.

    Raises:
      ValueError: there are so many that a list of their names would fill the memory.
    """
    if count > _MOST_LAYERS:
        raise ValueError(f"the number of layers must be at most {_MOST_LAYERS}, got {count}.")
    return count


def integers(data: Json, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """Returns a field that is a list of integers; None counts as absent.

    Raises:
      ValueError: the field has another type.
    """
    value = data.get(name)
    value = default if value is None else value
    if not isinstance(value, list | tuple) or not all(isinstance(x, int) for x in value):
        raise ValueError(f"{name} must be a list of integers, got {value!r}.")
    return tuple(value)


def rope_theta(data: Json, default: float) -> float:
    """Returns the base of the rotary positions, from the fields of either version.

    Version 4 of transformers writes `rope_theta` and `rope_scaling`, version 5 `rope_parameters`.

    Raises:
      ValueError: the positions are scaled in a way that is not supported.
    """
    rope = {**section(data, "rope_scaling"), **section(data, "rope_parameters")}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise ValueError(
            f"rope_type must be 'default', got {kind!r}; scaled rotary positions are not supported."
        )
    return number(rope, "rope_theta", number(data, "rope_theta", default))


def only(data: Json, name: str, expected: Any) -> None:
    """Raises a ValueError if a field has another value than the only one that is supported."""
    value = data.get(name, expected)
    if value is not None and value != expected:
        raise ValueError(f"{name} must be {expected!r}, got {value!r}, which is not supported.")


def read(data: Json, defaults: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """Returns the fields of a config dataclass from a dict of a `config.json`.

    Args:
      data: the dict.
      defaults: instance of the dataclass with the original's defaults.
      names: our field -> the original's.

    Raises:
      ValueError: a field has another type.
    """
    fields = {ours: number(data, name, getattr(defaults, ours)) for ours, name in names.items()}
    check_num_layers(fields["num_layers"])
    return fields


def write(config: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """Returns the inverse of `read`: the original's fields of a config dataclass."""
    return {name: getattr(config, ours) for ours, name in names.items()}
