"""Frames of RoboMME's clients and of AI2's harness become observations."""

import io
import pathlib
import sys

import msgpack
import numpy as np
import pytest
from PIL import Image

from vla_jax.serving import messages, pictures, robomme_frames, vla_eval

GOLDEN = pathlib.Path(__file__).parent / "golden/serving"
sys.path.insert(0, str(GOLDEN))
import observations  # noqa: E402

CLIENTS = ("openpi-client_0.1.1", "openpi-client_0.1.2")


def recorded(name):
    """Frames that a real client sent."""
    return msgpack.unpackb((GOLDEN / f"{name}.msgpack").read_bytes())["frames"]


def assert_same(found, expected):
    """Compares maps of arrays and text, at any depth."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_same(found[key], value)
        else:
            np.testing.assert_array_equal(found[key], value)
            assert getattr(found[key], "dtype", None) == getattr(value, "dtype", None)


@pytest.mark.parametrize("client", CLIENTS)
def test_the_frames_of_the_real_openpi_client_are_its_observations(client):
    sent = [step for form in ("libero", "droid", "aloha") for step in observations.EPISODES[form]]
    found = [messages.unpack(frame) for frame in recorded(client)]
    assert len(found) == len(sent)
    for one, other in zip(found, sent, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("client", CLIENTS)
def test_our_bytes_equal_those_of_the_real_openpi_client(client):
    for frame in recorded(client):
        assert messages.pack(messages.unpack(frame)) == frame


def test_the_frames_of_the_real_harness_are_its_episodes():
    found = [vla_eval.read_envelope(frame) for frame in recorded("vla-eval_0.8.0")]
    episode = ["episode_start", *["observation"] * 3, "episode_end"]
    assert [each.kind for each in found] == ["hello", *episode, *episode]
    assert [each.seq for each in found] == list(range(1, 12))
    shown = [each.payload for each in found if each.kind == "observation"]
    for step, payload in enumerate(shown[:3]):
        (frame,), prompt = vla_eval.read_observation(payload)
        assert prompt == observations.PROMPT
        expected = {
            "image_primary": observations.image(step),
            "image_wrist": observations.image(step, 1),
            "proprio": observations.numbers(step, 8).astype(np.float32),
            "environment_state": observations.numbers(step, 22).astype(np.float32),
        }
        assert_same(frame, expected)


def test_a_frame_for_the_harness_has_text_keys_and_the_seq():
    data = vla_eval.pack_envelope("action", {"actions": np.zeros((1, 7), np.float32)}, 5)
    frame = msgpack.unpackb(data)
    assert frame.keys() == {"type", "payload", "seq", "timestamp"}
    assert (frame["type"], frame["seq"]) == ("action", 5)
    assert frame["payload"]["actions"].keys() == {"__ndarray__", "data", "dtype", "shape"}


def test_hello_asks_the_benchmark_for_the_inputs_of_the_policy():
    asked = vla_eval.hello({"observation": {"image_primary": {}, "image_wrist": {}}})
    assert asked["observation_params"] == {"send_wrist_image": True, "send_video_history": True}
    asked = vla_eval.hello({"observation": {"image_primary": {}, "proprio": {}}})
    assert asked["observation_params"] == {"send_state": True, "send_video_history": True}


def test_the_shown_video_of_the_harness_comes_before_the_present_frame():
    image = observations.image
    payload = {
        "images": {"agentview": image(3), "wrist": image(3, 1)},
        "video_history": [image(step) for step in range(3)],
        "wrist_video_history": [image(step, 1) for step in range(3)],
        "task_description": "lift",
    }
    frames, _ = vla_eval.read_observation(payload)
    assert len(frames) == 4
    for step, frame in enumerate(frames):
        assert_same(frame, {"image_primary": image(step), "image_wrist": image(step, 1)})
    payload["wrist_video_history"].pop()
    with pytest.raises(ValueError, match="histories must have one length"):
        vla_eval.read_observation(payload)


@pytest.mark.parametrize(
    ("cameras", "parts"),
    [
        (["primary"], {"image_primary": "primary"}),
        (["agentview", "wrist"], {"image_primary": "agentview", "image_wrist": "wrist"}),
        (
            ["rgb_static", "rgb_gripper"],
            {"image_primary": "rgb_static", "image_wrist": "rgb_gripper"},
        ),
        (
            ["left_camera", "head_camera"],
            {"image_primary": "head_camera", "image_left_camera": "left_camera"},
        ),
        (
            ["image_primary", "image_top"],
            {"image_primary": "image_primary", "image_top": "image_top"},
        ),
        (["robot0_eye_in_hand"], {"image_wrist": "robot0_eye_in_hand"}),
    ],
)  # fmt: skip
def test_the_cameras_of_benchmarks_are_those_of_the_policy(cameras, parts):
    images = {name: np.full((1, 1, 3), i, np.uint8) for i, name in enumerate(cameras)}
    (frame,), _ = vla_eval.read_observation({"images": images})
    assert_same(frame, {part: images[name] for part, name in parts.items()})


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ([1], "message must be a map of type, payload, seq, timestamp, got list"),
        ({"type": "reset", "payload": {}, "seq": 1}, "type must be one of hello, .* got 'reset'"),
        ({"type": "hello", "payload": 1, "seq": 1}, "payload must be a map, got int"),
        ({"type": "hello", "payload": {}, "seq": True}, "seq must be a whole number, got bool"),
    ],
)
def test_a_frame_that_is_not_of_the_harness_is_refused(message, sentence):
    with pytest.raises(messages.MessageError, match=sentence):
        vla_eval.read_envelope(messages.pack(message))


@pytest.mark.parametrize(
    ("payload", "sentence"),
    [
        ({"images": [1]}, "images must be a map of camera to image, got list"),
        ({"images": {"a": 1, "b": 2}}, "images must name the main camera with .* got a, b"),
        ({"video_history": 3}, "history of image_primary must be a list of frames, got int"),
    ],
)
def test_an_observation_of_another_form_is_refused(payload, sentence):
    with pytest.raises(messages.MessageError, match=sentence):
        vla_eval.read_observation(payload)


def picture(array, kind="png"):
    file = io.BytesIO()
    Image.fromarray(array).save(file, format=kind)
    return {"__image__": True, "format": kind, "data": file.getvalue(), "shape": [1, 1, 3]}


def test_pictures_are_read_as_rgb():
    image = observations.image(1)
    np.testing.assert_array_equal(pictures.read_picture(picture(image)), image)
    grey = pictures.read_picture(picture(image[..., 0]))
    np.testing.assert_array_equal(grey, np.repeat(image[..., :1], 3, -1))
    assert pictures.read_picture(picture(image, "jpeg")).shape == image.shape
    raw = {"__image__": True, "format": "raw", "data": image.tobytes(), "dtype": "|u1"}
    np.testing.assert_array_equal(pictures.read_picture({**raw, "shape": [16, 16, 3]}), image)


def large(width, height):
    """A PNG of 100 bytes that says it is large."""
    data = bytearray(picture(observations.image(0))["data"])
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return {"__image__": True, "format": "png", "data": bytes(data)}


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"format": "png", "data": b"nothing"}, "must be a complete png file, got 7 bytes"),
        ({**picture(observations.image(0)), "data": picture(observations.image(0))["data"][:90]},
         "must be a complete png file, got 90 bytes"),
        ({**picture(observations.image(0)), "format": "jpeg"}, "must be a complete jpeg file"),
        (large(60_000, 60_000), "png"),
        ({"format": "gif", "data": b""}, "must be png, jpeg or raw, got 'gif'"),
        ({"format": "png", "data": "text"}, "data of an image must be bytes, got str"),
        (
            {"format": "raw", "data": b"1", "dtype": "O", "shape": [1]},
            r"\|u1 of shape \[h, w, 3\], got O",
        ),
        (
            {"format": "raw", "data": b"1", "dtype": "|u1", "shape": [1, 2**40, 3]},
            "must fill its data, got 1",
        ),
    ],
)  # fmt: skip
def test_a_damaged_or_large_picture_is_one_sentence(value, sentence):
    with pytest.raises(ValueError, match=sentence):
        pictures.read_picture(value)


def test_pictures_of_a_message_are_bounded_together_before_one_is_decoded(monkeypatch):
    payload = {"images": {"front": picture(observations.image(0))}, "task_description": "lift"}
    payload["video_history"] = [picture(observations.image(1))] * 3
    monkeypatch.setattr(pictures, "MAX_BYTES", 4 * 16 * 16 * 3)
    assert len(vla_eval.read_observation(dict(payload))[0]) == 4
    monkeypatch.setattr(vla_eval, "read_picture", None)
    payload["video_history"].append(picture(observations.image(1)))
    with pytest.raises(ValueError, match="images of a message must have at most 3072 bytes"):
        vla_eval.read_observation(payload)


def test_buffered_frames_are_those_of_one_session():
    spec = {"observation": {"image_primary": {"accepts": ["observation/image"]}}}
    buffered = {
        "add_buffer": True,
        "images": observations.image(0)[None, None],
        "state": np.zeros((1, 8)),
        "session_id": "left",
    }
    _, held = robomme_frames.expand(robomme_frames.start(spec), buffered)
    now = {"observation/image": observations.image(1), "session_id": "right"}
    with pytest.raises(ValueError, match="session_id must be that of the frames of add_buffer"):
        robomme_frames.expand(held, now)
    message, held = robomme_frames.expand(held, {**now, "session_id": "left"})
    assert (len(message["frames"]), held.frames) == (2, ())


def test_buffered_frames_come_before_the_present_one_and_are_not_repeated():
    image, state = observations.image, observations.numbers
    message = {
        "add_buffer": True,
        "images": np.stack([image(step) for step in range(4)])[:, None],
        "state": np.stack([state(step, 8) for step in range(4)]),
        "exec_start_idx": 3,
    }
    buffer = robomme_frames.read_buffer(message)
    assert len(buffer) == 4
    for step, frame in enumerate(buffer):
        assert_same(frame, {"image_primary": image(step), "proprio": state(step, 8)})
    present = {"observation/image": image(3), "observation/state": state(3, 8)}
    assert robomme_frames.with_buffer(buffer, present, ["observation/image"]) == [
        *buffer[:3],
        present,
    ]
    later = {"observation/image": image(4), "observation/state": state(4, 8)}
    assert robomme_frames.with_buffer(buffer, later, ["observation/image"]) == [*buffer, later]
    assert robomme_frames.with_buffer([], later, ["observation/image"]) == [later]


def lists(count=3):
    return {
        "task_goal": ["lift the red block", "raise it"],
        "is_first_step": True,
        "front_rgb_list": [observations.image(step) for step in range(count)],
        "wrist_rgb_list": [observations.image(step, 1) for step in range(count)],
        "joint_state_list": [observations.numbers(step, 7) for step in range(count)],
        "eef_state_list": [observations.numbers(step + 1, 6) for step in range(count)],
        "gripper_state_list": [np.array([0.1 * step, 0.2]) for step in range(count)],
        "front_depth_list": [np.zeros((2, 2), np.int16)] * count,
    }


def test_the_lists_of_the_challenge_are_frames():
    message = lists()
    assert robomme_frames.read_goal(message) == "lift the red block"
    for size, state in (
        (8, observations.numbers),
        (7, lambda t, _: observations.numbers(t + 1, 6)),
    ):
        frames = robomme_frames.read_lists(message, size)
        for step, frame in enumerate(frames):
            expected = {
                "image_primary": observations.image(step),
                "image_wrist": observations.image(step, 1),
                "proprio": np.append(state(step, 7), 0.1 * step),
            }
            assert_same(frame, expected)
    assert "proprio" not in robomme_frames.read_lists(message, 0)[0]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"front_rgb_list": []}, "front_rgb_list must be a list of the frames .* got list of 0"),
        ({"gripper_state_list": None}, "gripper_state_list must be a list .* got nothing"),
        ({"wrist_rgb_list": [1]}, "wrist_rgb_list must have 3 items as front_rgb_list, got 1"),
    ],
)
def test_lists_that_do_not_fit_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        robomme_frames.read_lists({**lists(), **change}, 8)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"images": np.zeros((2, 4, 4, 3), np.uint8)}, r"must be an array \[t, 1, h, w, 3\]"),
        (
            {"state": np.zeros((3, 8))},
            r"must be an array \[2, P\], one row per image, got an array",
        ),
        ({"state": None}, "one row per image, got NoneType"),
    ],
)
def test_a_buffer_of_another_form_is_refused(change, sentence):
    message = {"images": np.zeros((2, 1, 4, 4, 3), np.uint8), "state": np.zeros((2, 8))}
    with pytest.raises(ValueError, match=sentence):
        robomme_frames.read_buffer({**message, **change})
