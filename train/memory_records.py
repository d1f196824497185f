"""The trainings of a memory experiment, and the file to which their results are appended."""

import pathlib
from typing import Any, NamedTuple

from train.memory_config import EXPLODING, MemoryConfig, cells_of, lengths_of
from train.memory_training import TaskResult, learn, learn_windows, norms_by_lag
from vla_jax import config as configs
from vla_jax import files, records
from vla_jax.nn.cells import CellName

RESULTS = "results.jsonl"
WINDOWS = "windows"  # stands for recall through windows, beside the names of the tasks
# Fields that choose trainings; the others are settings of each of them.
_CHOICES = ("cells", "tasks", "adding", "recall", "tracking", "windows", "window_delay", "seed",
            "num_seeds", "small", "run_dir", "overwrite")  # fmt: skip


class MemoryTraining(NamedTuple):
    """One training of the experiment."""

    cell: CellName
    task: str  # or WINDOWS
    length: int  # length of the sequences, or delay of recall, steps
    seed: int
    windows: tuple[int, ...] = ()  # window sizes of WINDOWS, steps


class MemoryRecord(NamedTuple):
    """Result of one training: a line of the file."""

    training: MemoryTraining
    settings: dict[str, Any]  # of the config
    result: TaskResult | None = None  # None for WINDOWS
    norms: dict[str, list[float | None]] | None = None  # see `norms_by_lag`
    window_errors: list[float] | None = None  # error rate of each window


def trainings(config: MemoryConfig) -> list[MemoryTraining]:
    """Returns all trainings of the experiment, in order."""
    found = []
    for cell in cells_of(config):
        for task in config.tasks:
            for length in lengths_of(config, task):
                for seed in range(config.seed, config.seed + config.num_seeds):
                    found.append(MemoryTraining(cell, task, length, seed))
        if "recall" in config.tasks and config.windows:
            found.append(
                MemoryTraining(cell, WINDOWS, config.window_delay, config.seed, config.windows)
            )
    return found


def has_norms(config: MemoryConfig, training: MemoryTraining) -> bool:
    """Returns True if the gradient norms of a training are plotted: of the longest adding."""
    longest = ("adding", config.adding[-1], config.seed)
    return config.num_layers == 1 and training[1:4] == longest


def train(config: MemoryConfig, training: MemoryTraining) -> MemoryRecord:
    """Runs one training."""
    settings = _settings(config)
    if training.task == WINDOWS:
        errors = learn_windows(config, training.cell)
        return MemoryRecord(training, settings, window_errors=errors)
    result, params = learn(
        config, training.task, training.cell, training.length, seed=training.seed
    )
    norms = None
    if has_norms(config, training):
        norms = norms_by_lag(config, training.cell, params)
    return MemoryRecord(training, settings, result, norms)


def append(record: MemoryRecord, run_dir: pathlib.Path) -> None:
    """Appends a record to the file of a run folder."""
    line = {**record._asdict(), "training": record.training._asdict()}
    if record.result is not None:
        line["result"] = record.result._asdict()
    files.append_json_line(run_dir / RESULTS, line)


def read(config: MemoryConfig, run_dir: pathlib.Path) -> dict[MemoryTraining, MemoryRecord]:
    """Returns the records of a run folder that are complete and have the settings of the config.

    Raises:
      ValueError: a line is damaged.
    """
    settings = _settings(config)
    lines = records.read_lines(
        MemoryRecord,
        run_dir / RESULTS,
        select=lambda line: records.get(line, "settings", dict) == settings,
        fault=_fault,
    )
    return {
        record.training: record
        for record in lines
        if record.norms or not has_norms(config, record.training)
    }


def _fault(record: MemoryRecord) -> str:
    """Returns what is wrong with a record that was read, "" if nothing is."""
    training, result = record.training, record.result
    if training.task == WINDOWS:
        is_whole = len(record.window_errors or ()) == len(training.windows)
        return "" if is_whole else "window_errors must be one per window"
    if result is None or (result.cell, result.task, result.length, result.seed) != training[:4]:
        return "result must be that of its training"
    drawn = {"before", "after", *(("larger",) if training.cell in EXPLODING else ())}
    is_whole = record.norms is None or drawn <= set(record.norms)
    return "" if is_whole else f"norms must hold {', '.join(sorted(drawn))}"


def _settings(config: MemoryConfig) -> dict[str, Any]:
    """Returns the settings as they are read from JSON."""
    fields = configs.to_dict(config)
    return {name: value for name, value in fields.items() if name not in _CHOICES}
