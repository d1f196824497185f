"""RoboMME's two dialects of openpi's wire, which bring every frame to a policy with memory.

The benchmark's own clients (`add_buffer`) send the frames since the last request in one message and
the present observation in the next. The challenge's client sends lists: all frames since the last
request, the last one being now, and before the first action the whole shown video. Both become
frames of a request, over each of which the memory steps.

Source: RoboMME/robomme_policy_learning (119d9c1), `serving/websocket_policy_server.py`;
RoboMME/robomme_benchmark (13ba8ae), `challenge_interface/server.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vla_jax.serving.dialect import wire_names
from vla_jax.serving.requests import SESSION_FIELDS, Refused, shown

Part = dict[str, Any]  # part of an observation, or key of the wire -> array, one frame
BUFFERED = {"add_buffer_finished": True, "add_buffer_time_ms": 0.0}  # answer to `add_buffer`
MAX_HELD = 2048  # frames that a connection may hold until its next observation
MAX_HELD_BYTES = 512 * 2**20  # of their images
_EEF_SIZE = 7  # numbers of the proprio that is the tool's pose and the gripper
_OWN_FIELDS = (*SESSION_FIELDS, "prompt")


class Held(NamedTuple):
    """State of a connection: frames of `add_buffer` that wait for the next observation."""

    names: Mapping[str, str]  # part of an observation -> name on the wire
    image_keys: tuple[str, ...]  # names that the image of the front camera may have
    proprio_size: int  # P of the policy; 0 = none
    frames: tuple[Part, ...] = ()
    session_id: Any = None  # of the frames, as it was sent


def start(metadata: Mapping[str, Any]) -> Held:
    """Returns the state of a new connection."""
    parts = metadata["observation"]
    keys = parts["image_primary"]["accepts"] if "image_primary" in parts else ()
    size = parts["proprio"]["shape"][0] if "proprio" in parts else 0
    return Held(wire_names(metadata), tuple(keys), size)


def expand(held: Held, message: Any) -> tuple[Any, Held]:
    """Returns a message of RoboMME's clients as one with `frames`; any other one as it is.

    Args:
      held: state of the connection.
      message: decoded.

    Returns:
      The message, or None if it asks for no action; and the state after it.

    Raises:
      ValueError: frames are of other shapes or lengths.
    """
    if not isinstance(message, Mapping):
        return message, held
    session_id = message.get("session_id")
    if held.frames and session_id != held.session_id:
        raise Refused(
            f"session_id must be that of the frames of add_buffer, got {shown(session_id)}; "
            "use a connection for each robot."
        )
    if message.get("add_buffer"):
        frames = (*held.frames, *read_buffer(message))
        num_bytes = sum(frame["image_primary"].nbytes for frame in frames)
        if len(frames) > MAX_HELD or num_bytes > MAX_HELD_BYTES:
            raise Refused(
                f"add_buffer must hold at most {MAX_HELD} frames and {MAX_HELD_BYTES} bytes until "
                f"the next observation, got {len(frames)} and {num_bytes}; send smaller images."
            )
        return None, held._replace(frames=frames, session_id=session_id)
    own = {name: message[name] for name in _OWN_FIELDS if name in message}
    if "front_rgb_list" in message:
        frames = [_named(held, part) for part in read_lists(message, held.proprio_size)]
        goal, first = read_goal(message), bool(message.get("is_first_step"))
        return {"prompt": goal, "reset": first, **own, "frames": frames}, held
    frame = {name: value for name, value in message.items() if name not in _OWN_FIELDS}
    if held.frames and frame:
        frames = with_buffer(held.frames, frame, held.image_keys)
        frames = [*(_named(held, part) for part in frames[:-1]), frame]
        return {**own, "frames": frames}, held._replace(frames=())
    return message, held._replace(frames=())


def reset_finished(total_ms: float) -> dict[str, Any]:
    """Returns what RoboMME's clients wait for after `reset`."""
    return {"reset_finished": True, "reset_time_ms": total_ms}


def _named(held: Held, part: Part) -> Part:
    return {held.names.get(name, name): value for name, value in part.items()}


def read_buffer(message: Mapping[str, Any]) -> list[Part]:
    """Returns the frames of `add_buffer`: `images [t, 1, h, w, 3]`, `state [t, P]`.

    Raises:
      ValueError: the arrays are of other shapes or lengths.
    """
    images, states = message.get("images"), message.get("state")
    if not isinstance(images, np.ndarray) or images.ndim != 5 or images.shape[1] != 1:
        raise ValueError(
            "images of add_buffer must be an array [t, 1, h, w, 3] of one camera, got "
            f"{_shape(images)}; send the frames of the front camera."
        )
    if not isinstance(states, np.ndarray) or states.ndim != 2 or len(states) != len(images):
        raise ValueError(
            f"state of add_buffer must be an array [{len(images)}, P], one row per image, got "
            f"{_shape(states)}."
        )
    frames = zip(images[:, 0], states, strict=True)
    return [{"image_primary": image, "proprio": state} for image, state in frames]


def with_buffer(buffer: Sequence[Part], frame: Part, image_keys: Sequence[str]) -> list[Part]:
    """Returns the buffered frames and the present one, which the buffer may end with already.

    Args:
      buffer: from `read_buffer`, oldest first.
      frame: the present observation.
      image_keys: names that the image of the front camera may have in it.
    """
    present = next((frame[key] for key in image_keys if key in frame), None)
    repeats = (
        bool(buffer)
        and isinstance(present, np.ndarray)
        and np.array_equal(buffer[-1]["image_primary"], present)
    )
    return [*(buffer[:-1] if repeats else buffer), frame]


def read_lists(message: Mapping[str, Any], proprio_size: int) -> list[Part]:
    """Returns the frames of a request of the challenge's client, the last one being now.

    The proprio is the joints and the gripper, or, for a policy of 7 numbers, the tool's pose and
    the gripper.

    Args:
      message: `front_rgb_list`, `wrist_rgb_list`, `joint_state_list`, `eef_state_list`,
        `gripper_state_list`.
      proprio_size: P of the policy; 0 = none.

    Raises:
      ValueError: a list is missing, empty or of another length.
    """
    front = _list(message, "front_rgb_list", None)
    frames: list[Part] = [{"image_primary": image} for image in front]
    if "wrist_rgb_list" in message:
        wrist = _list(message, "wrist_rgb_list", len(front))
        frames = [{**f, "image_wrist": image} for f, image in zip(frames, wrist, strict=True)]
    if proprio_size:
        name = "eef_state_list" if proprio_size == _EEF_SIZE else "joint_state_list"
        arms, grippers = (_list(message, n, len(front)) for n in (name, "gripper_state_list"))
        states = [
            np.concatenate([np.ravel(arm), np.ravel(gripper)[:1]])
            for arm, gripper in zip(arms, grippers, strict=True)
        ]
        frames = [{**f, "proprio": state} for f, state in zip(frames, states, strict=True)]
    return frames


def read_goal(message: Mapping[str, Any]) -> str | None:
    """Returns the instruction of the challenge's client, the first of its wordings.

    Raises:
      ValueError: it is not text.
    """
    goal = message.get("task_goal")
    goal = goal[0] if isinstance(goal, list) and goal else goal
    if goal is not None and not isinstance(goal, str):
        raise ValueError(f"task_goal must be a list of str, got {type(goal).__name__}.")
    return goal


def _list(message: Mapping[str, Any], name: str, length: int | None) -> list[Any]:
    value = message.get(name)
    if not isinstance(value, list | np.ndarray) or not len(value):
        raise ValueError(
            f"{name} must be a list of the frames since the last request, got "
            f"{'nothing' if value is None else _shape(value)}; send at least the present frame."
        )
    if length is not None and len(value) != length:
        raise ValueError(f"{name} must have {length} items as front_rgb_list, got {len(value)}.")
    return list(value)


def _shape(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array {list(value.shape)}"
    return f"{type(value).__name__}" + (f" of {len(value)}" if isinstance(value, list) else "")
