"""Run folder of a training: written by the training scripts, read for acting.

config.json         config of the training script; the same config resumes the run
agent.json          config of the policy and of acting
norm_stats.json     statistics of the training data
world.json          config of the environment to evaluate in, if there is one
tokenizer.json      a file that the backbone reads, if it reads any; under the backbone's name
checkpoints/STEP    params, optimiser state, and metadata: config and norm_stats
"""

import os
import pathlib
import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils

from vla_jax import config as configs
from vla_jax.acting.agent import AgentConfig
from vla_jax.backbones import registry
from vla_jax.data import normalize
from vla_jax.data.normalize import NormStats
from vla_jax.envs import worlds
from vla_jax.envs.worlds import WorldConfig
from vla_jax.files import Path, read_json, replacing, write_json
from vla_jax.policies import policy
from vla_jax.training import checkpoint
from vla_jax.training.parallel import is_first_process
from vla_jax.types import Params


class Run(NamedTuple):
    """A trained policy with everything that acting needs."""

    folder: pathlib.Path
    agent: AgentConfig
    norm_stats: dict[str, NormStats]
    params: Params  # EMA of the params if the training kept one, else the params
    world: WorldConfig | None  # environment of the demonstrations; None if unknown
    step: int  # updates of the params


def check_run(run_dir: Path, config: Any, *, overwrite: bool) -> None:
    """Raises an error if `open_run` would refuse the same arguments; writes nothing.

    Args:
      run_dir: folder of the run.
      config: whole config of the script, with the fields `run_dir` and `overwrite`.
      overwrite: whether an earlier run in the folder may be deleted.

    Raises:
      ValueError: the folder holds a run of another config, or something other than a run.
      OSError: the folder cannot be written.
    """
    path = pathlib.Path(run_dir)
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise OSError(f"run_dir {path} cannot be written; choose another --run-dir.")
    file = path / "config.json"
    if overwrite and path.exists():
        if not file.exists():
            raise ValueError(f"{path} is not a run folder (no config.json); delete it yourself.")
    elif file.exists():
        _check_same_config(file, config)


def open_run(run_dir: Path, config: Any, *, overwrite: bool) -> pathlib.Path:
    """Creates a run folder, or opens an existing one of the same config in order to resume.

    Args:
      run_dir: folder of the run.
      config: whole config of the script; written to `config.json`.
      overwrite: deletes an earlier run in the folder.

    Returns:
      The folder.

    Raises:
      ValueError: the folder holds a run of another config, or something other than a run.
      OSError: the folder cannot be written.
    """
    path = pathlib.Path(run_dir)
    if is_first_process():
        check_run(path, config, overwrite=overwrite)
        if overwrite and path.exists():
            shutil.rmtree(path)
        if not (path / "config.json").exists():
            configs.save(config, path / "config.json")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("run folder")
    return path


def write_run(
    folder: Path,
    config: Any,
    agent: AgentConfig,
    norm_stats: Mapping[str, NormStats],
    world: WorldConfig | None,
) -> dict[str, Any]:
    """Writes what acting needs besides the params, and returns the metadata for the checkpoints.

    The run folder and each checkpoint both hold the statistics, so that either is sufficient. Files
    that the backbone reads are copied into the run folder, which no longer depends on their origin.

    Args:
      folder: run folder, from `open_run`.
      config: whole config of the script.
      agent: config of the policy and of acting.
      norm_stats: statistics of the training data.
      world: environment to evaluate in; None = unknown.

    Returns:
      Metadata for `checkpoint.save`: `config` and `norm_stats`.

    Raises:
      FileNotFoundError: a file of the backbone is missing.
    """
    write_acting(folder, agent, norm_stats, world)
    return {"config": configs.to_dict(config), "norm_stats": normalize.to_json(dict(norm_stats))}


def write_acting(
    folder: Path,
    agent: AgentConfig,
    norm_stats: Mapping[str, NormStats],
    world: WorldConfig | None,
) -> None:
    """Writes what acting needs besides the params; the arguments are those of `write_run`.

    Raises:
      FileNotFoundError: a file of the backbone is missing.
    """
    folder = pathlib.Path(folder)
    _copy_files(agent, folder)
    save_json(configs.to_dict(_with_files(agent, "")), folder / "agent.json")
    if world is not None:
        save_json(configs.to_dict(world), folder / "world.json")
    save_json(normalize.to_json(dict(norm_stats)), folder / "norm_stats.json")


def write_part_stats(folder: Path, stats: Mapping[str, Mapping[str, NormStats]]) -> None:
    """Writes the statistics of every data set of a mixture, `parts/NAME.json`.

    Copied over `norm_stats.json`, they let the run act on the robot of that data set.

    Args:
      folder: run folder.
      stats: name of the data set -> statistics.
    """
    for name, each in stats.items():
        save_json(normalize.to_json(dict(each)), pathlib.Path(folder) / "parts" / f"{name}.json")


def save_json(data: Mapping[str, Any], path: pathlib.Path) -> None:
    """Writes JSON from the first process; the file is complete or unchanged.

    Args:
      data: what JSON can hold.
      path: file to write.
    """
    if is_first_process():
        write_json(path, data)


def load_run(run_dir: Path, *, step: int | None = None) -> Run:
    """Reads a run folder.

    Args:
      run_dir: the folder.
      step: checkpoint to read, in updates; None means the latest.

    Raises:
      FileNotFoundError: the folder, one of its files or the checkpoint is missing.
      ValueError: a file is damaged, or the checkpoint does not fit `agent.json`.
    """
    folder = pathlib.Path(run_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"run folder {folder} is missing; train first, or give another.")
    agent = read_agent(folder)
    _check_files(agent)
    statistics = normalize.from_json(read_json(folder / "norm_stats.json", "statistics"))
    directory = folder / "checkpoints"
    like = jax.eval_shape(lambda key: policy.init(key, agent.policy), jax.random.key(0))
    params = _restore(directory, like, step)
    step = checkpoint.latest_step(directory) if step is None else step
    return Run(folder, agent, statistics, params, read_world(folder), step or 0)


def read_agent(run_dir: Path) -> AgentConfig:
    """Returns the agent's config of a run folder, which reads the folder's own files.

    Raises:
      FileNotFoundError: there is no `agent.json`.
      ValueError: the file is damaged.
    """
    folder = pathlib.Path(run_dir)
    return _with_files(configs.load(AgentConfig, folder / "agent.json"), folder)


def read_world(run_dir: Path) -> WorldConfig | None:
    """Returns the environment config of a run folder; None if it has no `world.json`.

    Raises:
      ValueError: the file is damaged, or its world is unknown.
    """
    path = pathlib.Path(run_dir) / "world.json"
    if not path.exists():
        return None
    data = read_json(path, "world")
    kind = str(data.get("kind"))
    if kind not in worlds.WORLDS:
        raise ValueError(
            f"{path}: unknown world '{kind}'; {configs.did_you_mean(kind, worlds.WORLDS)}"
        )
    return configs.load(worlds.WORLDS[kind].config, path)


def _files(agent: AgentConfig) -> dict[str, pathlib.Path]:
    """Returns name in the run folder -> path of each file that the backbone reads."""
    backbone = agent.policy.backbone
    files = registry.get(backbone).files(backbone)
    return {name: pathlib.Path(path) for name, path in files.items()}


def _with_files(agent: AgentConfig, folder: Path) -> AgentConfig:
    """Returns the config of an agent whose backbone reads its files from a folder."""
    backbone = agent.policy.backbone
    backbone = registry.get(backbone).with_files(backbone, folder)
    return replace(agent, policy=replace(agent.policy, backbone=backbone))


def _copy_files(agent: AgentConfig, folder: pathlib.Path) -> None:
    """Copies the files of the backbone into a run folder, from the first process."""
    _check_files(agent)
    for name, path in _files(agent).items():
        target = folder / name
        if is_first_process() and path.resolve() != target.resolve():
            with replacing(target) as part:
                shutil.copyfile(path, part)


def _check_files(agent: AgentConfig) -> None:
    for path in _files(agent).values():
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing, which backbone '{agent.policy.backbone.kind}' reads; copy it "
                "from the folder of the model."
            )


def _restore(directory: pathlib.Path, like: Any, step: int | None) -> Params:
    ema = checkpoint.has_ema(directory, step=step)
    return checkpoint.restore_params(directory, like, step=step, ema=ema)


def _check_same_config(file: pathlib.Path, config: Any) -> None:
    not_compared = {"run_dir": config.run_dir, "overwrite": config.overwrite}
    saved = replace(configs.load(type(config), file), **not_compared)
    if saved != config:
        differing = configs.differences(saved, config)
        raise ValueError(
            f"{file.parent} holds a run of another config: {'; '.join(differing)}; choose another "
            "--run-dir, restore those options, or add --overwrite to start again."
        )
