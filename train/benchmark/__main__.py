"""Benchmark of vla_jax against other implementations of the same computations.

    python -m train.benchmark                                # all cases
    python -m train.benchmark --cases recurrence head        # some of them
    python -m train.benchmark --cases start checkpoints      # vla_jax alone: start-up, checkpoints
    python -m train.benchmark --cases frames --workers 1 2 4 # frames per second of the loader
    python -m train.benchmark --small                        # tiny sizes: seconds, a smoke test
    python -m train.benchmark --precision tf32               # on a GPU: products in TF32

The others are the RNNs of Flax and PyTorch, RoboVLMs' head written in PyTorch, the SmolVLM of
transformers, autodiff of a plain scan, and recomputation of the whole window at every step. All
have the same weights, and their outputs and gradients must agree with those of vla_jax before any
is timed. Run nothing else on the machine: other programs widen the spread.
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

from train.benchmark import baselines, baselines_vlm, cell_memory, frame_rates, system, timing
from train.benchmark import cases as benchmark_cases
from train.benchmark.precision import PRECISIONS, Name, all_libraries
from train.benchmark.system import Measurement
from train.benchmark.timing import Device, Row, Spread
from vla_jax.command_line import run
from vla_jax.config import checked
from vla_jax.evaluation import plots
from vla_jax.runs import save_json
from vla_jax.training.malloc import keep_freed_memory

Case = Literal[
    "recurrence", "head", "streaming", "growth", "products", "cells", "parallel", "decoders",
    "backbone", "memory", "start", "checkpoints", "loader", "frames",
]  # fmt: skip
CASES: tuple[Case, ...] = get_args(Case)
MEASUREMENTS = {  # of vla_jax alone
    **system.MEASUREMENTS,
    "frames": frame_rates.frames,
    "parallel": cell_memory.parallel_forms,  # beside its times, which are comparisons
}
WIDTH = 200  # characters per line if the output is not a terminal: no cell wraps


@dataclass(frozen=True)
@checked(rounds=(1, 1_000_000), queue=(0, 1_000_000), workers=(0, 1000))
class BenchmarkConfig:
    """Cases, sizes and output of a benchmark."""

    cases: tuple[Case, ...] = CASES  # cases to measure, in this order
    rounds: int = 15  # timed runs of each implementation
    precision: Name = "float32"  # of all products: float32, tf32 (on a GPU), bfloat16
    # runs in a row of which only the last one is waited for, to time the device without the host;
    # 0 = 20 on an accelerator, not measured on a CPU
    queue: int = 0
    small: bool = False  # use tiny sizes: a smoke test without meaningful timings
    keep_freed_memory: bool = True  # keep freed memory in the process, as in training
    run_dir: str = "runs/benchmark"  # folder of the plot and of benchmark.json
    # threads, and worker processes, of case frames, such as 1 2 4 8 16; empty = those of the sizes
    workers: tuple[int, ...] = ()
    json: str = ""  # file of the measurements; empty = benchmark.json in run_dir

    def __post_init__(self):
        """Checks the number of cases."""
        if not self.cases:
            raise ValueError(f"cases must be at least one of {', '.join(CASES)}, got none.")


def robovlms() -> BenchmarkConfig:
    """The sizes of RoboVLMs' head: four layers of 1024 hidden units."""
    return BenchmarkConfig()


PRESETS = {"robovlms": robovlms}


def benchmark(config: BenchmarkConfig) -> pathlib.Path:
    """Runs the cases and prints their tables; returns the JSON file of the measurements."""
    precision, console = PRECISIONS[config.precision], _console()
    sizes = benchmark_cases.SMALL if config.small else benchmark_cases.LARGE
    sizes = benchmark_cases.in_precision(sizes, precision)
    on_cpu = jax.default_backend() == "cpu"
    queue = config.queue or (1 if on_cpu else 20)
    rows: list[Row] = []
    measurements: list[Measurement] = []
    if config.workers:
        sizes = sizes._replace(workers=config.workers)
    if config.keep_freed_memory:
        keep_freed_memory()

    with all_libraries(config.precision):
        device = Device(
            timing.measure_peak(
                sizes.peak_size if on_cpu else 4 * sizes.peak_size,  # large enough for each
                config.rounds, precision.dtype, num_runs=queue,
            ),
            timing.measure_bandwidth(4 * sizes.peak_size, config.rounds),
        )  # fmt: skip
        conditions = {
            "machine": machine(),
            "left_out": _left_out(config.cases),
            "small": config.small,
            "keep_freed_memory": config.keep_freed_memory,
            "rounds": config.rounds,
            "precision": config.precision,
            "queue": queue,
            "peak_gflops": device.gflops,
            "memory_gigabytes": device.gigabytes,
        }
        console.print(_introduction(conditions))
        for case in config.cases:
            if case in MEASUREMENTS:
                measured = list(MEASUREMENTS[case](sizes))
                console.print(_measurement_table(case, measured))
                measurements += measured
            if case not in benchmark_cases.COMPARISONS:
                continue
            timed = []
            for comparison in benchmark_cases.COMPARISONS[case](sizes):
                timing.check(comparison, tolerance=precision.tolerance)
                timed += timing.measure(comparison, config.rounds, device, queue=queue)
            console.print(_table(case, timed))
            rows += timed

    # The JSON file is written before the plot, which raises if its extra is not installed.
    file = pathlib.Path(config.json or pathlib.Path(config.run_dir) / "benchmark.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    results = {
        "rows": [_plain(row) for row in rows],
        "measurements": [_plain(measurement) for measurement in measurements],
    }
    save_json({**conditions, **results}, file)
    if "growth" in config.cases:
        plot = pathlib.Path(config.run_dir) / "growth.png"
        plots.growth(plot, _curves(rows), title="LSTM, forward and backward")
    return file


def _left_out(cases: Sequence[Case]) -> list[str]:
    """Returns why some of the other implementations are not measured."""
    reasons = [baselines.why_no_torch()]
    if "backbone" in cases:
        reasons.append(baselines_vlm.why_no_transformers())
    return sorted({reason for reason in reasons if reason})


def machine() -> dict[str, Any]:
    """Returns device, number of cores, load before the benchmark, and library versions."""
    versions = {name: _version(name) for name in ("jax", "jaxlib", "flax", "torch")}
    return {
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),  # runnable processes, mean of the last minute
        "versions": {name: version for name, version in versions.items() if version},
    }  # fmt: skip


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # not listed if it is not installed
        return ""


def _console() -> Console:
    """Returns the terminal, or a console with lines wide enough for the tables."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def _introduction(conditions: dict[str, Any]) -> str:
    host = conditions["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in host["versions"].items())
    freed = "kept in the process" if conditions["keep_freed_memory"] else "returned to the system"
    lines = [
        f"{host['device']}, {host['cores']} cores, load {host['load']}; {versions}",
        f"peak (one large {conditions['precision']} matrix product): "
        f"{conditions['peak_gflops']:.0f} GFLOP/s; memory: "
        f"{conditions['memory_gigabytes']:.0f} GB/s",
        f"freed memory: {freed}",
        *(f"left out: {reason}" for reason in conditions["left_out"]),
    ]
    if host["load"] > host["cores"] / 2:
        # PyTorch suffers most: its threads spin while they wait for each other.
        lines.append("warning: other programs are running, so the timings are not reliable")
    if conditions["small"]:
        lines.append("tiny sizes: the timings are not meaningful")
    return "\n".join(lines)


def _table(case: str, rows: Sequence[Row]) -> Table:
    table = Table(title=f"{case}: median (min – max) over rounds")
    for name in ("setting", "implementation"):
        table.add_column(name)
    columns = (
        "ms", "in a row", "device", "time / first", "GFLOP/s", "of peak", "weights read", "of time",
    )  # fmt: skip
    for name in columns:
        table.add_column(name, justify="right")
    setting = ""
    for row in rows:
        if row.setting != setting:
            table.add_section()
        table.add_row(
            "" if row.setting == setting else row.setting,
            row.implementation,
            _spread(row.ms, 3 if row.ms.median < 1 else 1),
            "" if row.queued_ms is None else _spread(row.queued_ms, 3),
            "" if row.device_ms is None else f"{row.device_ms:.3f}",
            _spread(row.ratio, 2),
            f"{row.gflops:.1f}",
            f"{100 * row.fraction_of_peak:.0f} %",
            f"{row.weight_bytes / 1e6:.1f} MB",
            "" if row.weights_share is None else f"{100 * row.weights_share:.0f} %",
        )
        setting = row.setting
    return table


def _measurement_table(case: str, measurements: Sequence[Measurement]) -> Table:
    table = Table(title=f"{case}: median (min – max) where measured more than once")
    for name in ("setting", "quantity", "value", "unit"):
        table.add_column(name, justify="right" if name == "value" else "left")
    setting = ""
    for each in measurements:
        if each.setting != setting:
            table.add_section()
        label = "" if each.setting == setting else each.setting
        table.add_row(label, each.quantity, _spread(each.value, 2), each.unit)
        setting = each.setting
    return table


def _spread(spread: Spread, digits: int) -> str:
    median = f"{spread.median:.{digits}f}"
    if spread.min == spread.max:
        return median
    return f"{median} ({spread.min:.{digits}f} – {spread.max:.{digits}f})"


def _plain(record: Row | Measurement) -> dict[str, Any]:
    return {
        name: value._asdict() if isinstance(value, Spread) else value
        for name, value in record._asdict().items()
    }


def _curves(rows: Sequence[Row]) -> dict[str, list[tuple[float, Spread, float]]]:
    """Returns axis -> (size, ms, ms extrapolated from the smallest size in proportion to FLOP)."""
    curves: dict[str, list[tuple[float, Spread, float]]] = {}
    for row in rows:
        if row.case == "growth":
            axis, size = row.setting.split()
            curves.setdefault(axis, []).append((float(size), row.ms, row.gflops * row.ms.median))
    for axis, points in curves.items():
        _, first_ms, first_flop = points[0]
        curves[axis] = [(x, ms, first_ms.median * flop / first_flop) for x, ms, flop in points]
    return curves


if __name__ == "__main__":
    run(benchmark, PRESETS, description="Compares the speed of vla_jax with other libraries.")
