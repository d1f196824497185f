"""Requests of clients: the fields of openpi's message and the session's, checked one by one.

    session_id, reset, step, endpoint, session_ids, prompt, frames        further keys = observation

A request steps one session through one frame or several, in order; the reply has the action after
the last one. A client that knows none of the fields of sessions sends observation and prompt only.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

Endpoint = Literal["infer", "reset"]
SESSION_FIELDS = ("session_id", "reset", "step", "endpoint", "session_ids")
_FIELDS = (*SESSION_FIELDS, "prompt", "frames")
MAX_ID = 128  # characters of a session_id
MAX_FRAMES = 4096  # frames of one request


class Refused(ValueError):  # noqa: N818
    """A request that cannot be served; one sentence for the client, nothing has changed."""

    def __init__(self, sentence: str, *, reason: str = "request", close: int | None = None) -> None:
        """Stores the arguments.

        Args:
          sentence: name, expected, got, remedy.
          reason: label for the metrics.
          close: code with which the connection is closed after the error; None leaves it open.
        """
        super().__init__(sentence)
        self.reason = reason
        self.close = close


class Request(NamedTuple):
    """One request, decoded from a frame of any wire format."""

    frames: tuple[Mapping[str, Any], ...]  # raw observations in order; () for the endpoint "reset"
    prompt: str | None = None  # instruction; None = that of the episode
    session_id: str | None = None  # None = session of the connection
    reset: bool = False  # the first frame is the first of an episode
    step: int | None = None  # index of the first frame in the episode; None = not given
    endpoint: Endpoint = "infer"
    session_ids: tuple[str, ...] = ()  # sessions that the endpoint "reset" ends; () = session_id
    extended: bool = False  # the client knows sessions: a changed prompt is no new episode


def parse(message: Any, *, prompt_chars: int) -> Request:
    """Returns the request in a decoded message; the observation's fields are not checked yet.

    Args:
      message: from `messages.unpack`.
      prompt_chars: greatest length of a prompt.

    Raises:
      Refused: a field has another type or value.
    """
    if not isinstance(message, Mapping):
        raise Refused(f"message must be a map of fields, got {shown(message)}; send a map.")
    fields = {key: value for key, value in message.items() if key not in _FIELDS}
    frames = _frames(message.get("frames"), fields)
    extended = any(message.get(name) is not None for name in SESSION_FIELDS)
    request = Request(
        frames=frames,
        prompt=_prompt(message.get("prompt"), prompt_chars),
        session_id=_session_id("session_id", message.get("session_id")),
        reset=_reset(message.get("reset")),
        step=_step(message.get("step")),
        endpoint=_endpoint(message.get("endpoint")),
        session_ids=_session_ids(message.get("session_ids")),
        extended=extended,
    )
    if request.endpoint == "reset" or (request.reset and frames == ({},)):
        return request._replace(endpoint="reset", frames=())
    if request.reset and request.step:
        raise Refused(f"step must be 0 with reset, got {request.step}; send reset: false.")
    if request.session_ids:
        raise Refused("session_ids must be absent unless endpoint is 'reset'; use session_id.")
    return request


def _frames(frames: Any, fields: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    if frames is None:
        return (fields,)
    if fields:
        raise Refused(
            f"frames must hold all observations, got {', '.join(map(shown, [*fields][:3]))} beside "
            "it; append the present one to the list."
        )
    if not isinstance(frames, list) or not 0 < len(frames) <= MAX_FRAMES:
        raise Refused(
            f"frames must be a list of 1 to {MAX_FRAMES} observations, got {shown(frames)}; leave "
            "it out for one frame."
        )
    wrong = [frame for frame in frames if not isinstance(frame, Mapping)]
    if wrong:
        raise Refused(f"frames must be maps of an observation's fields, got {shown(wrong[0])}.")
    return tuple(frames)


def _prompt(prompt: Any, prompt_chars: int) -> str | None:
    if prompt is None:
        return None
    if not isinstance(prompt, str):
        raise Refused(f"prompt must be a str, got {shown(prompt)}; send the instruction.")
    if len(prompt) > prompt_chars:
        raise Refused(
            f"prompt must have at most {prompt_chars} characters, got {len(prompt)}; shorten it."
        )
    return prompt


def _session_id(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not 0 < len(value) <= MAX_ID or not value.isprintable():
        raise Refused(
            f"{name} must be a str of 1 to {MAX_ID} printable characters, got {shown(value)}."
        )
    return value


def _session_ids(values: Any) -> tuple[str, ...]:
    if values is None:
        return ()
    if not isinstance(values, list):
        raise Refused(f"session_ids must be a list of session_id, got {shown(values)}.")
    return tuple(dict.fromkeys(filter(None, (_session_id("session_ids", v) for v in values))))


def _reset(reset: Any) -> bool:
    if reset is None:
        return False
    if not isinstance(reset, bool | np.bool_):
        raise Refused(f"reset must be true or false, got {shown(reset)}.")
    return bool(reset)


def _step(step: Any) -> int | None:
    if step is None:
        return None
    try:
        index = step.__index__() if not isinstance(step, bool) else -1
    except (AttributeError, TypeError):  # refused below
        index = -1
    if not 0 <= index < 2**31:
        raise Refused(
            f"step must be an integer of at least 0, got {shown(step)}; count the frames of the "
            "episode."
        )
    return index


def _endpoint(endpoint: Any) -> Endpoint:
    if endpoint is None:
        return "infer"
    if not isinstance(endpoint, str) or endpoint not in ("infer", "reset"):
        raise Refused(f"endpoint must be 'infer' or 'reset', got {shown(endpoint)}.")
    return "reset" if endpoint == "reset" else "infer"


def shown(value: Any) -> str:
    """Returns a short text of a value that a stranger sent."""
    if isinstance(value, np.ndarray):
        return f"array of {value.dtype} {list(value.shape)}"
    if isinstance(value, str | bytes | list | Mapping) and len(value) > 40:
        return f"{type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."
