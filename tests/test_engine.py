"""Law 9: served = in process, whoever else is served; a refused request changes nothing."""

import threading

import jax
import numpy as np
import pytest
import tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_jax.acting import agent as agents
from vla_jax.serving import sessions
from vla_jax.serving.engine import Engine
from vla_jax.serving.observer import NO_OBSERVER, Observer
from vla_jax.serving.requests import Refused, Request
from vla_jax.serving.session_warnings import Expected
from vla_jax.serving.sessions import SessionBook
from vla_jax.serving.table import batch_sizes, make_table

BLANK = {"proprio": np.zeros(8, np.float32), "environment_state": np.zeros(22, np.float32)}
PROMPTS = ("lift", "push the red block", "")
KEYS = ("left", "right", "third", 1, 2)  # the last two are anonymous


@pytest.fixture(scope="module")
def policy():
    config, stats, params = tiny_run.AGENT, tiny_run.norm_stats(), tiny_run.params()
    table = make_table(config, stats, params, BLANK, num_rows=6, max_batch=4)
    agent = agents.make_agent(config, stats)
    return table, agent.init(params, 1), params, jax.jit(agent.step)


@pytest.fixture
def engine(policy):
    engine = Engine(policy[0], SessionBook(6, ttl=300.0))
    yield engine
    assert engine.stop(10.0)


def words(prompt):
    return agents.read_instruction(tiny_run.AGENT, prompt)


def frame(rng):
    return {name: rng.normal(size=zero.shape).astype(np.float32) for name, zero in BLANK.items()}


def submit(engine, key, frames, **fields):
    request = Request(frames=({},) * len(frames), **fields)
    prompt = fields.get("prompt")
    return engine.submit(key, request, frames, None if prompt is None else words(prompt))


class InProcess:
    """A session alone, stepped without a server."""

    def __init__(self, policy):
        self.policy, self.prompt, self.last = policy, None, None
        self.state, self.age = policy[1], 0

    def step(self, frames, prompt, reset):
        self.prompt = self.prompt if prompt is None else prompt
        self.last = (0 if reset else self.age, frames)
        for position, one in enumerate(frames):
            observation = agents.Observation(
                **{name: part[None] for name, part in one.items()},
                instruction=words(self.prompt)[None],
            )
            starts = np.array([reset and position == 0])
            self.state, action = self.policy[3](self.policy[2], self.state, observation, starts)
        self.age = len(frames) + (0 if reset else self.age)
        self.action = np.asarray(action)
        return self.action


OPERATIONS = st.tuples(
    st.sampled_from(KEYS),
    st.sampled_from(("step", "step", "step", "retry", "reset", "prompt", "frames", "end", "wrong")),
    st.integers(0, 2),
)


def play(engine, policy, alone, key, operation, number, rng):
    """Submits one operation; returns a check of its result."""
    session = alone.get(key)
    if operation == "end":
        alone.pop(key, None)
        done = engine.end([key])
        return lambda: done.result(10)
    if session is None:
        session = alone[key] = InProcess(policy)
        operation = "reset"
    extended = isinstance(key, str)
    if operation == "retry" and extended and session.last[0] > 0:
        expected, (step, frames) = session.action, session.last
        future = submit(engine, key, frames, step=step, extended=True)
    elif operation == "wrong" and extended:
        future = submit(engine, key, [frame(rng)], step=session.age + 2, extended=True)
        return lambda: isinstance(future.exception(10), Refused) or pytest.fail("was served")
    else:
        frames = [frame(rng) for _ in range(number + 1 if operation == "frames" else 1)]
        reset = operation == "reset"
        prompt = PROMPTS[number] if reset or operation == "prompt" else None
        # A changed prompt is a new episode for a client that knows nothing of sessions.
        starts = reset or (not extended and prompt not in (None, session.prompt))
        fields = {"reset": reset} if number else {"step": 0 if reset else session.age}
        fields = {**fields, "extended": True} if extended else {}
        if reset and not extended and session.prompt is not None:
            fields = {"reset": True}
        expected = session.step(frames, prompt, starts)
        future = submit(engine, key, frames, prompt=prompt, **fields)
    expected = expected.copy()
    return lambda: np.testing.assert_allclose(future.result(10).reply.actions, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.sampled
@given(
    st.lists(st.lists(OPERATIONS, min_size=1, max_size=8), min_size=1, max_size=8), st.integers(0)
)
@settings(deadline=None, max_examples=10)
def test_sessions_act_as_alone_in_any_interleaving(policy, rounds, seed):
    rng, alone = np.random.default_rng(seed), {}
    engine = Engine(policy[0], SessionBook(6, ttl=300.0))
    try:
        for operations in rounds:
            release = threading.Event()
            engine.call((), release.wait)  # what follows arrives together
            checks = [play(engine, policy, alone, *each, rng) for each in operations]
            release.set()
            for check in checks:
                check()
    finally:
        assert engine.stop(10.0)


def contents(engine):
    """The whole memory and the book, from the engine's own thread."""
    return engine.call((), lambda: (jax.device_get(engine.state), dict(engine.book.live))).result(
        10
    )


def test_a_refused_request_changes_no_bit(engine):
    rng = np.random.default_rng(0)
    bad = {**frame(rng), "proprio": np.full(8, np.nan, np.float32)}
    for key in ("left", 1):
        submit(engine, key, [frame(rng), frame(rng)], prompt="lift").result(10)
    before, book = contents(engine)
    for key, frames, fields, message in (
        ("left", [frame(rng)], {"step": 3}, "^step must be 2, got 3; "),
        ("left", [frame(rng)], {"step": 1}, "^step must be 2, got 1; "),  # one frame of the two
        ("left", [frame(rng)], {"reset": True}, "^prompt must be given"),
        ("new", [frame(rng)], {}, "^prompt must be given"),
        ("new", [frame(rng)], {"step": 5, "prompt": "lift"}, "^step must be 0 for session 'new'"),
        ("left", [bad], {}, "^action must be finite numbers, got .* not sent"),
        (1, [frame(rng), bad], {}, "^action must be finite"),
        ("left", [frame(rng), frame(rng), bad], {"reset": True, "prompt": "x"}, "^action must be"),
        ("new", [bad], {"prompt": "lift"}, "^action must be finite"),
    ):
        with pytest.raises(Refused, match=message):
            submit(engine, key, frames, **fields).result(10)
        after, live = contents(engine)
        jax.tree.map(np.testing.assert_array_equal, before_of(before, live), before_of(after, live))
        assert live.keys() == book.keys()
        for name, session in live.items():
            assert session._replace(last_used=0.0) == book[name]._replace(last_used=0.0)


def before_of(state, live):
    """Rows of the live sessions; unused rows hold nothing."""
    rows = sorted(session.slot for session in live.values())
    return jax.tree.map(lambda leaf: leaf[rows], state)


def test_all_batch_sizes_are_compiled_before_the_first_request(policy, engine):
    rng = np.random.default_rng(0)
    assert batch_sizes(4) == (1, 4)
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        compiled = []
        patch.setattr("jax._src.compiler.backend_compile_and_load", compiled.append, raising=True)
        for size in (1, 2, 4, 6):
            futures = [submit(engine, key, [frame(rng)] * 2, prompt="lift") for key in range(size)]
            assert [future.result(10).reply.step for future in futures]
    assert not compiled


def test_a_failed_step_ends_all_sessions_with_an_error_and_the_next_ones_are_served(policy):
    fails = threading.Event()

    def step(state, *args):
        stepped = policy[0].step(state, *args)
        if fails.is_set():
            raise RuntimeError("the device is gone")
        return stepped

    engine = Engine(policy[0]._replace(step=step), SessionBook(6, ttl=300.0))
    rng = np.random.default_rng(0)
    submit(engine, "left", [frame(rng)], prompt="lift").result(10)
    fails.set()
    with pytest.raises(Refused, match=r"^server failed to serve the request"):
        submit(engine, "left", [frame(rng)]).result(10)
    fails.clear()
    with pytest.raises(Refused, match=r"^session 'left' ended by a failure .* begin a new episode"):
        submit(engine, "left", [frame(rng)]).result(10)
    assert submit(engine, "left", [frame(rng)], prompt="lift", reset=True).result(10).reply.reset
    assert engine.stop(10.0)


def full_disk(*_):
    raise OSError(28, "No space left on device")


def test_a_request_whose_state_cannot_be_saved_changes_no_bit(policy):
    saves = []
    observer = NO_OBSERVER._replace(saved=lambda *args: saves.pop()(*args))
    engine, rng = Engine(policy[0], SessionBook(6, 300.0), observer), np.random.default_rng(0)
    saves[:] = [lambda *_: None]
    submit(engine, "left", [frame(rng)], prompt="lift").result(10)
    before, book = contents(engine)
    for key, frames in (("left", 1), ("left", 3), ("new", 1)):
        saves[:] = [full_disk]
        with pytest.raises(Refused, match="server failed to serve the request"):
            submit(engine, key, [frame(rng)] * frames, prompt="lift").result(10)
        after, live = contents(engine)
        assert live.keys() == book.keys()
        assert live["left"].age == book["left"].age == 1
        jax.tree.map(np.testing.assert_array_equal, before_of(before, live), before_of(after, live))
    assert engine.stop(10.0)


def test_a_request_that_fails_at_its_second_frame_changes_no_bit(policy):
    calls = []

    def step(state, *args):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no memory")  # before the table is donated
        return policy[0].step(state, *args)

    engine = Engine(policy[0]._replace(step=step), SessionBook(6, 300.0))
    rng = np.random.default_rng(0)
    submit(engine, "left", [frame(rng)], prompt="lift").result(10)
    before, live = contents(engine)
    with pytest.raises(Refused, match="server failed"):
        submit(engine, "left", [frame(rng), frame(rng)]).result(10)
    after, _ = contents(engine)
    jax.tree.map(np.testing.assert_array_equal, before_of(before, live), before_of(after, live))
    assert submit(engine, "left", [frame(rng)], step=1).result(10).reply.step == 1
    assert engine.stop(10.0)


def test_a_session_that_gave_way_comes_back_if_the_newcomer_fails(policy, monkeypatch):
    monkeypatch.setattr(sessions, "IDLE", 0.0)
    ended, saves = [], []
    observer = Observer(lambda *_: None, lambda *args: ended.append(args), lambda *args: saves[0]())
    engine, rng = Engine(policy[0], SessionBook(1, 300.0), observer), np.random.default_rng(0)
    bad = {**frame(rng), "proprio": np.full(8, np.nan, np.float32)}
    saves[:] = [lambda: None]
    submit(engine, 1, [frame(rng)] * 3, prompt="lift").result(10)
    before, book = contents(engine)
    (session,) = book.values()
    row = jax.device_get(policy[0].read(before, session.slot))
    for frames in ([bad], [frame(rng), bad]):
        with pytest.raises(Refused, match=r"^action must be finite numbers"):
            submit(engine, 2, frames, prompt="lift").result(10)
    saves[:] = [full_disk]
    with pytest.raises(Refused, match="server failed to serve the request"):
        submit(engine, "new", [frame(rng)], prompt="lift").result(10)
    with pytest.raises(Refused, match="server failed to serve the request"):
        engine.place("new", session, row).result(10)
    after, live = contents(engine)
    assert (live.keys(), ended) == ({1}, [])
    jax.tree.map(np.testing.assert_array_equal, before_of(before, live), before_of(after, live))
    assert submit(engine, 1, [frame(rng)], step=3).result(10).reply.step == 3
    assert submit(engine, 2, [frame(rng)], prompt="lift").result(10).reply.reset
    assert ended == [("gave_way", 4)]
    assert engine.stop(10.0)


def test_a_session_whose_file_is_damaged_is_an_error_until_it_begins_anew(policy):
    removed = []
    observer = NO_OBSERVER._replace(removed=removed.append)
    lost = [sessions.digest(name) for name in ("left", "right")]
    engine = Engine(policy[0], SessionBook(6, 300.0, lost), observer)
    rng = np.random.default_rng(0)
    for fields in ({"prompt": "lift"}, {"prompt": "lift", "step": 7}):
        with pytest.raises(Refused, match=r"^session 'left' was lost, since its file is damaged, "):
            submit(engine, "left", [frame(rng)], **fields).result(10)
    assert submit(engine, "left", [frame(rng)], prompt="lift", reset=True).result(10).reply.reset
    engine.end(["left", "right", "other"]).result(10)
    assert removed == ["left", "right"]
    for name in ("left", "right"):
        assert submit(engine, name, [frame(rng)], prompt="lift").result(10).reply.reset
    assert engine.stop(10.0)


def test_a_file_that_cannot_be_deleted_stops_nobody(policy, caplog):
    engine = Engine(policy[0], SessionBook(6, 300.0), NO_OBSERVER._replace(removed=full_disk))
    rng = np.random.default_rng(0)
    submit(engine, "left", [frame(rng)], prompt="lift").result(10)
    engine.end(["left"]).result(10)
    assert "the file of a session remains" in caplog.text
    assert submit(engine, "left", [frame(rng)], prompt="lift").result(10).reply.step == 0
    assert engine.stop(10.0)


def test_an_engine_that_fails_refuses_everybody_and_ends(policy, caplog):
    def gone():
        raise RuntimeError("the device is gone")

    def step(*_):
        engine.table = engine.table._replace(init=gone)
        jax.tree.map(lambda leaf: leaf.delete(), engine.state)
        raise RuntimeError("the step failed")

    engine = Engine(policy[0]._replace(step=step), SessionBook(6, 300.0), start=False)
    rng = np.random.default_rng(0)
    futures = [submit(engine, key, [frame(rng)], prompt="lift") for key in ("left", "right", 1)]
    engine.start()
    for future in futures:
        with pytest.raises(Refused, match="server failed to serve the request"):
            future.result(10)
    with pytest.raises(Refused, match="server is stopping"):
        submit(engine, "left", [frame(rng)], prompt="lift").result(10)
    assert engine.stop(10.0)
    assert "the engine failed" in caplog.text


def test_a_request_that_is_not_as_in_training_is_served_with_a_warning(policy):
    engine = Engine(policy[0], SessionBook(6, 300.0), expected=Expected(control_hz=1e6))
    rng = np.random.default_rng(0)
    assert not submit(engine, 1, [frame(rng)], prompt="lift").result(10).warnings
    (warning,) = submit(engine, 1, [frame(rng)]).result(10).warnings
    assert "control periods of the training" in warning
    assert engine.stop(10.0)


def test_a_stopped_engine_serves_what_has_arrived_and_refuses_the_rest(policy):
    engine = Engine(policy[0], SessionBook(6, 300.0), start=False)
    rng = np.random.default_rng(0)
    future = submit(engine, 1, [frame(rng)] * 5, prompt="lift")
    engine.start()
    assert engine.stop(10.0)
    assert future.result(0).reply.num_frames == 5
    with pytest.raises(Refused, match=r"^server is stopping"):
        submit(engine, 1, [frame(rng)]).result(10)
