"""Valid requests that a policy with memory was not trained for get a warning."""

import pytest

from vla_jax.serving.session_warnings import Expected, Seen, warnings_of

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
