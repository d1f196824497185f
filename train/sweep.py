r"""A sweep: one preset of `train.imitate` over seeds, decoders, sizes and learning rates.

    python -m train.sweep --preset table_jax_state --seeds 16
    python -m train.sweep --preset table_jax_state --cells lstm gru fc --hidden-sizes 64 128 \
      --learning-rates 1e-3 3e-3 --seeds 3 --num-updates 500

All other options are those of `train.imitate`, and every training is the one that it would make.
Trainings whose params have the same shapes, which differ in seed and learning rate, run as one
program (a group); the groups run one after the other. The preset needs small observations: the
state of a simulator, or cached features of a frozen backbone (`--frozen-backbone`).

`RUN_DIR/sweep.md` is the table, `RUN_DIR/results.jsonl` has a line per training, and each training
is a run in `RUN_DIR/NAME`, which `vla_jax.evaluate` reads. The same command continues an
interrupted sweep, and adds what is new: finished trainings are kept, and a group resumes from its
last checkpoint. Processes with `--distributed` share the groups: each takes the next one that no
other process trains.
"""

import contextlib
import itertools
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
from rich.console import Console

from train import sweep_report
from train.backbone_source import resolve
from train.configs import ImitateConfig, with_decoder
from train.imitate import make_loss
from train.memory_check import check_memory
from train.mixture import TrainingInputs, read_training_inputs
from train.presets import IMITATE
from train.setup import check
from train.sweep_group import (
    Group,
    Member,
    final_loss,
    member_state,
    num_params,
    play_group,
    save_member,
    train_group,
)
from train.sweep_report import Result
from vla_jax import records
from vla_jax.backbones import registry
from vla_jax.command_line import run
from vla_jax.config import LEAST_FLOAT, check_names, checked
from vla_jax.envs import worlds
from vla_jax.files import delete_folder, write_json
from vla_jax.policies import trunks
from vla_jax.runs import open_run
from vla_jax.training.distributed import take_local_devices
from vla_jax.training.malloc import keep_freed_memory
from vla_jax.training.run_lock import in_use
from vla_jax.types import Env

_GROUP = "group.json"  # file in the folder of a group: names of its members
_RESULT = "result.json"  # file in the folder of a finished member
_POLL = 2.0  # s between two looks at groups that other processes train


@dataclass(frozen=True)
@checked(
    seeds=(1, 10_000), hidden_sizes=(1, 2**16), layers=(1, 1000),
    learning_rates=(LEAST_FLOAT, 1000), group_size=(1, 1024), num_episodes=(0, 2**20),
)  # fmt: skip
class SweepConfig(ImitateConfig):
    """Config of a sweep: that of a training, and the values to combine."""

    run_dir: str = "runs/sweep"  # output folder of the sweep
    seed: int = 0  # the seeds are seed, seed + 1, …; params and dropout depend on them
    seeds: int = 3  # trainings of every setting
    cells: tuple[str, ...] = ()  # kinds of decoder to compare, as lstm gru fc; () = the preset's
    hidden_sizes: tuple[int, ...] = ()  # hidden units H to compare; () = hidden_size alone
    layers: tuple[int, ...] = ()  # numbers of layers L to compare; () = num_layers alone
    learning_rates: tuple[float, ...] = ()  # peaks to compare; () = learning_rate alone
    # trainings in one program, at most: more take more memory, fewer leave more to other processes
    group_size: int = 16
    # test episodes of each training, if its world is a JAX environment; 0 = no test
    num_episodes: int = 200
    first_seed: int = 1_000_000  # seed of the first test episode, as in vla_jax.evaluate

    MAY_CHANGE: ClassVar[tuple[str, ...]] = (
        *ImitateConfig.MAY_CHANGE,
        "seeds", "cells", "hidden_sizes", "layers", "learning_rates", "group_size",
    )  # fmt: skip
    MAY_NOT_CHANGE: ClassVar[tuple[str, ...]] = ("loop.num_updates",)  # trainings are compared

    def __post_init__(self):
        """Checks the names, the numbers, and every setting."""
        super().__post_init__()
        check_names("cells", self.cells, trunks.names())
        for name in ("cells", "hidden_sizes", "layers", "learning_rates"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must hold every value once, got {values}; drop one.")
        for name, count in (("seed", "seeds"), ("first_seed", "num_episodes")):
            if getattr(self, name) >= 2**31 - getattr(self, count):
                raise ValueError(f"{name} must be below 2^31 - {count}, got {getattr(self, name)}.")
        if self.overwrite and self.loop.distributed != "none":
            raise ValueError(
                "overwrite must be False with distributed, whose processes share one folder, got "
                "True; delete the folder yourself, or choose another --run-dir."
            )
        if self.agent.policy.decoder.implementation == "cudnn":
            raise ValueError(
                "implementation must not be 'cudnn', which has no form for several trainings as "
                "one program (vmap); leave it out, or train one by one with train.imitate."
            )
        for _ in _settings(self):  # decoders that do not fit raise an error
            pass


class GroupNames(NamedTuple):
    """Content of `group.json`."""

    members: list[str]  # names of the trainings


def sweep(config: SweepConfig) -> pathlib.Path:
    """Runs a sweep; returns the file with its table."""
    take_local_devices(config.loop.distributed)
    config = resolve(config)
    _check(config)
    run_dir, members = pathlib.Path(config.run_dir), make_members(config)
    is_shared = config.loop.distributed != "none"
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_turn(run_dir) if is_shared else in_use(run_dir))
        if config.overwrite:
            _check_free(run_dir)
        data = read_training_inputs(config)
        open_run(run_dir, config, overwrite=config.overwrite)
        _clean(run_dir)
        groups = plan_groups(run_dir, members, config.group_size)
        if is_shared:
            stack.close()  # the other processes open the folder too
        try:
            _run_groups(groups, data, run_dir, _make_env(config), config, console)
        except (KeyboardInterrupt, SystemExit):
            count = sum(_is_finished(run_dir, member) for member in members)
            console.print(
                f"{count} of {len(members)} trainings are finished in {run_dir}; the same command "
                "continues."
            )
            raise
        if is_shared:
            stack.enter_context(_turn(run_dir))
        results = [_read_result(run_dir, member) for member in members]
        path = sweep_report.write(run_dir, results)
        console.print(sweep_report.table(results))
    return path


def _check_free(run_dir: pathlib.Path) -> None:
    """Raises a BlockingIOError if a process of a shared sweep trains in the folder."""
    for folder in run_dir.glob("group-*"):  # such a process holds only the lock of its group
        with in_use(folder):
            pass


def _check(config: SweepConfig) -> None:
    """Raises an error for settings that cannot work, without reading any data."""
    backbone = config.agent.policy.backbone
    if not config.frozen_backbone and registry.get(backbone).image_spec(backbone) is not None:
        raise ValueError(
            f"frozen_backbone must be True to sweep backbone '{backbone.kind}', which sees images, "
            "got False; add --frozen-backbone --backbone-from RUN_DIR (python -m train.cache with "
            "the same options computes its features), or choose a preset of state."
        )
    if config.frozen_backbone and not config.backbone_from:
        raise ValueError(
            "backbone_from must name a run or a model with frozen_backbone, whose random params "
            "would depend on the seed, got ''; add --backbone-from RUN_DIR."
        )
    if (pathlib.Path(config.run_dir) / "checkpoints").exists():
        raise ValueError(
            f"run_dir must be that of a sweep or new, but {config.run_dir} holds a single "
            "training; choose another --run-dir."
        )
    check(config)
    for setting in _settings(config):
        copies = min(config.group_size, config.seeds * max(1, len(config.learning_rates)))
        check_memory(setting, make_loss(setting), copies=copies)


def _settings(config: SweepConfig) -> Iterator[ImitateConfig]:
    """Yields the config of every shape of params, as of a training by `train.imitate`."""
    decoder = config.agent.policy.decoder
    single = ImitateConfig(
        **{field.name: getattr(config, field.name) for field in fields(ImitateConfig)}
    )
    single = replace(single, loop=replace(single.loop, distributed="none"), overwrite=False)
    axes = (
        config.cells or (decoder.kind,),
        config.hidden_sizes or (decoder.hidden_size,),
        config.layers or (decoder.num_layers,),
    )
    for kind, hidden_size, num_layers in itertools.product(*axes):
        yield with_decoder(single, kind=kind, hidden_size=hidden_size, num_layers=num_layers)


def make_members(config: SweepConfig) -> list[Member]:
    """Returns every training of a sweep; those with the same shapes are next to each other."""
    rates = config.learning_rates or (config.optim.learning_rate,)
    members = []
    for setting in _settings(config):
        for rate, seed in itertools.product(rates, range(config.seed, config.seed + config.seeds)):
            name = f"{_shape_name(setting)}-lr{rate:g}-seed{seed}"
            member = replace(
                setting,
                seed=seed,
                optim=replace(setting.optim, learning_rate=rate),
                run_dir=f"{config.run_dir}/{name}",
            )
            members.append(Member(name, member))
    return members


def _shape_name(config: ImitateConfig) -> str:
    decoder = config.agent.policy.decoder
    return f"{decoder.kind}-h{decoder.hidden_size}-l{decoder.num_layers}"


def plan_groups(run_dir: pathlib.Path, members: Sequence[Member], group_size: int) -> list[Group]:
    """Returns the groups with trainings that are not finished, in the order of the members.

    A group that another process or an interrupted one has planned stays as it is.

    Args:
      run_dir: folder of the sweep.
      members: all trainings.
      group_size: members of a new group, at most.
    """
    by_name = {member.name: member for member in members}
    left = {name: each for name, each in by_name.items() if not _is_finished(run_dir, each)}
    groups = []
    for file in sorted(run_dir.glob(f"group-*/{_GROUP}")):
        names = _names(file)
        if set(names) <= set(by_name) and set(names) & set(left):
            groups.append(Group(file.parent.name, tuple(by_name[name] for name in names)))
            left = {name: each for name, each in left.items() if name not in names}
    for shape, same in itertools.groupby(left.values(), lambda each: _shape_name(each.config)):
        rest = tuple(same)
        for start in range(0, len(rest), group_size):
            group = Group(_new_name(run_dir, shape), rest[start : start + group_size])
            names = [member.name for member in group.members]
            write_json(run_dir / group.name / _GROUP, GroupNames(names)._asdict())
            groups.append(group)
    order = list(by_name)
    return sorted(groups, key=lambda group: order.index(group.members[0].name))


def _clean(run_dir: pathlib.Path) -> None:
    """Deletes checkpoints that a process left which was killed after the last result of a group."""
    for file in run_dir.glob(f"group-*/{_GROUP}"):
        names = _names(file)
        if all((run_dir / name / _RESULT).is_file() for name in names):
            with contextlib.suppress(BlockingIOError), in_use(file.parent):  # they are deleted now
                delete_folder(file.parent / "checkpoints")


def _names(file: pathlib.Path) -> list[str]:
    return records.read_file(GroupNames, file, "the names of the members of a group").members


def _new_name(run_dir: pathlib.Path, shape: str) -> str:
    """Returns a name for a group that no folder has."""
    names = (f"group-{shape}-{number}" for number in itertools.count())
    return next(name for name in names if not (run_dir / name).exists())


def _run_groups(
    groups: Sequence[Group],
    data: TrainingInputs,
    run_dir: pathlib.Path,
    env: Env | None,
    config: SweepConfig,
    console: Console,
) -> None:
    """Trains the groups, one after the other; waits for those that other processes train."""
    waiting, began, own = list(groups), time.monotonic(), 0
    while waiting:
        for group in list(waiting):
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(in_use(run_dir / group.name))
                except BlockingIOError:  # another process trains it
                    continue
                waiting.remove(group)
                if all(_is_finished(run_dir, member) for member in group.members):
                    continue
                _run_group(group, data, run_dir, env, config)
            own += 1
            results = [_read_result(run_dir, member) for member in group.members]
            seconds = (time.monotonic() - began) / own * len(waiting)
            console.print(
                f"{sweep_report.line(group.name, results)}   "
                f"{len(groups) - len(waiting)} of {len(groups)} groups, {seconds:.0f} s left"
            )
        if waiting:
            time.sleep(_POLL)


def _run_group(
    group: Group,
    data: TrainingInputs,
    run_dir: pathlib.Path,
    env: Env | None,
    config: SweepConfig,
) -> None:
    """Trains, tests and writes the members of a group."""
    folder, began = run_dir / group.name, time.monotonic()
    state = train_group(group, data, folder, group.name)
    success: Any = [None] * len(group.members)
    if env is not None:
        seeds = range(config.first_seed, config.first_seed + config.num_episodes)
        success = np.sum(play_group(group, data, state, env, seeds).success, axis=1)
    seconds = (time.monotonic() - began) / len(group.members)
    for index, member in enumerate(group.members):
        if _is_finished(run_dir, member):
            continue
        save_member(run_dir / member.name, member, member_state(state, index), data)
        decoder = member.config.agent.policy.decoder
        result = Result(
            name=member.name,
            cell=decoder.kind,
            hidden_size=decoder.hidden_size,
            num_layers=decoder.num_layers,
            learning_rate=member.config.optim.learning_rate,
            seed=member.config.seed,
            num_params=num_params(member.config),
            num_updates=int(state.num_updates),
            loss=final_loss(state, index),
            diverged_at=int(state.diverged_at[index]) or None,
            episodes=config.num_episodes if env is not None else 0,
            successes=None if success[index] is None else int(success[index]),
            seconds=round(seconds, 2),
        )
        write_json(run_dir / member.name / _RESULT, result._asdict())
    delete_folder(folder / "checkpoints")  # the members have their own


def _make_env(config: SweepConfig) -> Env | None:
    """Returns the environment to test in; None without tests, or if it is not written in JAX."""
    make_env = worlds.get(config.world.kind).make_env
    if make_env is None or not config.num_episodes:
        return None
    image_size = registry.image_size(config.agent.policy.backbone)
    return make_env(replace(config.world, image_size=image_size))


def _is_finished(run_dir: pathlib.Path, member: Member) -> bool:
    return (run_dir / member.name / _RESULT).is_file()


def _read_result(run_dir: pathlib.Path, member: Member) -> Result:
    return sweep_report.read(run_dir / member.name / _RESULT)


@contextlib.contextmanager
def _turn(run_dir: pathlib.Path) -> Iterator[None]:
    """Holds the lock of a run folder, after waiting for other processes of the sweep."""
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(in_use(run_dir))
            except BlockingIOError:  # another process reads the data, and plans the groups
                time.sleep(_POLL)
            else:
                break
        yield


def _sweep_of(name: str, preset: Callable[[], ImitateConfig]) -> Callable[[], SweepConfig]:
    """Returns a preset of the sweep, with the settings of one of `train.imitate`."""

    def make() -> SweepConfig:
        config = preset()
        values: dict[str, Any] = {each.name: getattr(config, each.name) for each in fields(config)}
        values["run_dir"] = f"runs/sweep_{name}"
        return SweepConfig(**values)

    make.__doc__ = preset.__doc__
    return make


SWEEP = {name: _sweep_of(name, preset) for name, preset in IMITATE.items()}

if __name__ == "__main__":
    keep_freed_memory()
    run(sweep, SWEEP, description="Trains a preset over seeds, decoders, sizes, learning rates.")
