"""Run folder of a training: written by the training scripts, read for acting.

config.json         config of the training script; the same config resumes the run
agent.json          config of the policy and of acting
norm_stats.json     statistics of the training data; of the first data set of a mixture
parts/NAME.json     statistics, action layout and cameras of every data set of a mixture
world.json          config of the environment to evaluate in, if there is one
tokenizer.json      a file that the backbone reads, if it reads any; under the backbone's name
checkpoints/STEP    params, optimiser state, and metadata: config, agent, norm_stats, …
.lock               process that writes into the folder, while it does

A policy acts as its checkpoint says: `load_run` refuses a folder whose files differ from the
metadata of the checkpoint.
"""

import hashlib
import pathlib
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils

from vla_jax import config as configs
from vla_jax.acting import mixture_robots
from vla_jax.acting.agent import AgentConfig
from vla_jax.acting.mixture_robots import MixtureRobot
from vla_jax.backbones import registry
from vla_jax.data import normalize
from vla_jax.data.normalize import NormStats
from vla_jax.envs import worlds
from vla_jax.envs.worlds import WorldConfig
from vla_jax.files import Path, delete, read_json, replacing, write_json
from vla_jax.policies import policy
from vla_jax.training import checkpoint, opening
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
    robot: str | None = None  # data set of a mixture whose robot acts; None without a mixture


def check_run(run_dir: Path, config: Any, *, overwrite: bool, mark: str = "") -> None:
    """Raises an error if `open_run` would refuse the same arguments; writes nothing.

    Args:
      run_dir: folder of the run.
      config: whole config of the script, with the field `run_dir`.
      overwrite: whether an earlier run in the folder may be deleted.
      mark: as for `open_run`.

    Raises:
      ValueError: the folder holds a run of another config, or something other than a run.
      OSError: the folder cannot be written.
    """
    opening.check(pathlib.Path(run_dir), config, overwrite=overwrite, mark=mark)


def open_run(run_dir: Path, config: Any, *, overwrite: bool, mark: str = "") -> pathlib.Path:
    """Creates a run folder, or opens an existing one in order to resume.

    A run is resumed with the same config, except for fields that may change (`resuming`), which
    are written to `config.json`. A folder without any checkpoint may get another config.

    Args:
      run_dir: folder of the run.
      config: whole config of the script; written to `config.json`.
      overwrite: deletes an earlier run in the folder.
      mark: file by which a folder of an earlier version of the script, which wrote no config, is
        recognised; empty = the script has always written one.

    Returns:
      The folder.

    Raises:
      ValueError: the folder holds a run of another config, or something other than a run.
      OSError: the folder cannot be written.
    """
    path = pathlib.Path(run_dir)
    if is_first_process():
        for sentence in opening.check(path, config, overwrite=overwrite, mark=mark):
            warnings.warn(sentence, stacklevel=2)
        file = path / "config.json"
        is_earlier = overwrite and file.exists()
        for left in opening.contents(path) if is_earlier else path.glob("*.part"):
            delete(left)
        if not file.exists() or configs.load(type(config), file) != config:
            configs.save_of_run(config, file)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("run folder")
    return path


def make_metadata(
    config: Any,
    agent: AgentConfig,
    norm_stats: Mapping[str, NormStats],
    robots: Mapping[str, MixtureRobot] | None = None,
    *,
    world: WorldConfig | None = None,
) -> dict[str, Any]:
    """Returns the metadata for the checkpoints, with everything that acting depends on.

    Args:
      config: whole config of the script.
      agent: config of the policy and of acting.
      norm_stats: statistics of the training data.
      robots: of every data set of a mixture, by name.
      world: environment to evaluate in; None = unknown.

    Returns:
      Metadata for `checkpoint.save`: `config`, `agent`, `norm_stats`, `robots`, `world` if known,
      and the SHA-256 of the `files` of the backbone.

    Raises:
      FileNotFoundError: a file of the backbone is missing.
    """
    acting = acting_metadata(agent, norm_stats, robots, world=world)
    return {"config": configs.to_dict(config), **acting}


def acting_metadata(
    agent: AgentConfig,
    norm_stats: Mapping[str, NormStats],
    robots: Mapping[str, MixtureRobot] | None = None,
    *,
    world: WorldConfig | None = None,
) -> dict[str, Any]:
    """Returns the part of `make_metadata` that acting depends on; without a training script.

    The arguments and errors are those of `make_metadata`.
    """
    _check_files(agent)
    return {
        "agent": configs.to_dict(_with_files(agent, "")),
        "norm_stats": normalize.to_json(dict(norm_stats)),
        "robots": {name: mixture_robots.to_json(each) for name, each in (robots or {}).items()},
        "files": {name: _sha256(path) for name, path in _files(agent).items()},
        **({} if world is None else {"world": configs.to_dict(world)}),
    }


def write_acting(
    folder: Path,
    agent: AgentConfig,
    norm_stats: Mapping[str, NormStats],
    world: WorldConfig | None,
) -> None:
    """Writes what acting needs besides the params.

    The run folder and each checkpoint both hold the statistics. Files that the backbone reads are
    copied into the run folder, which no longer depends on their origin.

    Args:
      folder: run folder, from `open_run`.
      agent: config of the policy and of acting.
      norm_stats: statistics of the training data.
      world: environment to evaluate in; None = unknown.

    Raises:
      FileNotFoundError: a file of the backbone is missing.
    """
    folder = pathlib.Path(folder)
    _copy_files(agent, folder)
    save_json(configs.to_dict(_with_files(agent, "")), folder / "agent.json")
    if world is not None:
        save_json(configs.to_dict(world), folder / "world.json")
    save_json(normalize.to_json(dict(norm_stats)), folder / "norm_stats.json")


def save_json(data: Mapping[str, Any], path: pathlib.Path) -> None:
    """Writes JSON from the first process; the file is complete or unchanged.

    Args:
      data: what JSON can hold.
      path: file to write.
    """
    if is_first_process():
        write_json(path, data)


def load_run(run_dir: Path, *, step: int | None = None, robot: str | None = None) -> Run:
    """Reads a run folder.

    Args:
      run_dir: the folder.
      step: checkpoint to read, in updates; None means the latest.
      robot: data set of a mixture whose statistics and action layout the agent has; None if the
        run was trained on one data set.

    Raises:
      FileNotFoundError: the folder, one of its files or the checkpoint is missing.
      ValueError: a file is damaged, or differs from what the checkpoint says; the robot of a
        mixture is unknown or not given.
    """
    folder = pathlib.Path(run_dir)
    agent = read_agent(folder)
    _check_files(agent)
    statistics = normalize.read_norm_stats(folder / "norm_stats.json")
    robot = mixture_robots.choose(folder, robot)
    directory = folder / "checkpoints"
    saved = checkpoint.read_metadata(directory, step=step)
    _check_agrees(folder, saved, agent, statistics)
    world = _read_world(folder, saved)
    if robot is not None:
        acting = mixture_robots.read(folder, robot)
        _check_robot(folder, saved, robot, acting)
        agent, statistics = mixture_robots.act_as(agent, acting), acting.norm_stats
    params = load_params(folder, step=step)
    step = checkpoint.latest_step(directory) if step is None else step
    return Run(folder, agent, statistics, params, world, step or 0, robot)


def load_params(run_dir: Path, *, step: int | None = None) -> Params:
    """Returns the params of a run; arguments and errors as `load_run`."""
    agent, directory = read_agent(run_dir), pathlib.Path(run_dir) / "checkpoints"
    like = jax.eval_shape(lambda key: policy.init(key, agent.policy), jax.random.key(0))
    return _restore(directory, like, step)


def read_agent(run_dir: Path) -> AgentConfig:
    """Returns the agent's config of a run folder, which reads the folder's own files.

    Raises:
      FileNotFoundError: there is no such folder, or no `agent.json` in it.
      ValueError: the file is damaged.
    """
    folder = pathlib.Path(run_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"run folder {folder} is missing; train first, or give another.")
    return _with_files(configs.load(AgentConfig, folder / "agent.json"), folder)


def read_world(run_dir: Path) -> WorldConfig | None:
    """Returns the environment config of a run folder; None if it is unknown.

    Without `world.json` it is that of the latest checkpoint, if the checkpoint has one.

    Raises:
      ValueError: file or checkpoint is damaged, the world is unknown, or they differ.
    """
    folder = pathlib.Path(run_dir)
    directory = folder / "checkpoints"
    has_any = checkpoint.latest_step(directory) is not None
    return _read_world(folder, checkpoint.read_metadata(directory) if has_any else {})


def _read_world(folder: pathlib.Path, saved: Mapping[str, Any]) -> WorldConfig | None:
    path, trained = folder / "world.json", None
    if "world" in saved:  # not of earlier versions, nor of converted weights
        trained = _make_world(saved["world"], f"metadata of the checkpoint in {folder}")
    if not path.exists():
        return trained
    world = _make_world(read_json(path, "world"), str(path))
    if trained is not None:
        _refuse(path, configs.differences(trained, world))
    return world


def _make_world(data: Mapping[str, Any], place: str) -> WorldConfig:
    """Returns the environment config that was read from a file or a checkpoint."""
    kind = str(data.get("kind"))
    if kind not in worlds.WORLDS:
        raise ValueError(
            f"{place}: unknown world '{kind}'; {configs.did_you_mean(kind, worlds.WORLDS)}"
        )
    try:
        return configs.from_dict(worlds.WORLDS[kind].config, data)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


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


def _check_agrees(
    folder: pathlib.Path,
    saved: Mapping[str, Any],
    agent: AgentConfig,
    statistics: dict[str, NormStats],
) -> None:
    """Raises a ValueError if a run's files differ from a checkpoint's metadata.

    Earlier versions saved less of it; what is absent is not compared.
    """
    found = {
        "agent.json": configs.to_dict(_with_files(agent, "")),
        "norm_stats.json": normalize.to_json(statistics),
    }
    if "agent" in saved:
        expected = configs.to_dict(configs.from_dict(AgentConfig, saved["agent"]))
        _refuse(folder / "agent.json", configs.differences(expected, found["agent.json"]))
    if "norm_stats" in saved:
        expected = normalize.to_json(normalize.from_json(saved["norm_stats"]))
        differing = configs.differences(expected, found["norm_stats.json"])
        _refuse(folder / "norm_stats.json", differing)
    for name, digest in saved.get("files", {}).items():
        if _sha256(folder / name) != digest:
            _refuse(folder / name, ["the SHA-256 of its content is another"])


def _check_robot(
    folder: pathlib.Path, saved: Mapping[str, Any], name: str, robot: MixtureRobot
) -> None:
    """Raises a ValueError if the file of a robot differs from a checkpoint's metadata."""
    expected = saved.get("robots", {}).get(name)
    if expected is not None:
        differing = configs.differences(expected, mixture_robots.to_json(robot))
        _refuse(mixture_robots.path(folder, name), differing)


def _refuse(file: pathlib.Path, differing: list[str]) -> None:
    if differing:
        listed = "; ".join(differing[:3]) + (", …" if len(differing) > 3 else "")
        raise ValueError(
            f"{file} must be as in the metadata of the checkpoint, but {listed[:500]}; restore the "
            "file that the training wrote."
        )


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
