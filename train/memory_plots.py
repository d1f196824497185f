"""Plots of the memory experiment."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from train.memory_config import BLOCK, EXPLODING, MemoryConfig, lengths_of
from train.memory_training import TaskResult
from vla_jax.evaluation import plots
from vla_jax.evaluation.plots import Panel
from vla_jax.nn.sequence_tasks import TASKS

NAMES = {  # labels of cells in plots; default: the cell's name
    "rnn": "RNN", "lstm": "LSTM", "gru": "GRU", "layer_norm_lstm": "LayerNorm-LSTM",
    "min_gru": "minGRU", "min_lstm": "minLSTM", "rg_lru": "RG-LRU", "s_lstm": "sLSTM",
    "m_lstm": "mLSTM", "gated_delta_net": "gated DeltaNet", "mamba2": "Mamba-2",
}  # fmt: skip


def draw(
    run_dir: pathlib.Path,
    config: MemoryConfig,
    results: Sequence[TaskResult],
    norms: Mapping[str, Mapping[str, Sequence[float | None]]],
    window_errors: Mapping[str, Sequence[float]],
) -> None:
    """Plots the learning curves of each task, and an overview with gradient norms and windows."""
    panels = {
        task: [
            learning_curves(config, results, task, length) for length in lengths_of(config, task)
        ]
        for task in config.tasks
    }
    for task, curves in panels.items():
        plots.curves(run_dir / f"{task}.png", curves)
    overview = [curves[-1] for curves in panels.values()]
    if norms:
        overview += _all_lags(config, norms)
    if window_errors:
        overview.append(_windows(config, window_errors))
    plots.curves(run_dir / "memory.png", overview, columns=2)


def _all_lags(
    config: MemoryConfig, norms: Mapping[str, Mapping[str, Sequence[float | None]]]
) -> list[Panel]:
    before = {name(cell): variants["before"] for cell, variants in norms.items()}
    for cell in norms.keys() & EXPLODING:
        label = f"{name(cell)}, recurrent weights × {EXPLODING[cell]:g}"
        before[label] = norms[cell]["larger"]
    after = {name(cell): variants["after"] for cell, variants in norms.items()}
    return [
        _lags("gradient before training", before),
        _lags(f"gradient after adding {config.adding[-1]}", after),
    ]


def _windows(config: MemoryConfig, window_errors: Mapping[str, Sequence[float]]) -> Panel:
    accuracy = {
        name(cell): (config.windows, [1 - error for error in errors])
        for cell, errors in window_errors.items()
    }
    return Panel(
        f"recall after {config.window_delay} steps, inputs limited to a window",
        "window size W / steps", "accuracy", accuracy,
        levels={"chance": 1 - TASKS["recall"].chance}, y_range=(0.0, 1.05),
    )  # fmt: skip


def learning_curves(
    config: MemoryConfig, results: Sequence[TaskResult], task_name: str, length: int
) -> Panel:
    """Returns the curves of all cells on one task, of the first seed."""
    task, curves = TASKS[task_name], {}
    for result in results:
        if (result.task, result.length, result.seed) == (task_name, length, config.seed):
            updates = [BLOCK * (block + 1) for block in range(len(result.errors))]
            curves[name(result.cell)] = (updates, result.errors)
    levels = {"chance": task.chance, "solved": task.solved}
    title = f"{task_name}, {length} steps"
    return Panel(title, "updates", task.error_name, curves, levels, log="y", y_range=(1e-3, 1.2))


def _lags(title: str, norms: Mapping[str, Sequence[float | None]]) -> Panel:
    curves = {name: (range(len(values)), np.array(values, float)) for name, values in norms.items()}
    y_label = "‖∂ output / ∂ carry‖, lag 0 = 1"
    return Panel(title, "lag / steps", y_label, curves, log="y", y_range=(1e-9, 1e5))


def describe(result: TaskResult) -> str:
    """Returns a result as one line for the terminal."""
    task = TASKS[result.task]
    outcome = "solved" if result.error < task.solved else "not solved"
    longer = "".join(f", {error:.4f} at {length}" for length, error in result.longer.items())
    return (
        f"{result.task:8} {result.length:5}  {name(result.cell):14}  seed {result.seed}  error "
        f"{result.error:.4f} (chance {task.chance:.3f}){longer}  {outcome} after "
        f"{result.num_updates} updates, {result.seconds:.0f} s"
    )


def name(cell: str) -> str:
    """Returns the label of a cell."""
    return NAMES.get(cell, cell)
