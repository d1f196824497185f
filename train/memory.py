"""Memory of recurrent cells: every cell on recall, adding, words of permutations, and counting.

    python -m train.memory --cells all                       # all cells and tasks: hours
    python -m train.memory --preset two_tasks                # adding and recall: minutes
    python -m train.memory --cells lstm gru --tasks s3       # some of them
    python -m train.memory --tasks s3 --num-layers 2         # words of permutations, two layers
    python -m train.memory --chunk 50 --burn-in 10           # truncated backpropagation
    python -m train.memory --small                           # tiny sizes: seconds, a smoke test

Each training has one task and length, and new random data in every update. It ends when the task is
solved, or after `max_updates`. Results are appended to the run's folder one by one; trainings whose
results are there are not repeated, unless `overwrite`. Plots are drawn at the end.
"""

import dataclasses
import pathlib

from train import memory_plots, memory_records
from train.memory_config import PRESETS, SMALL, MemoryConfig
from train.memory_records import MemoryRecord
from vla_jax import config as configs
from vla_jax.command_line import run
from vla_jax.runs import check_run, open_run, save_json
from vla_jax.training.run_lock import exclusive


@exclusive
def memory(config: MemoryConfig) -> pathlib.Path:
    """Trains every cell on every task, writes results and plots; returns the JSON file."""
    if config.small:
        config = dataclasses.replace(config, **SMALL)
    folder, mark = pathlib.Path(config.run_dir), memory_records.RESULTS
    check_run(folder, config, overwrite=config.overwrite, mark=mark)
    known = {} if config.overwrite else memory_records.read(config, folder)
    run_dir = open_run(folder, config, overwrite=config.overwrite, mark=mark)
    trainings = memory_records.trainings(config)
    num_known = len(known.keys() & set(trainings))
    if num_known:
        file = run_dir / mark
        print(f"{num_known} of {len(trainings)} trainings are in {file}; --overwrite repeats them.")
    records = []
    for training in trainings:
        record = known.get(training)
        if record is None:
            record = memory_records.train(config, training)
            memory_records.append(record, run_dir)
            if record.result is not None:
                print(memory_plots.describe(record.result), flush=True)
        records.append(record)
    return _write(config, run_dir, records)


def _write(
    config: MemoryConfig, run_dir: pathlib.Path, records: list[MemoryRecord]
) -> pathlib.Path:
    """Writes all results to one file, and draws the plots; returns the file."""
    results = [record.result for record in records if record.result is not None]
    norms = {
        record.training.cell: record.norms
        for record in records
        if record.norms and memory_records.has_norms(config, record.training)
    }
    windows = {
        record.training.cell: record.window_errors for record in records if record.window_errors
    }
    content = {
        "config": configs.to_dict(config),
        "results": [result._asdict() for result in results],
        "gradient_norms": norms,
        "windows": {
            cell: dict(zip(config.windows, errors, strict=True)) for cell, errors in windows.items()
        },
    }
    file = run_dir / "memory.json"
    save_json(content, file)
    memory_plots.draw(run_dir, config, results, norms, windows)
    return file


if __name__ == "__main__":
    run(memory, PRESETS, description="Trains every recurrent cell on memory tasks.")
