"""The server over real sockets on loopback: openpi's wire, sessions, limits, drain."""

import asyncio
import contextlib
import functools
import http.client
import socket
import threading
import time

import jax
import numpy as np
import pytest
import tiny_run
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from vla_jax import serve
from vla_jax.acting import agent as agents
from vla_jax.runs import load_run
from vla_jax.serving import sessions, upload
from vla_jax.serving.messages import pack, unpack
from vla_jax.serving.server import Server

OBSERVATION = {"state": np.zeros(8), "environment_state": np.zeros(22, np.float32)}


@contextlib.contextmanager
def running(service):
    """Runs a server in a thread; yields its port and the function that stops it."""
    loop, stop, ports = asyncio.new_event_loop(), asyncio.Event(), []
    listening = threading.Event()

    def ready(port):
        ports.append(port)
        listening.set()

    def target():
        asyncio.set_event_loop(loop)
        loop.run_until_complete(Server(service).run("127.0.0.1", 0, stop, ready=ready))
        loop.close()

    thread = threading.Thread(target=target)
    thread.start()
    assert listening.wait(10)

    def end():
        with contextlib.suppress(RuntimeError):  # it has ended
            loop.call_soon_threadsafe(stop.set)
        thread.join(12)
        assert not thread.is_alive()

    try:
        yield ports[0], end
    finally:
        end()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return load_run(tiny_run.write(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def compiled(run):
    """A service; its engine is replaced for every test."""
    config = serve.ServeConfig(sessions=3, max_batch=2, message_bytes=100_000, prompt_chars=64)
    return serve.make_service(run, config)


def fresh(compiled, **changed):
    """The service with new sessions and counters, and with other limits."""
    ttl = changed.pop("ttl", 300.0)
    book = sessions.SessionBook(3, ttl)
    metrics = serve.make_metrics(book, {"run": "tiny"})
    engine = serve.Engine(compiled.engine.table, book, serve.make_observer(metrics))
    return compiled._replace(engine=engine, metrics=metrics, **changed)


@pytest.fixture
def port(compiled):
    with running(fresh(compiled)) as (port, _):
        yield port


@contextlib.contextmanager
def client(port, path="/", **options):
    with connect(f"ws://127.0.0.1:{port}{path}", compression=None, proxy=None, **options) as socket:
        socket.metadata = unpack(socket.recv())
        yield socket


def ask(socket, fields):
    """Returns the decoded reply; the text of an error."""
    socket.send(fields if isinstance(fields, bytes | str) else pack(fields))
    reply = socket.recv(timeout=10)
    return reply if isinstance(reply, str) else unpack(reply)


def get(port, path, method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    with contextlib.closing(connection):
        return response.status, response.read().decode()


@functools.cache
def acting():
    agent = agents.make_agent(tiny_run.AGENT, tiny_run.norm_stats())
    return agent, jax.jit(agent.step)


def in_process(run, frames, prompt):
    """Actions of an episode without a server."""
    agent, step = acting()
    state, actions = agent.init(run.params, 1), []
    words = agents.read_instruction(run.agent, prompt)[None]
    for t, frame in enumerate(frames):
        observation = agents.Observation(
            proprio=frame["state"][None].astype(np.float32),
            environment_state=frame["environment_state"][None],
            instruction=words,
        )
        state, action = step(run.params, state, observation, np.array([t == 0]))
        actions.append(np.asarray(action))
    return np.stack(actions)


def episode(seed, length):
    rng = np.random.default_rng(seed)
    return [
        {"state": rng.normal(size=8), "environment_state": rng.normal(size=22).astype(np.float32)}
        for _ in range(length)
    ]


def test_a_client_that_knows_no_sessions_is_served_as_openpi_serves_it(port, run):
    frames = episode(0, 6)
    expected = in_process(run, frames, "lift")
    for path in ("/", "/v1/realtime/robot/openpi"):
        with client(port, path) as socket:
            assert socket.metadata["protocol"] == "openpi+session/1"
            replies = [ask(socket, {**frame, "prompt": "lift"}) for frame in frames]
        actions = np.stack([reply["actions"] for reply in replies])
        np.testing.assert_allclose(actions, expected, atol=1e-5)
        assert [reply["session"]["reset"] for reply in replies] == [True] + [False] * 5
        assert "prev_total_ms" not in replies[0]["server_timing"]
        for reply in replies:  # openpi's client slices every array of a reply
            arrays = [key for key, part in reply.items() if isinstance(part, np.ndarray)]
            assert arrays == ["actions"]
            timing = {**reply["server_timing"], **reply["policy_timing"]}
            assert all(isinstance(value, float) for value in timing.values())


def test_a_changed_prompt_is_a_new_episode_for_such_a_client(port, run):
    frames = episode(1, 4)
    with client(port) as socket:
        for prompt in ("lift", "push"):
            replies = [ask(socket, {**frame, "prompt": prompt}) for frame in frames]
            actions = np.stack([reply["actions"] for reply in replies])
            np.testing.assert_allclose(actions, in_process(run, frames, prompt), atol=1e-5)


def test_a_session_goes_on_over_connections_and_a_repeated_step_changes_nothing(port, run):
    frames = episode(2, 5)
    expected = in_process(run, frames, "lift")
    for step, frame in enumerate(frames):
        with client(port) as socket:
            fields = {**frame, "session_id": "arm", "step": step, "prompt": "lift"}
            first, second = ask(socket, fields), ask(socket, fields)
        np.testing.assert_allclose(first["actions"], expected[step], atol=1e-5)
        np.testing.assert_allclose(second["actions"], first["actions"], atol=1e-6)
        assert second["session"] == {"id": "arm", "step": step, "reset": step == 0}


def test_sessions_of_concurrent_clients_are_those_in_process(port, run):
    results, lengths = {}, {0: 12, 1: 9, 2: 12}

    def play(seed):
        with client(port, f"/?session_id=robot{seed}") as socket:
            frames = episode(seed, lengths[seed])
            results[seed] = [ask(socket, {**f, "prompt": f"task {seed}"}) for f in frames]

    threads = [threading.Thread(target=play, args=(seed,)) for seed in lengths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for seed, replies in results.items():
        actions = np.stack([reply["actions"] for reply in replies])
        expected = in_process(run, episode(seed, lengths[seed]), f"task {seed}")
        np.testing.assert_allclose(actions, expected, atol=1e-5)
        assert replies[0]["session"]["id"] == f"robot{seed}"
    assert len(results) == 3


def test_the_newest_connection_has_the_session(port):
    first = {**OBSERVATION, "prompt": "lift", "session_id": "arm"}
    with client(port) as older, client(port) as newer:
        assert ask(older, first)["session"]["step"] == 0
        assert ask(newer, {**OBSERVATION, "session_id": "arm"})["session"]["step"] == 1
        refused = ask(older, {**OBSERVATION, "session_id": "arm"})
        assert "give every robot a session_id of its own" in refused
        assert ask(newer, {**OBSERVATION, "session_id": "arm"})["session"]["step"] == 2
        for reset in ({"session_ids": ["other", "arm"]}, {"session_id": "arm"}):
            refused = ask(older, {"endpoint": "reset", **reset})
            assert refused.startswith("session 'arm' must be used by one robot")
        assert ask(newer, {**OBSERVATION, "session_id": "arm"})["session"]["step"] == 3
        assert "status" in ask(newer, {"endpoint": "reset", "session_id": "arm"})


def test_frames_of_one_request_are_stepped_in_order(port, run):
    frames = episode(3, 5)
    expected = in_process(run, frames, "lift")
    with client(port) as socket:
        reply = ask(socket, {"frames": frames[:3], "prompt": "lift", "step": 0})
        np.testing.assert_allclose(reply["actions"], expected[2], atol=1e-5)
        for _ in range(2):
            reply = ask(socket, {"frames": frames[3:], "step": 3})
            np.testing.assert_allclose(reply["actions"], expected[4], atol=1e-5)


def test_the_endpoint_reset_ends_sessions(port):
    with client(port) as socket:
        fields = {**OBSERVATION, "prompt": "lift"}
        assert ask(socket, {**fields, "session_id": "a"})["session"]["reset"]
        for reset in ({"endpoint": "reset", "session_ids": ["a", "b"]}, {"reset": True}):
            assert ask(socket, reset)["status"] == "reset successful"
        assert ask(socket, {**OBSERVATION, "session_id": "a"}).startswith("prompt must be given")
        assert ask(socket, {**fields, "session_id": "a"})["session"]["reset"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (b"\xc1", "message must be MessagePack"),
        ("text", "message must be a binary frame"),
        ([1], "message must be a map"),
        ({}, "proprio must be in the observation as proprio or state"),
        ({**OBSERVATION, "proprio": np.zeros(8)}, "proprio must be in the observation once"),
        ({**OBSERVATION, "state": np.zeros(7)}, "proprio must have 8 numbers as in training"),
        ({**OBSERVATION, "state": np.full(8, np.nan)}, "proprio must be finite numbers"),
        ({**OBSERVATION, "state": np.full(8, 1e300)}, "proprio must be finite numbers in float32"),
        ({**OBSERVATION, "state": np.zeros((1, 8))}, "proprio must be numbers [P], got array of"),
        ({**OBSERVATION, "prompt": "x" * 65}, "prompt must have at most 64 characters, got 65"),
        ({**OBSERVATION, "prompt": 3}, "prompt must be a str, got 3"),
        ({**OBSERVATION, "step": -1}, "step must be an integer of at least 0, got -1"),
        ({**OBSERVATION, "step": 1.5}, "step must be an integer"),
        ({**OBSERVATION, "step": 2, "reset": True}, "step must be 0 with reset, got 2"),
        ({**OBSERVATION, "reset": 1}, "reset must be true or false, got 1"),
        ({**OBSERVATION, "session_id": "x" * 129}, "session_id must be a str of 1 to 128"),
        ({**OBSERVATION, "session_id": 3}, "session_id must be a str"),
        ({**OBSERVATION, "endpoint": "kill"}, "endpoint must be 'infer' or 'reset', got 'kill'"),
        ({**OBSERVATION, "session_ids": ["a"]}, "session_ids must be absent"),
        ({"frames": []}, "frames must be a list of 1 to 4096 observations"),
        ({"frames": [OBSERVATION, 3]}, "frames must be maps"),
        ({"frames": [OBSERVATION], "state": 3}, "frames must hold all observations, got 'state'"),
        ({"frames": [OBSERVATION, {}]}, "proprio must be in the observation"),
        ({**OBSERVATION}, "prompt must be given with the first frame"),
    ],
)
def test_a_refusal_is_one_sentence_and_the_connection_stays(port, fields, message):
    with client(port) as socket:
        answer = ask(socket, fields)
        assert answer.startswith(message), answer
        assert "\n" not in answer
        assert "Traceback" not in answer
        assert ask(socket, {**OBSERVATION, "prompt": "lift"})["session"]["reset"]


def test_sixteen_errors_in_a_row_close_the_connection(port):
    with client(port) as socket:
        for _ in range(15):
            ask(socket, b"\xc1")
        ask(socket, {**OBSERVATION, "prompt": "lift"})
        for _ in range(16):
            ask(socket, b"\xc1")
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=10)
        assert closed.value.rcvd.code == 1008


def test_a_message_over_the_size_closes_its_own_connection_only(port):
    with client(port) as other, client(port) as socket:
        socket.send(bytes(100_001))
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=10)
        assert closed.value.rcvd.code == 1009
        assert ask(other, {**OBSERVATION, "prompt": "lift"})["session"]["reset"]


def test_a_full_server_says_so_and_an_idle_anonymous_session_gives_way(compiled, monkeypatch):
    with running(fresh(compiled)) as (port, _), contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(client(port)) for _ in range(4)]
        fields = {**OBSERVATION, "prompt": "lift"}
        for socket in sockets[:3]:
            ask(socket, fields)
        assert ask(sockets[3], fields).startswith("server is full: 3 sessions are in use")
        with pytest.raises(ConnectionClosed) as closed:
            sockets[3].recv(timeout=10)
        assert closed.value.rcvd.code == 1013
        monkeypatch.setattr(sessions, "IDLE", 0.0)
        newest = stack.enter_context(client(port))
        assert ask(newest, fields)["session"]["reset"]
        answers = [ask(socket, OBSERVATION) for socket in sockets[:3]]
        gone = "the session of this connection gave way to another one"
        assert [str(answer).startswith(gone) for answer in answers] == [True, False, False]
        again = ask(sockets[0], {**fields, "reset": True})
        assert again["session"]["reset"]


def test_an_expired_session_is_an_error_and_never_an_empty_memory(compiled):
    with running(fresh(compiled, ttl=0.05)) as (port, _), client(port) as socket:
        fields = {**OBSERVATION, "prompt": "lift", "session_id": "arm"}
        ask(socket, fields)
        time.sleep(0.1)
        for step in ({}, {"step": 1}):
            answer = ask(socket, {**fields, **step})
            assert answer.startswith("session 'arm' expired after 0.05 s without a request")
        assert ask(socket, {**fields, "step": 0})["session"]["reset"]


def test_a_closed_connection_frees_its_session(port):
    for _ in range(5):  # of a server of three sessions
        with client(port) as socket:
            assert ask(socket, {**OBSERVATION, "prompt": "lift"})["session"]["reset"]
    deadline = time.monotonic() + 5
    while 'sessions{kind="anonymous"} 0.0' not in get(port, "/metrics")[1]:
        assert time.monotonic() < deadline


def test_a_killed_client_does_not_disturb_the_others(port):
    with client(port) as other:
        for _ in range(3):
            with client(port) as socket:
                socket.send(pack({**OBSERVATION, "prompt": "lift"}))
                socket.socket.shutdown(2)  # in the middle of its request
            assert "actions" in ask(other, {**OBSERVATION, "prompt": "lift"})


def test_health_metrics_and_unknown_paths(port):
    assert get(port, "/healthz") == (200, "OK\n")
    with client(port) as socket:
        ask(socket, {**OBSERVATION, "prompt": "lift"})
        ask(socket, b"\xc1")
    status, text = get(port, "/metrics")
    assert status == 200
    for line in (
        'vla_serve_requests_total{outcome="served"} 1.0',
        'vla_serve_refused_total{reason="message"} 1.0',
        "vla_serve_batch_rows_count 1.0",
        'vla_serve_step_seconds_count{stage="device"} 1.0',
    ):
        assert line in text
    assert get(port, "/other")[0] == 404
    with pytest.raises(InvalidStatus), client(port, "/other"):
        pass


def test_web_pages_may_not_connect(port):
    with pytest.raises(InvalidStatus) as refused, client(port, origin="http://evil.example"):
        pass
    assert refused.value.response.status_code == 403
    assert get(port, "/metrics", Origin="http://evil.example")[0] == 403


def test_a_token_is_needed_everywhere_but_for_the_health(compiled):
    with running(fresh(compiled, token="secret")) as (port, _):
        assert get(port, "/healthz")[0] == 200
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            assert get(port, "/metrics", **header)[0] == 401
            with pytest.raises(InvalidStatus), client(port, additional_headers=header):
                pass
        for scheme in ("Bearer", "Api-Key"):
            header = {"Authorization": f"{scheme} secret"}
            assert get(port, "/metrics", **header)[0] == 200
            with client(port, additional_headers=header) as socket:
                assert "actions" in ask(socket, {**OBSERVATION, "prompt": "lift"})


def test_a_drain_answers_what_is_under_way_and_closes_the_connections(compiled):
    service = fresh(compiled)
    with running(service) as (port, end), client(port) as idle, client(port) as busy:
        release = threading.Event()
        service.engine.call((), release.wait)
        busy.send(pack({**OBSERVATION, "prompt": "lift"}))
        time.sleep(0.2)  # until the server waits for the engine
        stopping = threading.Thread(target=end)
        stopping.start()
        with pytest.raises(ConnectionClosed) as closed:
            idle.recv(timeout=10)
        assert closed.value.rcvd.code == 1001
        for path in ("/healthz", "/", "/metrics"):
            assert get(port, path)[0] == 503
        release.set()
        assert "actions" in unpack(busy.recv(timeout=10))
        with pytest.raises(ConnectionClosed) as closed:
            busy.recv(timeout=10)
        assert closed.value.rcvd.code == 1001
        stopping.join(12)
        with pytest.raises(OSError, match="refused"):
            get(port, "/healthz")


def test_a_connection_that_never_speaks_does_not_hold_up_the_end(compiled):
    with running(fresh(compiled)) as (port, end), socket.create_connection(("127.0.0.1", port)):
        with client(port) as other:
            assert "actions" in ask(other, {**OBSERVATION, "prompt": "lift"})
        began = time.monotonic()
        end()
        assert time.monotonic() - began < 5  # its handshake would have 10 s


def test_a_connection_that_never_speaks_holds_no_session(port):
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(client(port))
        with client(port) as socket:
            assert "actions" in ask(socket, {**OBSERVATION, "prompt": "lift"})


def exchange(port, path, method="GET", body=None, token="secret"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, body, {"Authorization": f"Bearer {token}"})
    with contextlib.closing(connection):
        response = connection.getresponse()
        return response.status, response.read()


def test_a_session_moves_to_another_server(compiled, run):
    frames = episode(4, 6)
    expected = in_process(run, frames, "lift")
    header = {"additional_headers": {"Authorization": "Bearer secret"}}
    with running(fresh(compiled, token="secret")) as (port, _):
        with client(port, "/?session_id=arm", **header) as socket:
            for frame in frames[:4]:
                ask(socket, {**frame, "prompt": "lift"})
        status, exported = exchange(port, "/sessions/arm")
        assert status == 200
        assert exchange(port, "/sessions/other")[0] == 404
        assert exchange(port, "/sessions/arm", token="wrong")[0] == 401
    with running(fresh(compiled, token="secret")) as (port, _):
        assert exchange(port, "/sessions/a%2Fb", "PUT", exported) == (200, b"OK\n")
        for body in (b"", b"nothing", exported[:-5]):
            status, text = exchange(port, "/sessions/new", "PUT", body)
            assert (status, text[:15]) == (400, b"session must be")
        assert exchange(port, "/sessions/new", "PUT", bytes(100_001))[0] == 413
        assert exchange(port, "/sessions/new", "PUT", exported, token="wrong")[0] == 401
        assert exchange(port, "/sessions/new")[0] == 404
        with client(port, "/?session_id=a/b", **header) as socket:
            for step in (3, 4, 5):  # the third is the last one of the other server
                reply = ask(socket, {**frames[step], "step": step})
                np.testing.assert_allclose(reply["actions"], expected[step], atol=1e-5)


@pytest.mark.parametrize("mode", ["refresh", "periodic", "persistent"])
def test_a_replay_of_the_last_frames_gives_the_memory_of_an_exported_session(run, mode):
    """As many frames as the mode remembers, so that the replay's own first steps are forgotten."""
    window, length = 4, 10
    frames, header = episode(6, length + 3), {"additional_headers": {"Authorization": "Bearer s"}}
    config = serve.ServeConfig(sessions=3, max_batch=1, mode=mode, window_size=window)
    service = serve.make_service(run, config, token="s")
    with running(service) as (port, _), client(port, **header) as socket:
        for frame in frames[:length]:
            ask(socket, {**frame, "prompt": "lift", "session_id": "arm"})
        status, exported = exchange(port, "/sessions/arm", token="s")
        assert status == 200
        assert exchange(port, "/sessions/copy", "PUT", exported, token="s")[0] == 200
        count = {"refresh": window, "periodic": window + length % window, "persistent": length}[
            mode
        ]
        replayed = frames[length - count : length]
        ask(socket, {"frames": replayed, "prompt": "lift", "session_id": "replay", "reset": True})
        for frame in frames[length:]:
            names = ("arm", "copy", "replay")
            replies = [ask(socket, {**frame, "session_id": name}) for name in names]
            arm, copy, replay = (reply["actions"] for reply in replies)
            np.testing.assert_array_equal(copy, arm)
            np.testing.assert_allclose(replay, arm, atol=1e-5)


def test_the_body_of_a_stranger_is_not_kept(compiled):
    kept = []

    def is_allowed(path, authorization):
        kept.append((path, authorization))
        return False

    class Closed:
        def __init__(self, *_, **__):
            self.handed = []

        def data_received(self, data):
            self.handed.append(data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("websockets.asyncio.server.ServerConnection", Closed)
        connection = upload.make_connection_class(100, is_allowed)()
    head = b"PUT /sessions/a HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer no\r\nContent-Length: 9"
    for part in (head[:10], head[10:], b"\r\n\r\nbo", b"dy", b"more"):
        connection.data_received(part)
    assert kept == [("/sessions/a", "Bearer no")]
    assert connection.body is None
    expected = b"GET /sessions/a HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer no\r\n\r\n"
    assert connection.handed == [expected]  # the body would be read as frames, and end the response


def test_a_session_id_of_the_url_that_cannot_be_one_is_refused(port):
    for wrong in ("", "%0A", "x" * 129):
        with pytest.raises(InvalidStatus) as error, client(port, f"/?session_id={wrong}"):
            pass
        assert error.value.response.status_code == 400


def test_a_server_whose_engine_fails_ends_with_an_error(compiled):
    service = fresh(compiled)

    async def run():
        service.engine.stop(5.0)
        await asyncio.wait_for(Server(service).run("127.0.0.1", 0, asyncio.Event()), 30)

    with pytest.raises(RuntimeError, match="its engine failed; see its log"):
        asyncio.run(run())


def test_sessions_are_not_exported_without_a_token(port):
    assert exchange(port, "/sessions/arm")[0] == 403
    assert exchange(port, "/sessions/arm", "PUT", b"nothing")[0] == 403


def test_named_sessions_go_on_after_a_restart(run, tmp_path):
    frames = episode(5, 4)
    expected = in_process(run, frames, "lift")
    config = serve.ServeConfig(sessions=2, max_batch=1, snapshot=str(tmp_path / "sessions"))
    for half in (range(2), range(1, 4)):  # the second server gets the last request again
        service = serve.make_service(run, config)
        with running(service) as (port, _), client(port, "/?session_id=arm") as socket:
            for step in half:
                reply = ask(socket, {**frames[step], "prompt": "lift", "step": step})
                np.testing.assert_allclose(reply["actions"], expected[step], atol=1e-5)
            if half[0]:
                ask(socket, {"endpoint": "reset"})
    assert not list((tmp_path / "sessions").iterdir())


def test_the_requests_before_the_port_opens_leave_nothing(run):
    config = serve.ServeConfig(sessions=1, max_batch=1, message_bytes=1024, prompt_chars=4)
    service = serve.make_service(run, config)
    assert not service.engine.book.live
    text = service.metrics.text().decode()
    assert "vla_serve_batch_rows_count 0.0" in text
    assert "vla_serve_connections 0.0" in text
    assert 'outcome="served"' not in text
    with running(service) as (port, _), client(port) as socket:
        assert ask(socket, {**OBSERVATION, "prompt": "lift"})["session"]["reset"]


def test_a_damaged_file_of_a_session_is_an_error_after_a_restart(run, tmp_path):
    folder = tmp_path / "sessions"
    config = serve.ServeConfig(sessions=2, max_batch=1, snapshot=str(folder))
    fields = {**OBSERVATION, "prompt": "lift"}
    service = serve.make_service(run, config)
    with running(service) as (port, _), client(port, "/?session_id=arm") as socket:
        ask(socket, fields)
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.warns(UserWarning, match="damaged"):
        service = serve.make_service(run, config)
    with running(service) as (port, _), client(port, "/?session_id=arm") as socket:
        for step in ({}, {"step": 1}):
            answer = ask(socket, {**fields, **step})
            assert answer.startswith("session 'arm' was lost, since its file is damaged")
        assert ask(socket, {**fields, "reset": True})["session"]["reset"]
    service = serve.make_service(run, config)  # the file is that of the new one
    with running(service) as (port, _), client(port, "/?session_id=arm") as socket:
        assert ask(socket, {**fields, "step": 1})["session"]["step"] == 1


def test_a_server_can_reply_with_whole_chunks(run):
    config = serve.ServeConfig(sessions=1, max_batch=1, actions="chunk")
    service = serve.make_service(run, config)
    with running(service) as (port, _), connect(f"ws://127.0.0.1:{port}", proxy=None) as client:
        assert unpack(client.recv())["action"]["horizon"] == 2
        client.send(pack({**OBSERVATION, "prompt": "lift the red block"}))
        actions = unpack(client.recv())["actions"]
    assert actions.shape == (2, 7)
    assert np.isfinite(actions).all()
