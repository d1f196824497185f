"""Several ways to do the same work: first they must agree, then they are timed in turns.

Nobody wins by doing less: every run gives back all that the work asks for, the gradients too, and
ends when the last of it is there.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from vla_jax import trees

TOLERANCE = 1e-4  # ‖theirs - ours‖ / ‖ours‖ of each result
PAUSE = 0.02  # s before each turn: the threads of the one before may still be spinning


class Peer(NamedTuple):
    """One way to do the work."""

    name: str
    run: Callable[[], Any]  # does the work once, and waits until all of it is done
    read: Callable[[Any], Any]  # what `run` gave -> arrays, in the tree and the layout of ours
    weight_bytes: int  # bytes of weights that its products read
    lacks: tuple[str, ...] = ()  # leaves of ours that it has not


class Contest(NamedTuple):
    """A piece of work, and who does it; the first is ours."""

    work: str  # kind of work, one table each
    case: str  # its sizes, in words
    flop: float  # of its products, however they are done
    peers: Sequence[Peer]


class Spread(NamedTuple):
    """Of one number per round."""

    min: float
    median: float
    max: float


class Row(NamedTuple):
    """How one peer did."""

    work: str
    case: str
    peer: str
    ms: Spread
    ratio: Spread  # its time over that of ours in the same round: above 1 where ours is faster
    gflops: float  # GFLOP/s of the median
    share_of_ceiling: float  # the same over that of one large product, measured in the same run
    weight_bytes: int


def check(contest: Contest) -> None:
    """Runs every peer once and compares all results with ours.

    Raises:
      ValueError: a peer computes something else.
    """
    ours, *others = contest.peers
    expected = _leaves(ours.read(ours.run()))
    for peer in others:
        found = _leaves(peer.read(peer.run()))
        wanted = {path: leaf for path, leaf in expected.items() if not path.endswith(peer.lacks)}
        faults = [path for path in wanted.keys() ^ found.keys()]
        faults += [path for path in wanted.keys() & found.keys()
                   if not _is_same(found[path], wanted[path])]  # fmt: skip
        if faults:
            raise ValueError(
                f"{peer.name} computes something else than {ours.name} in {contest.work}, "
                f"{contest.case}: {', '.join(sorted(faults))} must agree to {TOLERANCE:g}; there "
                "is no ratio to tell until it does."
            )


def measure(contest: Contest, rounds: int, ceiling: float) -> list[Row]:
    """Times the peers in turns, A B A B.

    Args:
      contest: whose peers are known to agree.
      rounds: turns of each peer; it runs twice in each, and the second is timed.
      ceiling: GFLOP/s of one large product.
    """
    ms = 1e3 * np.array([[_time(peer.run) for peer in contest.peers] for _ in range(rounds)])
    rows = []
    for peer, own in zip(contest.peers, ms.T, strict=True):
        gflops = contest.flop / 1e6 / float(np.median(own))
        rows.append(
            Row(
                contest.work, contest.case, peer.name, spread(own), spread(own / ms[:, 0]),
                gflops, gflops / ceiling, peer.weight_bytes,
            )
        )  # fmt: skip
    return rows


def measure_ceiling(size: int, rounds: int) -> float:
    """GFLOP/s of one float32 product `[size, size] · [size, size]`, the best of the rounds."""
    one = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    factors = jax.device_put((one, one.T.copy()))
    product = jax.jit(lambda one, other: one @ other)
    product(*factors).block_until_ready()
    seconds = [_time(lambda: product(*factors).block_until_ready()) for _ in range(rounds)]
    return 2e-9 * size**3 / min(seconds)


def spread(values: np.ndarray) -> Spread:
    """The least, the middle and the greatest of `values [rounds]`."""
    return Spread(float(np.min(values)), float(np.median(values)), float(np.max(values)))


def _time(run: Callable[[], Any]) -> float:
    """Of the second of two runs: as in a training, the caches hold what the run before left."""
    time.sleep(PAUSE)
    run()
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _leaves(results: Any) -> dict[str, np.ndarray]:
    leaves = trees.leaves_by_path(results)
    return {path: np.asarray(leaf, np.float64) for path, leaf in leaves.items()}


def _is_same(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether the shapes are the same, all is finite, and the error is small beside the whole."""
    if found.shape != wanted.shape:
        return False
    error, size = np.linalg.norm(found - wanted), np.linalg.norm(wanted)
    return bool(np.isfinite(size) and error <= TOLERANCE * size)
