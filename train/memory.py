"""Memory of recurrent cells: every cell on recall, adding, words of permutations, and counting.

    python -m train.memory --cells all                       # all cells and tasks: hours
    python -m train.memory --preset two_tasks                # adding and recall: minutes
    python -m train.memory --cells lstm gru --tasks s3       # some of them
    python -m train.memory --tasks s3 --num-layers 2         # words of permutations, two layers
    python -m train.memory --chunk 50 --burn-in 10           # truncated backpropagation
    python -m train.memory --small                           # tiny sizes: seconds, a smoke test

Each training has one task and length, and new random data in every update. It ends when the task is
solved, or after `max_updates`. Results and plots are written to the run's folder.
"""

import dataclasses
import pathlib

from train import memory_plots
from train.memory_config import PRESETS, SMALL, MemoryConfig, cells_of, lengths_of
from train.memory_training import learn, learn_windows, norms_by_lag
from vla_jax import config as configs
from vla_jax.command_line import run
from vla_jax.runs import save_json
from vla_jax.training.run_lock import exclusive


@exclusive
def memory(config: MemoryConfig) -> pathlib.Path:
    """Trains every cell on every task, writes results and plots; returns the JSON file."""
    if config.small:
        config = dataclasses.replace(config, **SMALL)
    results, norms, window_errors = [], {}, {}
    for cell in cells_of(config):
        for task in config.tasks:
            for length in lengths_of(config, task):
                for seed in range(config.seed, config.seed + config.num_seeds):
                    result, params = learn(config, task, cell, length, seed=seed)
                    print(memory_plots.describe(result), flush=True)
                    results.append(result)
                    is_longest = (task, length, seed) == ("adding", config.adding[-1], config.seed)
                    if is_longest and config.num_layers == 1:
                        norms[cell] = norms_by_lag(config, cell, params)
        if "recall" in config.tasks and config.windows:
            window_errors[cell] = learn_windows(config, cell)
    run_dir = pathlib.Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    file = run_dir / "memory.json"
    windows = {
        cell: dict(zip(config.windows, errors, strict=True))
        for cell, errors in window_errors.items()
    }
    content = {
        "config": configs.to_dict(config),
        "results": [result._asdict() for result in results],
        "gradient_norms": norms,
        "windows": windows,
    }
    save_json(content, file)
    memory_plots.draw(run_dir, config, results, norms, window_errors)
    return file


if __name__ == "__main__":
    run(memory, PRESETS, description="Trains every recurrent cell on memory tasks.")
