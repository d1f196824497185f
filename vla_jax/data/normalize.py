"""Normalisation: statistics of a column, the map to about [-1, 1], and its inverse.

Uses only array operators and functions common to NumPy and JAX. The same code normalises NumPy
data sets, single observations during acting, and JAX arrays inside `jit`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from vla_jax.config import checked
from vla_jax.data import moments, quantile_sketch, stats_check
from vla_jax.data.dataset import ACTION_MASK, Dataset
from vla_jax.files import Path, read_json
from vla_jax.types import Array

Method = Literal["bounds", "quantiles", "mean_std", "none"]
CLIPPED = ("bounds", "quantiles")  # methods that clip to [-1, 1]
# standard deviations beyond the training's range to which "mean_std" clips
MARGIN = 10.0
EXACT_ROWS = 2**20  # rows up to which all statistics are exact
CHUNK_ROWS = 2**16  # rows whose float64 copy is in memory at once


class NormStats(NamedTuple):
    """Statistics of one column over all frames."""

    mean: np.ndarray  # [D]
    std: np.ndarray  # [D]
    min: np.ndarray  # [D]
    max: np.ndarray  # [D]
    q01: np.ndarray  # [D] 1 % quantile
    q99: np.ndarray  # [D] 99 % quantile
    count: int  # frames


@dataclass(frozen=True)
@checked()
class NormalizeConfig:
    """Normalisation method of each column."""

    action: Method = "bounds"  # method of the arm dims; the gripper is never normalised
    proprio: Method = "mean_std"  # method of the proprioceptive state
    environment_state: Method = "mean_std"  # method of the privileged simulator state
    action_mu: float = 0.0  # μ of the μ-law companding of the arm, such as 255; 0 = off

    def __post_init__(self) -> None:
        """Checks the methods."""
        for name in ("action", "proprio", "environment_state"):
            _check_method(name, getattr(self, name))
        if self.action_mu < 0:
            raise ValueError(f"action_mu must be 0 (none) or more, got {self.action_mu}.")


def compute(column: np.ndarray) -> NormStats:
    """Returns statistics over all leading axes of `column [..., D]`.

    Above `EXACT_ROWS` rows memory does not grow with them, and the quantiles have an error of rank
    of at most ceil(log2(rows / CHUNK_ROWS)) / CHUNK_ROWS, 0.02 % for 10^9 rows.
    """
    rows = column.reshape(-1, column.shape[-1])
    if len(rows) > EXACT_ROWS:
        return _compute_in_chunks(rows)
    flat = np.asarray(rows, np.float64)
    q01, q99 = np.quantile(flat, [0.01, 0.99], axis=0)
    values = (flat.mean(0), flat.std(0), flat.min(0), flat.max(0), q01, q99)
    return NormStats(*(value.astype(np.float32) for value in values), count=len(flat))


def _compute_in_chunks(rows: np.ndarray) -> NormStats:
    total = moments.moments_of(rows[:0])
    sketch = quantile_sketch.empty(rows.shape[1], CHUNK_ROWS)
    for start in range(0, len(rows), CHUNK_ROWS):
        chunk = rows[start : start + CHUNK_ROWS]
        total = moments.merge_moments(total, moments.moments_of(chunk))
        sketch = quantile_sketch.add(sketch, chunk)
    q01, q99 = quantile_sketch.quantiles(sketch, (0.01, 0.99))
    values = (total.mean, moments.std(total), total.low, total.high, q01, q99)
    return NormStats(*(value.astype(np.float32) for value in values), count=len(rows))


def compute_norm_stats(dataset: Dataset) -> dict[str, NormStats]:
    """Returns statistics of every numeric column; reads no images, counts only real actions."""
    columns = dict(dataset.columns)
    if ACTION_MASK in columns:
        columns["action"] = columns["action"][columns[ACTION_MASK][:, 0] > 0.5]
    return {name: compute(column) for name, column in columns.items()}


def fixed_bounds(low: Any, high: Any, dim: int) -> NormStats:
    """Returns statistics with given limits for the methods "bounds" and "quantiles".

    Args:
      low: value mapped to -1, a scalar or `[D]`.
      high: value mapped to 1, a scalar or `[D]`.
      dim: D, including the gripper, whose limits are not used.

    Returns:
      Statistics with count 0, the mean in the middle and the std half the width.

    Raises:
      ValueError: a lower limit is not below the upper one.
    """
    low, high = (np.broadcast_to(np.asarray(end, np.float32), dim) for end in (low, high))
    if not np.all(low < high):
        raise ValueError(f"low must be below high in every dimension, got {low} and {high}.")
    return NormStats((low + high) / 2, (high - low) / 2, low, high, low, high, count=0)


def normalize(x: Array, stats: NormStats, method: Method, *, gripper: bool = False) -> Array:
    """Maps `x` to about [-1, 1].

        y = (x - c) / s        c, s: middle and half width of [min, max] or [q01, q99]; mean, std

    "bounds" and "quantiles" clip to [-1, 1]; "none" changes nothing. "mean_std" clips what is more
    than `MARGIN` standard deviations beyond the training's range: of a nearly constant dimension,
    with a spread of 1e-5, a drift of 0.01 would be 1000 otherwise. A constant dimension gives 0,
    and a dimension whose quantiles coincide uses its bounds.

    Args:
      x: `[..., D]`.
      stats: statistics of the column.
      method: "bounds", "quantiles", "mean_std" or "none".
      gripper: the last dimension is a gripper, which is not changed.

    Returns:
      `[..., D]`, float32 for float32.

    Raises:
      ValueError: `x` and `stats` differ in size; unknown method.
    """
    centre, scale = affine(x, stats, method, gripper)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    y = (x - centre) * inverse
    if method in CLIPPED:
        return y.clip(-1, 1)
    if method == "mean_std":
        return y.clip(*reach(stats, gripper, x.ndim))
    return y


def denormalize(y: Array, stats: NormStats, method: Method, *, gripper: bool = False) -> Array:
    """Returns the inverse of `normalize` inside its bounds: `x = c + s y`.

    Args:
      y: `[..., D]`, from `normalize` or a policy.
      stats: the statistics that `normalize` used.
      method: the method that `normalize` used.
      gripper: the last dimension is a gripper, which is not changed.

    Returns:
      `[..., D]` in the units of the data; a constant dimension gives its constant.

    Raises:
      ValueError: `y` and `stats` differ in size; unknown method.
    """
    centre, scale = affine(y, stats, method, gripper)
    return y * scale + centre


def normalize_action(action: Array, stats: NormStats, config: NormalizeConfig) -> Array:
    """Returns the policy's action targets: normalised, then companded if μ > 0.

        y = sign(x) · ln(1 + μ |x|) / ln(1 + μ)        x: the normalised arm

    The gripper is not changed.

    Args:
      action: `[..., A]` in the units of the data.
      stats: statistics of the actions.
      config: the method and μ.

    Returns:
      `[..., A]`.

    Raises:
      ValueError: `action` and `stats` differ in size.
    """
    return _compand(normalize(action, stats, config.action, gripper=True), config.action_mu)


def denormalize_action(action: Array, stats: NormStats, config: NormalizeConfig) -> Array:
    """Returns the inverse of `normalize_action` inside its bounds.

    Args:
      action: `[..., A]`, from a policy.
      stats: the statistics that `normalize_action` used.
      config: the config that `normalize_action` used.

    Returns:
      `[..., A]` in the units of the data.

    Raises:
      ValueError: `action` and `stats` differ in size.
    """
    return denormalize(_expand(action, config.action_mu), stats, config.action, gripper=True)


def normalize_field(
    name: str, values: np.ndarray, stats: NormStats, config: NormalizeConfig
) -> np.ndarray:
    """Returns values of a field of a data set as the policy sees them.

    Args:
      name: "action", "proprio" or "environment_state".
      values: `[..., D]`.
      stats: statistics of the field; may come from another data set.
      config: the method of each field.

    Returns:
      `[..., D]` float32.
    """
    method = getattr(config, name)
    if name != "action":
        return np.asarray(normalize(values, stats, method), np.float32)
    y = normalize_action(values, stats, config)
    if method == "none":  # the tanh of a policy's arm output is within [-1, 1]
        y = y.clip(-1, 1)
    return np.asarray(y, np.float32)


def to_json(norm_stats: Mapping[str, NormStats]) -> dict[str, Any]:
    """Returns statistics as lists and numbers for `json.dump`."""
    return {
        name: {
            field: value.tolist() if isinstance(value, np.ndarray) else int(value)
            for field, value in stats._asdict().items()
        }
        for name, stats in norm_stats.items()
    }


def from_json(data: Mapping[str, Any], source: str = "norm_stats") -> dict[str, NormStats]:
    """Returns statistics from the output of `to_json`.

    Args:
      data: column -> statistics.
      source: file that they come from, as it appears in the error messages.

    Raises:
      ValueError: a statistic is missing, unknown, or one that no column can have; sizes differ.
    """
    return {name: _stats_from_json(f"{source} of {name}", fields) for name, fields in data.items()}


def read_norm_stats(path: Path) -> dict[str, NormStats]:
    """Returns the statistics of a run, from its `norm_stats.json`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, or lacks the actions.
    """
    data = read_json(path, "statistics")
    if "action" not in data:
        raise ValueError(
            f"{path} must hold statistics of action, got {[*data]!s:.200}; restore the file that "
            "the training wrote."
        )
    return from_json(data, str(path))


def _stats_from_json(name: str, fields: Any) -> NormStats:
    stats_check.check(name, fields, NormStats._fields)
    arrays = {f: np.asarray(v, np.float32) for f, v in fields.items() if f != "count"}
    return NormStats(**arrays, count=int(fields["count"]))


def _compand(action: Array, mu: float) -> Array:
    if not mu:
        return action
    xp, arm = action.__array_namespace__(), action[..., :-1]
    arm = xp.sign(arm) * xp.log1p(mu * xp.abs(arm)) / math.log1p(mu)
    return xp.concat([arm, action[..., -1:]], axis=-1)


def _expand(action: Array, mu: float) -> Array:
    if not mu:
        return action
    xp, arm = action.__array_namespace__(), action[..., :-1]
    arm = xp.sign(arm) * xp.expm1(math.log1p(mu) * xp.abs(arm)) / mu
    return xp.concat([arm, action[..., -1:]], axis=-1)


def affine(
    x: Array, stats: NormStats, method: Method, gripper: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Returns centre and scale with as many axes as `x`; scale 0 marks a constant dimension.

    Args:
      x: `[..., D]`.
      stats: statistics of the column.
      method: of the column.
      gripper: the last dimension is a gripper, which is not changed.

    Raises:
      ValueError: `x` and `stats` differ in size; unknown method.
    """
    size = len(stats.mean)
    if x.shape[-1] != size:
        raise ValueError(
            f"x must be [..., {size}] like its norm_stats, got {x.shape}; use the statistics "
            "of this column."
        )
    centre, scale = centre_scale(stats, method)
    if gripper:
        centre, scale = np.append(centre[:-1], 0), np.append(scale[:-1], 1)
    axes = (1,) * (x.ndim - 1) + (size,)
    return centre.astype(np.float32).reshape(axes), scale.astype(np.float32).reshape(axes)


def centre_scale(stats: NormStats, method: Method) -> tuple[np.ndarray, np.ndarray]:
    """Returns centre and scale `[D]`; scale 0 marks a constant dimension."""
    _check_method("method", method)
    if method == "none":
        return np.zeros_like(stats.mean), np.ones_like(stats.mean)
    if method == "mean_std":
        return stats.mean, np.where(_constant(stats.std, stats.mean), 0, stats.std)
    low, high = stats.min, stats.max
    if method == "quantiles":
        flat = _constant(stats.q99 - stats.q01, stats.q01)
        low, high = np.where(flat, low, stats.q01), np.where(flat, high, stats.q99)
    return (low + high) / 2, np.where(_constant(high - low, low), 0, (high - low) / 2)


def reach(stats: NormStats, gripper: bool, num_axes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the least and greatest value of "mean_std", with as many axes as the column.

    Args:
      stats: statistics of the column.
      gripper: the last dimension is a gripper, which is not changed.
      num_axes: of the column.
    """
    centre, scale = centre_scale(stats, "mean_std")
    safe = np.where(scale > 0, scale, 1)
    ends = [(stats.min - centre) / safe - MARGIN, (stats.max - centre) / safe + MARGIN]
    low, high = (np.asarray(end, np.float32) for end in ends)
    if gripper:  # the last dimension is not changed
        low, high = np.append(low[:-1], -np.inf), np.append(high[:-1], np.inf)
    axes = (1,) * (num_axes - 1) + (len(low),)
    return low.astype(np.float32).reshape(axes), high.astype(np.float32).reshape(axes)


def _constant(width: np.ndarray, level: np.ndarray) -> np.ndarray:
    # Dividing by a width of rounding errors would make the loss huge.
    return width <= 1e-6 * np.maximum(1, np.abs(level))


def _check_method(name: str, method: str) -> None:
    if method not in get_args(Method):
        raise ValueError(f"{name} must be one of {get_args(Method)}, got {method!r}.")
