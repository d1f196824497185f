"""Faults of clients against a policy server: what was sent, and what came back.

    python tests/campaigns/serving_faults.py RUN_DIR

After each fault a healthy session, which has been going on all the time, must get the actions that
it gets without faults.
"""

import argparse
import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from mutations_serving import broken_rule
from served import serve
from serving_load import PROMPT, Shapes, observation, shapes_of
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from vla_jax.serving import messages
from vla_jax.serving.client import Client

ENDLESS = """
import sys, numpy as np
sys.path[:0] = {path}
from serving_load import observation
from vla_jax.serving.client import Client
client, step = Client('ws://127.0.0.1:{port}', session_id='killed'), 0
while True:
    client.infer(observation({shapes}, 7, step), prompt='lift')
    step += 1
    print(step, flush=True)
"""


class Row(NamedTuple):
    """One fault."""

    sent: str
    came_back: str


class Target(NamedTuple):
    """A server, and what its policy takes."""

    port: int
    shapes: Shapes

    @property
    def image(self) -> str | None:
        """Key of the first image; None without one."""
        return next((key for key, shape in self.shapes.items() if len(shape) == 3), None)

    @property
    def state(self) -> str:
        """Key of the first column of numbers."""
        return next(key for key, shape in self.shapes.items() if len(shape) == 1)


@contextlib.contextmanager
def opened(target: Target) -> Iterator[Any]:
    """Opens a connection and reads the first frame."""
    with connect(
        f"ws://127.0.0.1:{target.port}",
        compression=None,
        proxy=None,
        max_size=None,
        ping_interval=None,
        close_timeout=2,
    ) as connection:
        connection.recv(timeout=30)
        yield connection


def ask(target: Target, message: Any) -> str:
    """Sends a message on a connection of its own; returns what came back, in words."""
    with opened(target) as connection:
        connection.send(message if isinstance(message, bytes | str) else messages.pack(message))
        try:
            answer = connection.recv(timeout=60)
        except ConnectionClosed as closed:
            return f"closed with {closed.rcvd.code if closed.rcvd else 1006}"
    if isinstance(answer, bytes):
        return "actions" if "actions" in messages.unpack(answer) else "another reply"
    broken = broken_rule(answer)
    return f"RULE BROKEN: {broken}" if broken else f"“{answer}”"


def seen(target: Target, **changes: Any) -> dict[str, Any]:
    """Returns an observation with changed fields, as the first of an episode."""
    fields = {**observation(target.shapes, 1, 0), "prompt": PROMPT, "reset": True}
    return {**fields, **changes}


def messages_of(target: Target) -> dict[str, Any]:
    """Returns name -> message of a client that is wrong, or unusual but right."""
    state = np.asarray(observation(target.shapes, 1, 0)[target.state])
    listed: dict[str, Any] = {
        "a text frame": "hello",
        "no map": [1, 2],
        "NaN in the state": {target.state: np.full_like(state, np.nan)},
        "a float64 above the float32 range": {target.state: np.full(state.shape, 1e39)},
        "a state of another size": {target.state: state[:-1]},
        "a state of objects (dtype O)": messages.pack(seen(target)).replace(b"<f4", b"|O8"),
        "a prompt of 1 MB": {"prompt": "x" * 1_000_000},
        "a prompt that is no text": {"prompt": 7},
        "step 5 of an unknown session": {"session_id": "new", "step": 5, "reset": False},
        "a session_id of 1,000 characters": {"session_id": "x" * 1000},
        "20 MB in one message": {"padding": np.zeros(20_000_000, np.uint8)},
    }
    if target.image:
        height, width, _ = target.shapes[target.image]
        image = np.asarray(observation(target.shapes, 1, 0)[target.image])
        listed |= {
            "an image [3, h, w]": {target.image: image.transpose(2, 0, 1)},
            "floats in [0, 1] as an image": {target.image: np.float32(image / 255)},
            "floats in [0, 255] as an image": {target.image: np.float32(image)},
            "a grey image [h, w]": {target.image: image[..., 0]},
            "a grey image [h, w, 1]": {target.image: image[..., :1]},
            "an image with alpha [h, w, 4]": {target.image: np.dstack([image, image[..., 0]])},
            "an image of 4 times the size": {target.image: np.repeat(np.repeat(image, 4, 0), 4, 1)},
            "an image of another aspect ratio": {target.image: image[: height // 2]},
            "an image of 0 pixels": {target.image: np.zeros((0, width, 3), np.uint8)},
        }
    return {
        name: seen(target, **message) if isinstance(message, dict) else message
        for name, message in listed.items()
    }


def wrong_messages(target: Target) -> Iterator[Row]:
    """Sends each message."""
    for name, message in messages_of(target).items():
        yield Row(name, ask(target, message))


def status(port: int, headers: dict[str, str], path: str = "/") -> str:
    """Returns the status of a WebSocket handshake."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
    upgrade["Sec-WebSocket-Key"] = "dGhlIHNhbXBsZSBub25jZQ=="
    connection.request("GET", path, headers={**upgrade, **headers})
    found = connection.getresponse().status
    connection.close()
    return f"HTTP {found}"


def handshakes(target: Target) -> Iterator[Row]:
    """Connects as a web page, to an unknown path, and without a word."""
    yield Row("a header Origin: http://evil.example", status(target.port, {"Origin": "http://e"}))
    yield Row("the path /admin", status(target.port, {}, "/admin"))
    with socket.create_connection(("127.0.0.1", target.port)) as silent:
        silent.settimeout(30)
        began = time.monotonic()
        end = silent.recv(1)
        waited = time.monotonic() - began
    yield Row("a TCP connection that never speaks", f"closed after {waited:.0f} s ({end!r})")


def wrong_token(run_dir: str) -> Iterator[Row]:
    """Connects to a server with a token."""
    with serve(run_dir, "--sessions", "1", environment={"VLA_JAX_TOKEN": "secret"}) as server:
        for name, headers in {
            "no token": {},
            "a wrong token": {"Authorization": "Bearer guess"},
            "the right token": {"Authorization": "Api-Key secret"},
        }.items():
            yield Row(name, status(server.port, headers))


def silent_connections(target: Target) -> Iterator[Row]:
    """Opens connections that never send anything: they take no session."""
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(opened(target))
        yield Row("100 open connections that never speak", f"a new robot gets {robot(target)}")


def robot(target: Target) -> str:
    """Returns what a new robot gets."""
    with Client(f"ws://127.0.0.1:{target.port}", patience=20) as client:
        reply = client.infer(observation(target.shapes, 3, 0), prompt=PROMPT)
    return "actions" if np.isfinite(reply.actions).all() else "no actions"


def slow_reader(target: Target) -> Iterator[Row]:
    """Sends 2,000 requests without reading an answer."""
    with opened(target) as connection:
        data = messages.pack(seen(target, reset=False))
        connection.socket.settimeout(5)
        count = 0
        with contextlib.suppress(OSError, ConnectionClosed):
            while count < 2000:
                connection.send(data)
                count += 1
        yield Row(f"{count} requests whose answers are not read", f"others get {robot(target)}")


def killed(target: Target) -> Iterator[Row]:
    """Kills clients in mid-step; another one goes on with the session."""
    path = [os.path.dirname(__file__), *sys.path]
    code = ENDLESS.format(path=path, port=target.port, shapes=target.shapes)
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 20:
                break
        process.send_signal(signal.SIGKILL)
        steps = [int(line) for line in process.stdout] or [int(line)]
    step = steps[-1]
    for tried in (step, step + 1):  # the reply of the last step may have been lost
        answer = ask(
            target,
            {**observation(target.shapes, 7, tried), "session_id": "killed", "step": tried},
        )
        if answer == "actions":
            break
    expected = "goes on" if answer == "actions" else answer
    yield Row(f"kill -9 of a client at step {step}", f"the session {expected} at step {tried}")


class Bystander:
    """A robot whose session goes on through all faults."""

    def __init__(self, target: Target) -> None:
        """Begins the session."""
        self._target, self._step = target, 0
        self._client = Client(f"ws://127.0.0.1:{target.port}", session_id="bystander")
        self.actions: list[np.ndarray] = []

    def act(self) -> None:
        """Makes one step."""
        now = observation(self._target.shapes, 0, self._step)
        self.actions.append(self._client.infer(now, prompt=PROMPT).actions[0])
        self._step += 1

    def replay(self) -> np.ndarray:
        """Returns the actions of the same episode without faults."""
        self._client.reset()
        replayed = [
            self._client.infer(observation(self._target.shapes, 0, step), prompt=PROMPT).actions[0]
            for step in range(self._step)
        ]
        return np.stack(replayed)


FAULTS: tuple[Callable[[Target], Iterator[Row]], ...] = (
    wrong_messages,
    handshakes,
    silent_connections,
    slow_reader,
    killed,
)


def run(target: Target, faults: tuple[Callable[[Target], Iterator[Row]], ...]) -> Iterator[Row]:
    """Yields the rows of some faults, and last that of the bystander."""
    bystander = Bystander(target)
    bystander.act()
    for fault in faults:
        for row in fault(target):
            bystander.act()
            yield row
    worst = np.abs(np.stack(bystander.actions) - bystander.replay()).max()
    yield Row("a robot beside all of these", f"actions differ by {worst:.1e} at most")


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir")
    parser.add_argument("--option", action="append", default=[], help="for the server")
    arguments = parser.parse_args()
    shapes, broken = shapes_of(arguments.run_dir), 0
    print("| sent | came back |", "| --- | --- |", sep="\n", flush=True)
    with serve(arguments.run_dir, *arguments.option) as server:
        for row in run(Target(server.port, shapes), FAULTS):
            broken += "RULE" in row.came_back
            print(f"| {row.sent} | {row.came_back} |", flush=True)
        log = server.log.read_text()
    for row in wrong_token(arguments.run_dir):
        print(f"| {row.sent} | {row.came_back} |", flush=True)
    print("tracebacks in the log:", log.count("Traceback"))
    return broken


if __name__ == "__main__":
    sys.exit(main())
