"""Ours beside the peers that are installed: the same work, checked to be the same, timed in turns.

    python -m train.benchmark                                # everything
    python -m train.benchmark --cases recurrence head        # some of it
    python -m train.benchmark --cases start checkpoints      # the rest of a training's path
    python -m train.benchmark --small                        # seconds: does it run here?

Flax's and PyTorch's RNNs, RoboVLMs' head written in PyTorch, a plain scan, and the window run again
at every step: all get the same weights, and no ratio is told before their outputs and gradients
agree with ours. Let it have the machine to itself; what else runs shows in the spread.
"""

import importlib.metadata
import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
from rich.console import Console
from rich.table import Table

from train.benchmark import baselines, system, timing
from train.benchmark import cases as benchmark_cases
from train.benchmark.system import Figure
from train.benchmark.timing import Row, Spread
from vla_jax.command_line import run
from vla_jax.evaluation import plots
from vla_jax.training.loop import save_json
from vla_jax.training.malloc import keep_freed_memory

Work = Literal[
    "recurrence", "head", "streaming", "growth", "products",
    "memory", "start", "checkpoints", "loader",
]  # fmt: skip
WORKS: tuple[Work, ...] = get_args(Work)
WIDTH = 130  # characters of a line that no terminal bounds


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure."""

    cases: tuple[Work, ...] = WORKS  # which of them, in this order
    rounds: int = 15  # turns of each peer
    small: bool = False  # tiny sizes, which say nothing about speed
    keep_freed_memory: bool = True  # as in our trainings, for everybody in this process
    run_dir: str = "runs/benchmark"  # folder of the plot and the figures
    json: str = ""  # file of the figures; empty = benchmark.json in run_dir

    def __post_init__(self):
        """Checks the numbers."""
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}.")
        if not self.cases:
            raise ValueError(f"cases must be at least one of {', '.join(WORKS)}, got none.")


def robovlms() -> BenchmarkConfig:
    """The sizes of RoboVLMs' head: four layers of 1024."""
    return BenchmarkConfig()


PRESETS = {"robovlms": robovlms}


def benchmark(config: BenchmarkConfig) -> pathlib.Path:
    """Measures and shows; returns the file of the figures."""
    sizes, console = benchmark_cases.SMALL if config.small else benchmark_cases.LARGE, _console()
    rows: list[Row] = []
    figures: list[Figure] = []
    if config.keep_freed_memory:
        keep_freed_memory()

    # The peers multiply in float32, not in a GPU's TF32; so do we.
    with jax.default_matmul_precision("float32"):
        ceiling = timing.measure_ceiling(sizes.product, config.rounds)
        about = {
            "machine": machine(),
            "left_out": [reason for reason in [baselines.torch_is_missing()] if reason],
            "small": config.small,
            "keep_freed_memory": config.keep_freed_memory,
            "rounds": config.rounds,
            "ceiling_gflops": ceiling,
        }
        console.print(_introduction(about))
        for work in config.cases:
            if work in system.FIGURES:
                found = list(system.FIGURES[work](sizes))
                console.print(_figure_table(work, found))
                figures += found
                continue
            measured = []
            for contest in benchmark_cases.CONTESTS[work](sizes):
                timing.check(contest)
                measured += timing.measure(contest, config.rounds, ceiling)
            console.print(_table(work, measured))
            rows += measured

    # The figures come before the plot, which may lack its extra.
    file = pathlib.Path(config.json or pathlib.Path(config.run_dir) / "benchmark.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    told = {"rows": [_plain(row) for row in rows], "figures": [_plain(found) for found in figures]}
    save_json({**about, **told}, file)
    if "growth" in config.cases:
        plot = pathlib.Path(config.run_dir) / "growth.png"
        plots.growth(plot, _curves(rows), title="LSTM, forward and backward")
    return file


def machine() -> dict[str, Any]:
    """What the figures are measured on, and how busy it was before."""
    versions = {name: _version(name) for name in ("jax", "jaxlib", "flax", "torch")}
    return {
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),  # processes that wanted a core, of the last minute
        "versions": {name: version for name, version in versions.items() if version},
    }  # fmt: skip


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _console() -> Console:
    """The terminal; in a file, lines wide enough for the tables."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def _introduction(about: dict[str, Any]) -> str:
    on = about["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in on["versions"].items())
    lines = [
        f"{on['device']}, {on['cores']} cores, load {on['load']}; {versions}",
        f"one large float32 product: {about['ceiling_gflops']:.0f} GFLOP/s",
        "freed memory is " + ("kept" if about["keep_freed_memory"] else "the C library's business"),
        *(f"left out: {reason}" for reason in about["left_out"]),
    ]
    if on["load"] > on["cores"] / 2:
        # PyTorch's threads suffer most: they wait for each other without giving up their core.
        lines.append("other programs are running: the figures are not to be trusted")
    if about["small"]:
        lines.append("tiny sizes: the figures say nothing about speed")
    return "\n".join(lines)


def _table(work: str, rows: Sequence[Row]) -> Table:
    shown = Table(title=f"{work}: median (min – max) of the rounds")
    for name in ("case", "who"):
        shown.add_column(name)
    for name in ("ms", "time over the first", "GFLOP/s", "of ceiling", "weights read"):
        shown.add_column(name, justify="right")
    case = ""
    for row in rows:
        if row.case != case:
            shown.add_section()
        shown.add_row(
            "" if row.case == case else row.case,
            row.peer,
            _spread(row.ms, 1),
            _spread(row.ratio, 2),
            f"{row.gflops:.1f}",
            f"{100 * row.share_of_ceiling:.0f} %",
            f"{row.weight_bytes / 1e6:.1f} MB",
        )
        case = row.case
    return shown


def _figure_table(work: str, figures: Sequence[Figure]) -> Table:
    shown = Table(title=f"{work}: median (min – max) where there are several")
    for name in ("case", "what", "", "unit"):
        shown.add_column(name, justify="right" if not name else "left")
    case = ""
    for figure in figures:
        if figure.case != case:
            shown.add_section()
        told = "" if figure.case == case else figure.case
        shown.add_row(told, figure.what, _spread(figure.value, 2), figure.unit)
        case = figure.case
    return shown


def _spread(spread: Spread, digits: int) -> str:
    middle = f"{spread.median:.{digits}f}"
    if spread.min == spread.max:
        return middle
    return f"{middle} ({spread.min:.{digits}f} – {spread.max:.{digits}f})"


def _plain(record: Row | Figure) -> dict[str, Any]:
    return {
        name: value._asdict() if isinstance(value, Spread) else value
        for name, value in record._asdict().items()
    }


def _curves(rows: Sequence[Row]) -> dict[str, list[tuple[float, Spread, float]]]:
    """Axis -> (its size, ms, ms that grow as the arithmetic does from the smallest size on)."""
    curves: dict[str, list[tuple[float, Spread, float]]] = {}
    for row in rows:
        if row.work == "growth":
            axis, size = row.case.split()
            curves.setdefault(axis, []).append((float(size), row.ms, row.gflops * row.ms.median))
    for axis, points in curves.items():
        _, first, flop = points[0]
        curves[axis] = [(x, ms, first.median * own / flop) for x, ms, own in points]
    return curves


if __name__ == "__main__":
    run(benchmark, PRESETS, description="Measures ours beside the peers that are installed.")
