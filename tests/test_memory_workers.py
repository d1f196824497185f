"""Processes of the memory suite: order, errors, killed workers, signals and progress."""

import contextlib
import io
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from rich.console import Console

from train import memory_grid, memory_workers
from train.memory_grid import CloningConfig, GridCell, Score
from train.memory_progress import grid_progress
from vla_jax.envs.memory_table.memory_env import JaxMemoryConfig

CONFIG = CloningConfig(num_updates=4)


def cells(*tasks):
    return [GridCell(JaxMemoryConfig(task=task), "fc") for task in tasks]


def run_cell(cell, config, progress, *, clones):
    """Stands for a training: "cups" fails, "dark" is killed, "kth" takes long."""
    del clones
    progress(config.num_updates // 2)
    if cell.world.task == "cups":
        raise ValueError("the loss is not finite")
    if cell.world.task == "dark":
        os.kill(os.getpid(), signal.SIGKILL)
    if cell.world.task == "kth":
        time.sleep(600)
    return Score(cell, np.array([os.getpid()]), {}, 0.25, 1.0)


def run(*tasks, num_workers=2, shares=None):
    shares = {} if shares is None else shares
    finished = memory_workers.run_cells(
        cells(*tasks), CONFIG, run_cell=run_cell, num_workers=num_workers,
        progress=lambda number, share: shares.setdefault(number, []).append(share),
    )  # fmt: skip
    with contextlib.closing(finished):
        return list(finished)


def test_every_cell_is_trained_once_in_another_process():
    shares = {}
    scores = run("lit", "blinks", "timing", shares=shares)
    assert sorted(score.cell.world.task for score in scores) == ["blinks", "lit", "timing"]
    processes = {int(score.success[0]) for score in scores}
    assert len(processes) == 2
    assert os.getpid() not in processes
    assert shares == {number: [0.5, 1.0] for number in range(3)}


def test_one_worker_is_this_process():
    (score,) = run("lit", num_workers=1)
    assert score.success[0] == os.getpid()


@pytest.mark.parametrize(
    ("task", "error", "sentence"),
    [
        ("cups", ValueError, "the loss is not finite"),
        ("dark", RuntimeError, "trained fc on dark was killed.*fewer --num-workers"),
    ],
)
def test_a_failed_or_killed_worker_is_an_error_and_ends_the_others(task, error, sentence):
    began = time.monotonic()
    with pytest.raises(error, match=sentence):
        run("kth", task)
    assert time.monotonic() - began < 300


@pytest.mark.slow
def test_a_cell_keeps_the_policy_of_the_first_seed_as_a_run(tmp_path):
    from vla_jax.runs import load_run

    config = CloningConfig(
        num_seeds=2, num_demonstrations=8, num_updates=1, batch_size=4, hidden_size=8,
        num_episodes=8,
    )  # fmt: skip
    cell = GridCell(JaxMemoryConfig(task="lit", delay=4), "fc")
    for _ in range(2):  # the second replaces the first
        memory_grid.run_cell(cell, config, clones=tmp_path)
    loaded = load_run(tmp_path / "lit-4-0-0-fc")
    assert loaded.world == cell.world
    assert loaded.agent.policy.decoder.kind == "fc"


def test_progress_weighs_the_cells_by_their_cost():
    console = Console(file=io.StringIO())
    with grid_progress([3.0, 1.0], console) as progress:
        assert progress.left() == "time left not known"
        time.sleep(0.2)
        progress.update(0, 1.0)
        assert progress.left() == "0 s left"


RUN_SUITE = """
import sys
from test_memory_workers import run_cell
from train import memory_grid, memory_suite
from vla_jax.command_line import exit_codes

if __name__ == "__main__":
    memory_grid.run_cell = run_cell
    config = memory_suite.MemorySuiteConfig(
        tasks=("lit", "blinks", "kth"), decoders=("fc",), delays=(), run_dir=sys.argv[1])
    with exit_codes():
        memory_suite.memory_suite(config)
"""


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize(
    ("number", "code", "to_all"),
    [(signal.SIGINT, 130, True), (signal.SIGTERM, 143, True), (signal.SIGTERM, 143, False)],
)
def test_a_signal_keeps_the_finished_cells_and_ends_the_workers(number, code, to_all, tmp_path):
    root = pathlib.Path(__file__).parents[1]
    script, results = tmp_path / "script.py", tmp_path / "run" / memory_grid.RESULTS
    script.write_text(RUN_SUITE)
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (root, root / "tests")))},
        start_new_session=True, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        while not results.exists() or results.read_text().count("\n") < 2:
            assert process.poll() is None
            time.sleep(0.1)
        (os.killpg if to_all else os.kill)(process.pid, number)
        _, said = process.communicate(timeout=120)  # until the workers have closed it too
    finally:
        process.kill()
    assert process.returncode == code
    assert "2 of 3 cells are in" in said
    assert "Traceback" not in said
