"""Client of a policy server for the robot's side: NumPy, websockets and msgpack, without JAX.

    with Client("ws://127.0.0.1:8000") as client:
        for episode in range(10):
            client.reset()
            while True:
                observation = {"observation/image": image, "observation/state": state}
                reply = client.infer(observation, prompt="lift the red block")
                robot.send(reply.actions[0])

The client works with `python -m vla_jax.serve` and with every other server of openpi's wire. With
the former it has a session of its own, which outlives lost connections: a request whose reply was
lost is repeated under the same `step`, and the memory of the policy does not advance twice. With
the latter an episode is one connection, since nothing else clears the server's memory.
"""

import collections
import contextlib
import time
import urllib.parse
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vla_jax.serving import messages

_KEPT_TIMES = 10_000  # round trips that the percentiles are computed from
_FIRST_DELAY, _LAST_DELAY = 0.05, 2.0  # seconds between two attempts to connect
_CLOSING = 2.0  # seconds for the farewell of `close`
_FINAL = {  # close codes after which the same request would fail again
    1008: "closed the connection because of its rules",
    1009: "does not accept a message of this size",
    1013: "is full",
}
_REFUSALS = {  # HTTP status of the handshake -> what to do
    401: "it needs another token; pass token",
    403: "it refuses this client",
    404: "it has no such path; use '/'",
}


class Reply(NamedTuple):
    """Answer to an observation."""

    actions: np.ndarray  # [K, A] float32, row 0 = the action for now; gripper +1 open, -1 closed
    step: int  # index of the observation in its episode
    latency: float  # milliseconds from the observation to the actions, repetitions included
    timing: Mapping[str, float]  # milliseconds inside the server, by name; empty if not known


class Percentiles(NamedTuple):
    """Round trips of a client, in milliseconds."""

    p50: float
    p95: float
    p99: float
    count: int  # of replies


class Client:
    """Connection to a policy server, for one robot; not for several threads at once.

    A class with state, since a connection is one: all of it is the socket, the index of the next
    step and the measured times.
    """

    def __init__(
        self,
        url: str = "ws://127.0.0.1:8000",
        *,
        session_id: str | None = None,
        token: str | None = None,
        timeout: float = 30.0,
        patience: float = 60.0,
    ) -> None:
        """Connects, waiting for a server that is not up yet.

        Args:
          url: `ws://HOST:PORT` or `wss://…`; without a scheme, `ws://` is assumed.
          session_id: name of the memory on the server, 1 to 128 characters; None = a new one.
          token: of the server, if it has one.
          timeout: seconds to wait for one answer.
          patience: seconds of attempts to get an answer after the connection is lost.

        Raises:
          ValueError: an argument is out of range.
          ConnectionError: there is no server, or it refuses this client.
          ImportError: the extra `serve` is missing.
        """
        self._url = _check_url(url)
        if session_id is not None and not 1 <= len(session_id) <= 128:
            raise ValueError(
                f"session_id must have 1 to 128 characters, got {len(session_id)}; shorten it."
            )
        for name, value in (("timeout", timeout), ("patience", patience)):
            if not value > 0:
                raise ValueError(f"{name} must be positive seconds, got {value}.")
        self.session_id = session_id or uuid.uuid4().hex
        self._headers = {"Authorization": f"Api-Key {token}"} if token else {}
        self._timeout, self._patience = timeout, patience
        self._socket: Any = None
        self._opened = contextlib.ExitStack()
        self._times: collections.deque[float] = collections.deque(maxlen=_KEPT_TIMES)
        self._step = 0  # index of the next observation
        self._unanswered: bytes | None = None  # request that the server may have served
        self.metadata: Mapping[str, Any] = {}
        self._retrying(lambda: None, repeatable=True)

    def __enter__(self) -> "Client":
        """Returns the client."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes the client."""
        self.close()

    @property
    def has_sessions(self) -> bool:
        """Returns True if the server knows sessions: `vla_jax.serve` and its kind."""
        return "session_id" in self.metadata.get("features", ())

    def reset(self) -> None:
        """Starts an episode: the next observation is its first."""
        if self._step and not self.has_sessions:
            self._disconnect()
        self._step, self._unanswered = 0, None

    def infer(
        self,
        observation: Mapping[str, Any],
        *,
        prompt: str | None = None,
        earlier: Sequence[Mapping[str, Any]] = (),
    ) -> Reply:
        """Sends an observation and returns the actions for it.

        Args:
          observation: the server's keys -> array, such as `observation/image` `[h, w, 3]` uint8.
          prompt: the instruction; necessary at the first step of an episode.
          earlier: observations since the last call, oldest first, such as a video that is shown
            before the first action: the policy steps its memory over every one of them.

        Raises:
          RuntimeError: the server refused the request, with its sentence; nothing has changed. Or
            the observation is another one than that which got no answer: the server may have
            stepped over that one.
          ConnectionError: there was no answer within `patience`, or the connection was lost and
            the memory with it.
        """
        request: dict[str, Any] = dict(observation)
        if earlier:
            request = {"frames": [*map(dict, earlier), request]}
        if prompt is not None:
            request["prompt"] = prompt
        if self.has_sessions:
            request |= {"session_id": self.session_id, "step": self._step}
        start = time.perf_counter()
        repeatable = self.has_sessions or self._step == 0
        reply = self._exchange(request, repeatable=repeatable)
        latency = 1000 * (time.perf_counter() - start)
        if not isinstance(reply.get("actions"), np.ndarray):
            raise RuntimeError(
                f"the reply of {self._url} must have the array 'actions', got {sorted(reply)}; "
                "check that it is a server of openpi's wire."
            )
        self._times.append(latency)
        self._step += 1 + len(earlier)
        actions = np.atleast_2d(reply["actions"])
        return Reply(actions, self._step - 1, latency, reply.get("server_timing") or {})

    def latency(self) -> Percentiles:
        """Returns percentiles of the last 10,000 round trips; NaN before the first."""
        times = list(self._times) or [np.nan]
        p50, p95, p99 = np.percentile(times, [50, 95, 99])
        return Percentiles(float(p50), float(p95), float(p99), len(self._times))

    def close(self) -> None:
        """Ends the session, which frees its place on the server, and the connection."""
        if self._socket is not None and self._step and self.has_sessions:
            farewell = messages.pack({"endpoint": "reset", "session_id": self.session_id})
            with contextlib.suppress(OSError, _websocket_error()):
                # the server ends silent sessions itself
                self._socket.send(farewell)
                self._socket.recv(timeout=_CLOSING)
        self._disconnect()
        self._step, self._unanswered = 0, None

    def _exchange(self, request: Mapping[str, Any], *, repeatable: bool) -> dict[str, Any]:
        """Returns the answer to a request, which is sent again if the answer was lost."""
        data = messages.pack(request)
        if self._unanswered not in (None, data):
            raise RuntimeError(
                f"the observation of step {self._step} got no answer, and another one cannot take "
                "its place; send the same again, or call reset() and start a new episode."
            )
        self._unanswered = data if self.has_sessions else None

        def once() -> str | bytes:
            self._socket.send(data)
            return self._socket.recv(timeout=self._timeout)

        answer = self._retrying(once, repeatable=repeatable)
        self._unanswered = None
        if isinstance(answer, str):
            raise RuntimeError(f"the server refused the request: {answer}")
        return _read_map(answer, self._url)

    def _retrying(self, once: Any, *, repeatable: bool) -> Any:
        """Returns `once()` on an open connection, which is opened again as often as needed."""
        lost, delay = time.monotonic() + self._patience, _FIRST_DELAY
        while True:
            try:
                if self._socket is None:
                    self._connect()
                return once()
            except (OSError, _websocket_error()) as error:
                self._disconnect()
                sentence = _final_sentence(error)
                if sentence:
                    raise ConnectionError(f"{self._url}: {sentence}.") from error
                if not repeatable:
                    raise ConnectionError(
                        f"the connection to {self._url} was lost in mid-episode, and with it the "
                        "policy's memory, as the server knows no sessions; start a new episode."
                    ) from error
                if time.monotonic() + delay > lost:
                    raise ConnectionError(
                        f"no answer from {self._url} within {self._patience:g} s, last error: "
                        f"{type(error).__name__} {error}; check that the server runs there."
                    ) from error
            except BaseException:  # a reply that nobody reads would be taken for the next one
                self._disconnect()
                raise
            time.sleep(delay)
            delay = min(2 * delay, _LAST_DELAY)

    def _connect(self) -> None:
        from websockets.sync.client import connect

        is_local = urllib.parse.urlsplit(self._url).hostname in ("127.0.0.1", "localhost", "::1")
        self._socket = self._opened.enter_context(
            connect(
                _naming_session(self._url, self.session_id),
                compression=None,
                max_size=None,
                additional_headers=self._headers,
                proxy=None if is_local else True,
                open_timeout=self._timeout,
                close_timeout=_CLOSING,
                ping_timeout=max(self._timeout, 20.0),
            )
        )
        first = self._socket.recv(timeout=self._timeout)
        if isinstance(first, str):
            raise ConnectionError(f"the server refused the connection: {first}")
        self.metadata = _read_map(first, self._url)

    def _disconnect(self) -> None:
        self._socket = None
        with contextlib.suppress(OSError, _websocket_error()):  # it is closed already
            self._opened.close()


def _check_url(url: str) -> str:
    """Returns the URL with a scheme."""
    url = url if "://" in url else f"ws://{url}"
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = (parts.hostname or "").encode("idna"), parts.port
    except ValueError as error:  # a port, an address or a name that cannot be
        raise ValueError(f"url must be ws://HOST:PORT, got '{url}' ({error}).") from None
    if parts.scheme not in ("ws", "wss") or not host:
        raise ValueError(f"url must be ws://HOST:PORT or wss://HOST:PORT, got '{url}'.")
    return url


def _naming_session(url: str, session_id: str) -> str:
    """Returns the URL with the query `session_id`, by which a proxy chooses among servers."""
    parts = urllib.parse.urlsplit(url)
    query = urllib.parse.parse_qsl(parts.query, keep_blank_values=True)
    if "session_id" not in dict(query):
        query.append(("session_id", session_id))
    return urllib.parse.urlunsplit(parts._replace(query=urllib.parse.urlencode(query)))


def _websocket_error() -> type[Exception]:
    try:
        from websockets.exceptions import WebSocketException
    except ImportError as error:
        raise ImportError(
            "the client of a policy server needs websockets and msgpack; "
            "pip install 'vla-jax[serve]'."
        ) from error
    return WebSocketException


def _final_sentence(error: Exception) -> str:
    """Returns why another attempt would fail too; "" if it may succeed."""
    received = getattr(error, "rcvd", None)  # of a closed connection
    if received is not None and received.code in _FINAL:
        reason = f", {received.reason}" if received.reason else ""
        return f"the server {_FINAL[received.code]}{reason}"
    response = getattr(error, "response", None)  # of a refused handshake
    status = getattr(response, "status_code", None)
    if status in _REFUSALS:
        return f"the server answered HTTP {status}, {_REFUSALS[status]}"
    if isinstance(error, ConnectionError) and str(error).startswith("the server refused"):
        return str(error)
    return ""


def _read_map(data: bytes, url: str) -> dict[str, Any]:
    value = messages.unpack(data)
    if not isinstance(value, dict):
        raise RuntimeError(f"the answer of {url} must be a map, got {type(value).__name__}.")
    return value
