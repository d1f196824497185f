"""Requests that a server sends itself before its port opens, so that a robot's first is no slower.

What the first requests load, allocate or specialise is then there: in the engine, the codec, the
event loop and the library of WebSockets.
"""

import asyncio
import secrets

import jax

from vla_jax.serving import observations
from vla_jax.serving.client import Client
from vla_jax.serving.dialect import wire_names
from vla_jax.serving.requests import Request
from vla_jax.serving.server import Limits, Server, Service

_REQUESTS = 100  # the interpreter specialises code that has run some dozen times


async def rehearse(service: Service) -> None:
    """Serves requests on a loopback port, under a token that nobody else knows.

    Args:
      service: with an engine of its own, which is stopped and whose table is deleted at the end.

    Raises:
      ValueError: the policy gives actions that are not finite.
      OSError: there is no loopback port.
    """
    engine, blank, token = service.engine, observations.blank(service.spec), secrets.token_hex()
    names = wire_names(service.metadata)
    observation = {names[part]: value for part, value in blank.items()}
    stop, port = asyncio.Event(), asyncio.get_running_loop().create_future()

    def play() -> None:
        with Client(f"ws://127.0.0.1:{port.result()}", token=token) as client:
            for _ in range(_REQUESTS):
                client.infer(observation, prompt="")

    try:
        request, words = Request(({}, {}), prompt=""), service.tokenize("")
        engine.submit("two frames", request, [blank, blank], words).result()
        engine.end(["two frames"]).result()
        own = service._replace(token=token, limits=Limits(message_bytes=2**31 - 1))
        running = Server(own).run("127.0.0.1", 0, stop, ready=port.set_result)
        server = asyncio.create_task(running)
        await asyncio.wait((port, server), return_when=asyncio.FIRST_COMPLETED)
        try:
            if port.done():
                await asyncio.to_thread(play)
        finally:
            stop.set()
            await server
    finally:
        engine.stop(timeout=10.0)
        for leaf in jax.tree.leaves(engine.state):  # the server's own table needs the memory
            leaf.delete()
