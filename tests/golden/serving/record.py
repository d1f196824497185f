"""Records the bytes that real clients send: the files `*.msgpack` beside this one.

    OPENPI_PYTHON record.py openpi-client     # environment with openpi-client and NumPy < 2
    VLA_EVAL_PYTHON record.py vla-eval        # environment with vla-eval

Needs nothing of this library: a server that accepts everything listens, and the client's own class
sends the observations of `observations.py`. A file is a map: client, version, path, frames.
"""

import asyncio
import pathlib
import sys
import threading
from importlib.metadata import version

import msgpack
import numpy as np
from observations import EPISODES
from websockets.sync.server import serve

FOLDER = pathlib.Path(__file__).parent
ACTIONS = {
    "__ndarray__": True, "data": np.zeros((1, 7), "<f4").tobytes(), "dtype": "<f4", "shape": [1, 7]
}  # fmt: skip


def record(client: str, talk, answer, first: bytes | None = None) -> None:
    """Writes the frames that `talk(port)` sends to a file named after the client."""
    frames: list[bytes] = []

    def handle(connection):
        if first is not None:
            connection.send(first)
        for frame in connection:
            frames.append(frame)
            reply = answer(frame)
            if reply is not None:
                connection.send(reply)

    with serve(handle, "127.0.0.1", 0, compression=None, max_size=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        talk(server.socket.getsockname()[1])
    content = {"client": client, "version": version(client), "frames": frames}
    name = f"{client}_{version(client)}.msgpack"
    (FOLDER / name).write_bytes(msgpack.packb(content))
    print(name, len(frames), "frames")


def openpi(port: int) -> None:
    """Sends the episodes by openpi's client, which has nothing to send between them."""
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    client = WebsocketClientPolicy("127.0.0.1", port)
    for steps in EPISODES.values():
        for observation in steps:
            client.infer(observation)
        client.reset()
    client._ws.close()


def answer_openpi(frame: bytes) -> bytes:
    """Returns actions of zeros."""
    return msgpack.packb({"actions": {key.encode(): v for key, v in ACTIONS.items()}})


def vla_eval(port: int) -> None:
    """Sends the episode "vla_eval" by the harness's own connection class."""
    asyncio.run(_vla_eval(port))


async def _vla_eval(port: int) -> None:
    from vla_eval.connection import Connection

    async with Connection(f"ws://127.0.0.1:{port}/vla-eval") as connection:
        for _ in range(2):
            await connection.start_episode({"task": {"name": "lift the red block"}})
            for observation in EPISODES["vla_eval"]:
                await connection.act(observation)
            await connection.end_episode({"metrics": {"success": False}, "steps": 3})


def answer_vla_eval(frame: bytes) -> bytes | None:
    """Answers hello and observation."""
    message = msgpack.unpackb(frame)
    reply = {"hello": ("hello", {}), "observation": ("action", {"actions": ACTIONS})}
    if message["type"] not in reply:
        return None
    kind, payload = reply[message["type"]]
    head = {"type": kind, "seq": message["seq"], "timestamp": message["timestamp"]}
    return msgpack.packb({**head, "payload": payload})


if __name__ == "__main__":
    if sys.argv[1] == "openpi-client":
        del EPISODES["vla_eval"]
        record("openpi-client", openpi, answer_openpi, msgpack.packb({}))
    else:
        record("vla-eval", vla_eval, answer_vla_eval)
