"""Memory suite: every decoder on every memory task of the JAX table, from its state.

    python -m train.memory_suite --preset quick  # six tasks, one seed: about 10 minutes
    python -m train.memory_suite --preset short  # all tasks, six policies, three seeds: hours
    python -m train.memory_suite                 # all tasks, all policies, curves: 1 to 2 days
    python -m train.memory_suite --tasks lit cups_swapped --decoders fc lstm gpt --num-workers 4
    python -m train.memory_suite --pictures      # four tasks from images, on the MuJoCo table

Each policy clones a scripted expert that sees the cue, from demonstrations of its own task. The
training also asks its features for what must be remembered (`training.recalling`; not with
`--recall-weight 0`, nor from images). Results are appended to the run folder cell by cell, and an
interrupted grid continues where it stopped; cells of another training (`cloning`) are run again.
"""

import contextlib
import pathlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from rich.console import Console

from train import (
    memory_films,
    memory_grid,
    memory_page,
    memory_pictures,
    memory_report,
    memory_workers,
)
from train.memory_decoders import variants
from train.memory_films import EpisodeFilm
from train.memory_grid import CloningConfig, GridCell, Score
from train.memory_pictures import MemoryPicturesConfig
from train.memory_progress import grid_progress
from vla_jax import files
from vla_jax.command_line import run
from vla_jax.config import check_names, checked
from vla_jax.envs.memory_table import tasks
from vla_jax.envs.memory_table.memory_env import JaxMemoryConfig
from vla_jax.envs.memory_table.memory_table_config import MAX_COUNT, MAX_DELAY
from vla_jax.evaluation import video
from vla_jax.runs import check_run, open_run
from vla_jax.training.progress import progress_bar
from vla_jax.training.run_lock import exclusive

_OF_PICTURES = ("pictures", "features", "delay", "run_dir")  # options that apply to pictures
_CURVES = {"swaps": "cups_swapped", "touches": "touch_times"}  # greatest number -> its task


@dataclass(frozen=True)
@checked(
    num_workers=(1, 1000), delay=(0, MAX_DELAY), delays=(0, MAX_DELAY), items=(0, MAX_COUNT),
    swaps=(0, MAX_COUNT), touches=(0, MAX_COUNT),
)  # fmt: skip
class MemorySuiteConfig:
    """Tasks, policies and sizes of the memory suite."""

    tasks: tuple[str, ...] = tuple(tasks.TASKS)  # tasks of the table
    # policies to compare: fc, first_and_now, lstm_window, and every trunk with memory
    decoders: tuple[str, ...] = tuple(variants())
    delay: int = 16  # mean steps between what is shown and the first action
    delays: tuple[int, ...] = (64, 256)  # further delays of the task "lit"; () = no such curve
    items: tuple[int, ...] = (2, 4)  # further numbers of blocks of the task "sequence"
    swaps: int = 6  # greatest number of swaps of the curve of "cups_swapped"; 0 = no such curve
    touches: int = 8  # greatest number of the curve of "touch_times"; 0 = no such curve
    cloning: CloningConfig = CloningConfig()  # training and test
    # instead of the grid: four tasks on the MuJoCo table from images, into RUN_DIR/pictures;
    # train.memory_pictures has the options
    pictures: bool = False
    # the same on the frozen backbone of this run, into RUN_DIR/features; empty = not
    features: str = ""
    num_workers: int = 2  # cells that are trained at a time, each in a process of its own
    run_dir: str = "runs/memory_suite"  # folder of results, table, plots and page
    overwrite: bool = False  # whether to delete earlier results in the folder

    def __post_init__(self):
        """Checks the names."""
        check_names("decoders", self.decoders, variants())
        check_names("tasks", self.tasks, tasks.TASKS)
        if not self.tasks or not self.decoders:
            raise ValueError("tasks and decoders must be at least one each, got none.")
        if self.pictures or self.features:
            _refuse_others(self)
        for option, task in _CURVES.items():
            count, least = getattr(self, option), tasks.get(task).least_updates
            if task in self.tasks and 0 < count < least:
                raise ValueError(
                    f"{option} must be at least {least}, or 0 for no such curve, got {count}."
                )
        for cell in cells(self):
            tasks.check(cell.world)


def _refuse_others(config: MemorySuiteConfig) -> None:
    """Raises a ValueError for an option, or a preset, that only the grid from state has."""
    given = _of_grid(config)
    for name, preset in MEMORY_SUITE.items():
        if given and given == _of_grid(preset()):
            raise ValueError(
                f"preset must be left out with pictures or features, got '{name}'; "
                "train.memory_pictures has presets of its own."
            )
    if given:
        name, value = next(iter(given.items()))
        raise ValueError(
            f"{name} must be left out with pictures or features, got {value}; "
            "train.memory_pictures has options of its own."
        )


def _of_grid(config: MemorySuiteConfig) -> dict[str, Any]:
    """Returns the options of the grid from state that are not at their defaults."""
    return {
        field.name: value
        for field in fields(config)
        if (value := getattr(config, field.name)) != field.default
        and field.name not in _OF_PICTURES
    }


def cells(config: MemorySuiteConfig) -> list[GridCell]:
    """Returns the cells of the grid, each once: the table, then what the curves need besides."""
    base = JaxMemoryConfig(delay=config.delay)
    worlds = [replace(base, task=task) for task in config.tasks]
    if "lit" in config.tasks:
        worlds += [replace(base, task="lit", delay=delay) for delay in config.delays]
    if "sequence" in config.tasks:
        worlds += [replace(base, task="sequence", items=items) for items in config.items]
    for option, task in _CURVES.items():
        if task in config.tasks and getattr(config, option):
            worlds.append(replace(base, task=task, updates=getattr(config, option)))
    grid = [GridCell(world, decoder) for world in worlds for decoder in config.decoders]
    return list({memory_report.key(cell): cell for cell in grid}.values())


@exclusive
def memory_suite(config: MemorySuiteConfig) -> pathlib.Path:
    """Runs the grid; returns the page with the results."""
    if config.pictures or config.features:
        place = f"{config.run_dir}/{'features' if config.features else 'pictures'}"
        return memory_pictures.memory_pictures(
            MemoryPicturesConfig(delay=config.delay, features=config.features, run_dir=place)
        )
    folder, grid = pathlib.Path(config.run_dir), cells(config)
    check_run(folder, config, overwrite=config.overwrite)
    earlier = () if config.overwrite else memory_grid.read_scores(folder, grid, config.cloning)
    scores = {memory_report.key(score.cell): score for score in earlier}
    run_dir = open_run(folder, config, overwrite=config.overwrite)
    order = {memory_report.key(cell): number for number, cell in enumerate(grid)}
    waiting = [cell for cell in grid if memory_report.key(cell) not in scores]
    console = Console(stderr=True)
    try:
        for score in _run(waiting, config, run_dir, console):
            scores[memory_report.key(score.cell)] = score
    except (KeyboardInterrupt, SystemExit):
        done = f"{len(scores)} of {len(grid)} cells are in {run_dir / memory_grid.RESULTS}"
        console.print(f"{done}; the same command continues.", highlight=False, soft_wrap=True)
        raise
    ordered = sorted(scores.values(), key=lambda score: order[memory_report.key(score.cell)])
    decoders = tuple(dict.fromkeys(config.decoders))
    memory_report.write(run_dir, ordered, decoders)
    console.print(memory_report.table(ordered, decoders))
    films = _films(run_dir, config, ordered, console)
    return memory_page.write(run_dir, ordered, decoders, config.cloning, films)


def _films(
    run_dir: pathlib.Path, config: MemorySuiteConfig, scores: Sequence[Score], console: Console
) -> dict[str, list[EpisodeFilm]]:
    """Returns the films of every task; none without the packages that write them."""
    try:
        video.check_packages()
    except ImportError as error:  # the page is useful without films too
        warnings.warn(f"the page has no films: {error}", stacklevel=2)
        return {}
    num_tasks = len({score.cell.world.task for score in scores})
    with progress_bar("films", num_tasks, unit="tasks", console=console) as show:
        return memory_films.film_tasks(run_dir, scores, config.cloning, show)


def _run(
    waiting: Sequence[GridCell], config: MemorySuiteConfig, run_dir: pathlib.Path, console: Console
) -> Iterator[Score]:
    """Trains and tests the cells; yields each score when it is in the results."""
    costs = [float(tasks.max_steps(cell.world)) for cell in waiting]
    with (
        grid_progress(costs, console) as progress,
        contextlib.closing(
            memory_workers.run_cells(
                waiting,
                config.cloning,
                run_cell=memory_grid.run_cell,
                num_workers=config.num_workers,
                progress=progress.update,
                clones=run_dir / memory_grid.CLONES,
                compiled=run_dir / ".jax_cache",
            )
        ) as finished,
    ):
        for count, score in enumerate(finished, start=1):
            files.append_json_line(
                run_dir / memory_grid.RESULTS, memory_grid.to_json(score, config.cloning)
            )
            place = f"{count} of {len(waiting)}"
            progress.describe(f"memory suite, {place} cells")
            line = f"{memory_report.line(score)}   {place}, {progress.left()}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
            yield score


def full() -> MemorySuiteConfig:
    """All tasks and curves, all policies, three seeds: one to two days on 2 CPU cores."""
    return MemorySuiteConfig()


def short() -> MemorySuiteConfig:
    """All tasks, six policies, three seeds, no curves: 5 to 10 hours on 2 CPU cores."""
    return MemorySuiteConfig(
        decoders=("fc", "first_and_now", "lstm_window", "lstm", "gru", "rotary_gpt"),
        delays=(),
        items=(),
        swaps=0,
        touches=0,
        run_dir="runs/memory_suite_short",
    )


def quick() -> MemorySuiteConfig:
    """Six tasks with and without memory, one seed, no curves: about 10 minutes on 2 CPU cores."""
    return MemorySuiteConfig(
        tasks=("touch_times", "blinks", "cups", "dark", "lit", "sequence"),
        decoders=("fc", "lstm"),
        delays=(),
        items=(),
        swaps=0,
        touches=0,
        cloning=CloningConfig(
            num_seeds=1, num_demonstrations=4000, num_updates=1000, learning_rate=3e-3
        ),
        run_dir="runs/memory_suite_quick",
    )


MEMORY_SUITE = {preset.__name__: preset for preset in (full, short, quick)}
if __name__ == "__main__":
    run(memory_suite, MEMORY_SUITE, description="Measures what policies remember.")
