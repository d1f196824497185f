"""Mutations of real messages against a policy server: no crash, no traceback, the rules kept.

    python tests/campaigns/mutations_serving.py RUN_DIR --count 10000

The messages are those that openpi-client and AI2's harness sent (tests/golden/serving), and those
of our client and of RoboMME's. Each is changed, sent on a connection, and its answer classified.
"""

import argparse
import collections
import pathlib
import random
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgpack
import numpy as np
from served import get, is_healthy, resident_mb, serve
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.sync.client import connect

from vla_jax.serving import messages

GOLDEN = pathlib.Path(__file__).parents[1] / "golden/serving"
sys.path.insert(0, str(GOLDEN))
import observations  # noqa: E402

MAX_SENTENCE = 2000  # characters
DTYPES = ["O", "|O", "i4,O", "<c16", "|V8", "<M8[s]", "<U9", ">f4", "<f16", "x" * 200, "", 3]
SHAPES = [[2**40], [-1], [0], [2**31, 2**31], [1] * 64, [2.0], "3", None, [[]], [True]]


class Message(NamedTuple):
    """A message that a client sends, and the path it sends it to."""

    client: str
    path: str
    data: bytes


class Answer(NamedTuple):
    """Outcome of one mutation."""

    client: str
    mutation: str
    outcome: str  # "sentence", "reply", "closed CODE", "no answer", or a broken rule
    text: str  # sentence, or reason of the close


def real_messages() -> list[Message]:
    """Returns one message of each kind of every client."""
    found = []
    for name, path in (("openpi-client_0.1.2", "/"), ("vla-eval_0.8.0", "/vla-eval")):
        frames = msgpack.unpackb((GOLDEN / f"{name}.msgpack").read_bytes())["frames"]
        found += [Message(name, path, data) for data in frames[:6]]
    first = observations.libero(0)
    ours = [
        {**first, "session_id": "mutant", "step": 0},
        {"frames": [first, observations.libero(1)], "prompt": "lift", "session_id": "mutant"},
        {"endpoint": "reset", "session_id": "mutant"},
        {**first, "reset": True},
    ]
    images = np.stack([observations.image(step) for step in range(3)])
    buffer = {"add_buffer": True, "images": images[:, None], "state": np.zeros((3, 8), np.float32)}
    lists = {
        "task_goal": ["lift"],
        "is_first_step": True,
        "front_rgb_list": list(images),
        "wrist_rgb_list": list(images),
        "joint_state_list": [np.zeros(7)] * 3,
        "gripper_state_list": [np.zeros(2)] * 3,
    }
    found += [Message("vla_jax", "/", messages.pack(message)) for message in ours]
    found += [Message("RoboMME", "/", messages.pack(message)) for message in (buffer, lists)]
    return found


def truncate(data: bytes, rng: random.Random) -> bytes:
    """Returns the beginning of a message."""
    return data[: rng.randrange(len(data))]


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    """Returns a message with one to eight other bits, half of the time in its first 200 bytes."""
    changed = bytearray(data)
    end = len(data) if rng.random() < 0.5 else min(200, len(data))
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def splice(data: bytes, rng: random.Random) -> bytes:
    """Returns a message with a piece removed, repeated or replaced by random bytes."""
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.randint(1, 64))
    middle = rng.choice([b"", data[start:stop] * 3, rng.randbytes(stop - start)])
    return data[:start] + middle + data[stop:]


def _change(data: bytes, rng: random.Random, change: Callable[[dict], None]) -> bytes:
    """Returns a message with a change in one of its arrays, or in the message itself."""
    message = msgpack.unpackb(data, strict_map_key=False)
    arrays = list(_arrays(message))
    change(rng.choice(arrays) if arrays else message)
    return msgpack.packb(message)


def _arrays(value: Any) -> Iterator[dict]:
    if isinstance(value, dict):
        if b"__ndarray__" in value or "__ndarray__" in value or "__image__" in value:
            yield value
        for inner in value.values():
            yield from _arrays(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _arrays(inner)


def _set(fields: dict, name: str, value: Any) -> None:
    key = name.encode() if b"__ndarray__" in fields else name
    fields[key] = value


def change_dtype(data: bytes, rng: random.Random) -> bytes:
    """Returns a message with another dtype of an array: objects, structs, texts."""
    return _change(data, rng, lambda fields: _set(fields, "dtype", rng.choice(DTYPES)))


def change_shape(data: bytes, rng: random.Random) -> bytes:
    """Returns a message with another shape of an array: huge, negative, no numbers."""
    return _change(data, rng, lambda fields: _set(fields, "shape", rng.choice(SHAPES)))


def change_field(data: bytes, rng: random.Random) -> bytes:
    """Returns a message with another value of one of its fields."""
    message = msgpack.unpackb(data, strict_map_key=False)
    values = [None, -1, 2**63, 1e308, float("nan"), "", "x" * 5000, b"\0" * 9, [], {}, [[[]]], True]
    fields = message.get("payload", message) if rng.random() < 0.7 else message
    if not isinstance(fields, dict) or not fields:
        fields = message
    further = ["session_id", "step", "reset", "endpoint", "frames", "session_ids", "prompt"]
    key = rng.choice([*fields, *further])
    fields[key] = rng.choice(values)
    return msgpack.packb(message)


def bomb(data: bytes, rng: random.Random) -> bytes:
    """Returns a small message that claims to be large, or is deeply nested."""
    return rng.choice(
        [
            b"\xdd\xff\xff\xff\xff" + data,  # array of 2^32 items
            b"\xdf\xff\xff\xff\xff" + data,  # map of 2^32 items
            b"\xc6\xff\xff\xff\xff" + data,  # 4 GiB of bytes
            b"\x91" * 4000 + b"\x01",
            b"\x81\xa1a" * 4000 + b"\x01",
            b"\xc9\xff\xff\xff\xff\x01" + data,  # extension type
            msgpack.packb(dict.fromkeys(map(str, range(5000)), 0)),
            msgpack.packb([0] * 100_000),
        ]
    )


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated": truncate,
    "bit flips": flip_bits,
    "spliced": splice,
    "dtype": change_dtype,
    "shape": change_shape,
    "field": change_field,
    "bomb": bomb,
}


class Sender:
    """A connection that is opened again when the server has closed it."""

    def __init__(self, port: int, path: str) -> None:
        """Connects.

        Args:
          port: of the server.
          path: of the wire, "/" or "/vla-eval".
        """
        self._url, self._path = f"ws://127.0.0.1:{port}{path}", path
        self._open()

    def _open(self) -> None:
        self._manager = connect(self._url, compression=None, proxy=None, max_size=None)
        self._socket = self._manager.__enter__()
        if self._path == "/":
            self._socket.recv(timeout=30)

    def close(self) -> None:
        """Closes the connection."""
        self._manager.__exit__(None, None, None)

    def send(self, data: bytes, patience: float) -> tuple[str, str]:
        """Returns the outcome of a message, and its text."""
        try:
            self._socket.send(data)
            answer = self._socket.recv(timeout=patience)
        except TimeoutError:
            return "no answer", ""
        except ConnectionClosed as closed:
            code = closed.rcvd.code if closed.rcvd else 1006
            reason = closed.rcvd.reason if closed.rcvd else ""
            self._open()
            return f"closed {code}", reason
        return classify(answer)


def classify(answer: str | bytes) -> tuple[str, str]:
    """Returns the outcome that an answer is, and its text."""
    text = answer if isinstance(answer, str) else _error_text(answer)
    if text is None:
        return "reply", ""
    broken = broken_rule(text)
    return (f"RULE BROKEN: {broken}" if broken else "sentence"), text


def _error_text(answer: bytes) -> str | None:
    """Returns the error in an answer of /vla-eval; None if it is none."""
    message = msgpack.unpackb(answer, strict_map_key=False)
    if isinstance(message, dict) and message.get("type") == "error":
        return str(message["payload"].get("error"))
    return None


def broken_rule(text: str) -> str:
    """Returns which rule of an error's text is broken; "" if none is."""
    if len(text) > MAX_SENTENCE:
        return f"{len(text)} characters"
    if "Traceback" in text or re.search(r'File "|line \d+, in ', text):
        return "a traceback"
    return "a path" if re.search(r"(?<![\w/])/(home|root|tmp|usr|work|opt)/", text) else ""


def run(port: int, count: int, *, seed: int = 0, patience: float = 5.0) -> list[Answer]:
    """Sends mutations and returns the answers; the server must answer a clean request at the end.

    Args:
      port: of the server.
      count: of mutations.
      seed: of the mutations.
      patience: seconds to wait for an answer on "/", where every message has one.
    """
    rng, sources, answers = random.Random(seed), real_messages(), []
    senders = {path: Sender(port, path) for path in {source.path for source in sources}}
    for _ in range(count):
        source, name = rng.choice(sources), rng.choice(list(MUTATIONS))
        data = MUTATIONS[name](source.data, rng)
        wait = patience if source.path == "/" else 0.1  # where most messages have no answer
        try:
            outcome, text = senders[source.path].send(data, wait)
        except WebSocketException as error:
            outcome, text = f"RULE BROKEN: {type(error).__name__}", str(error)
        if outcome == "no answer" and source.path == "/":
            outcome = "RULE BROKEN: no answer"
        answers.append(Answer(source.client, name, outcome, text))
        if source.path != "/" and outcome == "no answer":
            senders[source.path].close()  # a late answer would be taken for the next one
            senders[source.path] = Sender(port, source.path)
    for sender in senders.values():
        sender.close()
    return answers


def clean_actions(port: int) -> np.ndarray:
    """Returns the actions of a short episode in a session of its own."""
    from vla_jax.serving.client import Client

    with Client(f"ws://127.0.0.1:{port}") as client:
        steps = [observations.libero(step) for step in range(3)]
        return np.stack([client.infer(step).actions for step in steps])


def table(answers: list[Answer]) -> list[str]:
    """Returns rows: mutation, outcome, count, an example of the text."""
    counts = collections.Counter((each.mutation, each.outcome) for each in answers)
    rows = ["| mutation | outcome | count | for example |", "| --- | --- | --- | --- |"]
    for (mutation, outcome), count in sorted(counts.items()):
        texts = [a.text for a in answers if (a.mutation, a.outcome) == (mutation, outcome)]
        shown = next((text for text in texts if text), "").replace("|", "\\|")[:110]
        rows.append(f"| {mutation} | {outcome} | {count} | {shown} |")
    return rows


def main() -> int:
    """Starts a server on a run, sends mutations, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, help="of a server that runs already")
    arguments = parser.parse_args()
    with serve(arguments.run_dir, port=arguments.port) as server:
        before, memory = clean_actions(server.port), resident_mb(server.pid)
        answers = run(server.port, arguments.count, seed=arguments.seed)
        after = clean_actions(server.port)
        print(*table(answers), sep="\n")
        print(f"healthy: {is_healthy(server.port)}; actions unchanged: {(before == after).all()}")
        print(f"memory of the server: {memory:.0f} -> {resident_mb(server.pid):.0f} MB")
        print("tracebacks in the log:", server.log.read_text().count("Traceback"))
        refused = [line for line in get(server.port, "/metrics").splitlines() if "refused" in line]
        print(*refused, sep="\n")
    return int(any(each.outcome.startswith("RULE") for each in answers))


if __name__ == "__main__":
    sys.exit(main())
