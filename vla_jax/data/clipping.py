"""Values that normalisation clips: counts, and warnings at the start of a training."""

import warnings

import numpy as np

from vla_jax.data import normalize
from vla_jax.data.normalize import Method, NormalizeConfig, NormStats
from vla_jax.types import Array

# A dimension with a smaller spread, relative to its level if that is above 1, is nearly constant.
NEARLY_CONSTANT = 1e-4
QUANTILE_FRACTION = 0.02  # fraction of values outside [q01, q99] by definition


def count_clipped(x: Array, stats: NormStats, method: Method) -> Array:
    """Returns how many numbers of each row of an observation `[..., D]` are clipped, `[...]`.

    By "bounds" and "quantiles" those count that are more than `normalize.MARGIN` half widths
    outside: a value just outside the training's range is usual when acting.

    Args:
      x: `[..., D]`.
      stats: statistics of the column.
      method: of the column.
    """
    if method == "none":
        return np.zeros(x.shape[:-1], np.int32)
    centre, scale = normalize.affine(x, stats, method, False)
    low, high = -1 - normalize.MARGIN, 1 + normalize.MARGIN
    if method == "mean_std":
        low, high = normalize.reach(stats, False, x.ndim)
    outside = (x < centre + low * scale) | (x > centre + high * scale)
    return (outside & (scale > 0)).sum(axis=-1)


def nearly_constant(stats: NormStats, method: Method) -> list[int]:
    """Returns the dimensions that `normalize` scales although their spread is very small."""
    _, scale = normalize.centre_scale(stats, method)
    level = np.maximum(1, np.abs(stats.mean))
    is_scaled = (method != "none") & (scale > 0)
    return np.flatnonzero(is_scaled & (stats.std <= NEARLY_CONSTANT * level)).tolist()


def clipped_fraction(
    x: np.ndarray, stats: NormStats, method: Method, *, gripper: bool = False
) -> float:
    """Returns the fraction of the values of `x [..., D]` that `normalize` clips."""
    return _num_clipped(x, stats, method, gripper=gripper) / x.size


def warn_if_clipped(
    name: str, column: np.ndarray, stats: NormStats, config: NormalizeConfig
) -> None:
    """Warns if normalisation clips more of a column than the method does by definition.

    Of actions it always does, since a policy cannot send what was clipped. Nearly constant
    dimensions are named too.

    Args:
      name: "action", "proprio" or "environment_state".
      column: `[F, D]`.
      stats: statistics of the column; may come from another data set.
      config: the method of each column.
    """
    method, is_action = getattr(config, name), name == "action"
    count = 0
    for start in range(0, len(column), normalize.CHUNK_ROWS):
        chunk = column[start : start + normalize.CHUNK_ROWS]
        if is_action and method == "none":
            outside = np.abs(normalize.normalize_action(chunk, stats, config)) > 1 + 1e-5
            count += int(outside.sum())
        else:
            count += _num_clipped(chunk, stats, method, gripper=is_action)
    fraction = count / column.size
    _warn_if_nearly_constant(name, stats, method)
    if fraction > (QUANTILE_FRACTION * 1.25 if method == "quantiles" and not is_action else 0):
        warnings.warn(
            f"{fraction:.2%} of the values of {name} lie outside [-1, 1] after normalisation by "
            f"{method!r} and were clipped; {_advice(name, method)}",
            stacklevel=3,
        )


def _num_clipped(x: np.ndarray, stats: NormStats, method: Method, *, gripper: bool) -> int:
    centre, scale = normalize.affine(x, stats, method, gripper)
    if method not in normalize.CLIPPED:
        return 0
    outside = (np.abs(x - centre) > scale * (1 + 1e-5)) & (scale > 0)
    return int(outside.sum())


def _advice(name: str, method: Method) -> str:
    if name == "action" and method != "bounds":
        return "a policy cannot send them; choose --action bounds to represent all"
    return "compute norm_stats on this data set to avoid it"


def _warn_if_nearly_constant(name: str, stats: NormStats, method: Method) -> None:
    few = nearly_constant(stats, method)
    if few and stats.count:  # limits that the user gave have no spread
        index = few[0]
        warnings.warn(
            f"{name} is nearly constant in the dimensions {few}: the spread of dimension {index} "
            f"is {stats.std[index]:.1e} around {stats.mean[index]:.4g}, which normalisation by "
            f"{method!r} magnifies to 1; leave them out, or choose another method, if they are "
            "noise",
            stacklevel=4,
        )
