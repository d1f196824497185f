"""Short versions of the campaigns on a policy server: mutations, faults, load."""

import asyncio
import os
import pathlib
import re
import sys

import numpy as np
import pytest
import running_server
import tiny_run

from vla_jax.runs import Run
from vla_jax.serve import ServeConfig

sys.path.insert(0, str(pathlib.Path(__file__).parent / "campaigns"))

import mutations_serving
import served
import serving_faults
import serving_load

SHAPES = {"observation/state": (8,), "environment_state": (22,)}
NUM_MUTATIONS = 80


def difference(answer):
    """Returns the number in the row of the robot beside all faults; batches differ in size."""
    found = re.fullmatch(r"actions differ by (\S+) at most", answer)
    assert found, answer
    return float(found[1])


@pytest.fixture(scope="module")
def port():
    params = tiny_run.params()
    run = Run(pathlib.Path("tiny"), tiny_run.AGENT, tiny_run.norm_stats(), params, None, 3)
    with running_server.running(run, ServeConfig(sessions=16, max_batch=4)) as port:
        yield port


def test_mutations_of_real_messages_get_a_sentence_or_an_answer(port):
    before = mutations_serving.clean_actions(port)
    answers = mutations_serving.run(port, NUM_MUTATIONS)
    assert [each for each in answers if each.outcome.startswith("RULE")] == []
    assert sum(each.outcome == "sentence" for each in answers) > NUM_MUTATIONS / 2
    np.testing.assert_array_equal(mutations_serving.clean_actions(port), before)


def test_a_traceback_a_path_and_a_long_text_break_the_rules():
    assert mutations_serving.broken_rule("Traceback (most recent call last)") == "a traceback"
    assert mutations_serving.broken_rule("cannot read /home/someone/run") == "a path"
    assert mutations_serving.broken_rule("x" * 2001) == "2001 characters"
    assert not mutations_serving.broken_rule("observation/state must be [8], got [7].")


def test_wrong_messages_change_nothing_for_a_robot_beside_them(port):
    target = serving_faults.Target(port, SHAPES)
    rows = [*serving_faults.run(target, (serving_faults.wrong_messages,))]
    answers = {row.sent: row.came_back for row in rows}
    assert difference(answers.pop("a robot beside all of these")) < 1e-5
    assert answers.pop("20 MB in one message") == "closed with 1009"
    assert answers
    for sent, came_back in answers.items():
        assert came_back.startswith("“"), sent
        assert "RULE" not in came_back


@pytest.mark.slow
def test_a_killed_client_and_silent_ones_change_nothing(port):
    target = serving_faults.Target(port, SHAPES)
    faults = (serving_faults.killed, serving_faults.silent_connections, serving_faults.slow_reader)
    answers = [row.came_back for row in serving_faults.run(target, faults)]
    assert "goes on" in answers[0]
    assert [text.endswith("actions") for text in answers[1:3]] == [True, True]
    assert difference(answers[3]) < 1e-5


def test_robots_at_once_get_their_own_actions(port):
    server = served.Served(port, os.getpid(), pathlib.Path(os.devnull), 0.0)
    load = serving_load.run(server, SHAPES, 6, seconds=60, hz=50, limit=5)
    alone = asyncio.run(
        serving_load.act(port, SHAPES, 3, until=float("inf"), period=0.0, named=True, limit=5)
    )
    assert [len(each.actions) for each in load.episodes] == [5] * 6
    assert sum(each.wrong for each in load.episodes) == 0
    np.testing.assert_allclose(load.episodes[3].actions, alone.actions, atol=1e-5)
    assert load.episodes[2].actions[4].tolist() != alone.actions[4].tolist()
