"""Report of a conversion: which tensors are used, missing, left over, of another shape, cast.

Every tensor is in exactly one of `used`, `left_over`, `buffers` and `misshapen`; those that the
params need and the file lacks are in `missing`.
"""

import fnmatch
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from rich.table import Table

from vla_jax.convert.arrays import as_numpy

Shape = tuple[int, ...]
_LARGE = 1e6  # magnitude above which a weight is named
_NOT_FINITE = "NaN or infinity"
_MAX_NAMES = 6  # names listed in a sentence or a row of the table


class Report(NamedTuple):
    """Classification of the tensors of a foreign file."""

    used: Mapping[str, Shape]  # name -> shape of tensors in the params
    missing: Mapping[str, Shape]  # name -> shape of tensors needed, not in the file
    left_over: Mapping[str, Shape]  # name -> shape of tensors without a counterpart
    misshapen: Mapping[str, tuple[Shape, Shape]]  # name -> (expected shape, shape in the file)
    cast: Mapping[str, str]  # name -> dtype, cast to float32
    buffers: Mapping[str, Shape] = {}  # name -> shape of constants, not weights
    ignored: Sequence[str] = ()  # entries of the file other than its tensors
    unusual: Mapping[str, str] = {}  # name -> what trained weights do not have, such as NaN


def compare(
    expected: Mapping[str, Shape], tensors: Mapping[str, Any], buffers: Iterable[str] = ()
) -> Report:
    """Compares tensors with those that are expected.

    Args:
      expected: name to shape of the tensors that the params need.
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


def unusual(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Returns name -> description of tensors with values that trained weights do not have.

    Args:
      tensors: name to array (NumPy, JAX or torch).
    """
    found = {}
    for name, tensor in tensors.items():
        array = as_numpy(tensor)
        if not array.size or not jnp.issubdtype(array.dtype, jnp.floating):
            continue
        low, high = float(array.min()), float(array.max())  # NaN if there is one
        if not (math.isfinite(low) and math.isfinite(high)):
            found[name] = _NOT_FINITE
        elif max(-low, high) > _LARGE:
            found[name] = f"values up to {max(-low, high):.2g}"
        elif array.ndim > 1 and low == high:
            found[name] = f"all values {low:.2g}"
    return found


def check(
    report: Report,
    requirement: str,
    remedy: str,
    *,
    left_over: Iterable[str] | None = None,
    allow_missing: str | Sequence[str] = (),
) -> None:
    """Raises a ValueError unless all tensors fit and none is missing or left over.

    Args:
      report: of a conversion.
      requirement: begins the message, such as "params must be …".
      remedy: ends the message.
      left_over: names in `report.left_over` that are errors; None means all.
      allow_missing: glob or globs of names that may be missing.
    """
    globs = (allow_missing,) if isinstance(allow_missing, str) else allow_missing
    missing = [
        name
        for name in report.missing
        if not any(fnmatch.fnmatchcase(name, glob) for glob in globs)
    ]
    unexpected = list(report.left_over if left_over is None else left_over)
    faults = {  # left-over tensors may be a whole model: not all are named
        "missing": (len(missing), ", ".join(missing)),
        "of another shape": (len(report.misshapen), ", ".join(_misshapen(report))),
        "left over": (len(unexpected), abbreviate(unexpected)),
    }
    parts = [f"{count} {fault}: {names}" for fault, (count, names) in faults.items() if count]
    if parts:
        raise ValueError(f"{requirement}, got {'; '.join(parts)}; {remedy}.")


def warn(report: Report, tensors: Mapping[str, Any]) -> None:
    """Warns, at the line of the user's call, of tensors that were cast or randomly initialised.

    Also of those that hold NaN or infinity.

    Args:
      report: of a conversion.
      tensors: name to array, as for `compare`.
    """
    if report.cast:
        dtypes = ", ".join(sorted(set(report.cast.values())))
        warnings.warn(f"{len(report.cast)} tensors cast from {dtypes} to float32", stacklevel=3)
    if report.missing:
        names = ", ".join(report.missing)
        warnings.warn(
            f"{len(report.missing)} tensors missing, randomly initialised: {names}", stacklevel=3
        )
    found = unusual({name: tensors[name] for name in report.used})
    bad = [name for name, words in found.items() if words == _NOT_FINITE]
    if bad:
        warnings.warn(f"tensors with {_NOT_FINITE} ({len(bad)}): {abbreviate(bad)}", stacklevel=3)


def to_json(report: Report) -> dict[str, Any]:
    """Returns the report as lists and dicts for JSON."""
    return {
        name: list(part) if name == "ignored" else dict(part)
        for name, part in report._asdict().items()
    }


def table(report: Report) -> Table:
    """Returns the report as a table for `rich`, without empty rows.

    All missing and misshapen tensors are named, but only the first few of the others.
    """
    shown = Table()
    for column in ("", "tensors", "parameters", "names"):
        shown.add_column(column, justify="left" if column in ("", "names") else "right")
    misshapen = {name: got for name, (_, got) in report.misshapen.items()}
    rows = (
        ("used", report.used, abbreviate(list(report.used))),
        ("missing, initialised", report.missing, "\n".join(report.missing)),
        ("left over", report.left_over, abbreviate(list(report.left_over))),
        ("of another shape", misshapen, "\n".join(_misshapen(report))),
        ("buffers", report.buffers, abbreviate(list(report.buffers))),
    )
    for label, shapes, names in rows:
        if shapes:
            count = sum(math.prod(shape) for shape in shapes.values())
            shown.add_row(label, f"{len(shapes)}", f"{count:,}", names)
    if report.cast:
        dtypes = sorted(set(report.cast.values()))
        shown.add_row("cast to float32", f"{len(report.cast)}", "", f"from {abbreviate(dtypes)}")
    if report.unusual:
        lines = [f"{name}: {words}" for name, words in report.unusual.items()]
        shown.add_row("unusual values", f"{len(lines)}", "", abbreviate(lines))
    if report.ignored:
        shown.add_row("ignored, not tensors", "", "", abbreviate(report.ignored))
    return shown


def abbreviate(names: Sequence[str]) -> str:
    """Joins names with commas; a long list is cut, and the number of other names follows."""
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def _misshapen(report: Report) -> list[str]:
    return [
        f"{name} (expected {list(expected)}, got {list(got)})"
        for name, (expected, got) in report.misshapen.items()
    ]
