"""Closed-loop evaluation: success rates of a run's policy over unseen episodes.

    python -m vla_jax.evaluate RUN_DIR
    python -m vla_jax.evaluate RUN_DIR --mode persistent --num-episodes 500
    python -m vla_jax.evaluate RUN_DIR --reference expert_ignoring_colour --world table_mujoco

Writes into `RUN_DIR/evaluation/NAME`: a line per episode in `episodes.jsonl`, videos, and
`summary.json`; `RUN_DIR/index.html` shows them. An interrupted evaluation is resumed by the same
command.
"""

import contextlib
import dataclasses
import functools
import pathlib
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
from rich.console import Console

from vla_jax import config as configs
from vla_jax import folder_lock, stopping
from vla_jax.acting.agent import AgentConfig, Mode
from vla_jax.acting.rollout import (
    Controller,
    Outcome,
    RecordedEpisode,
    SimulatorView,
    run_simulators,
)
from vla_jax.actions.execution import Kind
from vla_jax.backbones import registry
from vla_jax.command_line import exit_codes, parse
from vla_jax.config import checked
from vla_jax.envs import worlds
from vla_jax.envs.worlds import WorldConfig, find_reference, make_simulator
from vla_jax.evaluation import players, report, results, video
from vla_jax.evaluation.players import Player
from vla_jax.evaluation.results import Latency, Summary
from vla_jax.files import Path, read_json, write_json, write_json_lines
from vla_jax.policies import trunks
from vla_jax.runs import Run, load_run, read_world
from vla_jax.training.progress import progress_bar
from vla_jax.types import Simulator, SuccessRule

# Options of `EvaluateConfig` that a reference does not have.
_POLICY_OPTIONS = (
    "step", "robot", "mode", "window_size", "instruction_steps", "exec_kind", "exec_horizon"
)  # fmt: skip
_VIDEO_SIZE = 320  # pixels along each side
_RENDERED_SIZE = 160  # pixels of the images that a JAX environment renders for a video


@dataclass(frozen=True)
@checked(instruction_steps=(-1, 2**31 - 1))
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
    exec_kind: Kind | None = None  # rule that selects actions from predicted chunks
    exec_horizon: int | None = None  # steps of a chunk that receding_horizon executes
    world: str | None = None  # kind of environment, such as table_jax; None = that of the run
    env_id: str | None = None  # id of a registered Gymnasium environment, for world "gymnasium"
    reference: str | None = None  # reference policy of the world to run instead, such as "expert"

    def __post_init__(self):
        """Checks the counts and the name."""
        for name, least in (("num_episodes", 1), ("num_simulators", 1), ("num_videos", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if not 0 <= self.first_seed < 2**31 - self.num_episodes:
            raise ValueError(
                f"first_seed must be in [0, 2^31 - num_episodes), got {self.first_seed}."
            )
        for name in _POLICY_OPTIONS if self.reference else ():
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} must be None with reference '{self.reference}', which needs no "
                    f"policy, got {getattr(self, name)}; omit it."
                )
        if self.name is not None and not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(
                "name must be letters, digits and '_-.', not starting with '-' or '.', got "
                f"'{self.name}'; choose another."
            )


class _Probe(NamedTuple):
    """Parts of an evaluation that are known before the first episode."""

    control_hz: float
    success_rule: SuccessRule
    latency: Latency | None  # None for a reference


class _Setup(NamedTuple):
    """Controller and environment of an evaluation."""

    folder: pathlib.Path
    settings: dict[str, Any]  # everything that the outcomes depend on
    world: WorldConfig
    controller: Controller
    player: Player | None  # None for a reference


def evaluate(
    run: Run | Path, config: EvaluateConfig | None = None, *, console: Console | None = None
) -> Summary:
    """Evaluates a policy in closed loop; episodes of an interrupted evaluation are not repeated.

    Args:
      run: run of `load_run`, or its folder.
      config: episodes, environment and execution.
      console: console for progress; None means stderr.

    Returns:
      Success rates per task and in total, also written to `summary.json`.

    Raises:
      FileNotFoundError: the run or one of its files is missing.
      ValueError: a file is damaged, an option does not fit, or an evaluation of this name has
        other settings.
      RuntimeError: every episode crashed: an exception, or actions that are not finite.
    """
    config = config or EvaluateConfig()
    reference = config.reference
    setup = _reference(run, config, reference) if reference else _policy(run, config)
    probe = _probe(setup, config)
    _open(setup, overwrite=config.overwrite)
    seeds = range(config.first_seed, config.first_seed + config.num_episodes)
    with folder_lock.hold(
        setup.folder / ".lock", f"evaluation {setup.folder}", "choose another --name"
    ):
        played = _play_all(setup, config, seeds, probe.control_hz, console)
    summary = results.summarize((played[seed] for seed in seeds), latency=probe.latency)
    first_error = next((o.error for o in played.values() if o.error), "")
    if not summary.total.episodes:
        raise RuntimeError(
            f"the simulator or the policy crashed in every episode, first with {first_error}; "
            "mend the cause, then evaluate again with --overwrite."
        )
    write_json(
        setup.folder / "summary.json",
        {
            "command": _command(setup.folder.parents[1], config),
            "settings": setup.settings,
            "success_rule": probe.success_rule,
            "summary": results.to_json(summary),
        },
    )
    return summary


def _play_all(
    setup: _Setup,
    config: EvaluateConfig,
    seeds: Sequence[int],
    control_hz: float,
    console: Console | None,
) -> dict[int, Outcome]:
    """Plays the episodes that are not in the folder yet; returns all outcomes by seed.

    After SIGTERM or Ctrl-C it ends the program when the next episode is kept.
    """
    file = setup.folder / "episodes.jsonl"
    played = {outcome.seed: outcome for outcome in results.read_outcomes(file)}
    left = [seed for seed in seeds if seed not in played]
    with (
        progress_bar(setup.folder.name, len(seeds), unit="episodes", console=console) as show,
        stopping.deferred("episode") as stop,
    ):
        for episode in _play(setup, config, left):
            _keep(setup, episode, control_hz)
            played[episode.outcome.seed] = episode.outcome
            finished = [played[seed] for seed in seeds if seed in played]
            show(len(finished), results.count_successes(finished))
            if stop.requested and len(finished) < len(seeds):
                stop.end(f"{len(finished)} episodes are in {file}; the same command continues")
    return played


def _policy(run: Run | Path, config: EvaluateConfig) -> _Setup:
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
    return _Setup(run.folder / "evaluation" / name, settings, world, player.controller, player)


def _reference(run: Run | Path, config: EvaluateConfig, reference: str) -> _Setup:
    folder = run.folder if isinstance(run, Run) else pathlib.Path(run)
    world = _world(read_world(folder), config, image_size=0)  # references use the state
    controller = players.reference_controller(find_reference(world.kind, reference))
    settings = {"reference": reference, "world": configs.to_dict(world)}
    name = config.name or _join(reference, config.world, config.env_id)
    return _Setup(folder / "evaluation" / name, settings, world, controller, None)


def _agent(agent: AgentConfig, config: EvaluateConfig) -> AgentConfig:
    """Returns the run's agent config with the options of the evaluation."""
    execution = _given({"kind": config.exec_kind, "exec_horizon": config.exec_horizon})
    acting = _given({"mode": config.mode, "instruction_steps": config.instruction_steps})
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
    options = (config.exec_kind, config.exec_horizon, config.world, config.env_id, config.step)
    return _join(*parts, robot, *options)


def _join(*options: Any) -> str:
    """Returns a folder name made of the options that are set."""
    return re.sub(r"[^\w.-]", "_", "-".join(str(o) for o in options if o is not None))


def _open(setup: _Setup, *, overwrite: bool) -> None:
    """Makes the folder, or checks that the episodes in it have the same settings."""
    path = setup.folder / "settings.json"
    if overwrite:
        shutil.rmtree(setup.folder, ignore_errors=True)
    if path.is_file():
        changed = configs.differences(_read_settings(path), setup.settings)
        if changed:
            raise ValueError(
                f"{setup.folder} has episodes with other settings: {'; '.join(changed)}; choose "
                "another --name, or --overwrite."
            )
    setup.folder.mkdir(parents=True, exist_ok=True)
    write_json(path, setup.settings)
    file = setup.folder / "episodes.jsonl"  # drops a line that a killed process left incomplete
    write_json_lines(file, [outcome._asdict() for outcome in results.read_outcomes(file)])


def _read_settings(path: pathlib.Path) -> dict[str, Any]:
    """Returns the settings of an earlier evaluation, with the present names of the fields."""
    settings = read_json(path, "settings")
    if "agent" in settings:  # not for a reference
        agent = configs.from_dict(AgentConfig, settings["agent"])
        settings["agent"] = configs.to_dict(agent)
    return settings


def _probe(setup: _Setup, config: EvaluateConfig) -> _Probe:
    """Resets a simulator and times the policy: missing packages fail before the first episode."""
    with contextlib.closing(make_simulator(setup.world)) as simulator:
        observation = simulator.reset(config.first_seed)
        if config.num_videos:
            video.check_packages()
            _draw(simulator)
        if setup.player is None:
            return _Probe(simulator.control_hz, simulator.success_rule, None)
        view = SimulatorView(observation, simulator.instruction, 0, config.first_seed, simulator)
        latency = players.measure_latency(setup.controller, view)
        return _Probe(simulator.control_hz, simulator.success_rule, latency)


def _play(setup: _Setup, config: EvaluateConfig, seeds: Sequence[int]) -> Iterator[RecordedEpisode]:
    """Plays the episodes to record, then the others; those of a JAX environment in one scan."""
    videos = range(config.first_seed, config.first_seed + config.num_videos)
    rest = [seed for seed in seeds if seed not in videos]
    make_env = worlds.get(setup.world.kind).make_env
    yield from run_simulators(
        setup.controller,
        functools.partial(make_simulator, _with_images(setup.world)),
        [seed for seed in seeds if seed in videos],
        num_simulators=config.num_simulators,
        video_seeds=videos,
        draw=_draw,
    )
    if setup.player is not None and make_env is not None:
        for outcome in setup.player.play_env(make_env(setup.world), rest):
            yield RecordedEpisode(outcome, [], np.zeros((0, 0)))
        return
    make = functools.partial(make_simulator, setup.world)
    yield from run_simulators(setup.controller, make, rest, num_simulators=config.num_simulators)


def _with_images(world: WorldConfig) -> WorldConfig:
    """Returns the environment config with images, if videos need them and the policy does not."""
    if worlds.get(world.kind).draws_observation and not world.image_size:
        return dataclasses.replace(world, image_size=_RENDERED_SIZE)
    return world


def _draw(simulator: Simulator) -> np.ndarray:
    return simulator.draw(_VIDEO_SIZE)


def _keep(setup: _Setup, episode: RecordedEpisode, fps: float) -> None:
    """Writes the video, then the outcome, so that a listed episode is complete."""
    outcome = episode.outcome
    if episode.video and not outcome.error:
        lines = [outcome.instruction, f"{setup.folder.name} · seed {outcome.seed}"]
        path = setup.folder / video.file_name(outcome.seed, outcome.task, outcome.success)
        frames = video.caption(episode.video, [line for line in lines if line], outcome.success)
        video.write_mp4(path, frames, fps)
    results.append_outcome(setup.folder / "episodes.jsonl", outcome)


def _command(run_dir: pathlib.Path, config: EvaluateConfig) -> str:
    """Returns the command line of this evaluation."""
    words = ["python", "-m", "vla_jax.evaluate", str(run_dir)]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default and field.name != "overwrite":
            words += [f"--{field.name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command with arguments from the command line; exit codes are in `command_line`."""
    import tyro

    def arguments(
        run_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")],
        config: Annotated[EvaluateConfig, tyro.conf.arg(name="")] = EvaluateConfig(),
    ) -> tuple[str, EvaluateConfig]:
        """Plays a run's policy in closed loop and shows its success rate per task.

        Args:
          run_dir: run folder of train.imitate.
          config: episodes, environment and execution.
        """
        return run_dir, config

    with exit_codes():
        run_dir, config = parse(arguments, argv, prog="python -m vla_jax.evaluate")
        summary = evaluate(run_dir, config)
        Console().print(results.table(summary))
        print(report.write_index(run_dir))


if __name__ == "__main__":
    main()
