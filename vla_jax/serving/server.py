"""WebSocket server of a policy: connections, health, metrics, token, limits and drain.

One connection has one request under way; replies are in the order of the requests. The event loop
decodes and encodes; the engine's thread computes.
"""

import asyncio
import contextlib
import functools
import hmac
import http
import itertools
import logging
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from vla_jax.acting.agent import AgentState
from vla_jax.serving import observations, snapshot
from vla_jax.serving.dialect import Answer, Dialect, Incoming
from vla_jax.serving.engine import Engine
from vla_jax.serving.messages import MessageError
from vla_jax.serving.metrics import Metrics
from vla_jax.serving.observations import ObservationSpec
from vla_jax.serving.requests import MAX_ID, Refused, Request
from vla_jax.serving.sessions import describe
from vla_jax.serving.upload import make_connection_class
from vla_jax.serving.waiting import Served

_LOGGER = __name__  # its logger is made on first use: no import changes logging
_HANDSHAKE = 10.0  # s until a new connection must have sent its request
_PING, _PING_TIMEOUT = 20.0, 300.0  # s; a compile or a simulator may hold a client's GIL for long
_LARGE = 2**17  # bytes of a message from which on it is decoded beside the event loop
_WATCH = 1.0  # s between two looks at the engine
_CLOSING = 2.0  # s that a client has for the closing handshake
_MAX_ERRORS = 16  # in a row, then the connection is closed
_LOGGED_ERRORS = 8  # per minute and peer
_DRAIN = 7.0  # s for the requests under way when the server stops
_SESSIONS = "/sessions/"  # path of exported sessions
_HEALTH = ("/healthz", "/health")  # of openpi's servers and of AI2's harness
_FAILED = "server failed to serve the request; its operator finds the cause in the log."
_GOING_AWAY, _POLICY_VIOLATION = 1001, 1008  # close codes


class Limits(NamedTuple):
    """Bounds on what clients may send and hold."""

    message_bytes: int = 16 * 2**20  # bytes of one message
    sessions: int = 64  # sessions at a time
    session_ttl_s: float = 300.0  # s without a request after which a named session ends
    prompt_chars: int = 4096  # characters of a prompt
    connections: int = 1024  # open connections


class Service(NamedTuple):
    """Everything that connections share."""

    engine: Engine
    spec: ObservationSpec
    tokenize: Callable[[str], np.ndarray]  # prompt -> [S] int32
    metadata: Mapping[str, Any]
    limits: Limits
    dialects: Mapping[str, Dialect]  # by path
    metrics: Metrics
    policy: str  # name of the policy, for exported sessions
    row: AgentState  # shapes and dtypes of a session's row, leaves [1, ...]
    token: str | None = None  # that clients must send; None = any client may connect


class Server:
    """Open connections of a service.

    It holds state since connections come and go: which of them wait for a reply, and whether the
    server is stopping.
    """

    def __init__(self, service: Service) -> None:
        """Prepares a server; `run` opens the port."""
        self.service = service
        self._opened: weakref.WeakSet[Any] = weakref.WeakSet()  # TCP connections
        self._connections: set[Any] = set()
        self._answering: set[Any] = set()
        self._numbers = itertools.count()
        self._stopping = False
        self._logged: dict[str, int] = {}  # peer -> errors logged in this minute
        self._minute = 0
        self._unknown: set[str] = set()  # keys of observations that were logged

    async def run(
        self,
        host: str,
        port: int,
        stop: asyncio.Event,
        *,
        ready: Callable[[int], None] = lambda port: None,
    ) -> None:
        """Serves until `stop` is set; then answers what is under way and closes with 1001.

        Args:
          host: address to bind.
          port: TCP port; 0 chooses a free one.
          stop: ends the server.
          ready: called with the port when clients can connect.

        Raises:
          OSError: the port is taken.
          RuntimeError: the engine failed.
          ImportError: websockets is missing.
        """
        from websockets.asyncio.server import serve

        limits = self.service.limits
        make_connection = make_connection_class(limits.message_bytes, self._may_upload)

        def open_connection(*args: Any, **options: Any) -> Any:
            connection = make_connection(*args, **options)
            self._opened.add(connection)
            return connection

        async with serve(
            self._handle,
            host,
            port,
            process_request=self._process_request,
            create_connection=open_connection,  # pyright: ignore[reportArgumentType]
            compression=None,
            max_size=limits.message_bytes,
            max_queue=2,
            open_timeout=_HANDSHAKE,
            ping_interval=_PING,
            ping_timeout=_PING_TIMEOUT,
            close_timeout=_CLOSING,
            server_header=None,
        ) as listening:
            ready(listening.sockets[0].getsockname()[1])
            while not stop.is_set() and self.service.engine.is_alive:
                with contextlib.suppress(TimeoutError):  # looks at the engine again
                    await asyncio.wait_for(stop.wait(), _WATCH)
            self._stopping = True
            await self._drain(listening)
        if not stop.is_set():
            raise RuntimeError("the server has stopped since its engine failed; see its log.")

    async def _drain(self, listening: Any) -> None:
        """Answers what is under way; new connections get HTTP 503 until that is done."""
        idle = self._connections - self._answering
        closing = [asyncio.create_task(each.close(_GOING_AWAY)) for each in idle]
        deadline = time.monotonic() + _DRAIN
        while self._connections and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        listening.close(close_connections=False)
        for connection in self._opened:  # also those that have sent no handshake yet
            connection.transport.abort()
        await asyncio.gather(*closing, return_exceptions=True)
        await asyncio.to_thread(self.service.engine.stop, 2.0)

    def _process_request(self, connection: Any, request: Any) -> Any:
        """Answers everything that is not the handshake of an allowed client."""
        path, status = urlsplit(request.path).path, http.HTTPStatus
        if self._stopping or not self.service.engine.is_alive:
            return connection.respond(status.SERVICE_UNAVAILABLE, "stopping\n")
        if path in _HEALTH:
            return connection.respond(status.OK, "OK\n")
        if request.headers.get("Origin") is not None:
            return connection.respond(status.FORBIDDEN, "web pages may not connect.\n")
        if not self._is_allowed(request.headers.get("Authorization", "")):
            return connection.respond(
                status.UNAUTHORIZED,
                "token must be given as 'Authorization: Bearer TOKEN' or 'Api-Key TOKEN'.\n",
            )
        if path == "/metrics":
            response = connection.respond(status.OK, self.service.metrics.text().decode())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = "text/plain; version=0.0.4; charset=utf-8"
            return response
        if path.startswith(_SESSIONS):
            return self._exchange(connection, _checked_id(unquote(path.removeprefix(_SESSIONS))))
        if _session_id(request.path) is None and "session_id=" in request.path:
            return connection.respond(
                status.BAD_REQUEST, f"session_id must be 1 to {MAX_ID} printable characters.\n"
            )
        if path not in self.service.dialects:
            return connection.respond(
                status.NOT_FOUND, f"path must be one of {', '.join(self.service.dialects)}.\n"
            )
        if len(self._connections) >= self.service.limits.connections:
            return connection.respond(status.SERVICE_UNAVAILABLE, "too many connections.\n")
        return None

    async def _exchange(self, connection: Any, session_id: str | None) -> Any:
        """Exports a session (GET), or imports one (PUT); only with a token."""
        service, status = self.service, http.HTTPStatus
        if service.token is None:
            return connection.respond(
                status.FORBIDDEN, "sessions are exported by a server with a token only.\n"
            )
        if connection.is_too_large:
            return connection.respond(
                status.REQUEST_ENTITY_TOO_LARGE,
                f"body must have at most {service.limits.message_bytes} bytes.\n",
            )
        if session_id is None:
            return connection.respond(status.BAD_REQUEST, f"ID must be 1 to {MAX_ID} characters.\n")
        if connection.body is not None:
            return await self._import(connection, session_id)
        found = await asyncio.wrap_future(service.engine.export(session_id))
        if found is None:
            return connection.respond(status.NOT_FOUND, "the session is unknown or has expired.\n")
        response = connection.respond(status.OK, "")
        response.body = snapshot.to_bytes(session_id, *found, service.policy)
        for name, value in (
            ("Content-Type", "application/octet-stream"),
            ("Content-Length", str(len(response.body))),
        ):
            del response.headers[name]
            response.headers[name] = value
        return response

    async def _import(self, connection: Any, session_id: str) -> Any:
        service, status = self.service, http.HTTPStatus
        try:
            _, session, row = snapshot.from_bytes(connection.body, service.row, service.policy)
            await asyncio.wrap_future(service.engine.place(session_id, session, row))
        except Refused as error:
            return connection.respond(status.SERVICE_UNAVAILABLE, f"{error}\n")
        except ValueError as error:
            return connection.respond(status.BAD_REQUEST, f"{error}\n")
        return connection.respond(status.OK, "OK\n")

    def _may_upload(self, path: str, authorization: str) -> bool:
        """Returns True if the body of a PUT request is worth reading."""
        has_token = self.service.token is not None
        return has_token and path.startswith(_SESSIONS) and self._is_allowed(authorization)

    def _is_allowed(self, header: str) -> bool:
        token = self.service.token
        if token is None:
            return True
        scheme, _, given = header.partition(" ")
        matches = hmac.compare_digest(given.strip().encode(), token.encode())
        return matches and scheme.lower() in ("bearer", "api-key")

    async def _handle(self, connection: Any) -> None:
        from websockets.exceptions import ConnectionClosed

        number = next(self._numbers)
        self._connections.add(connection)
        self.service.metrics.connections.set(len(self._connections))
        try:
            with contextlib.suppress(ConnectionClosed):  # the usual end of a connection
                await self._converse(connection, number)
        finally:
            self._answering.discard(connection)
            self._connections.discard(connection)
            self.service.metrics.connections.set(len(self._connections))
            self.service.engine.end([number], "closed")

    async def _converse(self, connection: Any, number: int) -> None:
        """Answers the frames of a connection one by one."""
        dialect = self.service.dialects[urlsplit(connection.request.path).path]
        session_id = _session_id(connection.request.path)
        greeting = dialect.greeting(self.service.metadata)
        if greeting is not None:
            await connection.send(greeting)
        state, prev_total_ms, num_errors = dialect.start(self.service.metadata), None, 0
        async for frame in connection:
            self._answering.add(connection)
            began, context, close = time.perf_counter(), None, None
            try:
                read = functools.partial(dialect.read, state, frame)
                incoming = await _off_loop(
                    len(frame) > _LARGE, read, self.service.limits.prompt_chars
                )
                context = incoming.context
                served = await self._serve(incoming.request, number, session_id)
                total_ms = 1000 * (time.perf_counter() - began)
                answer = _answer(dialect, incoming, Answer(served, total_ms, prev_total_ms))
                state, prev_total_ms, num_errors = incoming.state, total_ms, 0
                self._count(served, total_ms)
                if served is not None:
                    for sentence in served.warnings:
                        self._log(connection, f"{describe(served.key)}, {sentence}")
            except (MessageError, Refused) as error:
                num_errors += 1
                answer, close = dialect.error(context, str(error)), getattr(error, "close", None)
                self._count_error(connection, error)
            except Exception:  # a fault of this server: the others are served on
                num_errors += 1
                answer = dialect.error(context, _FAILED)
                self._count_error(connection, Refused(_FAILED, reason="failure"))
                logging.getLogger(_LOGGER).exception("a request failed")
            if answer is not None:
                await connection.send(answer)
            self._answering.discard(connection)
            if num_errors >= _MAX_ERRORS:
                close = _POLICY_VIOLATION
            if close is not None or self._stopping:
                await connection.close(close or _GOING_AWAY)
                return

    async def _serve(
        self, request: Request | None, number: int, session_id: str | None
    ) -> Served | None:
        """Returns the result of a request; None for one without actions.

        Raises:
          Refused: it cannot be served.
        """
        if request is None:
            return None
        key = request.session_id or session_id or number
        engine = self.service.engine
        if request.endpoint == "reset":
            ended = engine.end(request.session_ids or (key,), connection=number)
            await asyncio.wrap_future(ended)
            return None
        spec = self.service.spec
        frames = await _off_loop(
            len(request.frames) > 1, observations.read_all, spec, request.frames
        )
        self._log_unknown(observations.unknown_keys(spec, request.frames[-1]))
        words = None if request.prompt is None else self.service.tokenize(request.prompt)
        submitted = engine.submit(key, request, frames, words, connection=number)
        return await asyncio.wrap_future(submitted)

    def _count(self, served: Served | None, total_ms: float) -> None:
        if served is None:
            return
        self.service.metrics.requests.labels("repeated" if served.repeated else "served").inc()
        seconds = self.service.metrics.seconds
        seconds.labels("queue").observe(served.queue_ms / 1000)
        seconds.labels("total").observe(total_ms / 1000)

    def _count_error(self, connection: Any, error: Exception) -> None:
        self.service.metrics.requests.labels("refused").inc()
        self.service.metrics.refused.labels(getattr(error, "reason", "message")).inc()
        self._log(connection, f"refused a request: {error}")

    def _log(self, connection: Any, sentence: str) -> None:
        """Logs a sentence about a peer, unless there were many in this minute."""
        minute = int(time.monotonic() // 60)
        if minute != self._minute:
            self._minute, self._logged = minute, {}
        peer = str((connection.remote_address or ["?"])[0])
        self._logged[peer] = self._logged.get(peer, 0) + 1
        if self._logged[peer] <= _LOGGED_ERRORS:
            logging.getLogger(_LOGGER).warning("%s: %s", peer, _printable(sentence))

    def _log_unknown(self, keys: list[str]) -> None:
        new = set(keys) - self._unknown if len(self._unknown) < 100 else ()
        if new:
            self._unknown.update(new)
            logging.getLogger(_LOGGER).warning(
                "ignored keys of observations: %s",
                _printable(", ".join(k[:60] for k in sorted(new))),
            )


async def _off_loop(is_long: bool, function: Callable[..., Any], *args: Any) -> Any:
    """Returns the result of a function, which runs in another thread if that takes long."""
    return await asyncio.to_thread(function, *args) if is_long else function(*args)


def _answer(dialect: Dialect, incoming: Incoming, answer: Answer) -> Any:
    return incoming.answer if incoming.request is None else dialect.reply(incoming, answer)


def _printable(text: str) -> str:
    """Returns a text of a client as one line, which no control character can continue."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _session_id(url: str) -> str | None:
    """Returns the `session_id` of the URL, by which proxies choose a server."""
    return _checked_id(parse_qs(urlsplit(url).query).get("session_id", [""])[0])


def _checked_id(found: str) -> str | None:
    return found if 0 < len(found) <= MAX_ID and found.isprintable() else None
