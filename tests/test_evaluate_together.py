"""Processes share the episodes of an evaluation by one option; the results are those of one."""

import io
import os
import shutil
import subprocess
import sys

import pytest
import tiny_run
from processes import NO_CACHE, free_port
from rich.console import Console

from vla_jax.evaluate import EvaluateConfig, evaluate
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
        env={**os.environ, **NO_CACHE}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def alone(folder, name):
    return evaluate(
        folder, EvaluateConfig(name=name, **OPTIONS), console=Console(file=io.StringIO())
    )


def outcomes(folder, name):
    return results.read_outcomes(folder / "evaluation" / name / "episodes.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 3])
def test_shared_episodes_are_those_of_one_process(folder, num_processes):
    expected, address = alone(folder, "alone"), f"127.0.0.1:{free_port()}"
    processes = [
        command(folder, "shared", "--distributed", f"{address},{num_processes},{index}")
        for index in range(num_processes)
    ]
    ended = [process.communicate(timeout=300) for process in processes]
    for process, (_, errors) in zip(processes, ended, strict=True):
        assert process.returncode == 0, errors
    assert "success" in ended[0][0]  # the first one shows the table
    assert not ended[1][0]
    assert outcomes(folder, "shared") == outcomes(folder, "alone")
    summary = report.read_evaluation(folder / "evaluation" / "shared").summary
    assert summary == expected._replace(latency=summary.latency)
    left = {path.name.partition("_")[0] for path in (folder / "evaluation" / "shared").iterdir()}
    assert left >= {"episodes.jsonl", "settings.json", "summary.json", "1000000"}
    assert not any(name.startswith("episodes.1") for name in left)


@pytest.mark.slow
def test_episodes_of_processes_that_were_killed_are_kept(folder):
    expected = alone(folder, "alone")
    place = shutil.copytree(folder / "evaluation" / "alone", folder / "evaluation" / "shared")
    (place / "summary.json").unlink()
    lines = (place / "episodes.jsonl").read_text().splitlines(keepends=True)
    (place / "episodes.jsonl").write_text(lines[0] + lines[2])
    (place / "episodes.1.jsonl").write_text(lines[1] + lines[3][:20])  # killed in the middle
    again = alone(folder, "shared")
    assert again == expected._replace(latency=again.latency)
    assert outcomes(folder, "shared") == outcomes(folder, "alone")
    assert not (place / "episodes.1.jsonl").exists()
