"""Valid requests that a policy with memory was not trained for get a warning."""

import numpy as np
import pytest

from vla_jax.serving import messages, openpi
from vla_jax.serving.dialect import Answer, Incoming
from vla_jax.serving.engine import Engine
from vla_jax.serving.requests import Request
from vla_jax.serving.session_warnings import Expected, Seen, warnings_of
from vla_jax.serving.sessions import SessionBook
from vla_jax.serving.table import SessionTable, Stepped

EXPECTED = Expected(control_hz=10.0, episode_length=100)
USUAL = Seen(5, 1, starts=False, seconds=0.1, prompt="lift", episode_prompt="lift")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"prompt": None}, None),
        ({"seconds": None}, None),
        ({"seconds": 0.3}, None),
        ({"seconds": 0.5}, "0.50 s since the last request are 5 control periods"),
        ({"seconds": 0.5, "num_frames": 5}, None),
        ({"seconds": 60.0, "starts": True}, None),
        ({"prompt": "drop"}, "prompt changed without reset"),
        ({"prompt": "drop", "starts": True}, None),
        ({"age": 149}, None),
        ({"age": 150}, "longest episode of the training has 100 steps"),
        ({"age": 140, "num_frames": 20}, "longest episode"),
        ({"age": 151}, None),
    ],
)
def test_a_request_that_training_did_not_have_gets_a_sentence(changes, words):
    found = warnings_of(EXPECTED, USUAL._replace(**changes))
    assert len(found) == (words is not None)
    assert all(words in sentence for sentence in found)


def test_nothing_is_said_about_what_is_not_known():
    assert warnings_of(Expected(), USUAL._replace(seconds=9.0, age=10_000)) == ()


def test_a_request_may_have_several_warnings():
    assert len(warnings_of(EXPECTED, USUAL._replace(seconds=9.0, prompt="drop", age=150))) == 3


@pytest.fixture
def engine():
    """An engine whose policy does nothing."""

    def step(state, slots, *_):
        return Stepped(state, np.zeros((len(slots), 1, 7), np.float32), np.ones(len(slots), bool))

    table = SessionTable(2, 2, lambda: {}, step, lambda *_: {}, lambda *_: {})
    running = Engine(table, SessionBook(2, 60.0), expected=Expected(episode_length=2))
    yield running
    assert running.stop(5.0)


def ask(engine, prompt, *, key="a", **fields):
    """Returns the session's part of the reply that a client of openpi's wire gets."""
    request = Request(({},), prompt, key if isinstance(key, str) else None, **fields)
    served = engine.submit(key, request, [{}], np.zeros(4, np.int32)).result(5.0)
    answer = openpi.reply(Incoming(request, None), Answer(served, 1.0, None))
    return messages.unpack(answer)["session"]


def test_the_reply_has_the_warnings_of_a_request(engine):
    assert "warning" not in ask(engine, "lift", extended=True)
    assert "the prompt changed" in ask(engine, "drop", extended=True)["warning"]
    assert "warning" not in ask(engine, None, extended=True)
    assert "the longest episode" in ask(engine, None, extended=True)["warning"]
    assert "warning" not in ask(engine, "lift", extended=True, reset=True)


def test_another_prompt_of_a_client_without_sessions_is_an_episode(engine):
    ask(engine, "lift", key=1)
    assert ask(engine, "drop", key=1) == {"id": None, "step": 0, "reset": True}
