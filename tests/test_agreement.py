"""Processes decide together at the same updates, about once a second."""

import time

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from vla_jax.training import agreement, checkpoint, parallel, resuming


class Clock:
    """Time that passes by hand."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def others(monkeypatch):
    """Votes of the other process: its flag, and its seconds per update."""
    votes = {"flag": 0.0, "seconds": 0.0}
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        multihost_utils,
        "process_allgather",
        lambda own: np.stack([own, [votes["flag"], votes["seconds"]]]),
    )
    return votes


def votes_at(seconds_of, num_updates, others, monkeypatch):
    """Times of the votes; update i takes `seconds_of(i)`."""
    clock, times = Clock(), []
    monkeypatch.setattr(time, "monotonic", clock)
    gather = multihost_utils.process_allgather
    monkeypatch.setattr(
        multihost_utils, "process_allgather", lambda own: times.append(clock()) or gather(own)
    )
    votes = agreement.Votes(0)
    for step in range(1, num_updates + 1):
        clock.now += seconds_of(step)
        assert not votes.any(step, False, after=None)
    return np.array(times)


@pytest.mark.parametrize("seconds", [0.001, 0.02, 0.3])
def test_processes_vote_about_once_a_second(seconds, others, monkeypatch):
    """The first update, which is compiled, takes longer."""
    times = votes_at(lambda i: 60 if i == 1 else seconds, int(80 / seconds), others, monkeypatch)
    assert np.diff(times).max() <= 1.0 + 1e-6
    assert len(times) < 80 + 25 + 80 * seconds  # more often in the beginning


def test_processes_vote_at_every_slow_update(others, monkeypatch):
    assert len(votes_at(lambda i: 3.0, 20, others, monkeypatch)) == 20


def test_the_slowest_process_decides_how_often(others, monkeypatch):
    others["seconds"] = 0.5
    times = votes_at(lambda i: 0.01, 1000, others, monkeypatch)
    assert np.diff(times).max() <= 0.02 + 1e-6


def test_one_process_is_asked_at_every_update_and_several_are_heard(others, monkeypatch):
    votes = agreement.Votes(3)
    others["flag"] = 1.0
    assert votes.any(4, False, after=None)
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    for flag in (False, True):
        assert votes.any(5, flag, after=None) == flag


def test_a_process_that_sees_another_step_than_the_first_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "latest_step", lambda directory: 4)
    assert resuming.common_step(tmp_path) == 4
    for first, words in (([6], "and 6 in the first"), ([], "and none in the first")):
        monkeypatch.setattr(parallel, "agree", lambda found, first=first: first)
        with pytest.raises(ValueError, match=rf"got 4 in process 0 {words}; put the run on"):
            resuming.common_step(tmp_path)
