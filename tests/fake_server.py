"""A policy server of openpi's wire, scripted by a function, for tests of clients."""

import contextlib
import threading

from websockets.exceptions import ConnectionClosed
from websockets.sync.server import serve

from vla_jax.serving import messages


@contextlib.contextmanager
def serving(answer, *, metadata=None, process_request=None, port=0):
    """Runs a server until the block ends.

    Args:
      answer: (connection, request) -> reply to pack, text to send as it is, or None.
      metadata: first frame of every connection.
      process_request: as of websockets.
      port: to listen on; 0 = any.

    Yields:
      Its port.
    """

    def handle(connection):
        with contextlib.suppress(ConnectionClosed):
            connection.send(messages.pack(metadata or {}))
            for data in connection:
                reply = answer(connection, messages.unpack(data))
                if reply is not None:
                    connection.send(reply if isinstance(reply, str) else messages.pack(reply))

    with serve(
        handle, "127.0.0.1", port, compression=None, process_request=process_request
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.socket.getsockname()[1]
        finally:
            server.shutdown()
            thread.join()
