"""Dialect of openpi's clients, extended by sessions.

The server speaks first: a map of metadata. Then each binary frame gets one: a map with `actions`
`[K, A]`, times and the session. An error is a text frame. Besides `actions` the reply holds plain
values only, since openpi's client slices every array of it.

Source: `WebsocketClientPolicy` and `ActionChunkBroker` of openpi, `openpi_client` 0.1.2.
"""

from collections.abc import Mapping
from typing import Any

from vla_jax.serving.dialect import Answer, Dialect, Incoming, WireFrame
from vla_jax.serving.messages import pack, unpack
from vla_jax.serving.requests import Refused, parse

_MAX_ERROR = 2000  # characters


def greeting(metadata: Mapping[str, Any]) -> bytes:
    """Returns the first frame."""
    return pack(metadata)


def start() -> None:
    """Returns the state of a new connection: there is none."""


def read(state: None, frame: WireFrame, prompt_chars: int) -> Incoming:
    """Returns the request in a binary frame.

    Raises:
      MessageError: the frame cannot be decoded.
      Refused: a field has another type or value.
    """
    if isinstance(frame, str):
        raise Refused("message must be a binary frame of MessagePack, got a text frame.")
    return Incoming(parse(unpack(frame), prompt_chars=prompt_chars), state)


def reply(incoming: Incoming, answer: Answer) -> bytes:
    """Returns the frame with the action."""
    del incoming
    if answer.served is None:
        return pack({"status": "reset successful"})
    served = answer.served
    timing = {"infer_ms": served.infer_ms, "queue_ms": served.queue_ms}
    if answer.prev_total_ms is not None:
        timing["prev_total_ms"] = answer.prev_total_ms
    return pack(
        {
            "actions": served.reply.actions,
            "server_timing": timing,
            "policy_timing": {"infer_ms": served.infer_ms},
            "session": {
                "id": served.key if isinstance(served.key, str) else None,
                "step": served.reply.step,
                "reset": served.reply.reset,
            },
        }
    )


def error(context: None, sentence: str) -> str:
    """Returns the text frame of an error."""
    del context
    return sentence[:_MAX_ERROR]


OPENPI = Dialect(greeting, start, read, reply, error)
