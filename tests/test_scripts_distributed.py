"""Commands with `--distributed`, as a scheduler starts them: ends, signals, resuming."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import tiny_demos
from processes import free_port

from vla_jax.training import checkpoint
from vla_jax.training.logs import read_metrics

# The first process writes its report for longer than JAX waits for the others at the end. JAX must
# wait for some seconds, since each process first waits for its own watch, up to 2 s.
ALONE, SHUTDOWN = 20, 15  # s
IMPATIENT = f"""
import runpy, sys, time
from vla_jax import files
from vla_jax.training import distributed
distributed.SHUTDOWN = {SHUTDOWN}
replacing = files.replacing
def replacing_late(path):
    time.sleep({ALONE} if path.name in ("test.json", "report.json") else 0)
    return replacing(path)
files.replacing = replacing_late
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
LOOP = {"num_updates": 2, "log_every": 1, "warmup_steps": 1, "mesh": "data=2"}
SCAN = {
    "split": "addprim_jump", "batch_size": 8, "embed_size": 4, "hidden_size": 4, "num_layers": 1,
}  # fmt: skip
REWARD = {"num_seeds": 2, "num_envs": 2, "num_steps": 8, "report_episodes": 2}
IMITATE = {"preset": "table_jax_state", "window_size": 6, "hidden_size": 8, "head_sizes": 8}


def start(words, options, num_processes=2):
    """Starts a command in several process groups; `words` are those after the interpreter."""
    options = [
        word
        for name, value in options.items()
        for word in ("--" + name.replace("_", "-"), str(value))
    ]
    address = f"127.0.0.1:{free_port()}"
    return [
        subprocess.Popen(
            [sys.executable, *words, *options, "--distributed", f"{address},{num_processes},{i}"],
            cwd=pathlib.Path(__file__).parents[1],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )
        for i in range(num_processes)
    ]  # fmt: skip


def end(processes):
    """Returns exit code and errors of each; waits for their worker processes too."""
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, text) for p, text in zip(processes, errors, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "options", "written"),
    [("train.scan", SCAN, "test.json"), ("train.reinforce", REWARD, "report.json")],
)
def test_a_command_in_two_processes_ends_well(module, options, written, tmp_path):
    words, started = ["-c", IMPATIENT, module], time.monotonic()
    ended = end(start(words, {**LOOP, **options, "run_dir": tmp_path}))
    assert time.monotonic() - started > ALONE
    assert [code for code, _ in ended] == [0, 0], ended
    assert (tmp_path / written).exists()
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 2


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    return tiny_demos.write(tmp_path_factory.mktemp("data") / "demos")


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [False, True])
def test_a_signal_saves_before_the_next_log_and_the_command_resumes(to_all, demos, tmp_path):
    """One process is signalled; or all, with the processes that load their batches."""
    words = ["-m", "train.imitate"]
    options = {
        **LOOP, **IMITATE, "batch_size": 8, "num_workers": 1, "dataset": demos, "run_dir": tmp_path,
        "log_every": 100_000, "save_every": 100_000,
    }  # fmt: skip
    processes = start(words, {**options, "num_updates": 1_000_000})
    deadline = time.monotonic() + 300
    while not (tmp_path / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), end(processes)
        time.sleep(0.1)
    time.sleep(10)
    for process in processes if to_all else processes[1:]:
        (os.killpg if to_all else os.kill)(process.pid, signal.SIGTERM)
    signalled = time.monotonic()
    ended = end(processes)
    assert time.monotonic() - signalled < 60
    assert [code for code, _ in ended] == [143, 143], ended
    step = checkpoint.latest_step(tmp_path / "checkpoints")
    for _, errors in ended:
        assert f"update {step} is saved" in errors
    ended = end(start(words, {**options, "num_updates": step + 2}))
    assert [code for code, _ in ended] == [0, 0], ended
    assert checkpoint.latest_step(tmp_path / "checkpoints") == step + 2
