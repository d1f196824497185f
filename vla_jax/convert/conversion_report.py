"""What became of every tensor: used, missing, left over, of another shape, cast.

Nothing is skipped in silence: a name is in exactly one of `used`, `left_over`, `buffers` and
`misshapen`, and what the params needed and did not find is in `missing`.
"""

import fnmatch
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from vla_jax.convert.arrays import as_numpy

Shape = tuple[int, ...]
_LISTED = 6  # names that a sentence or a row of the table has room for


class Report(NamedTuple):
    """What became of the tensors of a foreign file."""

    used: Mapping[str, Shape]  # name -> shape of what is in the params now
    missing: Mapping[str, Shape]  # name -> shape of what the params need and the file lacks
    left_over: Mapping[str, Shape]  # name -> shape of what the params have no place for
    misshapen: Mapping[str, tuple[Shape, Shape]]  # name -> (shape expected, shape found)
    cast: Mapping[str, str]  # name -> dtype that became float32
    buffers: Mapping[str, Shape] = {}  # name -> shape of constants that are no weights
    ignored: Sequence[str] = ()  # entries of the file beside its tensors


def compare(
    expected: Mapping[str, Shape], tensors: Mapping[str, Any], buffers: Iterable[str] = ()
) -> Report:
    """Returns what becomes of tensors where those of `expected` are needed.

    Args:
      expected: name to shape of what the params need.
      tensors: name to array (NumPy, JAX or torch).
      buffers: names of constants among the tensors.
    """
    shapes = {name: tuple(np.shape(tensor)) for name, tensor in tensors.items()}
    used = {name: shape for name, shape in shapes.items() if expected.get(name) == shape}
    constants = {name: shapes[name] for name in buffers}
    dtypes = {name: as_numpy(tensors[name]).dtype.name for name in used}
    return Report(
        used=used,
        missing={name: shape for name, shape in expected.items() if name not in shapes},
        left_over={
            name: shape
            for name, shape in shapes.items()
            if name not in expected and name not in constants
        },
        misshapen={
            name: (shape, shapes[name])
            for name, shape in expected.items()
            if name in shapes and name not in used
        },
        cast={name: dtype for name, dtype in dtypes.items() if dtype != "float32"},
        buffers=constants,
    )


def check(
    report: Report,
    wanted: str,
    remedy: str,
    *,
    left_over: Iterable[str] | None = None,
    allow_missing: str | Sequence[str] = (),
) -> None:
    """Raises a ValueError unless all that is needed is there, and nothing else.

    Args:
      report: of a conversion.
      wanted: how the sentence begins: what must be what.
      remedy: how it ends.
      left_over: names among `report.left_over` that nothing excuses; None means all.
      allow_missing: glob or globs of names that may be missing.
    """
    globs = (allow_missing,) if isinstance(allow_missing, str) else allow_missing
    missing = [
        name
        for name in report.missing
        if not any(fnmatch.fnmatchcase(name, glob) for glob in globs)
    ]
    more = list(report.left_over if left_over is None else left_over)
    faults = {  # what is left over may be a whole model, and is not told in full
        "missing": (len(missing), ", ".join(missing)),
        "of another shape": (len(report.misshapen), ", ".join(_misshapen(report))),
        "left over": (len(more), listed(more)),
    }
    told = [f"{count} {what}: {names}" for what, (count, names) in faults.items() if count]
    if told:
        raise ValueError(f"{wanted}, got {'; '.join(told)}; {remedy}.")


def warn(report: Report) -> None:
    """Warns the caller's caller of what was cast, and of what was missing and drawn."""
    if report.cast:
        dtypes = ", ".join(sorted(set(report.cast.values())))
        warnings.warn(f"{len(report.cast)} tensors became float32, from {dtypes}", stacklevel=3)
    if report.missing:
        names = ", ".join(report.missing)
        warnings.warn(
            f"{len(report.missing)} tensors are missing and drawn at random: {names}", stacklevel=3
        )


def to_json(report: Report) -> dict[str, Any]:
    """The report as what JSON can hold."""
    return {
        name: list(part) if name == "ignored" else dict(part)
        for name, part in report._asdict().items()
    }


def table(report: Report) -> Table:
    """The report for `rich` to print; rows of what did not happen are left out.

    What is amiss is named in full, what is used or left over by its first names.
    """
    drawn = Table()
    for column in ("", "tensors", "numbers", "which"):
        drawn.add_column(column, justify="left" if column in ("", "which") else "right")
    misshapen = {name: got for name, (_, got) in report.misshapen.items()}
    rows = (
        ("used", report.used, listed(list(report.used))),
        ("missing, drawn", report.missing, "\n".join(report.missing)),
        ("left over", report.left_over, listed(list(report.left_over))),
        ("of another shape", misshapen, "\n".join(_misshapen(report))),
        ("buffers", report.buffers, listed(list(report.buffers))),
    )
    for what, shapes, names in rows:
        if shapes:
            count = sum(math.prod(shape) for shape in shapes.values())
            drawn.add_row(what, f"{len(shapes)}", f"{count:,}", names)
    if report.cast:
        dtypes = sorted(set(report.cast.values()))
        drawn.add_row("cast to float32", f"{len(report.cast)}", "", f"from {listed(dtypes)}")
    if report.ignored:
        drawn.add_row("no tensors, ignored", "", "", listed(report.ignored))
    return drawn


def listed(names: Sequence[str]) -> str:
    """The names, or the first of them and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _misshapen(report: Report) -> list[str]:
    return [
        f"{name} (expected {list(expected)}, got {list(got)})"
        for name, (expected, got) in report.misshapen.items()
    ]
