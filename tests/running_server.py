"""A policy server in a thread of the test's process."""

import asyncio
import contextlib
import threading

from vla_jax.serve import make_service
from vla_jax.serving.server import Server


@contextlib.contextmanager
def running(run, config, *, token=None):
    """Serves a run on a free port until the block ends; yields the port."""
    service = make_service(run, config, token=token)
    loop, ports = asyncio.new_event_loop(), []
    is_ready, stop = threading.Event(), asyncio.Event()

    def ready(port):
        ports.append(port)
        is_ready.set()

    def serve():
        asyncio.set_event_loop(loop)
        loop.run_until_complete(Server(service).run("127.0.0.1", 0, stop, ready=ready))
        loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    assert is_ready.wait(60)
    try:
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
