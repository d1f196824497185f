"""Frozen dataclasses to JSON and back, typed and strict.

A config is a frozen dataclass of numbers, strings, booleans, None, `Literal`s, tuples and other
configs. Where a field may hold one of several configs, each of them has a field
`kind: Literal["name"] = "name"`, which identifies the class in a file.
"""

import contextlib
import dataclasses
import difflib
import functools
import os
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from vla_jax.files import read_json, write_json

Config = TypeVar("Config")
CLASS = "config_class"  # key in the file of a run, besides the fields: name of the class

Bounds = tuple[float, float]  # least and greatest value, both included
LEAST_FLOAT = 1e-12  # lower bound of floats that must be above 0
MAX_SIZE = 2**24  # upper bound of sizes: arrays of this length can be made
MAX_LENGTH = 2**20  # upper bound of batches, episodes and their steps
MAX_STEPS = 2**28  # upper bound of steps that lie in memory together
MAX_SIDE = 2**14  # upper bound of the sides of images, pixels
MAX_INT = 2**31 - 1  # upper bound of what is only counted or compared, in 32 bits
_INT_BOUNDS: Bounds = (0, MAX_SIZE)  # of integers without bounds of their own
_FLOAT_BOUNDS: Bounds = (-1e12, 1e12)  # of floats: finite, and squares of them too in float32
# Of fields that mean the same in every config. Lists, processes or programs of as many layers,
# latents, taps of a convolution, … are made, so that their bounds are lower than a size's.
_NAMED_BOUNDS: dict[str, Bounds] = {
    "conv_size": (0, 64),
    **dict.fromkeys(("num_layers", "patch_layers", "latent_layers", "num_latents"), (0, 1000)),
    **dict.fromkeys(("num_workers", "num_threads", "num_processes", "prefetch"), (0, 1000)),
    **dict.fromkeys(("action_horizon", "exec_horizon", "action_dim"), (0, 4096)),
    **dict.fromkeys(("num_heads", "num_kv_heads", "num_bins", "max_words"), (0, 2**16)),
    **dict.fromkeys(("image_size", "patch_size"), (0, MAX_SIDE)),
    **dict.fromkeys(("batch_size", "num_envs", "num_simulators", "num_seeds"), (0, MAX_LENGTH)),
    **dict.fromkeys(("num_episodes", "num_demonstrations", "num_videos"), (0, MAX_LENGTH)),
    **dict.fromkeys(("window_size", "num_steps", "max_steps"), (0, MAX_LENGTH)),
    **dict.fromkeys(("num_updates", "log_every", "save_every", "keep", "step"), (0, MAX_INT)),
    **dict.fromkeys(("seed", "first_seed", "noise_seed"), (0, MAX_INT)),
    **dict.fromkeys(("learning_rate", "transformer_learning_rate"), (LEAST_FLOAT, 1000)),
}
_DTYPES = ("float32", "bfloat16", "float16")


def checked(**bounds: Bounds) -> Callable[[type[Config]], type[Config]]:
    """Returns a decorator for a config class that checks the values of all fields.

    It goes below `@dataclass`. Numbers must be finite and inside their bounds, also those in
    tuples and in fields that may be None; `Literal`s must be one of their values; a str field
    `dtype` must name one. Fields with bounds are checked before the class's own `__post_init__`,
    the others after it, since its messages say more.

    Args:
      **bounds: field name -> least and greatest value, if not those of every field of this name, of
        every integer or of every float.
    """

    def decorate(cls: type[Config]) -> type[Config]:
        after = getattr(cls, "__post_init__", None)  # its own or an inherited one
        all_bounds = {**_NAMED_BOUNDS, **getattr(cls, "field_bounds", {}), **bounds}

        @functools.wraps(after or _check_fields)
        def check(self: Any) -> None:
            _check_fields(self, all_bounds, all_bounds)
            if after is not None:
                after(self)
            _check_fields(self, all_bounds)

        cls.field_bounds = all_bounds  # pyright: ignore[reportAttributeAccessIssue]
        cls.__post_init__ = check  # pyright: ignore[reportAttributeAccessIssue]
        return cls

    return decorate


def _check_fields(
    config: Any, bounds: Mapping[str, Bounds], names: Iterable[str] | None = None
) -> None:
    """Checks all fields, or those in `names`."""
    for name, annotation in _hints(type(config)).items():
        if names is None or name in names:
            _check_value(name, annotation, getattr(config, name), bounds.get(name))


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _check_value(name: str, annotation: Any, value: Any, bounds: Bounds | None) -> None:
    """Raises a ValueError in one sentence, with the name, what is expected and the value."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        members = [member for member in args if member is not type(None)]
        if value is not None and len(members) == 1:  # several are configs, which check themselves
            _check_value(name, members[0], value, bounds)
    if origin is typing.Literal and value not in args:
        raise ValueError(f"unknown {name} '{value}'; {did_you_mean(str(value), map(str, args))}")
    if origin is tuple and isinstance(value, tuple):
        members = args[:1] * len(value) if len(args) == 2 and args[1] is Ellipsis else args
        for member, item in zip(members, value, strict=False):
            _check_value(name, member, item, bounds)
    if annotation is str and name == "dtype" and value not in _DTYPES:
        raise ValueError(f"unknown dtype '{value}'; {did_you_mean(str(value), _DTYPES)}")
    if annotation in (int, float) and isinstance(value, int | float):
        low, high = bounds or (_INT_BOUNDS if annotation is int else _FLOAT_BOUNDS)
        if annotation is int and isinstance(value, float):
            raise ValueError(f"{name} must be an integer, got {value}.")
        if not low <= value <= high:  # False for NaN
            expected = f"in [{_short(low)}, {_short(high)}]"
            if value < low:
                expected = f"at least {_short(low)}"
            elif value > high:
                expected = f"at most {_short(high)}"
            raise ValueError(f"{name} must be {expected}, got {_short(value)}.")


def _short(value: float) -> str:
    text = str(value)
    return text if len(text) < 30 else f"a number of {len(text)} digits"


def to_dict(config: Any) -> dict[str, Any]:
    """Returns the config as nested dicts and lists that `json` can write.

    Args:
      config: instance of a dataclass.

    Raises:
      TypeError: a field holds a value of a type that configs do not support.
    """
    return _plain(config, type(config).__name__)


def from_dict(cls: type[Config], data: Mapping[str, Any]) -> Config:
    """Returns the instance of `cls` that `to_dict` converted to `data`.

    Absent fields get their defaults, so that files older than a new option can be read. A field
    that `cls` does not have is an error, so that a misspelt one is not ignored. A class whose
    fields were renamed or moved has a static method `upgrade(data)`, which returns the fields of
    an earlier version under their present names.

    Args:
      cls: the dataclass to make.
      data: field name to value; lists become tuples, integers become floats in float
        fields.

    Raises:
      ValueError: an unknown field or kind, a value of another type, or a missing field.
    """
    return _read(cls, data, cls.__name__)


def save(config: Any, path: str | os.PathLike[str]) -> None:
    """Writes the config as JSON; the file is complete or unchanged.

    Args:
      config: instance of a dataclass.
      path: file to write; its parent folder is created if necessary.
    """
    write_json(path, to_dict(config))


def save_of_run(config: Any, path: str | os.PathLike[str]) -> None:
    """Writes the config of a script as `save` does, with the name of its class.

    It distinguishes runs of two scripts, whose fields may be the same.
    """
    write_json(path, {CLASS: type(config).__name__, **to_dict(config)})


def load(cls: type[Config], path: str | os.PathLike[str]) -> Config:
    """Returns the instance of `cls` that `save` or `save_of_run` wrote to `path`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not JSON, or does not describe a `cls`.
    """
    data = read_json(path, f"a {cls.__name__}")
    found = data.pop(CLASS, cls.__name__)
    if found != cls.__name__:
        raise ValueError(
            f"{path} must be the {cls.__name__} of a run, got the {found} of another script; "
            "choose another folder."
        )
    try:
        return from_dict(cls, data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns the end of a sentence about an unknown name: the choices and the nearest one.

    >>> did_you_mean("lstmm", ("gru", "lstm"))
    "choose from gru, lstm. Did you mean 'lstm'?"
    """
    known = [str(choice) for choice in known]
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
    return f"choose from {', '.join(known)}. Did you mean '{''.join(nearest)}'?"


def check_names(field: str, names: Iterable[str], known: Collection[str]) -> None:
    """Raises a ValueError for the first of a field's names that is not known.

    >>> check_names("decoders", ("lstmm",), ("gru", "lstm"))
    Traceback (most recent call last):
    ValueError: unknown name 'lstmm' in decoders; choose from gru, lstm. Did you mean 'lstm'?
    """
    for name in names:
        if name not in known:
            raise ValueError(f"unknown name '{name}' in {field}; {did_you_mean(name, known)}")


def differences(saved: Any, current: Any) -> list[str]:
    """Returns `PATH was A and is B` for every value that differs, in the order of the fields.

    >>> differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
    ['b.c was 2 and is 3']

    Args:
      saved: nested dicts, as from `to_dict`, or configs; a missing value counts as None.
      current: the same, to compare with.
    """
    return list(_differences(_as_dict(saved), _as_dict(current), ""))


def _as_dict(value: Any) -> Any:
    return to_dict(value) if dataclasses.is_dataclass(value) else value


def _differences(saved: Any, current: Any, path: str) -> Iterator[str]:
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        for name in {**saved, **current}:
            inner = f"{path}.{name}".lstrip(".")
            yield from _differences(saved.get(name), current.get(name), inner)
    elif saved != current:
        yield f"{path} was {saved!r} and is {current!r}"


def _plain(value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value)]
        return {name: _plain(getattr(value, name), f"{path}.{name}") for name in fields}
    if isinstance(value, tuple):
        return [_plain(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(
        f"{path} must be a number, str, bool, None, tuple or config, got {_shown(value)}; "
        "convert it to one of these."
    )


def renamed(names: Mapping[str, str]) -> Callable[[Any], Any]:
    """Returns an `upgrade` for a class whose fields had other names in an earlier version.

    Args:
      names: earlier name -> present name.
    """

    def upgrade(data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {names.get(name, name): value for name, value in data.items()}

    return staticmethod(upgrade)


def _read(annotation: Any, value: Any, path: str) -> Any:
    """Returns `value` as the annotated type; errors begin with `path`."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if dataclasses.is_dataclass(annotation):
        return _read_config(annotation, value, path)
    if origin in (typing.Union, types.UnionType):
        return _read_union(args, value, path)
    if origin is typing.Literal:
        return _read_literal(args, value, path)
    if origin is tuple:
        return _read_tuple(args, value, path)
    return _read_plain(annotation, value, path)


def _read_config(cls: Any, data: Any, path: str) -> Any:
    data = getattr(cls, "upgrade", lambda present: present)(data)
    if not isinstance(data, Mapping):
        raise ValueError(f"{path} must be a dict of {cls.__name__}'s fields, got {_shown(data)}.")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for name in data:
        if name not in fields:
            raise ValueError(f"{path} has no field '{name}'; {did_you_mean(name, fields)}")
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise ValueError(f"{path}.{name} is missing; add it, it has no default.")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _read(hints[name], data[name], f"{path}.{name}") for name in data})


def _read_union(members: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in members:
        return None
    members = tuple(member for member in members if member is not type(None))
    if len(members) == 1:
        return _read(members[0], value, path)
    configs = [member for member in members if dataclasses.is_dataclass(member)]
    if isinstance(value, Mapping) and configs:
        return _read_config(_of_kind(configs, value, path), value, path)
    for member in members:
        with contextlib.suppress(ValueError):  # no type fits: refused below
            return _read(member, value, path)
    raise ValueError(_mismatch(members, value, path))


def _of_kind(configs: list[Any], data: Mapping[str, Any], path: str) -> Any:
    """Returns the config class that the field `kind` of `data` names."""
    by_kind = {
        kind: cls for cls in configs for kind in typing.get_args(typing.get_type_hints(cls)["kind"])
    }
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in by_kind:
        raise ValueError(f"{path}.kind is {_shown(kind)}; {did_you_mean(str(kind), by_kind)}")
    return by_kind[kind]


def _read_literal(choices: tuple[Any, ...], value: Any, path: str) -> Any:
    for choice in choices:
        if value == choice and type(value) is type(choice):
            return choice
    raise ValueError(f"{path} is {_shown(value)}; {did_you_mean(str(value), map(str, choices))}")


def _read_tuple(members: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{path} must be a list, got {_shown(value)}.")
    if len(members) == 2 and members[1] is Ellipsis:
        members = members[:1] * len(value)
    if len(members) != len(value):
        raise ValueError(f"{path} must have {len(members)} items, got {len(value)}.")
    return tuple(
        _read(member, item, f"{path}[{i}]")
        for i, (member, item) in enumerate(zip(members, value, strict=True))
    )


def _read_plain(annotation: Any, value: Any, path: str) -> Any:
    if annotation is float and type(value) is int:
        return float(value)
    if type(value) is annotation:
        return value
    raise ValueError(_mismatch((annotation,), value, path))


def _mismatch(members: tuple[Any, ...], value: Any, path: str) -> str:
    names = " or ".join(getattr(member, "__name__", str(member)) for member in members)
    return f"{path} must be {names}, got {_shown(value)}."


def _shown(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"
