"""The folder of a training, read for acting.

agent.json          how the policy acts
norm_stats.json     statistics of its data
world.json          where the data came from, if that is a world
checkpoints/STEP    the params
"""

import pathlib
from typing import Any, NamedTuple

import jax

from vla_jax import config as configs
from vla_jax.acting.agent import AgentConfig
from vla_jax.data import normalize
from vla_jax.data.normalize import NormStats
from vla_jax.envs.worlds import WORLDS, WorldConfig
from vla_jax.files import Path, read_json
from vla_jax.policies import policy
from vla_jax.training import checkpoint
from vla_jax.types import Params


class Run(NamedTuple):
    """All that acting needs of a training."""

    folder: pathlib.Path
    agent: AgentConfig
    norm_stats: dict[str, NormStats]
    params: Params  # the slow average where one was kept
    world: WorldConfig | None  # that of the demonstrations; None where it is unknown
    step: int  # updates that made the params


def load_run(run_dir: Path, *, step: int | None = None) -> Run:
    """What a training left in its folder.

    Args:
      run_dir: the folder.
      step: which checkpoint, in updates; None means the latest.

    Raises:
      FileNotFoundError: the folder, one of its files or the checkpoint is missing.
      ValueError: a file is damaged, or the checkpoint is of another shape than `agent.json` says.
    """
    folder = pathlib.Path(run_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"run folder {folder} is missing; train first, or name another.")
    agent = configs.load(AgentConfig, folder / "agent.json")
    statistics = normalize.from_json(read_json(folder / "norm_stats.json", "statistics"))
    directory = folder / "checkpoints"
    like = jax.eval_shape(lambda key: policy.init(key, agent.policy), jax.random.key(0))
    params = _restore(directory, like, step)
    step = checkpoint.latest_step(directory) if step is None else step
    return Run(folder, agent, statistics, params, read_world(folder), step or 0)


def read_world(run_dir: Path) -> WorldConfig | None:
    """The world of a run folder; None where it has no `world.json`.

    Raises:
      ValueError: the file is damaged, or its world is unknown.
    """
    path = pathlib.Path(run_dir) / "world.json"
    if not path.exists():
        return None
    data = read_json(path, "world")
    kind = str(data.get("kind"))
    if kind not in WORLDS:
        raise ValueError(f"{path}: unknown world '{kind}'; {configs.did_you_mean(kind, WORLDS)}")
    return configs.load(WORLDS[kind], path)


def _restore(directory: pathlib.Path, like: Any, step: int | None) -> Params:
    try:
        return checkpoint.restore_params(directory, like, step=step, ema=True)
    except ValueError:  # no average was kept; any other fault is told by the next line
        return checkpoint.restore_params(directory, like, step=step)
