"""Checks of the statistics in a file: numbers that no data set can have are refused by name."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

LIMIT = 1e12  # magnitude of a statistic; larger ones are damage, or times that are no state
_ROUNDING = 1e-3  # of the width and the level: float32, and quantiles from a sketch
_ORDERED = (("min", "max"), ("q01", "q99"), ("min", "mean"), ("mean", "max"), ("min", "q99"))
_REMEDY = "restore the file as it was written"


def check(name: str, fields: Any, expected: Sequence[str]) -> None:
    """Raises a ValueError for the first statistic that no column can have.

    Args:
      name: of the column, with the file where it is known.
      fields: statistic -> list of numbers, and `count`, as in JSON.
      expected: names of the statistics.
    """
    if not isinstance(fields, Mapping) or set(fields) != set(expected):
        got = list(fields) if isinstance(fields, Mapping) else _shown(fields)
        raise ValueError(f"{name} must have exactly {list(expected)}, got {got!s:.200}; {_REMEDY}.")
    lists = {field: fields[field] for field in expected if field != "count"}
    for field, values in lists.items():
        if not isinstance(values, list) or not values:
            raise ValueError(
                f"{name}.{field} must be a list of numbers, got {_shown(values)}; {_REMEDY}."
            )
        for place, value in enumerate(values):
            _check_number(f"{name}.{field}[{place}]", value)
    lengths = {field: len(values) for field, values in lists.items()}
    if len({*lengths.values()}) > 1:
        raise ValueError(f"{name} must be lists of one length, got {lengths}; {_REMEDY}.")
    _check_order(name, lists)
    count = fields["count"]
    if type(count) is not int or not 0 <= count < 2**53:
        raise ValueError(
            f"{name}.count must be a number of frames, got {_shown(count)}; {_REMEDY}."
        )


def _check_number(place: str, value: Any) -> None:
    is_number = type(value) in (int, float)
    if not is_number or not math.isfinite(value) or abs(value) > LIMIT:
        raise ValueError(
            f"{place} must be a number within ±{LIMIT:g}, got {_shown(value)}; {_REMEDY}."
        )


def _check_order(name: str, lists: Mapping[str, Sequence[float]]) -> None:
    """Raises an error for a negative or too large spread, or limits in the wrong order."""
    for place, std in enumerate(lists["std"]):
        at = {field: values[place] for field, values in lists.items()}
        width, level = at["max"] - at["min"], max(abs(at["min"]), abs(at["max"]))
        rounding = _ROUNDING * (abs(width) + 1e-3 * level) + 1e-12
        if std < 0:
            raise ValueError(f"{name}.std[{place}] must be 0 or more, got {std:g}; {_REMEDY}.")
        for low, high in _ORDERED:
            slack = 0 if (low, high) == ("min", "max") else rounding
            if at[low] > at[high] + slack:
                raise ValueError(
                    f"{name}.{low}[{place}] must be at most {high}[{place}] = {at[high]:g}, got "
                    f"{at[low]:g}; {_REMEDY}."
                )
        if std > width / 2 + rounding:  # Popoviciu's inequality
            raise ValueError(
                f"{name}.std[{place}] must be at most half of max - min, {width / 2:g}, got "
                f"{std:g}; {_REMEDY}."
            )


def _shown(value: Any) -> str:
    return f"{value!r:.60} ({type(value).__name__})"
