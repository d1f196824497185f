"""Steps of `train.demo` and `train.memory_pictures`, run in two processes with one progress bar.

The bar is weighted by the expected times.
"""

import concurrent.futures
import functools
import math
import multiprocessing
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, NamedTuple

from rich.console import Console

from train import cache, imitate, pretrain, record
from train.configs import ImitateConfig
from train.pretrain import PretrainConfig
from train.record import RecordConfig
from vla_jax import compile_cache, stopping
from vla_jax.evaluate import EvaluateConfig, evaluate
from vla_jax.training.logs import read_metrics
from vla_jax.training.malloc import keep_freed_memory
from vla_jax.training.progress import progress_bar

NUM_PROCESSES = 2  # steps that run at a time
LOG = "log.txt"  # file in the folder of the whole, with the output of the steps
NUM_LINES = 20  # for all steps, if the output is not a terminal
# CPU seconds on one core without AVX-512, for the estimate and for the length of the bar.
SECONDS_PER_EPISODE = {"record": 0.115, "images": 0.25, "state": 0.02}
SECONDS_PER_UPDATE = {"pretrain": 0.13, "imitate": 0.09}
SECONDS_TO_START = 10.0  # per step, mostly compilation
SPEED_UP = 1.8  # two cores relative to one
# Seconds until a step that has not ended by itself gets a signal: Ctrl-C of a terminal and SIGTERM
# of a scheduler often reach the steps too; a second signal would end them before they have saved.
SECONDS_TO_SAVE = {KeyboardInterrupt: 30.0, SystemExit: 3.0}


class Step(NamedTuple):
    """One step: a function that runs in another process."""

    name: str
    function: Callable[[], Any]
    fraction: Callable[[], float]  # finished fraction in [0, 1], read from the step's files
    seconds: float  # expected CPU time
    after: Sequence[str] = ()  # names of the steps that must finish before


class Policy(NamedTuple):
    """A policy to train, and its evaluations by title."""

    config: ImitateConfig
    evaluations: dict[str, EvaluateConfig]


def recording(config: RecordConfig) -> Step:
    """Returns the step that records the demonstrations, unless they exist."""
    record.is_recorded(config)  # other settings are an error before the first step
    counter = pathlib.Path(f"{config.dataset}.count")
    return Step(
        "record",
        functools.partial(_record, config, counter),
        lambda: _read_count(counter) / config.num_episodes,
        SECONDS_TO_START
        + SECONDS_PER_EPISODE["record" if config.world.image_size else "state"]
        * config.num_episodes,
    )


def pretraining(config: PretrainConfig, policy: ImitateConfig, *, after: Sequence[str]) -> Step:
    """Returns the step that pre-trains the image encoder and encodes all frames for `policy`."""
    seconds = SECONDS_PER_UPDATE["pretrain"] * config.loop.num_updates + 50  # 50 for the frames
    return Step(
        config.run_dir,
        functools.partial(_pretrain, config, policy),
        functools.partial(_updates_done, config.run_dir, config.loop.num_updates),
        seconds,
        after,
    )


def training(policy: Policy, *, after: Sequence[str]) -> Step:
    """Returns the step that trains a policy by imitation."""
    config = policy.config
    return Step(
        config.run_dir,
        functools.partial(imitate.imitate, config),
        functools.partial(_updates_done, config.run_dir, config.loop.num_updates),
        SECONDS_TO_START + SECONDS_PER_UPDATE["imitate"] * config.loop.num_updates,
        after,
    )


def evaluation(run_dir: pathlib.Path, config: EvaluateConfig, *, after: Sequence[str]) -> Step:
    """Returns the step that evaluates a trained policy; `config.name` must be set."""
    file = run_dir / "evaluation" / str(config.name) / "episodes.jsonl"
    kind = "images" if config.num_videos else "state"
    return Step(
        str(file.parent),
        functools.partial(evaluate, run_dir, config),
        lambda: file.read_bytes().count(b"\n") / config.num_episodes if file.exists() else 0.0,
        SECONDS_TO_START + SECONDS_PER_EPISODE[kind] * config.num_episodes,
        after,
    )


def run_steps(
    steps: Sequence[Step], log: pathlib.Path, *, console: Console, name: str = "demo"
) -> None:
    """Runs every step as soon as the steps that it depends on are finished.

    Args:
      steps: in order of priority.
      log: file for their output.
      console: for the progress bar, or plain lines if it is not a terminal.
      name: of the whole, beside the bar.

    Raises:
      Exception: error of a step; the other steps are terminated.
      KeyboardInterrupt: after Ctrl-C, when the steps have saved what they have.
      SystemExit: after SIGTERM, likewise.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    pool = ProcessPoolExecutor(
        NUM_PROCESSES, multiprocessing.get_context("spawn"), _start_process, (log,)
    )
    total = sum(step.seconds for step in steps)
    minutes = math.ceil(total / SPEED_UP / 60)
    duration = f"about {minutes} minutes on 2 CPU cores" if minutes > 1 else "about a minute"
    console.print(f"{len(steps)} steps, {duration}; details in {log}", highlight=False)
    running: dict[Future, Step] = {}
    try:
        with progress_bar(name, 100, unit="%", num_lines=NUM_LINES, console=console) as show:
            for done in _schedule(steps, pool, running):
                seconds = sum(step.seconds for step in steps if step.name in done)
                seconds += sum(s.seconds * min(s.fraction(), 1.0) for s in running.values())
                names = ", ".join(step.name for step in running.values()) or "finished"
                show(int(100 * seconds / total), names)
    except BaseException as error:
        concurrent.futures.wait(running, timeout=SECONDS_TO_SAVE.get(type(error), 0.0))
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _schedule(
    steps: Sequence[Step], pool: ProcessPoolExecutor, running: dict[Future, Step]
) -> Iterator[set[str]]:
    """Starts steps, kept in `running`; yields the names of the finished ones, every second."""
    waiting, done = list(steps), set()
    while waiting or running:
        for step in [step for step in waiting if done.issuperset(step.after)]:
            if len(running) < NUM_PROCESSES:
                future: Future = pool.submit(_run_step, step.function)
                running[future] = step
                waiting.remove(step)
        finished = concurrent.futures.wait(
            running, timeout=1.0, return_when=concurrent.futures.FIRST_COMPLETED
        ).done
        for future in finished:
            future.result()
            done.add(running.pop(future).name)
        yield done


def _run_step(function: Callable[[], Any]) -> Any:
    """Runs a step, which signals end; the process then waits for the next one without them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with stopping.exit_on_sigterm():
            return function()
    finally:
        _ignore_signals()


def _ignore_signals() -> None:
    """Leaves signals to the parent: the end of an idle process would end the other's step too."""
    for number in stopping.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _start_process(log: pathlib.Path) -> None:
    """Redirects the output of this process to a file; sets up memory and compile cache."""
    _ignore_signals()
    keep_freed_memory()
    compile_cache.protect(log.parent / ".jax_cache")  # steps of several trainings are alike
    # Two processes share the memory of an accelerator.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with log.open("a", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]


def _record(config: RecordConfig, counter: pathlib.Path) -> None:
    if record.is_recorded(config):
        return
    counter.parent.mkdir(parents=True, exist_ok=True)
    try:
        record.record(config, on_episode=functools.partial(_count, counter, config.num_episodes))
    finally:
        counter.unlink(missing_ok=True)


def _count(counter: pathlib.Path, num_episodes: int, count: int) -> None:
    """Writes the number of episodes played so far, a hundred times over all episodes."""
    if count % max(1, num_episodes // 100) == 0:
        counter.write_text(str(count))


def _read_count(counter: pathlib.Path) -> int:
    """Returns the number of episodes played so far; 0 before and after the recording."""
    try:
        return int(counter.read_text() or 0)
    except FileNotFoundError:  # before and after the recording
        return 0


def _pretrain(config: PretrainConfig, policy: ImitateConfig) -> None:
    pretrain.pretrain(config)
    cache.cache(policy)


def _updates_done(run_dir: str, num_updates: int) -> float:
    lines = read_metrics(pathlib.Path(run_dir) / "metrics.jsonl")
    return lines[-1]["step"] / num_updates if lines else 0.0
