"""Sessions as safetensors: exported and imported the same, damaged or foreign ones refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from vla_jax.acting import agent as agents
from vla_jax.runs import Run
from vla_jax.serving import snapshot
from vla_jax.serving.sessions import Session, StoredReply

LAST = StoredReply(np.ones((1, 7), np.float32), 4, 2, False)
SESSION = Session(3, 6, "lift", np.arange(12, dtype=np.int32), True, 5.0, LAST, busy=True)


@pytest.fixture(scope="module")
def row():
    agent = agents.make_agent(tiny_run.AGENT, tiny_run.norm_stats())
    state = agent.init(tiny_run.params(), 1)
    state = state._replace(num_clipped=jnp.zeros(1, jnp.bfloat16) + 1.5)
    return jax.device_get(state)


def test_a_session_is_read_as_it_was_written(row):
    data = snapshot.to_bytes("arm/1 ☃", SESSION, row, "lstm")
    name, session, memory = snapshot.from_bytes(data, row, "lstm")
    assert name == "arm/1 ☃"
    assert session.age == 6
    assert (session.prompt, session.extended, session.slot, session.busy) == (
        "lift",
        True,
        -1,
        False,
    )
    np.testing.assert_array_equal(session.words, SESSION.words)
    assert session.last[1:] == LAST[1:]
    np.testing.assert_array_equal(session.last.actions, LAST.actions)
    jax.tree.map(np.testing.assert_array_equal, memory, row)
    assert [x.dtype for x in jax.tree.leaves(memory)] == [x.dtype for x in jax.tree.leaves(row)]


def test_a_damaged_or_foreign_session_is_refused(row):
    data = snapshot.to_bytes("arm", SESSION, row, "lstm")
    with pytest.raises(ValueError, match=r"^session must be of policy 'gru', got one of 'lstm'; "):
        snapshot.from_bytes(data, row, "gru")
    for damaged in (b"", data[:50], data[:-1], bytes(100), data.replace(b'"age', b'"agX')):
        with pytest.raises(ValueError, match=r"^session must be (a|of)") as error:
            snapshot.from_bytes(damaged, row, "lstm")
        assert "\n" not in str(error.value)
    other = row._replace(age=np.zeros(2, np.int32))
    with pytest.raises(ValueError, match=r"a damaged one \(got int32 \[1\], expected int32 \[2\]"):
        snapshot.from_bytes(data, other, "lstm")
    broken = row._replace(num_clipped=np.full(1, np.nan, np.float32))
    with pytest.raises(ValueError, match="NaN"):
        snapshot.from_bytes(snapshot.to_bytes("a", SESSION, broken, "lstm"), broken, "lstm")


def test_a_changed_bit_is_found(row):
    data = bytearray(snapshot.to_bytes("arm", SESSION, row, "lstm"))
    for position in range(0, len(data), max(1, len(data) // 300)):
        data[position] ^= 4
        with pytest.raises(ValueError, match=r"^session must be"):
            snapshot.from_bytes(bytes(data), row, "lstm")
        data[position] ^= 4
    snapshot.from_bytes(bytes(data), row, "lstm")


def test_a_folder_gives_its_sessions_and_a_warning_for_a_damaged_one(row, tmp_path):
    for name in ("../left", "right", "right"):
        snapshot.write(tmp_path, name, snapshot.to_bytes(name, SESSION, row, "lstm"))
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match=r"broken\.safetensors: session must be"):
        found = snapshot.read_all(tmp_path, row, "lstm")
    assert sorted(name for name, _, _ in found.sessions) == ["../left", "right"]
    assert found.damaged == {"broken"}
    snapshot.remove(tmp_path, "right")
    snapshot.remove(tmp_path, "right")
    (tmp_path / "broken.safetensors").unlink()
    found = snapshot.read_all(tmp_path, row, "lstm")
    assert ([name for name, _, _ in found.sessions], found.damaged) == (["../left"], set())
    with pytest.raises(ValueError, match=r"safetensors: session must be of policy 'gru'"):
        snapshot.read_all(tmp_path, row, "gru")


def test_arrays_that_do_not_fit_the_policy_are_refused(row):
    long = SESSION._replace(words=np.arange(13, dtype=np.int32))
    unknown = SESSION._replace(last=LAST._replace(actions=np.full((1, 7), np.nan, np.float32)))
    flat = SESSION._replace(last=LAST._replace(actions=np.ones(7, np.float32)))
    for session, found in ((long, r"got words int32 \[13\]"), (unknown, "finite"), (flat, "K, A")):
        with pytest.raises(ValueError, match=found):
            snapshot.from_bytes(snapshot.to_bytes("a", session, row, "lstm"), row, "lstm")
    not_a_number = row._replace(num_clipped=np.full(1, np.nan, jnp.bfloat16))
    with pytest.raises(ValueError, match="NaN"):
        snapshot.from_bytes(snapshot.to_bytes("a", SESSION, not_a_number, "x"), not_a_number, "x")


def test_the_name_of_a_policy_differs_with_all_that_a_memory_depends_on(tmp_path):
    stats, agent = tiny_run.norm_stats(), tiny_run.AGENT
    run = Run(tmp_path, agent, stats, tiny_run.params(), None, 3)
    other = {**stats, "action": stats["proprio"]}
    names = {
        snapshot.policy_name(run, agent, "window 4"),
        snapshot.policy_name(run, agent, "window 5"),
        snapshot.policy_name(run._replace(params=tiny_run.params(1)), agent, "window 4"),
        snapshot.policy_name(run._replace(norm_stats=other), agent, "window 4"),
        snapshot.policy_name(run, dataclasses.replace(agent, instruction_steps=2), "window 4"),
    }
    assert len(names) == 5
    again = run._replace(params=tiny_run.params())
    assert snapshot.policy_name(again, agent, "window 4") in names
