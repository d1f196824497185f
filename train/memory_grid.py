"""The grid of the memory suite: which policy is trained on which task, and the results."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from train import memory_cloning, memory_decoders
from train.memory_cloning import Clones
from vla_jax import files, records, runs
from vla_jax.config import checked
from vla_jax.envs.memory_table import memory_env, tasks
from vla_jax.envs.memory_table.memory_env import JaxMemoryConfig
from vla_jax.envs.memory_table.memory_state import STATE_NAMES
from vla_jax.policies import trunks
from vla_jax.training import checkpoint

RESULTS = "results.jsonl"  # file of the run folder, one line per cell
CLONES = "clones"  # folder in it with a run per cell: the policy of the first seed
_IDENTITY = ("task", "delay", "items", "updates", "decoder")  # fields that distinguish the cells
_OF_CLONE = "cloning.json"  # file of each of these runs: settings of its training


@dataclass(frozen=True)
@checked(
    num_seeds=(1, 1000), num_demonstrations=(2, 2**20), num_updates=(1, 2**31 - 1),
    batch_size=(1, 2**20), hidden_size=(1, 2**16), num_episodes=(1, 2**20),
    joint_sizes=(1, 2**16), recall_weight=(0.0, 1e6),
)  # fmt: skip
class CloningConfig:
    """Training and test of every cell of the grid."""

    num_seeds: int = 3  # trainings of each policy, in one program
    num_demonstrations: int = 16_000  # episodes of the expert; clones overfit to few of them
    num_updates: int = 4000  # updates of each training
    batch_size: int = 16  # episodes per update
    hidden_size: int = 64  # hidden units H of each policy
    # widths of an MLP over state, proprio and instruction, before the memory; none = a linear map,
    # with which "sequence" is not cloned even if the order is always visible
    joint_sizes: tuple[int, ...] = (256, 256)
    # weight of the loss that asks the trunk's features at every step for what must be remembered;
    # without it, 0, "kth" is not learned; with 1 "path" has half the success of 0.2
    recall_weight: float = 0.3
    learning_rate: float = 2e-3  # peak of the cosine schedule of AdamW
    # the same for transformers: after 1,000 updates at 0.005, with which recurrences learn "lit",
    # the rotary GPT has 49 %; at 0.001 it has 99 %
    transformer_learning_rate: float = 1e-3
    num_episodes: int = 200  # test episodes of each seed
    seed: int = 10  # the seeds are seed, seed + 1, …; settings were chosen on seed 0


class GridCell(NamedTuple):
    """One cell of the grid: a task and a policy."""

    world: JaxMemoryConfig
    decoder: str  # name of the policy, of `memory_decoders.variants`


class Score(NamedTuple):
    """Result of a cell."""

    cell: GridCell
    success: np.ndarray  # [S] success rate of each seed
    groups: dict[str, list[float]]  # group of the task -> success rate of each seed
    chance: float  # of the best policy without memory
    seconds: float  # training and test


class ScoreLine(NamedTuple):
    """A line of the results; the first fields are those of `identity`."""

    task: str
    delay: int
    items: int
    updates: int
    decoder: str
    success: list[float]  # success rate of each seed
    groups: dict[str, list[float]]  # as in `Score`, like the next two
    chance: float
    seconds: float
    cloning: dict[str, Any]  # settings of the training


def identity(cell: GridCell) -> dict[str, Any]:
    """Returns what distinguishes a cell from the others; a line of the results begins with it."""
    world = cell.world
    values = _plain(world.task, world.delay, world.items, world.updates, cell.decoder)
    return dict(zip(_IDENTITY, values, strict=True))


def _plain(task: str, delay: int, items: int, updates: int, decoder: str) -> tuple[object, ...]:
    """Returns the values of `identity`, the same for all options that give the same world.

    A number of items or updates that is the task's default is 0.
    """
    own = tasks.get(task)
    items, updates = (
        0 if value == default else value
        for value, default in ((items, own.items), (updates, own.updates))
    )
    return task, delay, items, updates, decoder


def clone_name(cell: GridCell) -> str:
    """Returns the name of the run with the policy of a cell, such as "lit-16-0-0-lstm"."""
    return "-".join(map(str, identity(cell).values()))


def learning_rate(config: CloningConfig, kind: str) -> float:
    """Returns the peak of the schedule for a trunk."""
    is_transformer = trunks.get(kind).is_transformer
    return config.transformer_learning_rate if is_transformer else config.learning_rate


def run_cell(
    cell: GridCell,
    config: CloningConfig,
    progress: Callable[[int], None] = lambda done: None,
    *,
    clones: pathlib.Path | None = None,
) -> Score:
    """Trains and tests one policy on one task, all seeds at once.

    Args:
      cell: of the grid.
      config: sizes of training and test.
      progress: is called with the updates done.
      clones: folder for the policy of the first seed, as a run; None = it is not kept.
    """
    start, env = time.monotonic(), memory_env.make(cell.world)
    variant = memory_decoders.variants()[cell.decoder]
    keys = jax.vmap(jax.random.key)(config.seed + np.arange(config.num_seeds))
    trained = memory_cloning.clone(
        env,
        variant,
        keys=keys,
        num_demonstrations=config.num_demonstrations,
        num_updates=config.num_updates,
        batch_size=config.batch_size,
        hidden_size=config.hidden_size,
        joint_sizes=config.joint_sizes,
        recall_weight=config.recall_weight,
        learning_rate=learning_rate(config, variant.kind),
        progress=progress,
    )
    test_key = jax.random.fold_in(keys[0], 2)
    episodes = memory_cloning.play(env, variant, trained, test_key, config.num_episodes)
    if clones is not None and not variant.sees_first:  # no world gives the first observation again
        _save(clones / clone_name(cell), cell, trained, config)
    success, index = np.asarray(episodes.success), np.asarray(episodes.instruction_index[0])
    names = np.array(env.tasks)[index]
    groups = {
        name: success[:, names == name].mean(axis=1).tolist()
        for name in dict.fromkeys(env.tasks)
        if np.any(names == name)
    }
    return Score(
        cell, success.mean(axis=1), groups, tasks.chance(cell.world), time.monotonic() - start
    )


def _save(folder: pathlib.Path, cell: GridCell, trained: Clones, config: CloningConfig) -> None:
    """Writes the policy of the first seed as a run, which `vla_jax.evaluate` can read."""
    files.delete_folder(folder)  # of another training
    folder.mkdir(parents=True)
    files.write_json(folder / _OF_CLONE, settings(config, cell.world.task))
    params = jax.tree.map(lambda leaf: np.asarray(leaf[0]), trained.params)
    runs.write_acting(folder, trained.agent, trained.norm_stats, cell.world)
    metadata = runs.acting_metadata(trained.agent, trained.norm_stats, world=cell.world)
    handle = checkpoint.open_checkpoints(folder / "checkpoints")
    checkpoint.save(handle, config.num_updates, {"params": params}, metadata)
    checkpoint.close(handle)


def find_clone(run_dir: pathlib.Path, cell: GridCell, config: CloningConfig) -> pathlib.Path | None:
    """Returns the run with the policy of a cell; None if there is none of this training."""
    folder = run_dir / CLONES / clone_name(cell)
    file = folder / _OF_CLONE  # runs of earlier versions have none
    if not file.exists():
        return None
    own = settings(config, cell.world.task)
    return folder if files.read_json(file, "the training's settings") == own else None


def to_json(score: Score, config: CloningConfig) -> dict[str, Any]:
    """Returns a score as one line of the results."""
    line = ScoreLine(
        **identity(score.cell),
        success=score.success.tolist(),
        groups=score.groups,
        chance=score.chance,
        seconds=round(score.seconds, 1),
        cloning=settings(config, score.cell.world.task),
    )
    return line._asdict()


def settings(config: CloningConfig, task: str) -> dict[str, Any]:
    """Returns everything that the result of a cell of this task depends on, but for the cell."""
    of_task = {"rules_version": tasks.get(task).rules_version, "state_size": len(STATE_NAMES)}
    return of_network(config) | of_task


def of_network(config: CloningConfig) -> dict[str, Any]:
    """Returns the settings of network and training, as JSON has them."""
    own = dataclasses.asdict(config) | {"joint_sizes": list(config.joint_sizes)}
    return own | memory_decoders.settings()


def read_scores(
    run_dir: pathlib.Path, cells: Sequence[GridCell], config: CloningConfig
) -> Iterator[Score]:
    """Yields the scores of a run folder that belong to these cells, trained with this config.

    Chance is that of the present rules. Lines of earlier rules, or of another network, are ignored.

    Raises:
      ValueError: a line is damaged.
    """
    own = {cell.world.task: settings(config, cell.world.task) for cell in cells}
    by_identity = {tuple(identity(cell).values()): cell for cell in cells}

    def select(line: Mapping[str, Any]) -> bool:
        cloning = records.get(line, "cloning", dict)
        return cloning == own.get(records.get(line, "task", str))

    def fault(line: ScoreLine) -> str:
        sizes = {len(rates) for rates in (line.success, *line.groups.values())}
        return "" if sizes == {config.num_seeds} else f"success must be of {config.num_seeds} seeds"

    for line in records.read_lines(
        ScoreLine,
        run_dir / RESULTS,
        bounds=dict.fromkeys(("success", "groups", "chance"), (0, 1)),
        select=select,
        fault=fault,
    ):
        cell = by_identity.get(
            _plain(line.task, line.delay, line.items, line.updates, line.decoder)
        )
        if cell is not None:
            chance = tasks.chance(cell.world)
            yield Score(cell, np.array(line.success), line.groups, chance, line.seconds)
