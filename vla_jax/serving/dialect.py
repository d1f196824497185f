"""Interface of a dialect: the messages of one kind of client to requests, and replies back."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vla_jax.serving.requests import Request
from vla_jax.serving.waiting import Served

WireFrame = bytes | str  # a binary or a text frame of a WebSocket


class Incoming(NamedTuple):
    """A decoded frame."""

    request: Request | None  # None = nothing to compute
    state: Any  # of the dialect on this connection, given to the next `read`
    answer: WireFrame | None = None  # sent if there is no request; None = nothing is sent
    context: Any = None  # of the frame, for `reply` and `error`, such as its sequence number


class Answer(NamedTuple):
    """Result of a request."""

    served: Served | None  # None for the endpoint "reset"
    total_ms: float  # from the arrival of the frame until now
    prev_total_ms: float | None  # of the previous request on this connection; None for the first


class Dialect(NamedTuple):
    """Member of the family of wire formats, one per path."""

    # metadata of the server -> its first frame; None = the client speaks first
    greeting: Callable[[Mapping[str, Any]], WireFrame | None]
    # metadata of the server -> state of the dialect on a new connection
    start: Callable[[Mapping[str, Any]], Any]
    # (state, frame, greatest length of a prompt) -> what the frame asks for; raises `Refused` or
    # `MessageError`
    read: Callable[[Any, WireFrame, int], Incoming]
    reply: Callable[[Incoming, Answer], WireFrame | None]  # None = nothing is sent
    error: Callable[[Any, str], WireFrame]  # (context, or None if `read` failed; sentence) -> frame


def wire_names(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Returns part of an observation -> its first name on the wire, of the parts in metadata."""
    return {part: str(about["accepts"][0]) for part, about in metadata["observation"].items()}
