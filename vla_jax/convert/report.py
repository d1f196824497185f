"""What became of every tensor: used, missing, left over, of another shape, cast.

Nothing is skipped in silence: a name is in exactly one of `used`, `left_over`, `buffers` and
`misshapen`, and what the params needed and did not find is in `missing`.
"""

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.table import Table

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


def check(report: Report, unknown: Iterable[str], allow_missing: Sequence[str]) -> None:
    """Raises a ValueError unless all that is needed is there, and nothing else.

    Args:
      report: of a conversion.
      unknown: names among `report.left_over` that nothing excuses.
      allow_missing: globs of names that may be missing.
    """
    missing = [
        name
        for name in report.missing
        if not any(fnmatch.fnmatchcase(name, glob) for glob in allow_missing)
    ]
    misshapen = [
        f"{name} (expected {list(expected)}, got {list(got)})"
        for name, (expected, got) in report.misshapen.items()
    ]
    faults = {"missing": missing, "of another shape": misshapen, "left over": list(unknown)}
    told = [f"{len(names)} {what}: {listed(names)}" for what, names in faults.items() if names]
    if told:
        raise ValueError(
            f"the head's tensors do not fit, {'; '.join(told)}; convert the file it was saved to, "
            "or name with allow_missing what may be missing."
        )


def to_json(report: Report) -> dict[str, Any]:
    """The report as what JSON can hold."""
    return {
        name: list(part) if name == "ignored" else dict(part)
        for name, part in report._asdict().items()
    }


def table(report: Report) -> Table:
    """The report for `rich` to print; rows of what did not happen are left out."""
    drawn = Table()
    for column in ("", "tensors", "numbers", "which"):
        drawn.add_column(column, justify="left" if column in ("", "which") else "right")
    rows = {
        "used": report.used,
        "missing, drawn": report.missing,
        "left over": report.left_over,
        "of another shape": {name: got for name, (_, got) in report.misshapen.items()},
        "buffers": report.buffers,
    }
    for what, shapes in rows.items():
        if shapes:
            count = sum(math.prod(shape) for shape in shapes.values())
            drawn.add_row(what, f"{len(shapes)}", f"{count:,}", listed(list(shapes)))
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
