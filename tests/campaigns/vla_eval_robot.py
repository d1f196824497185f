"""The connection class of AI2's harness, driven over pipes: run by the Python of an environment
with vla-eval. Maps as in `openpi_robot.py`, and `{"start": payload}`, `{"end": payload}`.
"""

import asyncio
import sys

import msgpack
from vla_eval.connection import Connection
from vla_eval.protocol import numpy_codec


def _arrays(answer):
    """Packs arrays as openpi does, images too."""
    numpy_codec.set_image_format("raw")
    data = msgpack.packb(answer, default=numpy_codec.encode_ndarray)
    numpy_codec.set_image_format("png")
    return data


async def main() -> None:
    """Sends what comes in through the connection; ends with the input."""
    connection, unpacker = None, msgpack.Unpacker(max_buffer_size=0)
    loop = asyncio.get_running_loop()
    while data := await loop.run_in_executor(None, sys.stdin.buffer.read1, 2**20):
        unpacker.feed(data)
        for message in unpacker:
            message = _decode(message)
            try:
                if "connect" in message:
                    host, port = message["connect"]
                    connection = Connection(f"ws://{host}:{port}/vla-eval", max_retries=2)
                    await connection.connect()
                    answer = connection.server_info
                elif "start" in message:
                    await connection.start_episode(message["start"])
                    answer = {}
                elif "end" in message:
                    await connection.end_episode(message["end"])
                    answer = {}
                else:
                    answer = await connection.act(message)
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            sys.stdout.buffer.write(_arrays(answer))
            sys.stdout.buffer.flush()


def _decode(value):
    """Returns the message with its arrays, whose keys are str or bytes."""
    if isinstance(value, dict):
        value = {k.decode() if isinstance(k, bytes) else k: _decode(v) for k, v in value.items()}
        return numpy_codec.decode_ndarray(value)
    return [_decode(each) for each in value] if isinstance(value, list) else value


asyncio.run(main())
