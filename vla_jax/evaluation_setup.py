"""Controller, environment and folder of an evaluation, made from its options."""

import dataclasses
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vla_jax import config as configs
from vla_jax.acting.agent import AgentConfig, Mode, with_noise
from vla_jax.acting.rollout import Controller, Outcome
from vla_jax.actions.execution import Kind
from vla_jax.backbones import registry
from vla_jax.config import checked
from vla_jax.envs import worlds
from vla_jax.envs.worlds import WorldConfig, find_reference
from vla_jax.evaluation import players
from vla_jax.files import Path
from vla_jax.policies import trunks
from vla_jax.runs import Run, load_run, read_world
from vla_jax.serving.remote_player import RemotePlayer
from vla_jax.training import distributed
from vla_jax.types import Env

# Options of `EvaluateConfig` that a reference does not have, nor a remote policy but the last.
_POLICY_OPTIONS = (
    "step", "robot", "mode", "window_size", "instruction_steps", "flow_steps", "noise_seed",
    "exec_kind", "exec_horizon"
)  # fmt: skip
TOKEN = "VLA_JAX_TOKEN"  # environment variable: token of the policy server of `remote`
_REMOTE_SIZE = 224  # pixels of the images for a server that does not name a size, as openpi's


@dataclass(frozen=True)
@checked(instruction_steps=(-1, 2**31 - 1), window_size=(1, 2**20), flow_steps=(1, 2**16))
class EvaluateConfig:
    """Episodes, environment and execution of an evaluation; None means as in training."""

    name: str | None = None  # folder inside RUN_DIR/evaluation; None = made from the options below
    num_episodes: int = 120  # episodes, one per seed
    first_seed: int = 1_000_000  # seeds count up from here; those of demonstrations start at 0
    num_simulators: int = 16  # simulators stepped in parallel: the batch size of the policy
    num_videos: int = 6  # episodes to record, the first ones
    overwrite: bool = False  # delete an earlier evaluation of this name
    step: int | None = None  # checkpoint to evaluate, in updates; None = the latest
    robot: str | None = None  # data set of a mixture whose robot acts; None without a mixture
    mode: Mode | None = None  # streaming mode: refresh, periodic or persistent
    window_size: int | None = None  # W, in environment steps
    instruction_steps: int | None = None  # initial steps with a visible instruction; -1 = all
    flow_steps: int | None = None  # Euler steps of the flow head; more are slower
    noise_seed: int | None = None  # random seed of the noise that the flow head acts from
    exec_kind: Kind | None = None  # rule that selects actions from predicted chunks
    exec_horizon: int | None = None  # steps of a chunk that receding_horizon executes
    world: str | None = None  # kind of environment, such as table_jax; None = that of the run
    env_id: str | None = None  # id of a registered Gymnasium environment, for world "gymnasium"
    reference: str | None = None  # reference policy of the world to run instead, such as "expert"
    # policy server that acts instead of the run's policy, ws://HOST:PORT; its token, if it has one,
    # is read from the environment variable VLA_JAX_TOKEN
    remote: str | None = None
    # processes that share the episodes, on one host or many: none, auto, slurm, openmpi,
    # kubernetes, or host:port,processes,index with the address of the first one
    distributed: str = "none"

    def __post_init__(self):
        """Checks the counts and the names."""
        distributed.parse(self.distributed)
        for name, least in (("num_episodes", 1), ("num_simulators", 1), ("num_videos", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.first_seed >= 2**31 - self.num_episodes:
            raise ValueError(
                f"first_seed must be below 2^31 - num_episodes, got {self.first_seed}."
            )
        if self.reference and self.remote:
            raise ValueError(
                f"remote must be None with reference '{self.reference}', which needs no policy, "
                f"got '{self.remote}'; omit it."
            )
        for name in _POLICY_OPTIONS if self.reference else ():
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} must be None with reference '{self.reference}', which needs no "
                    f"policy, got {getattr(self, name)}; omit it."
                )
        for name in _POLICY_OPTIONS[:-1] if self.remote else ():
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} must be None with remote '{self.remote}', whose server decides it, "
                    f"got {getattr(self, name)}; give it to the server."
                )
        if self.name is not None and not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(
                "name must be letters, digits and '_-.', not starting with '-' or '.', got "
                f"'{self.name}'; choose another."
            )


class EvaluationSetup(NamedTuple):
    """Controller and environment of an evaluation."""

    folder: pathlib.Path
    settings: dict[str, Any]  # everything that the outcomes depend on
    world: WorldConfig
    controller: Controller
    # plays all episodes of a JAX environment in one scan; None for a reference, a remote policy
    play_env: Callable[[Env, Sequence[int]], Iterator[Outcome]] | None = None
    is_timed: bool = True  # False for a reference
    disconnect: Callable[[], None] = lambda: None  # closes the connections of a remote policy


def make_setup(run: Run | Path, config: EvaluateConfig) -> EvaluationSetup:
    """Returns the parts of an evaluation.

    Args:
      run: run of `load_run`, or its folder; the folder may be new if the run's policy does not act.
      config: episodes, environment and execution.

    Raises:
      FileNotFoundError: the run or one of its files is missing.
      ValueError: a file is damaged, or an option does not fit.
      ConnectionError: the policy server of `remote` does not answer.
    """
    if config.reference is not None:
        return _reference(run, config, config.reference)
    return _policy(run, config) if config.remote is None else _remote(run, config, config.remote)


def _policy(run: Run | Path, config: EvaluateConfig) -> EvaluationSetup:
    if isinstance(run, Run) and config.step not in (None, run.step):
        raise ValueError(
            f"step must be {run.step} as in the loaded run, got {config.step}; give the run's "
            "folder instead."
        )
    if isinstance(run, Run) and config.robot not in (None, run.robot):
        raise ValueError(
            f"robot must be {run.robot} as in the loaded run, got {config.robot}; give the run's "
            "folder instead."
        )
    run = run if isinstance(run, Run) else load_run(run, step=config.step, robot=config.robot)
    agent = _agent(run.agent, config)
    world = _world(run.world, config, registry.image_size(agent.policy.backbone))
    player = players.make_player(agent, run.norm_stats, run.params, window_size=config.window_size)
    settings = {
        "agent": configs.to_dict(agent),
        "window_size": config.window_size or agent.policy.decoder.window_size,
        "checkpoint": run.step,
        "world": configs.to_dict(world),
        **({} if run.robot is None else {"robot": run.robot}),
    }
    name = config.name or _name(agent, config, run.robot)
    return EvaluationSetup(
        run.folder / "evaluation" / name, settings, world, player.controller, player.play_env
    )


def _reference(run: Run | Path, config: EvaluateConfig, reference: str) -> EvaluationSetup:
    folder = run.folder if isinstance(run, Run) else pathlib.Path(run)
    world = _world(read_world(folder), config, image_size=0)  # references use the state
    controller = players.reference_controller(find_reference(world.kind, reference))
    settings = {"reference": reference, "world": configs.to_dict(world)}
    name = config.name or _join(reference, config.world, config.env_id)
    place = folder / "evaluation" / name
    return EvaluationSetup(place, settings, world, controller, is_timed=False)


def _remote(run: Run | Path, config: EvaluateConfig, url: str) -> EvaluationSetup:
    folder = run.folder if isinstance(run, Run) else pathlib.Path(run)
    rows = config.exec_horizon or 1
    player = RemotePlayer(url, token=os.environ.get(TOKEN), exec_horizon=rows)
    limit = player.metadata.get("limits", {}).get("sessions", config.num_simulators)
    if config.num_simulators > limit:
        raise ValueError(
            f"num_simulators must be at most {limit}, the sessions of {url}, got "
            f"{config.num_simulators}; lower it, or raise the limit of the server."
        )
    saved = read_world(folder)
    size = player.image_size
    if size is None and saved is None:
        warnings.warn(
            f"{url} does not name the size of its images, and {folder} has no world.json: images "
            f"get {_REMOTE_SIZE} pixels, as those of openpi's clients; copy the world.json of the "
            "training into the folder if the policy takes others.",
            stacklevel=2,
        )
    if size is None:
        size = saved.image_size if saved else _REMOTE_SIZE
    world = _world(saved, config, size)
    served = {name: player.metadata.get(name) for name in ("server", "version", "run", "step")}
    settings = {
        "remote": url,
        "serves": served,
        "exec_horizon": rows,
        "world": configs.to_dict(world),
    }
    host = url.rpartition("//")[2].rstrip("/")
    name = config.name or _join("remote", host, config.world, config.env_id, config.exec_horizon)
    place = folder / "evaluation" / name
    return EvaluationSetup(place, settings, world, player.controller, disconnect=player.disconnect)


def _agent(agent: AgentConfig, config: EvaluateConfig) -> AgentConfig:
    """Returns the run's agent config with the options of the evaluation."""
    execution = _given({"kind": config.exec_kind, "exec_horizon": config.exec_horizon})
    acting = _given({"mode": config.mode, "instruction_steps": config.instruction_steps})
    agent = with_noise(agent, flow_steps=config.flow_steps, noise_seed=config.noise_seed)
    executing = dataclasses.replace(agent.execution, **execution)
    return dataclasses.replace(agent, **acting, execution=executing)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _world(saved: WorldConfig | None, config: EvaluateConfig, image_size: int) -> WorldConfig:
    """Returns the config of the environment, with images of the policy's size."""
    kind = config.world or (saved.kind if saved else None)
    if kind is None:
        raise ValueError(
            f"the run has no world.json; choose with --world from {', '.join(worlds.WORLDS)}."
        )
    options = {} if saved is None else configs.to_dict(saved)
    options |= {"image_size": image_size, "env_id": config.env_id or options.get("env_id")}
    cls = worlds.get(kind).config
    fields = {field.name for field in dataclasses.fields(cls)}
    if config.env_id and "env_id" not in fields:
        raise ValueError(f"env_id must be None in {kind}, got '{config.env_id}'; leave it out.")
    kept = {name: value for name, value in _given(options).items() if name in fields}
    return configs.from_dict(cls, {**kept, "kind": kind})


def _name(agent: AgentConfig, config: EvaluateConfig, robot: str | None) -> str:
    """Returns the default name of an evaluation, made from its settings."""
    decoder = agent.policy.decoder
    memory = [agent.mode]
    if agent.mode != "persistent":
        memory.append(str(config.window_size or decoder.window_size))
    parts = memory if trunks.get(decoder.kind).has_memory else ["memoryless"]
    if config.instruction_steps is not None:
        parts.append(f"instruction{config.instruction_steps}")
    noise = {"flow": config.flow_steps, "noise": config.noise_seed}
    parts += [f"{option}{value}" for option, value in _given(noise).items()]
    options = (config.exec_kind, config.exec_horizon, config.world, config.env_id, config.step)
    return _join(*parts, robot, *options)


def _join(*options: Any) -> str:
    """Returns a folder name made of the options that are set."""
    return re.sub(r"[^\w.-]", "_", "-".join(str(o) for o in options if o is not None))
