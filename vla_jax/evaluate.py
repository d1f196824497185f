"""Closed-loop evaluation: success rates of a run's policy over unseen episodes.

    python -m vla_jax.evaluate RUN_DIR
    python -m vla_jax.evaluate RUN_DIR --mode persistent --num-episodes 500
    python -m vla_jax.evaluate RUN_DIR --reference expert_ignoring_colour --world table_mujoco
    python -m vla_jax.evaluate RUN_DIR --remote ws://127.0.0.1:8000
    srun python -m vla_jax.evaluate RUN_DIR --distributed slurm    # shares the episodes

Writes into `RUN_DIR/evaluation/NAME`: a line per episode in `episodes.jsonl`, videos, and
`summary.json`; `RUN_DIR/index.html` shows them. An interrupted evaluation is resumed by the same
command.
"""

import contextlib
import dataclasses
import functools
import pathlib
import shlex
from collections.abc import Container, Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from vla_jax import config as configs
from vla_jax import folder_lock, stopping
from vla_jax.acting.agent import AgentConfig
from vla_jax.acting.rollout import Outcome, RecordedEpisode, SimulatorView, run_simulators
from vla_jax.command_line import exit_codes, parse
from vla_jax.envs import worlds
from vla_jax.envs.worlds import WorldConfig, make_simulator
from vla_jax.evaluation import players, report, results, video
from vla_jax.evaluation.results import Latency, Summary
from vla_jax.evaluation_setup import EvaluateConfig, EvaluationSetup, make_setup
from vla_jax.files import Path, delete, named_errors, read_json, write_json, write_json_lines
from vla_jax.runs import Run
from vla_jax.training import distributed
from vla_jax.training.parallel import is_first_process
from vla_jax.training.progress import progress_bar
from vla_jax.types import Simulator, SuccessRule

_DEFAULTS = EvaluateConfig()
_LOCK = ".lock"  # file of the process that writes into the folder
EPISODES = "episodes.jsonl"  # file of the outcomes, a line each
_PART = "episodes.{}.jsonl"  # likewise, of a process that plays beside the first one
_STOP = "stop"  # what a process announces to the others when it got a signal
_VIDEO_SIZE = 320  # pixels along each side
_RENDERED_SIZE = 160  # pixels of the images that a JAX environment renders for a video


class _Probe(NamedTuple):
    """Parts of an evaluation that are known before the first episode."""

    control_hz: float
    success_rule: SuccessRule
    latency: Latency | None  # None for a reference


def evaluate(
    run: Run | Path, config: EvaluateConfig | None = None, *, console: Console | None = None
) -> Summary:
    """Evaluates a policy in closed loop; episodes of an interrupted evaluation are not repeated.

    With `config.distributed` every process plays its share of the episodes and returns the summary
    of all; the first one writes it. Nothing may have used a device before in that case, so `run` is
    a folder.

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
    with distributed.connected(config.distributed):
        return _evaluate(run, config, console)


def _evaluate(run: Run | Path, config: EvaluateConfig, console: Console | None) -> Summary:
    setup = make_setup(run, config)
    probe, is_first = _probe(setup, config), is_first_process()
    seeds = range(config.first_seed, config.first_seed + config.num_episodes)
    with contextlib.ExitStack() as stack:
        stack.callback(setup.disconnect)
        if is_first:  # it holds the lock for all processes of the evaluation
            stack.enter_context(_in_use(setup.folder))
            _open(setup, overwrite=config.overwrite)
        distributed.wait_for_all("open")
        played = _play_all(setup, config, seeds, probe.control_hz, console)
        summary = results.summarize((played[seed] for seed in seeds), latency=probe.latency)
        first_error = next((o.error for o in played.values() if o.error), "")
        if not summary.total.episodes:
            raise RuntimeError(
                f"the simulator or the policy crashed in every episode, first with {first_error}; "
                "mend the cause, then evaluate again with --overwrite."
            )
        if is_first:
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


def _in_use(folder: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Makes the folder of an evaluation, and returns its lock."""
    with named_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder_lock.hold(folder / _LOCK, f"evaluation {folder}", "choose another --name")


def share(
    seeds: Sequence[int], played: Container[int], index: int, num_processes: int
) -> list[int]:
    """Returns the episodes that are not played yet and fall to one of several processes.

    Args:
      seeds: of all episodes.
      played: seeds of those that are played.
      index: of the process.
      num_processes: that share the episodes.
    """
    return [seed for seed in seeds if seed not in played][index::num_processes]


def _play_all(
    setup: EvaluationSetup,
    config: EvaluateConfig,
    seeds: Sequence[int],
    control_hz: float,
    console: Console | None,
) -> dict[int, Outcome]:
    """Plays this process's share of the missing episodes; returns all outcomes by seed.

    After SIGTERM or Ctrl-C in any of the processes, each of them ends when its next episode is
    kept.
    """
    file = setup.folder / EPISODES
    earlier = {outcome.seed: outcome for outcome in results.read_outcomes(file)}
    distributed.wait_for_all("read")  # every process deals out the same episodes
    left = share(seeds, earlier, jax.process_index(), jax.process_count())
    own = [earlier[seed] for seed in seeds if seed in earlier]
    num_own = len(own) + len(left)
    with (
        progress_bar(setup.folder.name, num_own, unit="episodes", console=console) as show,
        stopping.deferred("episode") as stop,
    ):
        for episode in _play(setup, config, left):
            _keep(setup, episode, control_hz)
            own.append(episode.outcome)
            show(len(own), results.count_successes(own))
            if stop.requested:
                distributed.announce(_STOP)
            if stop.requested or distributed.is_announced(_STOP):
                break
        distributed.wait_for_all("played")
        if is_first_process():
            _merge(setup.folder)
        distributed.wait_for_all("merged")
        played = {outcome.seed: outcome for outcome in results.read_outcomes(file)}
        if all(seed in played for seed in seeds):
            return played
        if stop.requested or distributed.is_announced(_STOP):
            stop.end(f"{len(played)} episodes are in {file}; the same command continues")
    raise RuntimeError(
        f"{file} must hold all {len(seeds)} episodes, got {len(played)}; put the run on a disk "
        "that all processes share, then evaluate again."
    )


def _open(setup: EvaluationSetup, *, overwrite: bool) -> None:
    """Empties the folder, or checks that the episodes in it have the same settings."""
    path = setup.folder / "settings.json"
    for left in [*setup.folder.iterdir()] if overwrite else []:
        if not left.name.startswith(_LOCK):
            delete(left)
    if path.is_file():
        changed = configs.differences(_read_settings(path), setup.settings)
        if changed:
            raise ValueError(
                f"{setup.folder} has episodes with other settings: {'; '.join(changed)}; choose "
                "another --name, or --overwrite."
            )
    write_json(path, setup.settings)
    _merge(setup.folder)


def _merge(folder: pathlib.Path) -> None:
    """Joins the episodes of all processes in the file of the first one.

    Drops lines that killed processes left incomplete.
    """
    parts = sorted(folder.glob(_PART.format("*")))
    files = [folder / EPISODES, *parts]
    outcomes = {o.seed: o for file in files for o in results.read_outcomes(file)}
    write_json_lines(files[0], [outcomes[seed]._asdict() for seed in sorted(outcomes)])
    for part in parts:
        part.unlink()


def _read_settings(path: pathlib.Path) -> dict[str, Any]:
    """Returns the settings of an earlier evaluation, with the present names of the fields."""
    settings = read_json(path, "settings")
    if "agent" in settings:  # not for a reference
        agent = configs.from_dict(AgentConfig, settings["agent"])
        settings["agent"] = configs.to_dict(agent)
    return settings


def _probe(setup: EvaluationSetup, config: EvaluateConfig) -> _Probe:
    """Resets a simulator and times the policy: missing packages fail before the first episode."""
    with contextlib.closing(make_simulator(setup.world)) as simulator:
        observation = simulator.reset(config.first_seed)
        if config.num_videos:
            video.check_packages()
            _draw(simulator)
        if not setup.is_timed:
            return _Probe(simulator.control_hz, simulator.success_rule, None)
        view = SimulatorView(observation, simulator.instruction, 0, config.first_seed, simulator)
        try:
            latency = players.measure_latency(setup.controller, view)
        finally:
            setup.disconnect()
        return _Probe(simulator.control_hz, simulator.success_rule, latency)


def _play(
    setup: EvaluationSetup, config: EvaluateConfig, seeds: Sequence[int]
) -> Iterator[RecordedEpisode]:
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
    if setup.play_env is not None and make_env is not None:
        for outcome in setup.play_env(make_env(setup.world), rest):
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


def _keep(setup: EvaluationSetup, episode: RecordedEpisode, fps: float) -> None:
    """Writes the video, then the outcome, so that a listed episode is complete."""
    outcome = episode.outcome
    if episode.video and not outcome.error:
        lines = [outcome.instruction, f"{setup.folder.name} · seed {outcome.seed}"]
        path = setup.folder / video.file_name(outcome.seed, outcome.task, outcome.success)
        frames = video.caption(episode.video, [line for line in lines if line], outcome.success)
        video.write_mp4(path, frames, fps)
    index = jax.process_index()
    results.append_outcome(setup.folder / (_PART.format(index) if index else EPISODES), outcome)


def _command(run_dir: pathlib.Path, config: EvaluateConfig) -> str:
    """Returns the command line of this evaluation."""
    words = ["python", "-m", "vla_jax.evaluate", str(run_dir)]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default and field.name not in ("overwrite", "distributed"):
            words += [f"--{field.name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command with arguments from the command line; exit codes are in `command_line`."""
    import tyro

    def arguments(
        run_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")],
        config: Annotated[EvaluateConfig, tyro.conf.arg(name="")] = _DEFAULTS,
    ) -> tuple[str, EvaluateConfig]:
        """Plays a run's policy in closed loop and shows its success rate per task.

        Args:
          run_dir: run folder of train.imitate.
          config: episodes, environment and execution.
        """
        return run_dir, config

    with exit_codes():
        run_dir, config = parse(arguments, argv, prog="python -m vla_jax.evaluate")
        with distributed.connected(config.distributed):
            summary = evaluate(run_dir, config)
            if is_first_process():
                Console().print(results.table(summary))
                print(report.write_index(run_dir))


if __name__ == "__main__":
    main()
