"""A frozen config from the command line: a preset by name, and one flat option per field.

    python -m train.imitate --preset table_lstm --window-size 16 --learning-rate 3e-4

A preset is a function without arguments that returns a config; the first line of its docstring
stands in `--help`, which lists every option with the comment behind its field.
"""

import argparse
import collections
import contextlib
import dataclasses
import inspect
import io
import itertools
import os
import re
import sys
import typing
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from vla_jax import config as configs

Config = TypeVar("Config")
NAMED_PARTS = ("loss", "auxiliary", "dataset")  # parts whose options always carry their name
TRACEBACK = "VLA_JAX_TRACEBACK"  # environment variable that brings the whole traceback back


def run(
    function: Callable[[Config], Any],
    presets: Mapping[str, Callable[[], Config]],
    argv: Sequence[str] | None = None,
    *,
    description: str,
) -> None:
    """Calls `function` with the config that the user asked for, and prints what it returns.

    An error becomes one line on stderr and exit code 2, and a warning one line; the environment
    variable `VLA_JAX_TRACEBACK=1` shows where an error came from instead.

    Args:
      function: the script.
      presets: as for `command_line`.
      argv: as for `command_line`.
      description: as for `command_line`.

    Raises:
      SystemExit: 2 after an error, 130 after Ctrl-C.
    """
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        print(function(command_line(presets, argv, description=description)))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get(TRACEBACK):
            raise
        _stop(f"error: {' '.join(str(error).split())}")


def command_line(
    presets: Mapping[str, Callable[[], Config]],
    argv: Sequence[str] | None = None,
    *,
    description: str,
) -> Config:
    """Returns the config that the user asked for, or ends the program with one clear message.

    An option has the bare name of its field (`--window-size`); only where two parts of the config
    have a field of that name, and for `kind` and `head`, which say nothing without it, does it
    carry the part's name (`--decoder.dropout`). So do all options of the parts `loss`,
    `auxiliary` and `dataset`, whose names alone say too little. The field `path` of a part is
    set by the part's own name too (`--dataset demos/table`, `--dataset.path demos/table`).
    Which of several config classes stands in a union is the preset's choice.

    Args:
      presets: name to a function that makes a config; the first one is the default.
      argv: what follows the program's name; None means the program's own.
      description: what the program does, shown above the presets.

    Raises:
      SystemExit: 0 after `--help`; 2 after a mistake, which is told on stderr.
    """
    import tyro

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default=next(iter(presets)))
    known, rest = parser.parse_known_args(argv)
    if known.preset not in presets:
        _stop(
            f"error: unknown preset '{known.preset}'; {configs.did_you_mean(known.preset, presets)}"
        )
    default = presets[known.preset]()
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            chosen = tyro.cli(
                _flat_class(default, "", ambiguous=_ambiguous(default)),
                description=f"{description}\n\n{_preset_list(presets, known.preset)}",
                args=rest,
            )
    except SystemExit as stopped:
        if stopped.code:
            _stop(_one_line(told.getvalue()))
        raise
    return configs.from_dict(type(default), configs.to_dict(chosen))


def _flat_class(config: Any, part: str, *, ambiguous: Container[str]) -> type:
    """Returns a subclass of the config's class for tyro to read.

    Its defaults are the config's values, each union is narrowed to the member that the config
    holds (tyro would make sub-commands of it), and options are flat; those of `ambiguous` name
    and of `NAMED_PARTS` begin with `part`.
    """
    import tyro

    cls = type(config)
    fields: list[Any] = []
    for name, kind in typing.get_type_hints(cls).items():
        value, about = getattr(config, name), _comment(cls, name)
        if dataclasses.is_dataclass(value):
            kind, marker = _flat_class(value, name, ambiguous=ambiguous), tyro.conf.arg(help=about)
            value = kind()
        elif _fixed(kind):
            marker = tyro.conf.Suppress
        else:
            dotted = part in NAMED_PARTS or (part and name in ambiguous)
            flag = f"{part}.{name}" if dotted else name
            aliases = [f"--{part}"] if part and name == "path" else None
            marker = tyro.conf.arg(name=flag, help=about, prefix_name=False, aliases=aliases)
        fields.append((name, Annotated[kind, marker], dataclasses.field(default=value)))
    return dataclasses.make_dataclass(cls.__name__, fields, bases=(cls,), frozen=True)


def _fixed(kind: Any) -> bool:
    """Returns whether a preset alone sets this field: a union's mark, or a part that is None."""
    members = typing.get_args(kind)
    mark = typing.get_origin(kind) is Literal and len(members) == 1
    return mark or any(dataclasses.is_dataclass(member) for member in members)


def _comment(cls: type, name: str) -> str:
    """Returns the comment behind the field (tyro finds none in a class made at run time)."""
    sources = [inspect.getsource(base) for base in cls.__mro__ if dataclasses.is_dataclass(base)]
    found = re.search(rf"^ +{name}: .*?  # (.*)$", "\n".join(sources), re.MULTILINE)
    return found[1] if found else ""


def _ambiguous(config: Any) -> set[str]:
    """Returns the names that occur in more than one part, and those too vague without theirs."""
    counts = collections.Counter(_leaf_names(config))
    return {"kind", "head", *(name for name, count in counts.items() if count > 1)}


def _leaf_names(config: Any) -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaf_names(value)
        else:
            yield field.name


def _preset_list(presets: Mapping[str, Callable[[], Any]], chosen: str) -> str:
    width = max(map(len, presets))
    lines = [f"  {name:<{width}}  {_first_line(preset)}" for name, preset in presets.items()]
    return "\n".join([f"presets (--preset NAME; below are the values of {chosen}):", *lines])


def _first_line(preset: Callable[[], Any]) -> str:
    return (inspect.getdoc(preset) or "").partition("\n")[0]


def _one_line(box: str) -> str:
    """Returns what tyro tells in a box of several lines, drawn in Unicode or in ASCII."""
    lines = [line.strip("│| ") for line in box.splitlines()]
    is_rule = re.compile("[─-]{10}").search
    parts = [" ".join(group) for rule, group in itertools.groupby(lines, is_rule) if not rule]
    return f"error: {'. '.join(part for part in parts if part and 'full helptext' not in part)}"


def _stop(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(2)
