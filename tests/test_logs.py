"""Logs of a training: one line per log, no duplicates after a resume, plain text or a terminal."""

import io
import json
import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from vla_jax.training import logs


def plain_console():
    return Console(file=io.StringIO(), force_terminal=False)


def train(run_dir, steps, *, start=0, console=None, tensorboard=False):
    with logs.Logs(
        run_dir,
        num_updates=100,
        start=start,
        tensorboard=tensorboard,
        console=console or plain_console(),
    ) as open_logs:
        for step in open_logs.timed(steps):
            open_logs.advance(step)
            open_logs.write(step, {"loss": jnp.float32(1 / step), "grad_norm": np.float32(2.0)})


def test_every_log_is_a_line_of_json_with_the_metrics_and_the_speed(tmp_path):
    train(tmp_path / "run", [1, 2, 4])
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4]
    assert [line["loss"] for line in lines] == [1.0, 0.5, 0.25]
    assert all(line["grad_norm"] == 2.0 for line in lines)
    assert all(line["steps_per_second"] > 0 and 0 <= line["data_wait"] <= 1 for line in lines)
    assert logs.read_metrics(tmp_path / "run" / "metrics.jsonl") == lines


def test_lines_after_the_resumed_step_are_removed_and_written_again(tmp_path):
    train(tmp_path, [1, 2, 3, 4])
    with (tmp_path / "metrics.jsonl").open("a") as cut:
        cut.write('{"step": 5, "los')  # an incomplete line of a killed process
    train(tmp_path, [3, 4, 5], start=2)
    steps = [line["step"] for line in logs.read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4, 5]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_missing_file_has_no_lines(tmp_path):
    assert logs.read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_line_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    with logs.Logs(tmp_path, num_updates=10, console=plain_console()) as open_logs:
        open_logs.write(1, {"loss": 1.0})
        assert len(logs.read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_the_fraction_of_time_spent_waiting_for_data_is_measured(tmp_path, monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 5.0])  # opened, batch requested, batch received, written
    monkeypatch.setattr(logs.time, "perf_counter", lambda: next(clock))
    with logs.Logs(tmp_path, num_updates=10, console=plain_console()) as open_logs:
        assert next(open_logs.timed(["batch"])) == "batch"
        open_logs.write(2, {"loss": 1.0})
    [line] = logs.read_metrics(tmp_path / "metrics.jsonl")
    assert (line["data_wait"], line["steps_per_second"]) == (3 / 5, 2 / 5)


def test_without_a_terminal_a_few_plain_lines_are_printed(tmp_path):
    console = plain_console()
    train(tmp_path, range(1, 101), console=console)
    printed = console.file.getvalue().splitlines()
    assert len(printed) == logs.PLAIN_LINES
    assert printed[-1].startswith("train 100/100 updates  loss 0.0100")
    assert printed[-1].endswith("0 s left")
    assert all(line.isprintable() for line in printed)


def test_a_terminal_shows_a_bar_with_loss_speed_data_wait_and_time_left(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    train(tmp_path, [50, 100], console=console)
    printed = console.file.getvalue()
    for text in ["100/100", "loss 0.0100", "steps/s", "data ", "left"]:
        assert text in printed


def test_tensorboard_gets_the_same_scalars(tmp_path):
    train(tmp_path, [1, 2], tensorboard=True)
    [events] = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    for name in [b"loss", b"grad_norm", b"steps_per_second", b"data_wait"]:
        assert content.count(name) == 2


def test_a_missing_tensorboard_writer_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install 'vla-jax\[tensorboard\]'"):
        logs.Logs(tmp_path, num_updates=10, tensorboard=True)


def test_a_damaged_line_is_named_with_its_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for line in (
        '{"step" 2}',
        '["step", 2]',
        '{"step": null}',
        '{"loss": 1}',
        '{"step": 1}',
        '{"step": 2, "loss": true}',
        '{"step": 2, "steps_per_second": -3}',
        '{"step": 2, "data_wait": 1.5}',
        '{"step": 2, "skipped_updates": -1}',
        "[" * 100_000,
    ):
        path.write_text('{"step": 1, "loss": -2.5}\n' + line + "\n")
        with pytest.raises(ValueError, match=r"jsonl has a damaged line 2 .*; delete that line"):
            logs.read_metrics(path)
    path.write_text('{"step": 1}\n{"step": 2')  # a killed program did not finish it
    assert logs.read_metrics(path) == [{"step": 1}]


def test_numbers_that_are_not_finite_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    console = Console(file=io.StringIO())
    with logs.Logs(tmp_path, num_updates=2, console=console) as open_logs:
        open_logs.write(1, {"loss": 1.0, "success_lift": math.nan, "far": math.inf})
    (line,) = logs.read_metrics(path)
    assert line.keys() == {"step", "loss", "steps_per_second", "data_wait"}
    path.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "a": -Infinity, "loss": 1}\n')
    with pytest.warns(UserWarning, match=r"metrics.jsonl has 2 numbers that are not finite: left"):
        assert logs.read_metrics(path) == [{"step": 1}, {"step": 2, "loss": 1}]
