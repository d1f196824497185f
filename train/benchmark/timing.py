"""Comparison of several implementations of one computation: checked for agreement, then timed.

Every implementation returns all results of the case, gradients included, and is timed until the
last result is ready, so that none is fast by computing less.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from vla_jax import trees

TOLERANCE = 1e-4  # largest ‖result - expected‖ / ‖expected‖ of each result
PAUSE = 0.02  # s before each run: threads of the previous implementation may still be spinning


class Implementation(NamedTuple):
    """One implementation of a case."""

    name: str
    run: Callable[[], Any]  # runs it once and blocks until all results are ready
    read: Callable[[Any], Any]  # result of `run` -> arrays, in the tree and layout of vla_jax
    weight_bytes: int  # bytes of weights that its matrix products read
    lacks: tuple[str, ...] = ()  # leaf names of the first implementation that this one lacks


class Comparison(NamedTuple):
    """Implementations of one case at one setting; the first is the reference of the ratios."""

    case: str  # name of the case, one table each
    setting: str  # sizes, as text
    flop: float  # floating-point operations of the matrix products
    implementations: Sequence[Implementation]


class Spread(NamedTuple):
    """Spread of a quantity that is measured once per round."""

    min: float
    median: float
    max: float


class Row(NamedTuple):
    """Timing of one implementation at one setting."""

    case: str
    setting: str
    implementation: str
    ms: Spread
    ratio: Spread  # time / time of the first implementation in the same round
    gflops: float  # GFLOP/s at the median time
    fraction_of_peak: (
        float  # relative to the GFLOP/s of one large product, measured in the same run
    )
    weight_bytes: int


def check(comparison: Comparison) -> None:
    """Runs every implementation once and compares all results with those of the first.

    Raises:
      ValueError: the results of an implementation differ.
    """
    reference, *others = comparison.implementations
    all_expected = _leaves(reference.read(reference.run()))
    for other in others:
        results = _leaves(other.read(other.run()))
        expected = {
            path: leaf for path, leaf in all_expected.items() if not path.endswith(other.lacks)
        }
        differing = list(expected.keys() ^ results.keys())
        differing += [
            path
            for path in expected.keys() & results.keys()
            if not _agree(results[path], expected[path])
        ]
        if differing:
            raise ValueError(
                f"{other.name} must agree with {reference.name} to {TOLERANCE:g} in "
                f"{comparison.case}, {comparison.setting}, got different results for "
                f"{', '.join(sorted(differing))}; correct it before comparing its speed."
            )


def measure(comparison: Comparison, rounds: int, peak_gflops: float) -> list[Row]:
    """Times the implementations in alternation, A B A B.

    Args:
      comparison: checked by `check`.
      rounds: rounds per implementation; each runs it twice and times the second run.
      peak_gflops: GFLOP/s of one large product.
    """
    implementations = comparison.implementations
    ms = 1e3 * np.array([[_time(each.run) for each in implementations] for _ in range(rounds)])
    rows = []
    for each, times in zip(implementations, ms.T, strict=True):
        gflops = comparison.flop / 1e6 / float(np.median(times))
        rows.append(
            Row(
                comparison.case, comparison.setting, each.name, spread(times),
                spread(times / ms[:, 0]), gflops, gflops / peak_gflops, each.weight_bytes,
            )
        )  # fmt: skip
    return rows


def measure_peak(size: int, rounds: int) -> float:
    """Returns GFLOP/s of a float32 product `[size, size] · [size, size]`, best of the rounds."""
    left = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    factors = jax.device_put((left, left.T.copy()))
    product = jax.jit(lambda left, right: left @ right)
    product(*factors).block_until_ready()
    seconds = [_time(lambda: product(*factors).block_until_ready()) for _ in range(rounds)]
    return 2e-9 * size**3 / min(seconds)


def spread(values: np.ndarray) -> Spread:
    """Returns minimum, median and maximum of `values [rounds]`."""
    return Spread(float(np.min(values)), float(np.median(values)), float(np.max(values)))


def _time(run: Callable[[], Any]) -> float:
    """Returns seconds of the second of two runs: as in training, the caches are warm."""
    time.sleep(PAUSE)
    run()
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _leaves(results: Any) -> dict[str, np.ndarray]:
    leaves = trees.leaves_by_path(results)
    return {path: np.asarray(leaf, np.float64) for path, leaf in leaves.items()}


def _agree(result: np.ndarray, expected: np.ndarray) -> bool:
    """Returns True if shapes are equal, all values finite, and the relative error is small."""
    if result.shape != expected.shape:
        return False
    error, size = np.linalg.norm(result - expected), np.linalg.norm(expected)
    return bool(np.isfinite(size) and error <= TOLERANCE * size)
