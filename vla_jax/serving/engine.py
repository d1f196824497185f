"""The one thread that computes: it takes the requests that arrived, and steps them as batches.

Each tick takes what has arrived while the last one ran; there is no timer, so that a robot alone
never waits. A request with several frames takes one tick per frame, in turn with the others. Per
session, requests are served in the order of their arrival.
"""

import concurrent.futures
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import jax
import numpy as np

from vla_jax.acting.agent import AgentState
from vla_jax.serving.observer import NO_OBSERVER, Observer
from vla_jax.serving.requests import Refused, Request
from vla_jax.serving.session_warnings import NOTHING_KNOWN, Expected, Seen, warnings_of
from vla_jax.serving.sessions import Key, Session, SessionBook, StoredReply
from vla_jax.serving.table import Frame, SessionTable, Stepped
from vla_jax.serving.waiting import Served, Waiting

Result = TypeVar("Result")
_LOGGER = __name__  # its logger is made on first use: no import changes logging
_SWEEP = 1.0  # s between two looks for expired sessions while nothing arrives


class Engine:
    """Sessions and their memory, behind a queue.

    It holds state since the table on the device is one value that every tick replaces; only its own
    thread touches it and the book.
    """

    def __init__(
        self,
        table: SessionTable,
        book: SessionBook,
        observer: Observer = NO_OBSERVER,
        *,
        expected: Expected = NOTHING_KNOWN,
        start: bool = True,
    ) -> None:
        """Starts the thread.

        Args:
          table: compiled programs.
          book: of the sessions; the engine's alone from now on.
          observer: of what happens.
          expected: requests that the policy was trained for; others get a warning.
          start: False leaves the thread to a later `start`.
        """
        self.table, self.book = table, book
        self.state = table.init()
        self._observer, self._expected = observer, expected
        self._changed = threading.Condition()
        self._arrived: list[Waiting] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        if start:
            self.start()

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """True until the thread has ended."""
        return self._thread.is_alive()

    def submit(
        self,
        key: Key,
        request: Request,
        frames: Sequence[Frame],
        words: np.ndarray | None,
        *,
        connection: int = 0,
    ) -> concurrent.futures.Future[Served]:
        """Hands in a request; the future raises `Refused` if it does not fit its session.

        Args:
          key: of the session.
          request: for the endpoint "infer".
          frames: its observations in the policy's layout.
          words: `[S]` int32, token ids of its prompt; None without one.
          connection: number of the connection, higher ones being newer.
        """
        task = Waiting(frozenset((key,)), concurrent.futures.Future())
        task.request, task.frames, task.words = request, frames, words
        task.connection = connection
        return self._add(task)

    def call(
        self, keys: Iterable[Key], function: Callable[[], Result]
    ) -> concurrent.futures.Future[Result]:
        """Runs a function on the engine's thread, after the earlier requests of some sessions."""
        return self._add(Waiting(frozenset(keys), concurrent.futures.Future(), function))

    def end(
        self, keys: Iterable[Key], why: str = "reset", *, connection: int | None = None
    ) -> concurrent.futures.Future[None]:
        """Ends sessions after their requests under way; unknown ones are ignored.

        Args:
          keys: of the sessions.
          why: for the observer.
          connection: number of the connection that asks; None = the server itself. If a newer one
            has used one of the sessions, the future raises `Refused` and none ends.
        """
        keys = tuple(keys)

        def run() -> None:
            if connection is not None:
                for key in keys:
                    self.book.check_newest(key, connection)
            for key in keys:
                self._end(key, why)

        return self.call(keys, run)

    def export(self, key: str) -> concurrent.futures.Future[tuple[Session, AgentState] | None]:
        """Returns a session and its row on the host, between two requests; None if unknown."""

        def run() -> tuple[Session, AgentState] | None:
            session = self.book.live.get(key)
            return None if session is None else (session, self._row(session))

        return self.call((key,), run)

    def place(
        self, key: str, session: Session, row: AgentState
    ) -> concurrent.futures.Future[Session]:
        """Stores a session from elsewhere; the future raises `Refused` on a full server.

        Args:
          key: of the session, which replaces a present one.
          session: its slot counts for nothing.
          row: leaves `[1, ...]`.
        """

        def run() -> Session:
            now = time.monotonic()
            evicted = None if key in self.book.live else self.book.make_room(now)
            try:
                self._save(key, session, row)
            except Exception:
                if evicted is not None:
                    self.book.restore(*evicted)
                raise
            placed = self.book.place(key, session, now)
            self.state = self.table.write(self.state, placed.slot, row)
            self._gave_way(evicted)
            return placed

        return self.call((key,), run)

    def stop(self, timeout: float) -> bool:
        """Refuses new requests, serves those that have arrived, and ends the thread.

        Args:
          timeout: s to wait.

        Returns:
          True if the thread has ended.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _add(self, task: Waiting) -> concurrent.futures.Future:
        with self._changed:
            if self._stopping:
                task.future.set_exception(
                    Refused("server is stopping; connect again later.", reason="stopping")
                )
            else:
                self._arrived.append(task)
                self._changed.notify()
        return task.future

    def _run(self) -> None:
        waiting: list[Waiting] = []
        running: deque[Waiting] = deque()
        try:
            self._serve(waiting, running)
        except Exception as error:  # logged by `_fail`; the server ends when the thread has ended
            with self._changed:
                self._stopping = True
            for task in (*running, *waiting, *self._arrived):
                if not task.future.done():
                    self._fail(task, error)
            logging.getLogger(_LOGGER).exception("the engine failed")

    def _serve(self, waiting: list[Waiting], running: deque[Waiting]) -> None:
        """Serves until `stop`; the arguments hold the tasks that are not done."""
        while True:
            with self._changed:
                if not (self._arrived or running or self._stopping):
                    self._changed.wait(_SWEEP)
                waiting += self._arrived
                self._arrived = []
                if self._stopping and not waiting and not running:
                    return
            self._sweep()
            waiting[:] = self._begin_all(waiting, running)
            if running:
                self._tick(running)

    def _begin_all(self, waiting: list[Waiting], running: deque[Waiting]) -> list[Waiting]:
        """Begins the tasks whose sessions are free; returns the others."""
        busy = {key for task in running for key in task.keys}
        later = []
        for task in waiting:
            if task.keys & busy:
                later.append(task)
            elif self._begin(task):
                running.append(task)
            else:
                continue
            busy |= task.keys
        return later

    def _begin(self, task: Waiting) -> bool:
        """Begins a task; returns True if frames are to be stepped, False if it is done."""
        if not task.future.set_running_or_notify_cancel():
            return False
        task.begun = time.perf_counter()
        try:
            if task.run is not None:
                task.future.set_result(task.run())
                return False
            return self._begin_request(task)
        except Exception as error:
            self._fail(task, error)
            return False

    def _begin_request(self, task: Waiting) -> bool:
        (key,) = task.keys
        decision = self.book.decide(key, task.request, task.words, task.connection)
        if isinstance(decision, StoredReply):
            queue_ms = 1000 * (task.begun - task.arrived)
            task.future.set_result(Served(decision, key, True, queue_ms, 0.0))
            return False
        before, now = self.book.live.get(key), time.monotonic()
        if decision.session.slot < 0:
            task.evicted = self.book.make_room(now)
        session = self.book.begin(key, decision, now)
        task.start, task.before = decision._replace(session=session), before
        seen = Seen(
            session.age,
            len(task.frames),
            decision.reset,
            None if before is None else now - before.last_used,
            task.request.prompt,
            None if before is None else before.prompt,
        )
        task.warnings = warnings_of(self._expected, seen)
        may_undo = len(task.frames) > 1 or self._observer.saved is not None
        if may_undo and (before is not None or task.evicted is not None):
            task.row = self.table.read(self.state, session.slot)
        return True

    def _tick(self, running: deque[Waiting]) -> None:
        """Steps one frame of the first tasks; those with further frames go to the end."""
        batch = [running.popleft() for _ in range(min(len(running), self.table.max_batch))]
        began = time.perf_counter()
        try:
            stepped = self._step(batch)
        except Exception:  # logged; `_recover` fails the requests
            logging.getLogger(_LOGGER).exception("a step of the policy failed")
            self._recover(batch, running)
            return
        self.state = stepped.state
        seconds = time.perf_counter() - began
        self._observer.ticked(len(batch), seconds)
        for task, actions, is_finite in zip(batch, stepped.actions, stepped.is_finite, strict=True):
            task.position += 1
            if not is_finite:
                self._undo(task)
                self._fail(task, _not_finite(actions))
            elif task.position < len(task.frames):
                running.append(task)
            else:
                self._finish(task, actions, 1000 * seconds)

    def _step(self, batch: Sequence[Waiting]) -> Stepped:
        starts = [task.start for task in batch if task.start is not None]
        return self.table.step(
            self.state,
            [start.session.slot for start in starts],
            [task.frames[task.position] for task in batch],
            [start.session.words for start in starts],
            [s.reset and t.position == 0 for s, t in zip(starts, batch, strict=True)],
        )

    def _finish(self, task: Waiting, actions: np.ndarray, infer_ms: float) -> None:
        (key,), start = task.keys, task.start
        assert start is not None
        begun, count = start.session, len(task.frames)
        reply = StoredReply(actions, begun.age, count, start.reset)
        now = time.monotonic()
        session = begun._replace(age=begun.age + count, last_used=now, last=reply)
        try:
            if self._observer.saved is not None and isinstance(key, str):
                self._save(key, session, self._row(session))
        except Exception as error:  # a full disk, most likely: a refused request changes nothing
            self._undo(task)
            self._fail(task, error)
            return
        self.book.put(key, session)
        if start.reset and task.before is not None:
            self._observer.ended("reset", task.before.age)
        self._gave_way(task.evicted)
        queue_ms = 1000 * (task.begun - task.arrived)
        task.future.set_result(Served(reply, key, False, queue_ms, infer_ms, task.warnings))

    def _row(self, session: Session) -> AgentState:
        return jax.device_get(self.table.read(self.state, session.slot))

    def _save(self, key: str, session: Session, row: AgentState) -> None:
        if self._observer.saved is not None:
            self._observer.saved(key, session, row)

    def _gave_way(self, evicted: tuple[Key, Session] | None) -> None:
        """Counts a session whose row another one has now."""
        if evicted is not None:
            self._observer.ended("gave_way", evicted[1].age)

    def _undo(self, task: Waiting) -> None:
        """Restores the sessions and the row as they were before a request."""
        (key,), start = task.keys, task.start
        if task.row is not None and task.position and start is not None:
            self.state = self.table.write(self.state, start.session.slot, task.row)
        self.book.put(key, task.before)
        if task.evicted is not None:
            self.book.restore(*task.evicted)

    def _fail(self, task: Waiting, error: Exception) -> None:
        """Gives an error to the client; one that is not its own goes to the log."""
        if not isinstance(error, Refused):
            logging.getLogger(_LOGGER).error("a request failed", exc_info=error)
            error = Refused(
                "server failed to serve the request; its operator finds the cause in the log.",
                reason="failure",
            )
        task.future.set_exception(error)

    def _recover(self, batch: Sequence[Waiting], running: deque[Waiting]) -> None:
        """Refuses a batch whose step failed; all sessions end if their memory is gone with it."""
        lost = any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state))
        tasks = [*batch, *running] if lost else batch
        for task in tasks:
            if not lost:
                self._undo(task)
            self._fail(task, RuntimeError("the step failed"))
        if lost:
            running.clear()
            for key, session in list(self.book.live.items()):
                self.book.end(key, "ended by a failure of the server")
                self._ended(key, "failure", session.age)
            self.state = self.table.init()

    def _sweep(self) -> None:
        for key, session in self.book.expire(time.monotonic()).items():
            self._ended(key, "expired", session.age)

    def _end(self, key: Key, why: str) -> None:
        session, is_lost = self.book.live.get(key), self.book.is_lost(key)
        self.book.end(key)
        if session is not None:
            self._ended(key, why, session.age)
        elif is_lost:
            self._remove(key)

    def _ended(self, key: Key, why: str, age: int) -> None:
        self._observer.ended(why, age)
        self._remove(key)

    def _remove(self, key: Key) -> None:
        if self._observer.removed is not None and isinstance(key, str):
            try:
                self._observer.removed(key)
            except OSError as error:  # the session has ended all the same
                logging.getLogger(_LOGGER).warning("the file of a session remains: %s", error)


def _not_finite(actions: np.ndarray) -> Refused:
    return Refused(
        f"action must be finite numbers, got {actions[0].tolist()}, which was not sent; check the "
        "observation, and use an earlier checkpoint if the params have NaN.",
        reason="not_finite",
    )
