"""Dialect of AI2's vla-evaluation-harness, whose episodes are explicit.

Every frame is a map `{type, payload, seq, timestamp}`. The client says hello first; an episode is
`episode_start`, observations, `episode_end`; only hello and observations are answered, under the
same `seq`. An observation outside of an episode is an error: a client that lost its connection in
mid-episode goes on without `episode_start`, and would meet an empty memory.

Source: vla-eval 0.8.0, `protocol/messages.py`, `model_servers/serve.py`, `benchmarks/robomme`.
"""

import itertools
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from vla_jax.serving import messages, requests
from vla_jax.serving.dialect import Answer, Dialect, Incoming, WireFrame, wire_names
from vla_jax.serving.messages import MessageError
from vla_jax.serving.pictures import check_sizes, is_picture, read_picture
from vla_jax.serving.requests import Refused, Request

TYPES = ("hello", "observation", "action", "episode_start", "episode_end", "error")
PROTOCOL_VERSION = 1
MAX_ERROR = 2000  # characters
_WRIST = ("wrist", "hand", "gripper")  # parts of the names of cameras on the arm
# names of the main camera in the harness's benchmarks
_PRIMARY = ("primary", "agentview", "front", "static", "base", "head", "scene", "image")


_HISTORIES = {  # frames of a shown video -> part of the observation
    "video_history": "image_primary",
    "wrist_video_history": "image_wrist",
    "states_history": "proprio",
}


class Phase(NamedTuple):
    """State of a connection."""

    metadata: Mapping[str, Any]  # of the server
    in_episode: bool = False
    starts: bool = False  # the next observation is the first of an episode


class Envelope(NamedTuple):
    """One frame of the harness."""

    kind: str  # one of `TYPES`
    payload: Mapping[str, Any]
    seq: int  # number of the request, repeated in its answer


def read_envelope(data: bytes) -> Envelope:
    """Returns the frame in some bytes.

    Raises:
      MessageError: the data is not such a frame.
    """
    value = messages.unpack(data)
    if not isinstance(value, dict):
        raise MessageError(
            f"message must be a map of type, payload, seq, timestamp, got {type(value).__name__}."
        )
    kind, payload, seq = (value.get(name) for name in ("type", "payload", "seq"))
    if kind not in TYPES:
        raise MessageError(f"type must be one of {', '.join(TYPES)}, got {str(kind)[:40]!r}.")
    if not isinstance(payload, dict):
        raise MessageError(f"payload must be a map, got {type(payload).__name__}.")
    if type(seq) is not int:
        raise MessageError(f"seq must be a whole number, got {type(seq).__name__}.")
    return Envelope(kind, payload, seq)


def pack_envelope(kind: str, payload: Mapping[str, Any], seq: int) -> bytes:
    """Returns a frame as bytes; arrays have str keys, as the harness reads them."""
    frame = {"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()}
    return messages.pack(frame, text_keys=True)


def hello(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the payload of the answer to hello.

    Args:
      metadata: of the server; the benchmark is asked for the parts of its observation.
    """
    parts = metadata.get("observation", {})
    wants = {
        "send_wrist_image": "image_wrist" in parts,
        "send_state": "proprio" in parts,
        "send_video_history": True,  # shown before the first action; the memory steps over it
    }
    gripper = {"name": "gripper", "dims": 1, "format": "binary_close_negative", "range": [-1, 1]}
    return {
        "harness_version": f"vla_jax {metadata.get('version', '')}",
        "protocol_version": PROTOCOL_VERSION,
        "model_server": "vla_jax",
        "capabilities": {},
        "observation_params": {name: wanted for name, wanted in wants.items() if wanted},
        "action_spec": {"gripper": gripper},
    }


def greeting(metadata: Mapping[str, Any]) -> None:
    """Returns no first frame: the client speaks first."""


def read(phase: Phase, frame: WireFrame, prompt_chars: int) -> Incoming:
    """Returns what a frame asks for; `context` is its `seq`.

    Raises:
      MessageError: the frame cannot be decoded.
      Refused: an observation is outside of an episode, or a field has another type or value.
    """
    if isinstance(frame, str):
        raise Refused("message must be a binary frame of MessagePack, got a text frame.")
    kind, payload, seq = read_envelope(frame)
    if kind == "hello":
        answer = pack_envelope("hello", hello(phase.metadata), seq)
        return Incoming(None, phase, answer, seq)
    if kind == "episode_start":
        return Incoming(None, phase._replace(in_episode=True, starts=True), None, seq)
    if kind == "episode_end":
        ended = phase._replace(in_episode=False)
        return Incoming(Request((), endpoint="reset", extended=True), ended, None, seq)
    if kind != "observation":
        return Incoming(None, phase, None, seq)
    try:
        request = _request(phase, payload, prompt_chars)
    except (Refused, MessageError):
        raise
    except ValueError as error:
        raise Refused(str(error)) from None
    return Incoming(request, phase._replace(starts=False), None, seq)


def _request(phase: Phase, payload: Mapping[str, Any], prompt_chars: int) -> Request:
    if not phase.in_episode:
        raise Refused(
            "observation must come after episode_start, got one outside of an episode, which the "
            "memory of a lost connection does not outlive; start the episode again."
        )
    parts, prompt = read_observation(payload)
    names = wire_names(phase.metadata)
    frames = [{names.get(part, part): value for part, value in each.items()} for each in parts]
    if not frames[-1]:
        raise Refused("observation must have images or states, got neither; check the benchmark.")
    message = {"frames": frames, "prompt": prompt, "reset": phase.starts}
    return requests.parse(message, prompt_chars=prompt_chars)


def reply(incoming: Incoming, answer: Answer) -> bytes | None:
    """Returns the frame with the actions, `[A]` or `[K, A]`; None for the end of an episode."""
    if answer.served is None:
        return None
    actions = answer.served.reply.actions
    payload = {"actions": actions[0] if len(actions) == 1 else actions}
    return pack_envelope("action", payload, incoming.context)


def error(context: int | None, sentence: str) -> bytes:
    """Returns the frame of an error, which ends the episode but not the connection."""
    return pack_envelope("error", {"error": sentence[:MAX_ERROR]}, context or 0)


def read_observation(payload: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str | None]:
    """Returns the frames of an observation, the last one being now, and the instruction.

    `video_history` becomes the frames before it: images only, so a policy that takes proprio
    needs `states_history` as well.

    Raises:
      MessageError: the images are not a map, or none is that of the main camera.
      ValueError: an image file is damaged.
    """
    images = payload.get("images", {})
    if not isinstance(images, dict):
        raise MessageError(f"images must be a map of camera to image, got {type(images).__name__}.")
    histories = (payload.get(name) for name in _HISTORIES)
    lists = [values for values in histories if isinstance(values, list)]
    check_sizes(itertools.chain(images.values(), *lists))
    known = ("images", "states", "state", "task_description")
    extra = {name: value for name, value in payload.items() if name not in known}
    history = _read_history(extra)
    frame = {**extra, **_read_cameras(images)}
    state = payload.get("states", payload.get("state"))
    if state is not None:
        frame["proprio"] = state
    return [*history, frame], payload.get("task_description")


def _read_history(extra: dict[str, Any]) -> list[dict[str, Any]]:
    """Removes the shown video from the further fields and returns its frames."""
    columns = {part: extra.pop(name, None) for name, part in _HISTORIES.items()}
    columns = {part: values for part, values in columns.items() if values is not None}
    if not columns:
        return []
    for part, values in columns.items():
        if not isinstance(values, list | np.ndarray):
            raise MessageError(
                f"history of {part} must be a list of frames, got {type(values).__name__}."
            )
    lengths = {part: len(values) for part, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise MessageError(f"histories must have one length, got {lengths}.")
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, map(_image, row), strict=True)) for row in rows]


def _read_cameras(images: Mapping[str, Any]) -> dict[str, Any]:
    """Returns part of an observation -> image, by the names of the cameras."""
    wrist = [name for name in images if any(word in name for word in _WRIST)]
    others = [name for name in images if name not in wrist]
    named = [n for word in _PRIMARY for n in others if word in n]
    if len(others) > 1 and not named:
        raise MessageError(
            f"images must name the main camera with {', '.join(_PRIMARY)}, got "
            f"{', '.join(name[:40] for name in others)}; rename it in the benchmark."
        )
    chosen = {"image_primary": (named or others)[:1], "image_wrist": wrist[:1]}
    parts = {part: names[0] for part, names in chosen.items() if names}
    for name in images:
        if name not in parts.values():
            parts[name if name.startswith("image_") else f"image_{name}"] = name
    return {part: _image(images[name]) for part, name in parts.items()}


def _image(value: Any) -> Any:
    return read_picture(value) if is_picture(value) else value


VLA_EVAL = Dialect(greeting, Phase, read, reply, error)
