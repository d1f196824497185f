"""Order, errors and progress of the steps of the demo."""

import functools
import io
import pathlib
import time

import pytest
from rich.console import Console

from train import demo
from train.demo_steps import Step, run_steps


def note(path: pathlib.Path, name: str) -> None:
    """Appends a name to a file that all steps share."""
    with path.open("a") as file:
        file.write(f"{name}\n")


def fail() -> None:
    raise ValueError("the step failed")


def make_step(path, name, after=()):
    return Step(name, functools.partial(note, path, name), lambda: 0.0, 1.0, after)


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


def test_several_trainings_differ_in_their_seeds_and_share_the_demonstrations():
    steps, evaluations = demo.make_steps(demo.DemoConfig(num_trainings=3))
    names = [step.name for step in steps]
    assert names.count("record") == 1
    assert len(set(names)) == len(names)
    assert all(len(set(folders)) == 3 for folders in evaluations.values())
    needed = {name for step in steps for name in step.after}
    assert needed < set(names)
