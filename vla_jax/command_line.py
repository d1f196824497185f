"""A frozen config from the command line: a preset by name, and one flat option per field.

    python -m train.imitate --preset table_lstm --window-size 16 --learning-rate 3e-4

A preset is a function without arguments that returns a config; the first line of its docstring
appears in `--help`, which lists every option with the comment of its field.

Every command of this project ends with one of these exit codes: 0 done; 2 wrong input, with one
sentence on stderr; 130 interrupted by Ctrl-C; 141 nobody reads the output (`| head`);
143 ended by SIGTERM.
"""

import argparse
import ast
import collections
import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import os
import re
import sys
import textwrap
import tokenize
import typing
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, NoReturn, TypeVar

from vla_jax import compile_cache, output_pipe, stopping
from vla_jax import config as configs

Config = TypeVar("Config")
Result = TypeVar("Result")
NAMED_PARTS = ("loss", "auxiliary", "dataset", "lora")  # their options always carry the name
_OUTPUT_CLOSED = 141  # exit code of a program whose output nobody reads, as after SIGPIPE
TRACEBACK = "VLA_JAX_TRACEBACK"  # environment variable: show the traceback of an error


def run(
    function: Callable[[Config], Any],
    presets: Mapping[str, Callable[[], Config]],
    argv: Sequence[str] | None = None,
    *,
    description: str,
) -> None:
    """Calls `function` with the config from the command line, and prints what it returns.

    Args:
      function: the script.
      presets: as for `command_line`.
      argv: as for `command_line`.
      description: as for `command_line`.

    Raises:
      SystemExit: 2 after an error, 130 after Ctrl-C, 141 if nobody reads the output, 143 after
        SIGTERM.
    """
    with exit_codes():
        print(function(command_line(presets, argv, description=description)))


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Turns errors inside the block into one line on stderr and an exit code.

    Warnings become one line too. The environment variable `VLA_JAX_TRACEBACK=1` shows the whole
    traceback of an error instead.

    Raises:
      SystemExit: 2 after an error, 130 after Ctrl-C, 141 if nobody reads the output, 143 after
        SIGTERM.
    """
    before = warnings.formatwarning
    about_cache = compile_cache.make_line()

    def one_line(message: Warning | str, *_: object, **__: object) -> str:
        line = about_cache(message)
        return "" if line == "" else f"warning: {line or message}\n"

    warnings.formatwarning = one_line
    try:
        compile_cache.protect()
        with stopping.exit_on_sigterm():
            yield
    except KeyboardInterrupt:
        output_pipe.drop_unread()
        raise SystemExit(130) from None
    except SystemExit as end:  # also after --help
        if output_pipe.drop_unread() and not end.code:
            raise SystemExit(_OUTPUT_CLOSED) from None
        raise
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get(TRACEBACK):
            raise
        if isinstance(error, BrokenPipeError) and not output_pipe.has_reader():
            output_pipe.drop()
            raise SystemExit(_OUTPUT_CLOSED) from None
        output_pipe.drop_unread()
        _stop(f"error: {' '.join(_sentence(error).split())}")
    else:
        if output_pipe.drop_unread():
            raise SystemExit(_OUTPUT_CLOSED)
    finally:
        warnings.formatwarning = before


def program() -> str | None:
    """Returns "python -m NAME" for the module that was started, for the usage line."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return None if spec is None else f"python -m {spec.name.removesuffix('.__main__')}"


def command_line(
    presets: Mapping[str, Callable[[], Config]],
    argv: Sequence[str] | None = None,
    *,
    description: str,
) -> Config:
    """Returns the config from the command line, or ends the program with one clear message.

    An option has the bare name of its field (`--window-size`). The part's name is prepended
    (`--decoder.dropout`) if two parts of the config have a field of that name, for the fields
    `kind` and `head`, and for all fields of the parts `loss`, `auxiliary`, `dataset` and `lora`,
    whose bare names would be ambiguous. The field `path` of a part can also be set by the part's
    own name (`--dataset demos/table`, `--dataset.path demos/table`). The other fields of `dataset`
    have their bare name as well (`--cameras`, `--skip-bad-episodes`), except `kind` and those that
    the config itself has too.
    Where a field may hold one of several config classes, the preset determines which.

    Args:
      presets: name to a function that makes a config; the first one is the default.
      argv: arguments after the program's name; None means `sys.argv[1:]`.
      description: what the program does, shown above the presets.

    Raises:
      SystemExit: 0 after `--help`; 2 after a mistake, with one line on stderr.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default=next(iter(presets)))
    known, rest = parser.parse_known_args(argv)
    if known.preset not in presets:
        _stop(
            f"error: unknown preset '{known.preset}'; {configs.did_you_mean(known.preset, presets)}"
        )
    default = presets[known.preset]()
    _refuse_retired(default, rest)
    chosen = parse(
        _flat_class(
            default,
            "",
            ambiguous=_ambiguous(default),
            taken=_own_names(default),
            described=bool({"-h", "--help"} & set(rest)),
        ),
        rest,
        prog=program(),
        description=f"{description}\n\n{_preset_list(presets, known.preset)}",
    )
    try:
        return configs.from_dict(type(default), configs.to_dict(_complete(chosen)))
    except ValueError as error:
        _stop(f"error: {error}")


def parse(
    make: Callable[..., Result],
    argv: Sequence[str] | None,
    *,
    prog: str | None,
    description: str | None = None,
) -> Result:
    """Returns `make(…)`, called with its arguments from the command line.

    Args:
      make: a function or config class, whose parameters become options.
      argv: arguments after the program's name; None means `sys.argv[1:]`.
      prog: name of the program in the usage line; None means that of `sys.argv`.
      description: text above the options; None means the docstring of `make`.

    Raises:
      SystemExit: 0 after `--help`; 2 after a mistake, with one line on stderr.
    """
    import tyro

    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(make, args=argv, prog=prog, description=description)
    except SystemExit as stopped:
        if stopped.code:
            _stop(_one_line(messages.getvalue()) + _takes_no_value(messages.getvalue(), make, argv))
        raise


def _flat_class(
    config: Any,
    part: str,
    *,
    ambiguous: Container[str],
    taken: Container[str],
    described: bool,
    hidden: Container[str] = (),
) -> type:
    """Returns a subclass of the config's class for tyro to read.

    Its defaults are the config's values, each union is narrowed to the member that the config
    holds (tyro would make sub-commands of it), and options are flat; those named in `ambiguous`
    and those of `NAMED_PARTS` begin with `part`. There are none for the fields in `hidden`, and for
    those that a class lists as DERIVED. The data set has its bare names too, if not in `taken`.
    If `described`, their help texts are the comments: slow to read, and only `--help` shows them.
    """
    import tyro

    cls = type(config)
    about = collections.defaultdict(str, comments(cls) if described else {})
    derived = getattr(cls, "DERIVED", ())
    fields: list[Any] = []
    for name, kind in typing.get_type_hints(cls).items():
        if typing.get_origin(kind) is ClassVar:
            continue
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            inner = [path.partition(".")[2] for path in derived if path.startswith(f"{name}.")]
            kind = _flat_class(
                value, name, ambiguous=ambiguous, taken=taken, described=described, hidden=inner
            )
            marker, value = tyro.conf.arg(help=about[name]), kind()
        elif _fixed(kind) or name in hidden:
            marker = tyro.conf.Suppress
        else:
            dotted = part in NAMED_PARTS or (part and name in ambiguous)
            flag = f"{part}.{name}" if dotted else name
            aliases = [f"--{part}"] if part and name == "path" else None
            if part == "dataset" and name not in taken:
                aliases = [f"--{name.replace('_', '-')}"]
            marker = tyro.conf.arg(name=flag, help=about[name], prefix_name=False, aliases=aliases)
        fields.append((name, Annotated[kind, marker], dataclasses.field(default=value)))
    # Checked once all options are known, by the class itself.
    unchecked = {"__post_init__": lambda self: None}
    return dataclasses.make_dataclass(
        cls.__name__, fields, bases=(cls,), namespace=unchecked, frozen=True
    )


def _refuse_retired(config: Any, argv: Sequence[str]) -> None:
    """Ends the program if an option is one that a class of the config lists as RETIRED."""
    given = {argument.partition("=")[0].replace("_", "-") for argument in argv}
    for name, instead in getattr(type(config), "RETIRED", {}).items():
        flag = f"--{name.replace('_', '-')}"
        if flag in given:
            _stop(f"error: {flag} is no longer an option; use {instead}.")
    for field in dataclasses.fields(config):
        part = getattr(config, field.name)
        if dataclasses.is_dataclass(part):
            _refuse_retired(part, argv)


def _complete(config: Any) -> Any:
    """Returns the config with the fields that its classes derive from others (`complete`)."""
    parts = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    changed = {name: _complete(v) for name, v in parts.items() if dataclasses.is_dataclass(v)}
    config = dataclasses.replace(config, **changed)
    return config.complete() if hasattr(config, "complete") else config


def _fixed(kind: Any) -> bool:
    """Returns True if only a preset can set this field: a union's tag, or a part that is None."""
    members = typing.get_args(kind)
    is_tag = typing.get_origin(kind) is Literal and len(members) == 1
    return is_tag or any(dataclasses.is_dataclass(member) for member in members)


@functools.cache
def comments(cls: type) -> dict[str, str]:
    """Returns the comment of every field of a dataclass: after it, or on the lines above it.

    A field that a subclass redeclares without a comment keeps that of the base class. tyro finds
    no comments in a class that is made at run time.
    """
    comment_by_field: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        source = textwrap.dedent(inspect.getsource(base))
        lines = _comment_lines(source)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                text = _comment_of(node, lines)
                comment_by_field[node.target.id] = text or comment_by_field.get(node.target.id, "")
    return comment_by_field


def _comment_of(node: ast.AnnAssign, lines: "dict[int, _Comment]") -> str:
    same_lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
    text = [lines[number].text for number in same_lines if number in lines]
    number = node.lineno - 1
    while not any(line in lines for line in same_lines) and number in lines and lines[number].alone:
        text.insert(0, lines[number].text)
        number -= 1
    return " ".join(text)


class _Comment(NamedTuple):
    """One comment of a source text."""

    text: str
    alone: bool  # True if the line holds nothing else


def _comment_lines(source: str) -> dict[int, _Comment]:
    """Returns the comments of a source text by line number."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        token.start[0]: _Comment(token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokens
        if token.type == tokenize.COMMENT
    }


def _ambiguous(config: Any) -> set[str]:
    """Returns the field names that occur in more than one part, and `kind` and `head`."""
    counts = collections.Counter(_leaf_names(config))
    return {"kind", "head", *(name for name, count in counts.items() if count > 1)}


def _own_names(config: Any) -> set[str]:
    """Returns the names of the fields outside any part, and those with a fixed meaning."""
    return {"kind", "head", "path", *(field.name for field in dataclasses.fields(config))}


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
    """Returns the text of tyro's error box (Unicode or ASCII borders) as one line."""
    lines = [line.strip("│| ") for line in box.splitlines()]
    is_rule = re.compile("[─-]{10}").search
    parts = [" ".join(group) for rule, group in itertools.groupby(lines, is_rule) if not rule]
    parts = [part for part in parts if part and "full helptext" not in part]
    if len(parts) > 1 and parts[1].startswith(parts[0]):  # the title again
        parts = parts[1:]
    return f"error: {'. '.join(parts)}"


def _takes_no_value(box: str, make: Callable[..., Any], argv: Sequence[str] | None) -> str:
    """Returns the end of a message about a value that follows an option without values."""
    values = re.findall(r"Unrecognized options: ([^,\s]*)", box)
    for option, value in itertools.pairwise(sys.argv[1:] if argv is None else argv):
        if value in values and not value.startswith("--") and _is_flag(make, option):
            return f"; {option} takes no value."
    return ""


def _is_flag(make: Callable[..., Any], option: str) -> bool:
    """Returns True for `--name` and `--no-name` of a bool parameter, also one of a part."""
    kinds = typing.get_type_hints(make)
    parts = [kind for kind in kinds.values() if isinstance(kind, type)]
    name = option.rpartition(".")[2].removeprefix("--").replace("-", "_")
    return option.startswith("--") and (
        bool in (kinds.get(name), kinds.get(name.removeprefix("no_")))
        or any(_is_flag(part, option) for part in parts if dataclasses.is_dataclass(part))
    )


def _sentence(error: Exception) -> str:
    """Returns the message of an error; one of the system gets a remedy."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}; give another path, or make this one usable."
    return str(error)


def _stop(message: str) -> NoReturn:
    """Ends the program with a message, in which words that are too long to read are shortened."""
    long = r"\S{400,}|(?:\S{50,} ){4,}\S*"  # the second: a value that tyro wrapped
    print(re.sub(long, lambda value: f"{value[0][:60]}…", message), file=sys.stderr)
    raise SystemExit(2)
