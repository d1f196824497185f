"""The loops of the page on robots: every frame is sent once, and an episode begins with a reset."""

import contextlib
import importlib.util
import pathlib
import re
import sys
import types

import fake_server
import numpy as np
import pytest
from websockets.sync.client import connect

from vla_jax.serving import messages
from vla_jax.serving.client import Client

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = ROOT / "examples/robots"
ACTION = np.array([[0.1, 0.2, 0.3, -1.0]], np.float32)
IMAGE = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def server():
    """Port of a server, and the requests that it got."""
    requests = []

    def answer(_, request):
        requests.append(request)
        return {"actions": ACTION}

    features = {"features": ["session_id", "reset", "step", "endpoint"]}
    with fake_server.serving(answer, metadata=features) as port:
        yield port, requests


class OpenPIClient:
    """The part of openpi-client's interface that the loop uses; it needs NumPy below 2."""

    def __init__(self, host, port):
        self.opened = contextlib.ExitStack()
        url = f"ws://{host}:{port}"
        self.socket = self.opened.enter_context(connect(url, compression=None))
        self.socket.recv()

    def infer(self, observation):
        self.socket.send(messages.pack(observation))
        return messages.unpack(self.socket.recv())


def test_the_loop_of_openpi_client(server, monkeypatch):
    clients = []

    def make(*arguments):
        clients.append(OpenPIClient(*arguments))
        return clients[-1]

    stand_in = types.SimpleNamespace(WebsocketClientPolicy=make)
    monkeypatch.setitem(sys.modules, "openpi_client", types.ModuleType("openpi_client"))
    monkeypatch.setitem(sys.modules, "openpi_client.websocket_client_policy", stand_in)
    port, requests = server
    sent = []
    robot = types.SimpleNamespace(
        read=lambda: (IMAGE, IMAGE, np.zeros(3, np.float32)), send=sent.append
    )
    load("openpi_loop").run(robot, "lift", num_steps=3, hz=1000.0, port=port)
    clients[0].opened.close()
    assert [request["reset"] for request in requests] == [True, False, False]
    assert {request["prompt"] for request in requests} == {"lift"}
    np.testing.assert_array_equal(sent, np.repeat(ACTION, 3, axis=0))


def test_the_loop_of_lerobot(server):
    port, requests = server
    sent = []
    joints = ["pan.pos", "lift.pos", "roll.pos", "gripper.pos"]
    robot = types.SimpleNamespace(
        observation_features={**dict.fromkeys(joints, float), "front": (2, 2, 3)},
        action_features=dict.fromkeys(joints, float),
        get_observation=lambda: {**dict(zip(joints, range(4), strict=True)), "front": IMAGE},
        send_action=sent.append,
    )
    with Client(f"ws://127.0.0.1:{port}") as client:
        load("lerobot_loop").run(robot, client, "lift", num_steps=2, hz=1000.0)
    frames = [request for request in requests if "endpoint" not in request]
    assert [frame["step"] for frame in frames] == [0, 1]
    np.testing.assert_array_equal(frames[0]["observation/state"], np.arange(4, dtype=np.float32))
    np.testing.assert_array_equal(frames[0]["observation/image"], IMAGE)
    assert list(sent[0]) == joints
    assert sent[0]["gripper.pos"] == 0.0
    assert sent[0]["pan.pos"] == pytest.approx(0.1)


@pytest.fixture
def ros(monkeypatch):
    """Modules of ROS 2 with the few names that the node uses; returns the published messages."""
    published = []

    class Node:
        def __init__(self, name):
            self.name = name

        def create_subscription(self, *_):
            pass

        def create_publisher(self, *_):
            return types.SimpleNamespace(publish=published.append)

        def create_timer(self, *_):
            pass

    modules = {
        "rclpy": {},
        "rclpy.node": {"Node": Node},
        "sensor_msgs": {},
        "sensor_msgs.msg": {"Image": object, "JointState": object},
        "std_msgs": {},
        "std_msgs.msg": {"Float32MultiArray": types.SimpleNamespace},
    }
    for name, names in modules.items():
        module = types.ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    return published


@pytest.mark.parametrize("encoding", ["rgb8", "bgr8"])
def test_the_node_of_ros_sends_rgb_images(encoding, ros, server):
    port, requests = server
    pixels = IMAGE if encoding == "rgb8" else IMAGE[..., ::-1]
    rows = np.zeros((2, 8), np.uint8)  # rows of an image may have padding
    rows[:, :6] = pixels.reshape(2, 6)
    message = {"height": 2, "width": 2, "step": 8, "encoding": encoding, "data": rows.tobytes()}
    with Client(f"ws://127.0.0.1:{port}") as client:
        node = load("ros2_node").PolicyNode(client, "lift")
        node.act()  # nothing has been seen yet
        node.see(types.SimpleNamespace(**message))
        node.feel(types.SimpleNamespace(position=[0.5, 1.0]))
        node.act()
        node.seen -= 1.0  # the camera is silent
        node.act()
    assert len(requests) == len(ros) + 1 == 2  # one observation, and the end of the session
    np.testing.assert_array_equal(requests[0]["observation/image"], IMAGE)
    np.testing.assert_allclose(ros[0].data, ACTION[0])


def test_the_page_shows_the_files():
    page = (ROOT / "docs/robot.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```py\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert shown == [
        (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        for name in ("openpi_loop", "lerobot_loop", "ros2_node")
    ]
