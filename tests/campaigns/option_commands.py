"""Every command of the project with arguments that it accepts, and the options that it has.

A command runs in this process, up to the point where the first large program would be compiled, a
process started, or a time limit passes: that counts as accepted.
"""

import argparse
import contextlib
import importlib
import io
import os
import pathlib
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import tiny_demos
import tyro

from vla_jax import command_line, convert

LARGE = 20_000  # characters of a program from which on its compilation counts as slow
LIMIT = 4  # seconds of CPU time until a command counts as accepted
SMALL = "--window-size 6 --head-sizes 8 --batch-size 8 --num-updates 4 --warmup-steps 0"
SMALL += " --dataset demos --run-dir out"
ENCODER = "--backbone-from encoder --backbone.image-size 16 --width 16 --backbone.num-latents 2"
ENCODER += " --backbone.num-heads 2 --backbone.token-dim 8"


class Accepted(BaseException):
    """Raised in place of the first slow step."""


class Command(NamedTuple):
    """A command with arguments that it accepts."""

    module: str  # of `python -m`
    base: str  # its arguments, in a folder that `prepare` made
    wrong: str  # an option, added to them, that is refused before any file is read
    presets: str = ""  # name of the dict of presets in the module; empty = it has a `main`
    function: str = ""  # name of the script in the module
    options: Sequence[str] = ()  # the only options to try; empty = all

    @property
    def name(self) -> str:
        """Name of the command in tables."""
        preset = self.base.split("--preset ")[1].split()[0] if "--preset" in self.base else ""
        return " ".join(filter(None, (self.module.removesuffix(".__main__"), preset)))


COMMANDS = (
    Command("train.imitate", f"--preset table_jax_state {SMALL} --hidden-size 8",
            "--mesh data=99", "IMITATE", "imitate"),
    Command("train.imitate", f"--preset table_lstm {SMALL} --hidden-size 8 {ENCODER}",
            "--action-bounds 1 -1", "IMITATE", "imitate"),
    Command("train.imitate", f"--preset tiny_vlm {SMALL}", "--mesh tensor=3", "IMITATE",
            "imitate"),
    Command("train.cache", f"--preset table_lstm --dataset demos {ENCODER}", "--cache-batch 0",
            "CACHE", "write"),
    Command("train.pretrain", "--dataset demos --run-dir out --image-size 16 --patch-size 4",
            "--warmup-steps 10000000", "PRESETS", "pretrain"),
    Command("train.reinforce", "--init-from run --run-dir out --num-steps 6",
            "--warmup-steps 10000000", "FINETUNE", "finetune"),
    Command("train.reinforce", "--preset grid --run-dir out", "--num-obstacles 1000",
            "REINFORCE", "train"),
    Command("train.reinforce", "--preset table --run-dir out", "--warmup-steps 10000000",
            "REINFORCE", "train"),
    Command("train.reinforce", "--preset gymnasium --run-dir out", "--warmup-steps 10000000",
            "REINFORCE", "train"),
    Command("train.ppo", "--preset lit --run-dir out", "--num-minibatches 7", "PPO", "train"),
    Command("train.ppo", "--preset gymnasium --run-dir out", "--freeze nothing/*", "PPO",
            "train"),
    Command("train.deep_sarsa", "--preset grid --run-dir out", "--freeze nothing/*", "SARSA",
            "train"),
    Command("train.deep_sarsa", "--preset gymnasium --run-dir out", "--num-seeds 2", "SARSA",
            "train"),
    Command("train.tabular", "--run-dir out", "--step-size 2", "TABULAR", "compare"),
    Command("train.scan", "--run-dir out --split addprim_turn_left --batch-size 8",
            "--source-size 3", "PRESETS", "train"),
    Command("train.memory", "--small --run-dir out", "--burn-in 3", "PRESETS", "memory"),
    Command("train.chains", "--policies fc --num-seeds 1 --num-demonstrations 2 --run-dir out",
            "--length 1000", "CHAINS", "chain_suite"),
    Command("train.memory_suite", "--preset quick --decoders fc --run-dir out",
            "--tasks lit lita", "MEMORY_SUITE", "memory_suite"),
    Command("train.memory_pictures", "--tasks lit --run-dir out", "--decoders fc lstmm",
            "PRESETS", "memory_pictures"),
    Command("train.sweep", f"--preset table_jax_state {SMALL} --hidden-size 8 --seeds 2",
            "--learning-rates 1e-3 1e11", "SWEEP", "sweep"),
    Command("train.record", "--preset table_jax --image-size 16 --dataset out",
            "--wander-steps 1000000", "PRESETS", "record"),
    Command("train.record", "--preset table_mujoco --image-size 16 --dataset out",
            "--disturbance 2", "PRESETS", "record"),
    Command("train.demo", "--preset table_jax_state --run-dir out", "--num-trainings 0",
            "PRESETS", "demo"),
    Command("train.benchmark.__main__", "--small --run-dir out", "--cases recurrencee",
            "PRESETS", "benchmark"),
    Command("train.benchmark.throughput", "--num-envs 4", "--hidden-sizes 1000000000",
            "THROUGHPUT", "measure"),
    Command("vla_jax.evaluate", "run --num-episodes 4 --num-videos 0", "--window-size 0"),
    Command("vla_jax.convert.__main__", "head.safetensors out", "--num-heads 0"),
    Command("vla_jax.serve", "run --port 0", "--window-size 0"),
    Command("vla_jax.export", "run out", "--platforms cpuu"),
    Command("vla_jax.inspect_data", "demos", "--num-frames 0"),
    Command("vla_jax.convert_data", "demos out --num-workers 0", "--fps 0"),
)  # fmt: skip


class Answer(NamedTuple):
    """Answer of a command to its arguments."""

    outcome: str  # "sentence", "foreign", "traceback", or "accepted"
    detail: str  # the message
    seconds: float  # CPU time
    megabytes: float  # peak of the memory of this process, above that before


def prepare(root: pathlib.Path) -> None:
    """Writes what the commands read: demonstrations, an encoder, a run, weights of a head."""
    from train.imitate import imitate
    from train.pretrain import pretrain

    demos = tiny_demos.write(root / "demos")
    pretrain(tiny_demos.pretraining(demos, root / "encoder"))
    imitate(tiny_demos.imitation(demos, root / "run"))
    lstm = {"weight_ih_l0": (16, 3), "weight_hh_l0": (16, 4), "bias_ih_l0": (16,)}
    tensors = {name: np.ones(shape, np.float32) for name, shape in lstm.items()}
    tensors["bias_hh_l0"] = tensors["bias_ih_l0"]
    convert.write(root / "head.safetensors", convert.TensorFile(tensors))


def main_of(command: Command) -> Callable[[Sequence[str]], None]:
    """Returns a function that runs a command with arguments."""
    module = importlib.import_module(command.module)
    if not command.presets:
        return module.main
    presets, script = getattr(module, command.presets), getattr(module, command.function)
    return lambda argv: command_line.run(script, presets, argv, description="A command.")


def options_of(command: Command) -> dict[str, argparse.Action]:
    """Returns the options of a command by their first name, read from its parser."""
    found: dict[str, argparse.Action] = {}

    def keep(make: Any, **_: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # tyro has nothing else for this
            parser = tyro.extras.get_parser(make)
        actions = [action for action in parser._actions if action.option_strings]
        found.update({action.option_strings[0]: action for action in actions})
        raise Accepted

    with mock.patch.object(tyro, "cli", keep), contextlib.suppress(Accepted):
        main_of(command)(command.base.split())
    return {name: action for name, action in found.items() if name not in ("-h", "--help")}


def run(command: Command, argv: Sequence[str]) -> Answer:
    """Runs a command up to its first slow step, in the current folder."""
    main, errors = main_of(command), io.StringIO()
    before = _reset_peak()
    start = time.process_time()
    with _stops(), contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(argv)
            outcome, detail = "accepted", "finished"
        except Accepted as stop:
            outcome, detail = "accepted", str(stop)
        except SystemExit as stop:
            outcome, detail = _judge_text(errors.getvalue()) if stop.code else ("accepted", "help")
        except BaseException as error:
            outcome, detail = _judge(error)
    return Answer(outcome, detail, time.process_time() - start, _peak() - before)


def _judge_text(text: str) -> tuple[str, str]:
    """Returns the outcome of a refusal on stderr: one line that is not too long."""
    lines = [line for line in text.splitlines() if line and not line.startswith("warning: ")]
    is_sentence = len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 3000
    return ("sentence" if is_sentence else "foreign"), text.strip()


def _judge(error: BaseException) -> tuple[str, str]:
    """Returns the outcome of an exception: of the project, of a dependency, or a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = frames[-1]
    where = f"{type(error).__name__} at {frame.filename.rpartition('/')[2]}:{frame.lineno}"
    text = " ".join(str(error).split())
    if not isinstance(error, (ValueError, TypeError, OSError, ImportError, RuntimeError)):
        return "traceback", f"{where}: {text[:300]}"
    root = str(pathlib.Path(command_line.__file__).parents[1])
    if isinstance(error, OSError) and error.strerror and error.filename:
        return "sentence", f"error: {error.filename}: {error.strerror}"
    is_own = frame.filename.startswith(root) and "site-packages" not in frame.filename
    if is_own and text.endswith((".", "?", ")")):
        return "sentence", f"error: {text}"
    return "foreign", f"{where}: {text[:300]}"


@contextlib.contextmanager
def _stops() -> Iterator[None]:
    """Raises `Accepted` in place of slow steps inside the block."""
    from jax._src import compiler

    compile_program = compiler.compile_or_get_cached

    def compile_small(backend: Any, computation: Any, *rest: Any, **options: Any) -> Any:
        text = str(computation.operation)
        if len(text) > LARGE:
            raise Accepted("compiles")
        return compile_program(backend, computation, *rest, **options)

    def stop(reason: str) -> Callable[..., Any]:
        def raise_accepted(*_: Any, **__: Any) -> None:
            raise Accepted(reason)

        return raise_accepted

    before = signal.signal(signal.SIGPROF, stop(f"runs for {LIMIT} s"))
    try:
        signal.setitimer(signal.ITIMER_PROF, LIMIT)
        with (
            mock.patch.dict(os.environ, {command_line.TRACEBACK: "1"}),
            mock.patch.object(compiler, "compile_or_get_cached", compile_small),
            mock.patch("multiprocessing.process.BaseProcess.start", stop("starts a process")),
            mock.patch("subprocess.Popen.__init__", stop("starts a program")),
            mock.patch("train.demo.run_steps", stop("starts its steps")),
            mock.patch("vla_jax.serve.Engine", stop("compiles")),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _reset_peak() -> float:
    """Sets the peak of the memory of this process to what it has now; returns that, MB."""
    with contextlib.suppress(OSError):  # another system than Linux: the peak only grows
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> float:
    """Returns the peak of the memory of this process, MB."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1000
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
