"""Processes connect by one option, and end together when one of them dies or fails."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest
from processes import free_port

from vla_jax.training import distributed, peers
from vla_jax.training.loop import LoopConfig

PROGRAM = """
import os, sys, time
import jax, numpy as np
from jax.experimental import multihost_utils
from vla_jax.command_line import exit_codes
from vla_jax.training import distributed, peers
option, event, victim, *patience = sys.argv[1:]
if patience:
    distributed.CONNECTION = peers.SILENCE = float(patience[0])
    distributed.SHUTDOWN = 1
if event == "aborted":  # as if JAX were faster than the watch
    peers.watch = peers._watch_first = lambda *_: None
ENDS = {
    "aborted": lambda: os.kill(os.getpid(), 9),
    "aborts": os.abort,
    "killed": lambda: os.kill(os.getpid(), 9),
    "fails": ValueError("the disk is full; free some space."),
    "full": jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"),
    "lost": jax.errors.JaxRuntimeError("INTERNAL: connection reset"),
    "stopped": SystemExit(143),
    "exits": SystemExit(3),
}
with exit_codes(), distributed.connected(option):
    assert not jax.config.jax_enable_compilation_cache
    is_victim = jax.process_index() == int(victim)
    for number in range(10**9 if event in ENDS else 10):
        total = multihost_utils.process_allgather(np.array(1)).sum()
        if number == 5 and is_victim and event in ENDS:
            if callable(ENDS[event]):
                ENDS[event]()
            raise ENDS[event]
    if event.startswith("late") and is_victim:
        time.sleep(2 * peers.SILENCE + 2 * peers.GRACE)
        if event == "late, stopped":
            raise SystemExit(143)
    print("sum", total, flush=True)
"""


def start(option, event="none", victim=-1, *patience, environment=None):
    command = [sys.executable, "-c", PROGRAM, option, event, *map(str, (victim, *patience))]
    return subprocess.Popen(
        command,
        cwd=pathlib.Path(__file__).parents[1],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(processes, timeout=150):
    """Returns exit code, output and errors of each."""
    outputs = [process.communicate(timeout=timeout) for process in processes]
    return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


def start_all(event, victim, *patience, num_processes=4):
    address = f"127.0.0.1:{free_port()}"
    options = [f"{address},{num_processes},{index}" for index in range(num_processes)]
    return [start(option, event, victim, *patience) for option in options]


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize(("event", "victim"), [("killed", 2), ("killed", 0), ("aborted", 0)])
def test_a_killed_process_ends_the_others_with_its_name(event, victim):
    processes = start_all(event, victim)
    processes[victim].wait(150)
    killed = time.monotonic()
    ended = end(processes, timeout=60)
    assert time.monotonic() - killed < 60
    for index, (code, _, errors) in enumerate(ended):
        if index != victim:
            assert code == peers.OTHER_DIED, errors
            assert f"error: process {victim}" in errors.splitlines()[-1]
            assert errors.endswith("the same command continues\n")
            assert f"PID {processes[victim].pid}) has died" in errors or victim == 0


@pytest.mark.slow
def test_an_abort_of_another_cause_stays_an_abort():
    processes = start_all("aborts", 2)
    code, _, errors = processes[2].wait(150), *processes[2].communicate()
    for process in processes:
        process.kill()
        process.communicate()
    assert code == -signal.SIGABRT
    assert "process 0" not in errors
    assert errors.count("error: this process has aborted, by the cause above") == 1


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_the_others_end_with_the_error_of_a_process_that_fails(victim):
    processes = start_all("fails", victim)
    ended = end(processes)
    assert [code for code, _, _ in ended] == [2] * 4
    for index, (_, _, errors) in enumerate(ended):
        assert errors.endswith("the disk is full; free some space.\n"), errors
        place = f"process {victim} of 4 ("
        assert (place in errors) == (index != victim)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "victim", "code", "sentence"),
    [
        ("stopped", 1, 143, "was stopped; the same command continues"),
        ("stopped", 0, 143, "was stopped; the same command continues"),
        ("late, stopped", 0, 143, "was stopped; the same command continues"),
        (
            "lost",
            1,
            75,
            "connection reset; this may be a lost connection; the same command may continue",
        ),
        ("full", 1, 2, "has ended: RESOURCE_EXHAUSTED: out of memory"),
        ("exits", 1, 3, "has ended with exit code 3"),
    ],
)
def test_a_process_that_ends_too_early_gives_the_others_its_exit_code(
    event, victim, code, sentence
):
    processes = start_all(event, victim, 10, num_processes=2)
    ended = end(processes)
    assert [each for each, _, _ in ended] == [code] * 2, ended
    last = ended[1 - victim][2].splitlines()[-1]
    assert last.startswith(f"error: process {victim} of 2 (")
    assert last.endswith(sentence)


ERRORS = {  # status and text -> whether it may be that of a lost connection
    "UNKNOWN: Gloo all-reduce failed: Connection closed by peer": True,
    "INTERNAL: NCCL operation ncclGroupEnd() failed": True,
    "FAILED_PRECONDITION: Agent must be in CONNECTED state. It is currently in ERROR.": True,
    "FAILED_PRECONDITION: DNN library initialization failed": False,
    "NOT_FOUND: No kernel symbol": False,
    "INTERNAL: Autotuning failed for HLO: NOT_FOUND": False,
    "INTERNAL: ptxas exited with non-zero error code 65280": False,
    "INTERNAL: Failed to compile the module": False,
    "RESOURCE_EXHAUSTED: Out of memory": False,
}


def caught(raise_it):
    with pytest.raises(Exception) as found:  # noqa: PT011
        raise_it()
    return found.value


@pytest.mark.parametrize(("text", "expected"), ERRORS.items())
def test_faults_that_each_start_repeats_are_not_those_of_a_connection(text, expected, monkeypatch):
    """An error counts as what it came from, unless `from None` says that it came from nothing."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    error = jax.errors.JaxRuntimeError(text)

    def explain():
        try:
            raise error
        except RuntimeError:
            raise ValueError("explained")  # noqa: B904

    def replace():
        try:
            raise error
        except RuntimeError:
            raise ValueError("replaced") from None

    for each in (error, caught(explain)):
        assert distributed._may_be_of_another(each) == expected
    assert not distributed._may_be_of_another(caught(replace))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (SystemExit(143), 143),
        (SystemExit(), 0),
        (SystemExit(3), 3),
        (SystemExit("a sentence"), 1),
        (ValueError("another"), 2),
    ],
)
def test_a_process_that_ends_early_keeps_its_exit_code(error, code):
    assert distributed._exit_code(error) == code


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_processes_wait_for_the_last_one_at_their_end(victim):
    for code, output, errors in end(start_all("late", victim, 6, num_processes=2)):
        assert (code, output.splitlines()[-1]) == (0, "sum 2"), errors


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_process_alone_among_several_ends_with_one_sentence(index):
    option = f"127.0.0.1:{free_port()},2,{index}"
    (code, _, errors), *_ = end([start(option, "none", -1, 5)])
    assert code == peers.OTHER_DIED
    assert errors.startswith(f"error: distributed {option} must connect all processes within 5 s")
    assert errors.endswith("the same command continues\n")


@pytest.mark.slow
def test_a_process_that_starts_again_ends_the_others_with_an_explanation():
    processes = start_all("late", 0, 60, num_processes=2)
    while not processes[1].stdout.readline().startswith("sum"):  # it waits for the other one
        assert processes[1].poll() is None
    processes[1].kill()
    again = start(processes[1].args[3], "late", 0, 60)
    (code, _, errors), _ = end(processes)
    again.kill()
    again.communicate()
    assert code == -signal.SIGABRT
    assert "was started again, and the same command continues" in errors.splitlines()[-1]


@pytest.mark.slow
def test_no_cluster_is_one_sentence():
    (code, _, errors), *_ = end([start("auto")])
    assert code == 2
    assert "got auto, which finds no cluster; give host:port" in errors


def slurm(job, count, index):
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
        "SLURM_STEP_NUM_NODES": "1",
    }


@pytest.mark.slow
@pytest.mark.parametrize("option", ["slurm", "auto"])
def test_tasks_of_slurm_find_each_other(option):
    job = free_port()  # JAX derives the port from it
    ended = end([start(option, environment=slurm(job, 2, index)) for index in range(2)])
    for code, output, errors in ended:
        assert (code, output.splitlines()[-1]) == (0, "sum 2"), errors


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("slrm", r"got 'slrm'; choose from none, auto, slurm, .*Did you mean 'slurm'"),
        ("localhost,2,0", "distributed must be host:port,processes,index or one of the clusters"),
        ("localhost:80,2,2", "an index below the number of processes, got 'localhost:80,2,2'"),
    ],
)
def test_an_option_that_cannot_be_is_refused(option, sentence):
    with pytest.raises(ValueError, match=sentence):
        LoopConfig(distributed=option)


@pytest.mark.parametrize("option", distributed.CLUSTERS)
def test_missing_variables_of_a_cluster_are_named(option, monkeypatch):
    cluster = distributed.CLUSTERS[option]
    for name in cluster.variables:
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv(cluster.variables[1])
    sentence = f"distributed {option} must have .* got none named {cluster.variables[1]}; start"
    with pytest.raises(ValueError, match=sentence), distributed.connected(option):
        pass


@pytest.mark.parametrize(
    ("option", "variables", "chosen"),
    [
        ("slurm", {"SLURM_LOCALID": "3"}, "3"),
        ("auto", {"OMPI_COMM_WORLD_LOCAL_RANK": "1"}, "1"),
        ("openmpi", {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "JAX_LOCAL_DEVICE_IDS": "2,3"}, "2,3"),
        ("kubernetes", {}, None),
        ("none", {"SLURM_LOCALID": "3"}, None),
    ],
)
def test_a_process_alone_takes_the_devices_of_its_number(option, variables, chosen, monkeypatch):
    for name in ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "JAX_LOCAL_DEVICE_IDS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = {}
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    distributed.take_local_devices(option)
    assert settings.get("jax_cuda_visible_devices") == chosen


def test_a_process_alone_needs_the_number_that_slurm_gives(monkeypatch):
    monkeypatch.delenv("SLURM_LOCALID", raising=False)
    with pytest.raises(ValueError, match="none named SLURM_LOCALID; start the command with srun"):
        distributed.take_local_devices("slurm")


def test_one_process_is_connected_to_none():
    with distributed.connected("none"):
        assert not jax.distributed.is_initialized()


def test_a_process_alone_may_still_choose_its_devices():
    """In a new process, since the devices of this one have started."""
    program = """
import jax
from vla_jax.training import distributed
with distributed.connected("none"):
    jax.config.update("jax_num_cpu_devices", 3)
    assert jax.device_count() == 3
"""
    subprocess.run([sys.executable, "-c", program], check=True)
