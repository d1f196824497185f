"""Fields of a Hugging Face `config.json`; absent ones have the original's defaults."""

from collections.abc import Mapping
from typing import Any

Json = Mapping[str, Any]


def section(data: Json, name: str) -> Json:
    """Returns a nested dict of the config; an absent one is empty.

    Raises:
      ValueError: it is not a dict.
    """
    value = data.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a dict, got {value!r}.")
    return value


def number(data: Json, name: str, default: Any) -> Any:
    """Returns a field of the type of its default; None counts as absent.

    Raises:
      ValueError: the field has another type.
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
    return float(value) if isinstance(default, float) else value


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
    return {ours: number(data, name, getattr(defaults, ours)) for ours, name in names.items()}


def write(config: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """Returns the inverse of `read`: the original's fields of a config dataclass."""
    return {name: getattr(config, ours) for ours, name in names.items()}
