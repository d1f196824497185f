"""Comparison of several implementations of one computation: checked for agreement, then timed.

Every implementation returns all results of the case, gradients included, and is timed until the
last result is ready, so that none is fast by computing less.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train.benchmark.device_time import device_ms
from vla_jax import trees

TOLERANCE = 1e-4  # largest ‖result - expected‖ / ‖expected‖ of each result, in float32
_IN_A_ROW = 10  # runs that measure the memory, so that the time to start one does not count
PAUSE = 0.02  # s before each run: threads of the previous implementation may still be spinning


class Implementation(NamedTuple):
    """One implementation of a case."""

    name: str
    run: Callable[[], Any]  # runs it once; the results may be ready later
    read: Callable[[Any], Any]  # results -> arrays, in the tree and layout of vla_jax
    weight_bytes: int  # bytes of weights that its matrix products read
    lacks: tuple[str, ...] = ()  # leaf names of the first implementation that this one lacks
    wait: Callable[[Any], Any] = jax.block_until_ready  # blocks until results are ready


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
    # ms per run of many in a row, of which only the last one is waited for: the time of the device,
    # or of the host if that takes longer to start one; None where it was not measured
    queued_ms: Spread | None = None
    # ms per run in which the device works, from its trace; None where it was not measured
    device_ms: float | None = None
    # share of `device_ms`, else of `queued_ms`, else of `ms`, in which the memory could read the
    # weights; None where the memory was not measured
    weights_share: float | None = None


class Device(NamedTuple):
    """Limits of the device, measured in the same run."""

    gflops: float  # GFLOP/s of one large product
    gigabytes: float | None = None  # GB/s of memory; None = not measured


def check(comparison: Comparison, *, tolerance: float = TOLERANCE) -> None:
    """Runs every implementation once and compares all results with those of the first.

    Args:
      comparison: the implementations.
      tolerance: largest ‖result − expected‖ / ‖expected‖ of each result.

    Raises:
      ValueError: the results of an implementation differ.
    """
    reference, *others = comparison.implementations
    all_expected = _leaves(reference.read(reference.wait(reference.run())))
    for other in others:
        results = _leaves(other.read(other.wait(other.run())))
        expected = {
            path: leaf for path, leaf in all_expected.items() if not path.endswith(other.lacks)
        }
        differing = list(expected.keys() ^ results.keys())
        differing += [
            path
            for path in expected.keys() & results.keys()
            if not _agree(results[path], expected[path], tolerance)
        ]
        if differing:
            raise ValueError(
                f"{other.name} must agree with {reference.name} to {tolerance:g} in "
                f"{comparison.case}, {comparison.setting}, got different results for "
                f"{', '.join(sorted(differing))}; correct it before comparing its speed."
            )


def measure(comparison: Comparison, rounds: int, device: Device, *, queue: int = 1) -> list[Row]:
    """Times the implementations in alternation, A B A B.

    Args:
      comparison: checked by `check`.
      rounds: rounds per implementation; each runs it twice and times the second run.
      device: measured in the same run.
      queue: runs in a row without waiting in between, timed after those, and again under the
        profiler of the device; 1 = not measured.
    """
    implementations = comparison.implementations
    ms = 1e3 * np.array([[_time(each) for each in implementations] for _ in range(rounds)])
    queued = None
    if queue > 1:
        queued = 1e3 / queue * np.array(
            [[_time(each, queue) for each in implementations] for _ in range(rounds)]
        )  # fmt: skip
    rows = []
    for index, (each, times) in enumerate(zip(implementations, ms.T, strict=True)):
        gflops = comparison.flop / 1e6 / float(np.median(times))
        own = times if queued is None else queued[:, index]
        busy = None if queued is None else device_ms(each.run, each.wait, queue)
        share = None
        if device.gigabytes is not None:
            shortest = float(np.median(own)) if busy is None else busy
            share = each.weight_bytes / 1e6 / device.gigabytes / shortest
        rows.append(
            Row(
                comparison.case, comparison.setting, each.name, spread(times),
                spread(times / ms[:, 0]), gflops, gflops / device.gflops, each.weight_bytes,
                None if queued is None else spread(own), busy, share,
            )
        )  # fmt: skip
    return rows


def measure_peak(size: int, rounds: int, dtype: str = "float32", *, num_runs: int = 1) -> float:
    """Returns GFLOP/s of a product `[size, size] · [size, size]`, best of the rounds.

    Args:
      size: rows and columns.
      rounds: of which the best counts.
      dtype: of both factors; the sum is in float32.
      num_runs: products in a row, so that on an accelerator the time to start one does not count.
    """
    left = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), dtype)
    product = jax.jit(lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32))
    right = left.T.copy()
    return 2e-9 * size**3 / _best(lambda: product(left, right), rounds, num_runs)


def measure_bandwidth(size: int, rounds: int) -> float:
    """Returns GB/s of memory, read and written, by adding 1 to `[size, size]` float32.

    Args:
      size: rows and columns.
      rounds: of which the best counts.
    """
    numbers = jnp.zeros((size, size))
    add = jax.jit(lambda x: x + 1)
    return 8e-9 * size**2 / _best(lambda: add(numbers), rounds, _IN_A_ROW)


def _best(run: Callable[[], Any], rounds: int, num_runs: int = 1) -> float:
    """Returns the shortest time of a run, s: the best round of so many runs in a row."""
    jax.block_until_ready(run())
    only = Implementation("", run, lambda results: results, 0)
    return min(_time(only, num_runs) for _ in range(rounds)) / num_runs


def spread(values: np.ndarray) -> Spread:
    """Returns minimum, median and maximum of `values [rounds]`."""
    return Spread(float(np.min(values)), float(np.median(values)), float(np.max(values)))


def _time(implementation: Implementation, num_runs: int = 1) -> float:
    """Returns seconds of runs in a row after a first one: as in training, the caches are warm."""
    time.sleep(PAUSE)
    implementation.wait(implementation.run())
    began = time.perf_counter()
    for _ in range(num_runs - 1):
        implementation.run()
    implementation.wait(implementation.run())
    return time.perf_counter() - began


def _leaves(results: Any) -> dict[str, np.ndarray]:
    leaves = trees.leaves_by_path(results)
    return {path: np.asarray(leaf, np.float64) for path, leaf in leaves.items()}


def _agree(result: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    """Returns True if shapes are equal, all values finite, and the relative error is small."""
    if result.shape != expected.shape:
        return False
    error, size = np.linalg.norm(result - expected), np.linalg.norm(expected)
    return bool(np.isfinite(size) and error <= tolerance * size)
