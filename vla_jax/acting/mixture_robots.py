"""Robots of a policy that was trained on a mixture of data sets, one of which acts.

A run folder has a file `parts/NAME.json` for each of them.
"""

import pathlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from vla_jax import config as configs
from vla_jax.acting.agent import AgentConfig
from vla_jax.actions.action_layout import ActionLayout
from vla_jax.backbones import registry
from vla_jax.data import normalize
from vla_jax.data.normalize import NormStats
from vla_jax.files import Path, read_json, write_json
from vla_jax.training.parallel import is_first_process

_FOLDER = "parts"  # of a run folder


class MixtureRobot(NamedTuple):
    """Robot of one data set of a mixture: what acting on it needs besides the policy."""

    norm_stats: dict[str, NormStats]
    action_layout: ActionLayout  # order and range of its actions
    cameras: tuple[str, ...]  # fields of Observation; the policy may have others, which are masked


def path(run_dir: Path, name: str) -> pathlib.Path:
    """Returns the file of a robot."""
    return pathlib.Path(run_dir) / _FOLDER / f"{name}.json"


def to_json(robot: MixtureRobot) -> dict[str, Any]:
    """Returns a robot as JSON values."""
    return {
        "action_layout": configs.to_dict(robot.action_layout),
        "cameras": sorted(robot.cameras),
        "norm_stats": normalize.to_json(robot.norm_stats),
    }


def write(run_dir: Path, robots: Mapping[str, MixtureRobot]) -> None:
    """Writes the robots of a mixture, from the first process.

    Args:
      run_dir: run folder.
      robots: name of the data set -> robot.
    """
    for name, robot in robots.items() if is_first_process() else ():
        write_json(path(run_dir, name), to_json(robot))


def names(run_dir: Path) -> list[str]:
    """Returns the names of the data sets of a mixture, sorted; [] if the run has no mixture."""
    return sorted(file.stem for file in (pathlib.Path(run_dir) / _FOLDER).glob("*.json"))


def read(run_dir: Path, name: str) -> MixtureRobot:
    """Returns the robot of one data set of a mixture.

    Raises:
      FileNotFoundError: the run has no such data set.
      ValueError: the file is damaged.
    """
    file = path(run_dir, name)
    data = read_json(file, "statistics and action layout")
    try:
        layout = configs.from_dict(ActionLayout, data["action_layout"])
        statistics = normalize.from_json(data["norm_stats"])
        return MixtureRobot(statistics, layout, tuple(data["cameras"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} must have norm_stats, action_layout and cameras ({error}); restore the file "
            "that the training wrote."
        ) from error


def choose(run_dir: Path, robot: str | None) -> str | None:
    """Returns the name of the robot that acts; None without a mixture.

    Args:
      run_dir: run folder.
      robot: wanted name; None = the only one.

    Raises:
      ValueError: the run has no such robot, or several and none is wanted.
    """
    known = names(run_dir)
    if robot is None and len(known) < 2:
        return known[0] if known else None
    if not known:
        raise ValueError(
            f"robot must be None for {run_dir}, which was trained on one data set, got '{robot}'; "
            "leave it out."
        )
    if robot not in known:
        raise ValueError(
            f"robot must be one of {', '.join(known)}, the data sets of the mixture that {run_dir} "
            f"was trained on, got {'none' if robot is None else repr(robot)}; choose with --robot."
        )
    return robot


def act_as(agent: AgentConfig, robot: MixtureRobot) -> AgentConfig:
    """Returns the config of an agent for a robot, with its action layout and what it lacks."""
    backbone = agent.policy.backbone
    member = registry.get(backbone)
    spec = member.image_spec(backbone)
    needed = () if spec is None else spec.cameras
    if member.example is not None:
        columns = ("proprio", "environment_state")
        example = member.example(backbone)
        needed = (*needed, *(name for name in columns if getattr(example, name) is not None))
    present = {*robot.cameras, *robot.norm_stats}
    missing = tuple(name for name in needed if name not in present)
    return replace(agent, action_layout=robot.action_layout, missing_parts=missing)
