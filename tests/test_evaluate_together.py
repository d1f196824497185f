"""Processes share the episodes of an evaluation by one option; the results are those of one."""

import io
import json
import shutil
import subprocess
import sys
import time

import pytest
import tiny_run
from processes import free_port
from rich.console import Console

from vla_jax import folder_lock
from vla_jax.evaluate import EvaluateConfig, evaluate, share
from vla_jax.evaluation import report, results

OPTIONS = {"num_episodes": 7, "num_videos": 1, "num_simulators": 2}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return tiny_run.write(tmp_path_factory.mktemp("run"))


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "run")


def command(folder, name, *options):
    pairs = [(f"--{key.replace('_', '-')}", str(value)) for key, value in OPTIONS.items()]
    words = [word for pair in pairs for word in pair]
    return subprocess.Popen(
        [sys.executable, "-m", "vla_jax.evaluate", str(folder), "--name", name, *words, *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def alone(folder, name):
    return evaluate(
        folder, EvaluateConfig(name=name, **OPTIONS), console=Console(file=io.StringIO())
    )


def outcomes(folder, name):
    return results.read_outcomes(folder / "evaluation" / name / "episodes.jsonl")


def together(folder, name, num_processes, *options):
    address = f"127.0.0.1:{free_port()}"
    return [
        command(folder, name, *options, "--distributed", f"{address},{num_processes},{index}")
        for index in range(num_processes)
    ]


@pytest.mark.parametrize("num_processes", [1, 2, 3, 9])
def test_every_missing_episode_falls_to_one_process(num_processes):
    shares = [share(range(10, 17), {11, 12}, i, num_processes) for i in range(num_processes)]
    assert sorted(seed for one in shares for seed in one) == [10, 13, 14, 15, 16]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize("num_processes", [2, 9])
def test_shared_episodes_are_those_of_one_process(folder, num_processes):
    expected = alone(folder, "alone")
    processes = together(folder, "shared", num_processes)
    ended = [process.communicate(timeout=500) for process in processes]
    for process, (_, errors) in zip(processes, ended, strict=True):
        assert process.returncode == 0, errors
    assert "success" in ended[0][0]  # the first one shows the table
    assert not ended[1][0]
    assert outcomes(folder, "shared") == outcomes(folder, "alone")
    place = folder / "evaluation" / "shared"
    summary = report.read_evaluation(place).summary
    assert summary == expected._replace(latency=summary.latency)
    assert not [*place.glob("episodes.*.jsonl")]
    assert len([*place.glob("1000000*.mp4")]) == 1


@pytest.mark.slow
def test_episodes_of_processes_that_were_killed_are_kept(folder):
    alone(folder, "alone")
    place = shutil.copytree(folder / "evaluation" / "alone", folder / "evaluation" / "shared")
    (place / "summary.json").unlink()
    lines = (place / "episodes.jsonl").read_text().splitlines(keepends=True)
    kept = json.loads(lines[1])
    marked = json.dumps({**kept, "num_steps": kept["num_steps"] + 1000}) + "\n"
    (place / "episodes.jsonl").write_text(lines[0] + lines[2])
    (place / "episodes.1.jsonl").write_text(marked + lines[3][:20])  # killed in the middle
    alone(folder, "shared")
    found, whole = outcomes(folder, "shared"), outcomes(folder, "alone")
    assert found[1] == whole[1]._replace(num_steps=whole[1].num_steps + 1000)
    assert found[2:] == whole[2:]
    assert not [*place.glob("episodes.*.jsonl")]


@pytest.mark.slow
@pytest.mark.sampled
def test_a_signal_to_one_process_ends_all_and_the_same_command_continues(folder):
    videos = ("--num-videos", "7", "--num-simulators", "1")  # episode by episode
    processes = together(folder, "shared", 2, *videos)
    place = folder / "evaluation" / "shared"
    deadline = time.monotonic() + 300
    while not (place / "episodes.1.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    processes[1].terminate()
    ended = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [143, 143], ended
    for _, errors in ended:
        assert "the same command continues" in errors
    assert 1 < len(outcomes(folder, "shared")) < 7
    assert not (place / "summary.json").exists()
    again = command(folder, "shared", *videos)
    again.communicate(timeout=300)
    assert again.returncode == 0
    assert outcomes(folder, "shared") == sorted(outcomes(folder, "shared"))
    alone(folder, "alone")
    assert outcomes(folder, "shared") == outcomes(folder, "alone")


@pytest.mark.slow
def test_a_second_evaluation_of_the_same_name_changes_nothing(folder):
    alone(folder, "shared")
    place = folder / "evaluation" / "shared"
    (place / "episodes.1.jsonl").write_text("")  # of a process that plays
    with folder_lock.hold(place / ".lock", "evaluation", "wait"):
        second = command(folder, "shared", "--overwrite")
        assert "choose another --name" in second.communicate(timeout=300)[1]
        assert second.returncode == 2
    assert (place / "episodes.1.jsonl").exists()
    assert len(outcomes(folder, "shared")) == 7
