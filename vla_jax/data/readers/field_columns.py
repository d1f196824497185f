"""Numeric fields of a `Dataset`, put together from the columns of a raw episode."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from vla_jax.config import did_you_mean
from vla_jax.data.raw import Feature

_SELECTION = re.compile(r"(?P<key>.+)\[(?P<start>-?\d+)?(?P<colon>:)?(?P<stop>-?\d+)?\]")


def parse_key(key: str, known: Mapping[str, object]) -> tuple[str, slice]:
    """Returns the column and the dimensions that a key of a `FieldMap` selects.

    Args:
      key: a column, or a column with dimensions: `state[:7]`, `action[0:3]`, `action[-1]`.
      known: the columns of the data set; one of them may itself end in brackets.

    Raises:
      ValueError: no such column.
    """
    found = _SELECTION.fullmatch(key)
    if key in known or not found:
        column, dims = key, slice(None)
    elif found["colon"] or not found["start"]:
        ends = [int(text) if text else None for text in (found["start"], found["stop"])]
        column, dims = found["key"], slice(*ends)
    else:
        start = int(found["start"])
        column, dims = found["key"], slice(start, start + 1 or None)
    if column not in known:
        raise ValueError(
            f"column must be one that the data set has, got '{key}'; {did_you_mean(column, known)}"
        )
    return column, dims


def field_column(columns: Mapping[str, np.ndarray], keys: Sequence[str]) -> np.ndarray:
    """Returns the selected columns side by side, `[T, D]`, with their common dtype.

    Raises:
      ValueError: a column has more than one axis behind the steps, such as chunks of actions.
    """
    parts = []
    for key in keys:
        column, dims = parse_key(key, columns)
        values = columns[column]
        if values.ndim > 2:
            raise ValueError(
                f"{column} must have one list of numbers per step, [T, D], got {values.shape}; "
                "choose another column with --dataset.feature-keys, or convert the data."
            )
        parts.append(values.reshape(len(values), -1)[:, dims])
    return np.concatenate(parts, axis=1)


def field_names(features: Mapping[str, Feature], keys: Sequence[str]) -> tuple[str, ...]:
    """Returns a name for every dimension of the selected columns: its own, or `column[i]`."""
    names: list[str] = []
    for key in keys:
        column, dims = parse_key(key, features)
        feature = features[column]
        size = int(np.prod(feature.shape))
        plain = [column.rpartition("/")[2]] if size == 1 else _numbered(column, size)
        names += (list(feature.names) if len(feature.names) == size else plain)[dims]
    return tuple(names)


def _numbered(column: str, size: int) -> list[str]:
    return [f"{column.rpartition('/')[2]}[{i}]" for i in range(size)]
