"""The real openpi-client, driven over pipes: run by the Python of an environment of its own.

Reads maps from stdin, `{"connect": [host, port]}` or an observation, and writes maps to stdout.
"""

import sys

import msgpack
from openpi_client import msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy


def main() -> None:
    """Sends what comes in through the client; ends with the input."""
    client = None
    unbuffered = sys.stdin.buffer.raw  # a read returns what there is
    for message in msgpack.Unpacker(
        unbuffered, object_hook=msgpack_numpy.unpack_array, max_buffer_size=0
    ):
        try:
            if "connect" in message:
                client = WebsocketClientPolicy(*message["connect"])
                answer = client.get_server_metadata()
            else:
                assert client is not None
                answer = client.infer(message)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.buffer.write(msgpack_numpy.packb(answer))
        sys.stdout.buffer.flush()


main()
