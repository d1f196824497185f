"""Finds the first NaN or infinity of a training, without waiting for the device at every update.

Loss and gradient norm of each update stay on the device until the next log or checkpoint, at most
`PENDING` updates later; then they are read together. The train state itself is checked before every
checkpoint, so that none is saved that could not be resumed.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vla_jax import trees
from vla_jax.training import checkpoint
from vla_jax.types import Metrics

PENDING = 100  # updates whose metrics are not checked yet, at most
_REMEDIES = {"reward": "fix the environment and run the command again"}
DECISIVE = ("reward", "loss", "grad_norm")  # must be finite; other metrics only name the cause


class Bad(NamedTuple):
    """An update with a loss or gradient that is not finite."""

    step: int  # number of the update, from 1
    name: str  # first of its metrics that is not finite
    value: float
    seed: int | None = None  # index of the seed, where several train together


class Skipped(NamedTuple):
    """Numbers of updates that were skipped, since they were not finite."""

    total: int
    in_a_row: int  # up to the last update


NONE_SKIPPED = Skipped(0, 0)


class Watch:
    """Checks the metrics of all updates, some time after each of them."""

    def __init__(self, allowed: int, skipped: Skipped) -> None:
        """Starts to watch.

        Args:
          allowed: bad updates in a row that are skipped; 0 = none.
          skipped: those before the first update that is watched.
        """
        self.skipped = skipped
        self._allowed = allowed
        self._pending: list[tuple[int, Metrics]] = []

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of an update, on the device.

        Args:
          step: number of the update, from 1.
          metrics: from the update; not read yet.
        """
        self._pending.append((step, metrics))

    @property
    def is_full(self) -> bool:
        """True if `read` should be called."""
        return len(self._pending) >= PENDING

    def read(self) -> tuple[Bad | None, dict[str, Any]]:
        """Waits for the updates so far, and checks them.

        Returns:
          The update at which the training must stop, or None; and the metrics of the last finite
          update since the previous call, which are empty if all of them were skipped.
        """
        last: dict[str, Any] = {}
        for step, metrics in jax.device_get(self._pending):
            bad = bad_update(step, metrics)
            if bad is None:
                last, self.skipped = metrics, self.skipped._replace(in_a_row=0)
                continue
            total, in_a_row = self.skipped
            if in_a_row >= self._allowed:
                return bad, last
            self.skipped = Skipped(total + 1, in_a_row + 1)
        self._pending.clear()
        return None, last


class SeedsWatch:
    """Checks the metrics of all updates of seeds that train together."""

    def __init__(self, allowed: int, num_seeds: int) -> None:
        """Starts to watch.

        Args:
          allowed: bad updates in a row that are skipped; 0 = none.
          num_seeds: number of seeds.
        """
        self._allowed = allowed
        self._total = [0] * num_seeds
        self._in_a_row = [0] * num_seeds

    def read(self, start: int, updates: Metrics) -> tuple[Bad | None, dict[str, np.ndarray]]:
        """Waits for some updates, and checks them.

        Args:
          start: updates done before them.
          updates: metrics `[num_seeds, n]` of n updates.

        Returns:
          The first update at which the training must stop, or None; and the mean of every metric
          `[num_seeds]` over the updates that are finite, NaN for a seed without any.
        """
        values = {name: np.asarray(each, np.float64) for name, each in updates.items()}
        is_good = np.all([np.isfinite(values[n]) for n in DECISIVE if n in values], axis=0)
        for index, seed in np.ndindex(is_good.T.shape):  # in the order of the updates
            if is_good[seed, index]:
                self._in_a_row[seed] = 0
                continue
            if self._in_a_row[seed] >= self._allowed:
                at = {name: each[seed, index] for name, each in values.items()}
                bad = bad_update(start + int(index) + 1, at)
                return bad and bad._replace(seed=int(seed)), {}
            self._in_a_row[seed] += 1
            self._total[seed] += 1
        count, no_mean = np.sum(is_good, axis=1), np.full(len(is_good), np.nan)
        sums = {name: np.sum(each, axis=1, where=is_good) for name, each in values.items()}
        return None, {
            name: np.divide(each, count, out=no_mean.copy(), where=count > 0)
            for name, each in sums.items()
        }

    @property
    def total(self) -> np.ndarray:
        """Updates skipped so far `[num_seeds]`."""
        return np.array(self._total)

    def get_state(self) -> list[list[int]]:
        """Returns the counts, JSON-serialisable."""
        return [list(self._total), list(self._in_a_row)]

    def set_state(self, state: list[list[int]] | None) -> None:
        """Continues with the counts of `get_state`; None = 0, as in earlier versions."""
        if state:
            self._total, self._in_a_row = (list(counts) for counts in state)


def bad_update(step: int, metrics: Mapping[str, Any]) -> Bad | None:
    """Returns what is not finite in an update; None if loss and gradient norm are finite.

    Args:
      step: number of the update.
      metrics: of this update, on the host; a loss term is named before the loss.
    """
    if all(np.isfinite(metrics[name]) for name in DECISIVE if name in metrics):
        return None
    name = min((name for name, value in metrics.items() if not np.isfinite(value)), key=_rank)
    return Bad(step, name, float(metrics[name]))


def _rank(name: str) -> tuple[int, str]:
    """Returns a sort key of a metric's name: a cause comes before what follows from it."""
    order = {"reward": 0, "loss": 3, "grad_norm": 4}
    return order.get(name, 1 if name.startswith("loss_") else 2), name


def first_bad_leaf(tree: Any, mesh: Mesh | None = None) -> str | None:
    """Returns the path of the first leaf with a NaN or infinity; None if all are finite.

    Args:
      tree: arrays on devices, such as a train state.
      mesh: of those devices if they are several.
    """
    leaves = {
        path: leaf
        for path, leaf in trees.leaves_by_path(tree).items()
        if jnp.issubdtype(getattr(leaf, "dtype", np.dtype(int)), jnp.inexact)
    }
    if not leaves:
        return None
    where = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    flags = jax.jit(_are_finite, out_shardings=where)(list(leaves.values()))
    return next((path for path, flag in zip(leaves, flags, strict=True) if not flag), None)


def _are_finite(leaves: Sequence[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves])


def sentence(bad: Bad, run_dir: pathlib.Path, *, allowed: int = 0) -> str:
    """Returns the error message about an update that is not finite.

    Args:
      bad: the update.
      run_dir: folder of the run, for its last checkpoint.
      allowed: bad updates in a row that were skipped before this one.
    """
    row = f", after {allowed} such updates in a row" if allowed else ""
    where = "" if bad.seed is None else f" in seed {bad.seed}"
    remedy = _REMEDIES.get(bad.name, "run the command again with a lower --learning-rate")
    option = "a higher --skip-bad-updates" if allowed else "--skip-bad-updates 10"
    return (
        f"{bad.name} must be finite, got {bad.value}{where} at update {bad.step}{row}; "
        f"{describe_latest(run_dir)}: {remedy}, or add {option}."
    )


def leaf_sentence(path: str, step: int, run_dir: pathlib.Path) -> str:
    """Returns the error message about a train state that is not finite.

    Args:
      path: of the leaf.
      step: updates done.
      run_dir: folder of the run, for its last checkpoint.
    """
    return (
        f"{path} must be finite, got NaN or infinity after update {step}, which is not saved; "
        f"{describe_latest(run_dir)}: run the command again with a lower --learning-rate."
    )


def describe_latest(run_dir: pathlib.Path) -> str:
    """Returns the part of an error message about the checkpoint that a training can resume from."""
    latest = checkpoint.latest_step(run_dir / "checkpoints")
    if latest is None:
        return "no checkpoint was saved"
    return f"the last checkpoint, at update {latest}, is kept"
