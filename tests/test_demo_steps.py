"""Order, errors and progress of the steps of the demo."""

import functools
import io
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from train import demo
from train.demo_steps import Step, run_steps
from vla_jax import stopping


def note(path: pathlib.Path, name: str) -> None:
    """Appends a name to a file that all steps share."""
    with path.open("a") as file:
        file.write(f"{name}\n")


def fail() -> None:
    raise ValueError("the step failed")


def make_step(path, name, after=()):
    return Step(name, functools.partial(note, path, name), lambda: 0.0, 1.0, after)


@pytest.mark.slow
def test_a_step_starts_after_the_steps_that_it_depends_on(tmp_path):
    path, output = tmp_path / "order", io.StringIO()
    needs = {"d": ["b", "c"], "b": ["a"], "c": ["a"], "a": []}
    steps = [make_step(path, name, after) for name, after in needs.items()]
    run_steps(steps, tmp_path / "log.txt", console=Console(file=output))
    order = path.read_text().split()
    assert sorted(order) == sorted(needs)
    assert all(order.index(a) < order.index(name) for name, after in needs.items() for a in after)
    estimate, *lines = output.getvalue().splitlines()
    assert "about a minute" in estimate
    assert lines[-1].startswith("demo 100/100 %  finished")


def test_an_error_in_a_step_is_raised_and_stops_the_others(tmp_path):
    steps = [
        Step("sleep", functools.partial(time.sleep, 600), lambda: 0.0, 1.0),
        Step("fail", fail, lambda: 0.0, 1.0),
    ]
    began = time.perf_counter()
    with pytest.raises(ValueError, match="the step failed"):
        run_steps(steps, tmp_path / "log.txt", console=Console(file=io.StringIO()))
    assert time.perf_counter() - began < 300


def train_slowly(folder: pathlib.Path) -> None:
    """Runs updates of a second; saves when a signal comes, which takes another second."""
    with stopping.deferred("update") as stop:
        (folder / "started").touch()
        while not stop.requested:
            time.sleep(1.0)
        time.sleep(1.0)
        (folder / "saved").touch()
        stop.end("update is saved")


RUN_SLOWLY = """
import functools, io, pathlib, sys
from rich.console import Console
from test_demo_steps import Step, train_slowly
from train.demo_steps import run_steps
from vla_jax.command_line import exit_codes

folder = pathlib.Path(sys.argv[1])
step = Step("train", functools.partial(train_slowly, folder), lambda: 0.0, 1.0)
with exit_codes():
    run_steps([step], folder / "log.txt", console=Console(file=io.StringIO()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "to_all"),
    [(signal.SIGINT, 130, True), (signal.SIGTERM, 143, True), (signal.SIGTERM, 143, False)],
)
def test_a_signal_to_all_processes_or_to_the_first_lets_the_steps_save(
    number, code, to_all, tmp_path
):
    """One process of two is idle."""
    root = pathlib.Path(__file__).parents[1]
    path = os.pathsep.join(map(str, (root, root / "tests")))
    process = subprocess.Popen(
        [sys.executable, "-c", RUN_SLOWLY, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path}, start_new_session=True,
    )  # fmt: skip
    try:
        while not (tmp_path / "started").exists():
            assert process.poll() is None
            time.sleep(0.1)
        (os.killpg if to_all else os.kill)(process.pid, number)
        assert process.wait(120) == code
    finally:
        process.kill()
    assert (tmp_path / "saved").exists()


def test_several_trainings_differ_in_their_seeds_and_share_the_demonstrations():
    steps, evaluations = demo.make_steps(demo.DemoConfig(num_trainings=3))
    names = [step.name for step in steps]
    assert names.count("record") == 1
    assert len(set(names)) == len(names)
    assert all(len(set(folders)) == 3 for folders in evaluations.values())
    needed = {name for step in steps for name in step.after}
    assert needed < set(names)
