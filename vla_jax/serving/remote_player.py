"""Controller of an evaluation that asks a policy server, ours or any other of openpi's wire."""

import concurrent.futures
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from vla_jax.acting.rollout import Controller, SimulatorView
from vla_jax.serving.client import Client
from vla_jax.types import Simulator

# Part of an observation -> key of openpi's scripts, which every server of its wire knows; parts
# that are not listed have the same name on the wire.
KEYS = {
    "image_primary": "observation/image",
    "image_wrist": "observation/wrist_image",
    "proprio": "observation/state",
}


class RemoteRobot(NamedTuple):
    """One simulator and its connection."""

    simulator: Simulator
    client: Client
    plan: np.ndarray  # [rows, A] actions of the last reply that are not executed yet


class RemotePlayer:
    """A policy behind a server as a controller: one session, or one connection, per simulator.

    The memory is on the server. A server that knows no sessions gets a new connection for every
    episode. Connections are open until `disconnect`; they are opened again where necessary.
    """

    def __init__(
        self, url: str, *, token: str | None = None, exec_horizon: int = 1, patience: float = 60.0
    ) -> None:
        """Connects once, to learn what the server expects.

        Args:
          url: of the server, `ws://HOST:PORT`.
          token: of the server, if it has one.
          exec_horizon: rows of each reply to execute before the server is asked again.
          patience: seconds to wait for a server that does not answer.

        Raises:
          ConnectionError: there is no server, or it refuses this client.
        """
        self._url, self._token, self._patience = url, token, patience
        self._exec_horizon = exec_horizon
        self._open: list[Client] = []
        self._pool = concurrent.futures.ThreadPoolExecutor(256)
        self.metadata: Mapping[str, Any] = self._connect().metadata
        self.disconnect()
        self.controller = Controller(lambda num_simulators: (), self._step)

    @property
    def image_size(self) -> int | None:
        """Pixels along each side of the server's images; 0 = none, None = unknown."""
        size = self.metadata.get("image_resolution")
        if isinstance(size, list | tuple) and size:
            return int(size[0])
        observation = self.metadata.get("observation")
        if not isinstance(observation, Mapping):
            return None
        shapes = [part.get("shape") for name, part in observation.items() if "image" in name]
        return int(shapes[0][0]) if shapes else 0

    def disconnect(self) -> None:
        """Closes all connections, which ends their sessions."""
        for client in self._open:
            client.close()
        self._open.clear()

    def _connect(self) -> Client:
        client = Client(self._url, token=self._token, patience=self._patience)
        self._open.append(client)
        return client

    def _step(
        self, state: tuple[RemoteRobot, ...], views: list[SimulatorView], reset: np.ndarray
    ) -> tuple[tuple[RemoteRobot, ...], np.ndarray]:
        # A rollout repeats a view in the rows that have no simulator any more; it is asked once.
        asked = {id(v.simulator): (v, bool(r)) for v, r in zip(views, reset, strict=True)}
        robots = {id(robot.simulator): robot for robot in state}
        for key in robots.keys() - asked.keys():
            client = robots.pop(key).client
            client.close()
            self._open.remove(client)
        for key, (view, _) in asked.items():
            if key not in robots:
                robots[key] = RemoteRobot(view.simulator, self._connect(), np.empty((0, 0)))
        jobs = [(robots[key], view, start) for key, (view, start) in asked.items()]
        acted = dict(zip(asked, self._pool.map(self._act, jobs), strict=True))
        actions = np.stack([acted[id(view.simulator)].plan[0] for view in views])
        return tuple(robot._replace(plan=robot.plan[1:]) for robot in acted.values()), actions

    def _act(self, job: tuple[RemoteRobot, SimulatorView, bool]) -> RemoteRobot:
        """Returns the robot with a plan whose first row is the action for this view."""
        robot, view, reset = job
        if reset:
            robot.client.reset()
        if len(robot.plan) and not reset:
            return robot
        reply = robot.client.infer(self._parts(view), prompt=view.instruction)
        return robot._replace(plan=reply.actions[: self._exec_horizon])

    def _parts(self, view: SimulatorView) -> dict[str, np.ndarray]:
        wanted = self.metadata.get("observation")
        known = wanted if isinstance(wanted, Mapping) else view.observation
        parts = {name: part for name, part in view.observation.items() if name in known}
        return {KEYS.get(name, name): np.asarray(part) for name, part in parts.items()}
