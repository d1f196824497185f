"""Statistics stored in a LeRobot data set, per episode and in total, with lerobot's names."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Stats = dict[str, np.ndarray]
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
MAX_NUMBERS = 1024  # of one step; statistics of a depth image would exceed its data
SAMPLED_FRAMES = 8  # images per episode used for its statistics


def column_stats(columns: Mapping[str, np.ndarray]) -> dict[str, Stats]:
    """Returns statistics `[...]` of each column `[T, ...]` of an episode, `[1]` of scalars.

    Texts and columns of more than `MAX_NUMBERS` numbers per step have none.
    """
    columns = {
        key: column
        for key, column in columns.items()
        if column.dtype.kind != "U" and column[:1].size <= MAX_NUMBERS
    }
    parts = [np.reshape(column, (len(column), -1)) for column in columns.values()]
    values = np.concatenate(parts, axis=1, dtype=np.float64)  # one quantile call for all columns
    with np.errstate(invalid="ignore"):  # of infinite values
        quantiles = np.quantile(values, list(QUANTILES.values()), axis=0)
        moments = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0)}
        moments |= {"std": values.std(0), **dict(zip(QUANTILES, quantiles, strict=True))}
    cuts = np.cumsum([part.shape[1] for part in parts])[:-1]
    split = {name: np.split(value, cuts) for name, value in moments.items()}
    count = np.array([len(values)])
    return {
        key: {
            **{name: np.reshape(v[i], column.shape[1:] or 1) for name, v in split.items()},
            "count": count,
        }
        for i, (key, column) in enumerate(columns.items())
    }


def image_stats(images: np.ndarray) -> Stats:
    """Returns statistics `[3, 1, 1]` of sampled frames of `[T, h, w, 3]`, pixels in [0, 1]."""
    sampled = images[np.linspace(0, len(images) - 1, min(len(images), SAMPLED_FRAMES)).astype(int)]
    counts = np.stack([np.bincount(sampled[..., c].ravel(), minlength=256) for c in range(3)])
    levels, below = np.arange(256) / 255, np.cumsum(counts, axis=1)
    weights = counts / below[:, -1:]
    mean = weights @ levels
    stats = {
        "min": levels[np.argmax(below > 0, axis=1)],
        "max": levels[np.argmax(below == below[:, -1:], axis=1)],
        "mean": mean,
        "std": np.sqrt((weights * (levels - mean[:, None]) ** 2).sum(1)),
        **{n: levels[np.argmax(below >= q * below[:, -1:], axis=1)] for n, q in QUANTILES.items()},
    }
    shaped = {name: value.reshape(3, 1, 1) for name, value in stats.items()}
    return {**shaped, "count": np.array([len(sampled)])}


def total_stats(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    """Returns statistics of a feature over all episodes, as JSON values.

    Quantiles are the means of the episodes' quantiles, weighted by frames, as in lerobot.

    Args:
      rows: one mapping per episode with `stats/<key>/<name>`.
      key: the feature.

    Returns:
      Name -> nested list.
    """
    names = ["min", "max", "mean", "std", "count", *QUANTILES]
    stats = {name: np.array([row[f"stats/{key}/{name}"] for row in rows]) for name in names}
    weights = stats["count"].reshape(-1, *[1] * (stats["mean"].ndim - 1)) / stats["count"].sum()
    means = {name: (weights * stats[name]).sum(0) for name in ("mean", *QUANTILES)}
    variance = (weights * (stats["std"] ** 2 + (stats["mean"] - means["mean"]) ** 2)).sum(0)
    totals = {
        "min": stats["min"].min(0),
        "max": stats["max"].max(0),
        "std": np.sqrt(variance),
        "count": stats["count"].sum(0),
        **means,
    }
    return {name: value.tolist() for name, value in totals.items()}
