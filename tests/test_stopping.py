"""SIGTERM and Ctrl-C: the work at hand is finished and saved; a second signal ends at once."""

import itertools
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import test_finite
import test_learning_loop
import tiny_demos
import tiny_run

from train.record import RecordConfig, record
from vla_jax import command_line, evaluate, stopping
from vla_jax.training import checkpoint
from vla_jax.training.logs import read_metrics

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


class SignalledBatches(test_finite.Batches):
    """Raises a signal while the third batch is made."""

    number = signal.SIGTERM

    def __next__(self):
        if self.position == 2:
            signal.raise_signal(self.number)
        return super().__next__()


def exit_code(function):
    """Runs a function as a command does; returns its exit code."""
    with pytest.raises(SystemExit) as caught, command_line.exit_codes():
        function()
    return caught.value.code


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_training_saves_the_update_at_hand_and_resumes_bitwise(number, tmp_path, monkeypatch):
    values = [1, 0.5, 2, 1, 0.25, 1]
    whole = test_finite.fit(tmp_path / "whole", values)
    before = [signal.getsignal(each) for each in stopping.SIGNALS]
    with monkeypatch.context() as patch:
        patch.setattr(test_finite, "Batches", SignalledBatches)
        patch.setattr(SignalledBatches, "number", number)
        assert exit_code(lambda: test_finite.fit(tmp_path / "cut", values)) == CODES[number]
    assert [signal.getsignal(each) for each in stopping.SIGNALS] == before
    assert checkpoint.latest_step(tmp_path / "cut" / "checkpoints") == 3
    resumed = test_finite.fit(tmp_path / "cut", values)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    steps = [line["step"] for line in read_metrics(tmp_path / "cut" / "metrics.jsonl")]
    assert steps == [2, 4, 6]


@pytest.mark.slow
def test_reinforcement_learning_saves_the_block_at_hand(tmp_path):
    learner = test_learning_loop.LEARNERS["reinforce"]
    calls = itertools.count()

    def evaluated(params, key):
        jax.debug.callback(lambda: next(calls) or signal.raise_signal(signal.SIGTERM))
        return learner.evaluate(params, key)

    signalled = learner._replace(evaluate=evaluated)
    run = test_learning_loop.run
    assert exit_code(lambda: run(tmp_path, "reinforce", learner=signalled)) == 143
    assert checkpoint.latest_step(tmp_path / "checkpoints") == 2
    assert run(tmp_path, "reinforce").num_updates.tolist() == [4, 4]


@pytest.mark.slow
def test_an_evaluation_keeps_the_episode_at_hand_and_continues(tmp_path, monkeypatch, capfd):
    folder = tiny_run.write(tmp_path / "run")
    config = evaluate.EvaluateConfig(name="all", num_episodes=5, num_videos=0)
    keep = evaluate._keep

    def keep_and_signal(setup, episode, fps):
        keep(setup, episode, fps)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "_keep", keep_and_signal)
        assert exit_code(lambda: evaluate.evaluate(folder, config)) == 143
    assert "1 episodes are in" in capfd.readouterr().err
    lines = (folder / "evaluation/all/episodes.jsonl").read_text().splitlines()
    assert len(lines) == 1
    assert evaluate.evaluate(folder, config).total.episodes == 5
    assert (folder / "evaluation/all/episodes.jsonl").read_text().startswith(lines[0])
    assert not (folder / "evaluation/all/.lock").exists()


@pytest.mark.slow
def test_a_recording_leaves_nothing_behind(tmp_path):
    config = RecordConfig(str(tmp_path / "table"), tiny_demos.WORLD, num_episodes=12)

    def interrupt(count):
        signal.raise_signal(signal.SIGTERM)

    assert exit_code(lambda: record(config, on_episode=interrupt)) == 143
    assert list(tmp_path.iterdir()) == []


def test_a_signal_outside_a_loop_ends_the_program_and_runs_its_cleanup():
    cleaned = []

    def read():
        try:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(5)
        finally:
            cleaned.append(True)

    assert exit_code(read) == 143
    assert cleaned
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_other_threads_and_earlier_handlers_are_left_alone():
    with stopping.deferred("update") as outer:
        with stopping.deferred("update") as inner:
            signal.raise_signal(signal.SIGTERM)
        assert inner.requested
        assert not outer.requested
        signal.raise_signal(signal.SIGINT)
        assert outer.requested
    with pytest.raises(KeyboardInterrupt):
        outer.end("saved")


TWICE = """
import ctypes, os, signal, sys, threading, time
from vla_jax import stopping

def send():
    for _ in range(2):
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

with stopping.deferred("update") as stop:
    threading.Thread(target=send, daemon=True).start()
    if sys.argv[1] == "native":
        ctypes.CDLL(None).sleep(1)  # is interrupted by the first signal only
        ctypes.CDLL(None).sleep(60)
    else:
        while True:
            time.sleep(0.01)
"""


@pytest.mark.parametrize("where", ["python", "native"])
def test_a_second_signal_ends_the_program_at_once(where):
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", TWICE, where], capture_output=True, text=True)
    assert done.returncode == 143
    assert time.monotonic() - began < 30
    assert "SIGTERM: stops after this update; a second signal ends at once." in done.stderr or (
        where == "native"  # no handler has run
    )
