"""Dialect of openpi's clients, extended by sessions.

The server speaks first: a map of metadata. Then each binary frame gets one: a map with `actions`
`[K, A]`, times and the session. An error is a text frame. Besides `actions` the reply holds plain
values only, since openpi's client slices every array of it. RoboMME's clients speak the same wire
with messages of their own (`robomme_frames`).

Source: `WebsocketClientPolicy` and `ActionChunkBroker` of openpi, `openpi_client` 0.1.2.
"""

from collections.abc import Mapping
from typing import Any

from vla_jax.serving import robomme_frames
from vla_jax.serving.dialect import Answer, Dialect, Incoming, WireFrame
from vla_jax.serving.messages import MessageError, pack, unpack
from vla_jax.serving.requests import Refused, parse
from vla_jax.serving.robomme_frames import Held

_MAX_ERROR = 2000  # characters


def greeting(metadata: Mapping[str, Any]) -> bytes:
    """Returns the first frame."""
    return pack(metadata)


def read(state: Held, frame: WireFrame, prompt_chars: int) -> Incoming:
    """Returns the request in a binary frame.

    Raises:
      MessageError: the frame cannot be decoded.
      Refused: a field has another type or value.
    """
    if isinstance(frame, str):
        raise Refused("message must be a binary frame of MessagePack, got a text frame.")
    try:
        message, state = robomme_frames.expand(state, unpack(frame))
    except MessageError:
        raise
    except ValueError as error:
        raise Refused(str(error)) from None
    if message is None:
        return Incoming(None, state, pack(robomme_frames.BUFFERED))
    return Incoming(parse(message, prompt_chars=prompt_chars), state)


def reply(incoming: Incoming, answer: Answer) -> bytes:
    """Returns the frame with the action."""
    del incoming
    if answer.served is None:
        return pack(
            {"status": "reset successful", **robomme_frames.reset_finished(answer.total_ms)}
        )
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
                **({"warning": " ".join(served.warnings)} if served.warnings else {}),
            },
        }
    )


def error(context: None, sentence: str) -> str:
    """Returns the text frame of an error."""
    del context
    return sentence[:_MAX_ERROR]


OPENPI = Dialect(greeting, robomme_frames.start, read, reply, error)
