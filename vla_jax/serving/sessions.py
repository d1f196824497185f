"""Sessions: whose memory is in which row of the table, how old it is, and when it ends.

A session is one memory. A named one (`session_id`) outlives its connections and ends after a time
without requests; an anonymous one is that of its connection and ends with it. When all rows are
taken, the anonymous session that is idle longest gives way; the reason is kept, so that its next
request is an error and never meets an empty memory.
"""

import collections
import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from vla_jax.serving.requests import Refused, Request

Key = str | int  # session_id, or the number of the connection of an anonymous session
IDLE = 10.0  # s without a request after which an anonymous session may give way
_KEPT = 16  # ended sessions whose reason is kept, for each row of the table; at least 1024
TRY_AGAIN_LATER = 1013  # close code


class StoredReply(NamedTuple):
    """Result of a request, kept for a client that asks again."""

    actions: np.ndarray  # [K, A] float32
    step: int  # index in the episode of the first frame of the request
    num_frames: int
    reset: bool  # the request began an episode


class Session(NamedTuple):
    """One memory; a new value after each request."""

    slot: int  # row of the table
    age: int  # frames of the episode so far
    prompt: str
    words: np.ndarray  # [S] int32, token ids of the prompt
    extended: bool  # the client has used a field of sessions
    last_used: float  # s, of `time.monotonic`
    last: StoredReply | None = None
    busy: bool = False  # a request is under way
    connection: int = 0  # number of the newest connection that has used it


class Ended(NamedTuple):
    """A session that ended without its client's knowledge."""

    why: str  # end of a sentence
    prompt: str
    extended: bool


_LOST = Ended("was lost, since its file is damaged", "", True)


class Admitted(NamedTuple):
    """Decision to step a session."""

    session: Session  # with age and prompt before the request's first frame
    reset: bool  # the first frame begins an episode


class SessionBook:
    """All sessions of a server, by key; used by one thread.

    It holds state, since connections come and go while the server runs; each session in it is a
    value that is replaced as a whole once its request has succeeded.
    """

    def __init__(self, num_rows: int, ttl: float, lost: Iterable[str] = ()) -> None:
        """Makes an empty book.

        Args:
          num_rows: rows of the table, the greatest number of sessions.
          ttl: s without a request after which a named session ends.
          lost: digests of the named sessions whose files are damaged.
        """
        self.num_rows = num_rows
        self.ttl = ttl
        self.live: dict[Key, Session] = {}
        self._free = list(range(num_rows))[::-1]
        self._ended: collections.OrderedDict[Key, Ended] = collections.OrderedDict()
        self._lost = set(lost)

    def decide(
        self, key: Key, request: Request, words: np.ndarray | None, connection: int = 0
    ) -> Admitted | StoredReply:
        """Returns how a request is to be served; changes nothing.

        Args:
          key: of the session.
          request: for the endpoint "infer".
          words: `[S]` int32, token ids of the request's prompt; None without one.
          connection: number of the connection, higher ones being newer.

        Returns:
          The session to step, with slot −1 if it has no row yet, or the stored reply to a request
          that has been served before.

        Raises:
          Refused: the request does not fit the session.
        """
        self.check_newest(key, connection)
        session = self.live.get(key)
        ended = _LOST if self.is_lost(key) else self._ended.get(key)
        known = session or ended
        extended = request.extended or (known is not None and known.extended)
        starts = request.reset or request.step == 0
        if known is not None and not extended and request.prompt is not None:
            starts = starts or request.prompt != known.prompt  # a new episode for openpi's clients
        if session is None and not starts:
            _check_new(key, request, ended)
            starts = True
        if session is not None and not starts:
            repeated = _repeated(session, request)
            if repeated is not None:
                return repeated
        prompt = request.prompt
        if prompt is None and session is not None and not starts:
            prompt, words = session.prompt, session.words
        if prompt is None or words is None:
            raise Refused(
                "prompt must be given with the first frame of an episode, got none; send the "
                "instruction.",
                reason="prompt",
            )
        age = 0 if starts or session is None else session.age
        slot = -1 if session is None else session.slot
        session = Session(slot, age, prompt, words, extended, 0.0, connection=connection)
        return Admitted(session, starts)

    def check_newest(self, key: Key, connection: int) -> None:
        """Checks that no newer connection has used a session.

        Raises:
          Refused: one has.
        """
        session = self.live.get(key)
        if session is not None and connection < session.connection:
            raise Refused(
                f"{describe(key)} must be used by one robot, got a request of an older connection "
                "than its last one; give every robot a session_id of its own.",
                reason="in_use",
            )

    def is_lost(self, key: Key) -> bool:
        """Returns True for a session whose file is damaged, until it begins anew."""
        return bool(self._lost) and isinstance(key, str) and digest(key) in self._lost

    def begin(self, key: Key, start: Admitted, now: float) -> Session:
        """Gives a session a row if it has none, and marks it as busy.

        Returns:
          The session; `put` replaces it after the last frame, `put(key, before)` on failure.

        Raises:
          IndexError: all rows are taken; `make_room` comes first.
        """
        slot = start.session.slot
        if slot < 0:
            slot = self._free.pop()
        begun = start.session._replace(slot=slot, last_used=now)
        present = self.live.get(key)
        self.live[key] = (present or begun)._replace(busy=True, last_used=now)
        return begun

    def put(self, key: Key, session: Session | None) -> None:
        """Stores a session after a request, or frees the row of one that never began."""
        if session is None:
            self._free.append(self.live.pop(key).slot)
            return
        self.live[key] = session._replace(busy=False)
        self._forget(key)

    def place(self, key: Key, session: Session, now: float) -> Session:
        """Stores an imported session in a row of its own or in that of the session it replaces.

        Raises:
          IndexError: all rows are taken; `make_room` comes first.
        """
        present = self.live.get(key)
        slot = self._free.pop() if present is None else present.slot
        placed = session._replace(slot=slot, last_used=now, busy=False)
        self.live[key] = placed
        self._forget(key)
        return placed

    def end(self, key: Key, why: str | None = None) -> bool:
        """Ends a session and frees its row.

        Args:
          key: of the session.
          why: end of the sentence that its next request gets; None forgets the session.

        Returns:
          True if there was one.
        """
        session = self.live.pop(key, None)
        if why is None:
            self._forget(key)
        if session is None:
            return False
        self._free.append(session.slot)
        if why is not None:
            self._ended[key] = Ended(why, session.prompt, session.extended)
            while len(self._ended) > max(1024, _KEPT * self.num_rows):
                self._ended.popitem(last=False)
        return True

    def expire(self, now: float) -> dict[str, Session]:
        """Ends the named sessions that have been idle for too long, and returns them."""
        late = {
            key: session
            for key, session in self.live.items()
            if isinstance(key, str) and not session.busy and now - session.last_used > self.ttl
        }
        for key in late:
            self.end(key, f"expired after {self.ttl:g} s without a request")
        return late

    def make_room(self, now: float) -> tuple[Key, Session] | None:
        """Frees a row if all are taken.

        Returns:
          The session that gave way, which `restore` brings back; None if a row was free.

        Raises:
          Refused: all rows are taken by named sessions, or by others that are not idle.
        """
        if self._free:
            return None
        idle = [
            (session.last_used, key)
            for key, session in self.live.items()
            if isinstance(key, int) and not session.busy and now - session.last_used >= IDLE
        ]
        if not idle:
            raise Refused(
                f"server is full: {self.num_rows} sessions are in use; end one, or start the server"
                " with more --sessions.",
                reason="full",
                close=TRY_AGAIN_LATER,
            )
        _, key = min(idle)
        session = self.live[key]
        self.end(key, "gave way to another one while it was idle on a full server")
        return key, session

    def restore(self, key: Key, session: Session) -> None:
        """Brings back a session that gave way to one that has failed.

        Nothing happens if it has begun anew, or if its connection is closed.
        """
        if key in self._ended and session.slot in self._free:
            self._free.remove(session.slot)
            self.live[key] = session
            self._forget(key)

    def _forget(self, key: Key) -> None:
        """Drops what is known of a session that has ended."""
        self._ended.pop(key, None)
        if self.is_lost(key):
            self._lost.discard(digest(str(key)))


def _check_new(key: Key, request: Request, ended: Ended | None) -> None:
    """Raises an error if a session without memory is asked to go on."""
    if ended is not None:
        raise Refused(
            f"{describe(key)} {ended.why}, its memory is gone; begin a new episode with reset: "
            "true.",
            reason="expired",
        )
    if request.step:
        raise Refused(
            f"step must be 0 for {describe(key)}, which is unknown or has expired, got "
            f"{request.step}; begin a new episode with step 0.",
            reason="expired",
        )


def _repeated(session: Session, request: Request) -> StoredReply | None:
    """Returns the stored reply if the request was served before; None if it is the next one."""
    step, last = request.step, session.last
    if step is None or step == session.age:
        return None
    if last is not None and (step, len(request.frames)) == (last.step, last.num_frames):
        return last
    raise Refused(
        f"step must be {session.age}, got {step}; every frame of an episode is sent once and in "
        "order, or begin a new episode with step 0.",
        reason="step",
    )


def digest(session_id: str) -> str:
    """Returns a name for a session's file, which says nothing of the id that a client chose."""
    return hashlib.sha256(session_id.encode()).hexdigest()[:32]


def describe(key: Key) -> str:
    """Returns a session as the subject of a sentence."""
    return f"session '{key}'" if isinstance(key, str) else "the session of this connection"
