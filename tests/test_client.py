"""The client of a policy server: sessions, retries, reconnects, errors and latency."""

import http
import subprocess
import sys
import threading

import fake_server
import numpy as np
import pytest

from vla_jax.serving.client import Client

SESSIONS = {"features": ["session_id", "reset", "step", "endpoint"]}
OBSERVATION = {"observation/state": np.arange(3.0)}


class Memory:
    """Counts steps as a server does: by session, or by connection if there is no name."""

    def __init__(self, losing=()):
        self.requests, self.ages, self.losing = [], {}, list(losing)

    def __call__(self, connection, request):
        self.requests.append(request)
        name = request.get("session_id", connection.id)
        if request.get("endpoint") == "reset":
            self.ages.pop(name, None)
            return {"status": "reset successful"}
        age, count = self.ages.get(name, 0), len(request.get("frames", [1]))
        if request.get("step", age) == 0:
            age = 0
        if request.get("step", age) == age:
            self.ages[name] = age + count
        if len(self.requests) in self.losing:
            connection.close_socket()
            return None
        return {
            "actions": np.full((2, 7), self.ages[name] - 1.0, np.float32),
            "server_timing": {"infer_ms": 1.5},
        }


def client_of(port, **options):
    return Client(f"ws://127.0.0.1:{port}", **{"timeout": 5.0, "patience": 5.0, **options})


def steps_of(requests):
    return [request.get("step") for request in requests]


def test_the_client_needs_no_jax():
    code = "import sys, vla_jax.serving.client; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_episode_counts_its_steps_and_gets_actions_and_times():
    memory = Memory()
    with (
        fake_server.serving(memory, metadata=SESSIONS) as port,
        client_of(port, session_id="arm") as client,
    ):
        replies = [client.infer(OBSERVATION, prompt="lift") for _ in range(3)]
        client.reset()
        again = client.infer(OBSERVATION)
        assert client.latency().count == 4
        assert 0 < client.latency().p50 <= client.latency().p95 <= client.latency().p99 < 5000
    assert [reply.step for reply in [*replies, again]] == [0, 1, 2, 0]
    assert [reply.actions[0, 0] for reply in [*replies, again]] == [0, 1, 2, 0]
    assert replies[0].timing == {"infer_ms": 1.5}
    *asked, farewell = memory.requests
    assert {request["session_id"] for request in memory.requests} == {"arm"}
    assert steps_of(asked) == [0, 1, 2, 0]
    assert asked[0]["prompt"] == "lift"
    assert farewell["endpoint"] == "reset"


def test_every_client_has_a_session_of_its_own():
    with (
        fake_server.serving(Memory(), metadata=SESSIONS) as port,
        client_of(port) as one,
        client_of(port) as other,
    ):
        assert one.session_id != other.session_id


def test_a_lost_reply_is_asked_for_again_under_the_same_step():
    memory = Memory(losing=[2, 3])
    with fake_server.serving(memory, metadata=SESSIONS) as port, client_of(port) as client:
        replies = [client.infer(OBSERVATION) for _ in range(3)]
    assert [reply.actions[0, 0] for reply in replies] == [0, 1, 2]
    assert steps_of(memory.requests[:-1]) == [0, 1, 1, 1, 2]


def test_another_observation_never_takes_the_place_of_an_unanswered_one():
    memory = Memory(losing=range(2, 50))
    other = {name: part + 1 for name, part in OBSERVATION.items()}
    server = fake_server.serving(memory, metadata=SESSIONS)
    with server as port, client_of(port, patience=0.1) as client:
        client.infer(OBSERVATION)
        with pytest.raises(ConnectionError):
            client.infer(OBSERVATION)
        with pytest.raises(RuntimeError, match="another one cannot take its place"):
            client.infer(other)
        memory.losing.clear()
        assert client.infer(OBSERVATION).actions[0, 0] == 1
        client.reset()
        assert client.infer(other).actions[0, 0] == 0


def test_earlier_frames_are_sent_with_the_present_one():
    memory = Memory()
    with fake_server.serving(memory, metadata=SESSIONS) as port, client_of(port) as client:
        first = client.infer(OBSERVATION, prompt="lift", earlier=[OBSERVATION] * 4)
        assert (first.step, client.infer(OBSERVATION).step) == (4, 5)
    assert len(memory.requests[0]["frames"]) == 5
    assert set(memory.requests[0]) == {"frames", "prompt", "session_id", "step"}
    assert steps_of(memory.requests[:2]) == [0, 5]


def test_a_server_without_sessions_gets_a_new_connection_for_every_episode():
    memory = Memory()
    with fake_server.serving(memory) as port, client_of(port) as client:
        for _ in range(2):
            client.reset()
            steps = [client.infer(OBSERVATION).actions[0, 0] for _ in range(2)]
            assert steps == [0, 1]
    assert steps_of(memory.requests) == [None] * 4


def test_a_server_without_sessions_loses_its_memory_with_the_connection():
    with fake_server.serving(Memory(losing=[1, 4])) as port, client_of(port) as client:
        client.infer(OBSERVATION)  # lost at the first step: asked again
        client.infer(OBSERVATION)
        with pytest.raises(ConnectionError, match="was lost in mid-episode, and with it the"):
            client.infer(OBSERVATION)
        client.reset()
        assert client.infer(OBSERVATION).step == 0


def test_a_refusal_is_one_sentence_and_the_connection_goes_on():
    memory = Memory()

    def answer(connection, request):
        bad = not np.isfinite(request["observation/state"]).all()
        return "state must be finite, got nan." if bad else memory(connection, request)

    with fake_server.serving(answer) as port, client_of(port) as client:
        with pytest.raises(RuntimeError, match=r"^the server refused the request: state must be"):
            client.infer({"observation/state": np.array([np.nan])})
        assert client.infer(OBSERVATION).step == 0


@pytest.mark.parametrize(
    ("code", "words"), [(1008, "because of its rules"), (1009, "of this size"), (1013, "is full")]
)
def test_a_final_close_is_not_tried_again(code, words):
    requests = []

    def answer(connection, request):
        requests.append(request)
        connection.close(code, "64 sessions")

    with (
        fake_server.serving(answer, metadata=SESSIONS) as port,
        client_of(port) as client,
        pytest.raises(ConnectionError, match=f"{words}, 64 sessions"),
    ):
        client.infer(OBSERVATION)
    assert len(requests) == 1


@pytest.mark.parametrize(("status", "words"), [(401, "another token"), (404, "no such path")])
def test_a_refused_handshake_is_one_sentence(status, words):
    def refuse(connection, request):
        return connection.respond(http.HTTPStatus(status), "")

    with (
        fake_server.serving(Memory(), process_request=refuse) as port,
        pytest.raises(ConnectionError, match=f"HTTP {status}, .*{words}"),
    ):
        client_of(port)


def test_the_token_is_in_the_header():
    seen = []

    def look(connection, request):
        seen.append(request.headers.get("Authorization"))

    with fake_server.serving(Memory(), process_request=look) as port:
        client_of(port, token="secret").close()
    assert seen == ["Api-Key secret"]


def test_without_a_server_the_patience_ends():
    with fake_server.serving(Memory()) as port:
        pass
    with pytest.raises(ConnectionError, match=r"no answer from ws://.* within 0\.2 s, last error"):
        client_of(port, patience=0.2)


def test_the_client_waits_for_a_server_that_starts_later():
    with fake_server.serving(Memory()) as port:
        pass
    made = []
    thread = threading.Thread(target=lambda: made.append(client_of(port)))
    thread.start()
    with fake_server.serving(Memory(), port=port):
        thread.join()
        made[0].close()


def test_a_proxy_of_the_environment_is_not_used_on_this_machine(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    with fake_server.serving(Memory()) as port:
        client_of(port).close()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"url": f"ws://{'x' * 70}:1"}, "url must be ws://HOST:PORT, got 'ws://xxx"),
        ({"url": "ws://robot:99999"}, "url must be ws://HOST:PORT, got 'ws://robot:99999'"),
        ({"url": "http://robot"}, "url must be ws://HOST:PORT or wss://HOST:PORT, got 'http://rob"),
        ({"session_id": ""}, "session_id must have 1 to 128 characters, got 0"),
        ({"session_id": "x" * 129}, "session_id must have 1 to 128 characters, got 129"),
        ({"timeout": 0.0}, r"timeout must be positive seconds, got 0\.0"),
        ({"patience": -1.0}, r"patience must be positive seconds, got -1\.0"),
    ],
)
def test_an_argument_out_of_range_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Client(**options)


def test_a_server_of_another_wire_is_named():
    with (
        fake_server.serving(lambda *_: {"action": 1}) as port,
        client_of(port) as client,
        pytest.raises(RuntimeError, match=r"must have the array 'actions', got \['action'\]"),
    ):
        client.infer(OBSERVATION)
