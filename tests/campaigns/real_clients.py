"""Real clients against a policy server: episodes on the table, with the agent's actions in process.

    python tests/campaigns/real_clients.py RUN_DIR \
        --openpi OPENPI_PYTHON --openpi OTHER_OPENPI_PYTHON --vla-eval VLA_EVAL_PYTHON

Each PYTHON is an interpreter of an environment with the client: `openpi-client==0.1.2` or 0.1.1
(which need NumPy < 2), `vla-eval==0.8.0`. The client runs there; the simulator runs here.
"""

import argparse
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import msgpack
import numpy as np
from served import serve

from vla_jax.acting.agent import make_agent, read_instruction
from vla_jax.backbones import registry
from vla_jax.envs.table.jax_env import JaxTableConfig
from vla_jax.envs.table.jax_simulator import JaxTable
from vla_jax.runs import Run, load_run
from vla_jax.serving import messages
from vla_jax.types import make_observation

FOLDER = pathlib.Path(__file__).parent
OPENPI_KEYS = {"image_primary": "observation/image", "image_wrist": "observation/wrist_image"}
OPENPI_KEYS |= {"proprio": "observation/state"}
Observed = dict[str, np.ndarray]


class Episode(NamedTuple):
    """Observations of an episode and the actions for them."""

    instruction: str
    observations: list[Observed]
    actions: np.ndarray  # [T, A]
    success: bool


class Robot:
    """A real client in a process of its own."""

    def __init__(self, python: str, script: str, port: int) -> None:
        """Starts the client and connects it.

        Args:
          python: interpreter of its environment.
          script: file beside this one.
          port: of the server.
        """
        self._process = subprocess.Popen(
            [python, str(FOLDER / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # a read returns what there is
        )
        self._unpacker = msgpack.Unpacker(self._process.stdout, strict_map_key=False)
        self.metadata = self.ask({"connect": ["127.0.0.1", port]})

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Sends a message to the client and returns its answer."""
        assert self._process.stdin is not None
        left = memoryview(messages.pack(message))
        while left:
            left = left[self._process.stdin.write(left) :]
        answer = messages.unpack(msgpack.packb(next(self._unpacker)))
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        """Ends the client."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


def world_of(run: Run, max_steps: int) -> JaxTable:
    """Returns the table with images of the policy's size."""
    size = registry.image_size(run.agent.policy.backbone)
    return JaxTable(JaxTableConfig(image_size=size, max_steps=max_steps))


def play(world: JaxTable, seed: int, act: Callable[[Observed, str], np.ndarray]) -> Episode:
    """Plays an episode."""
    observed, actions, success = dict(world.reset(seed)), [], False
    seen = []
    while True:
        action = act(observed, world.instruction)
        seen.append(observed)
        actions.append(action)
        step = world.step(action)
        success |= bool(step.success)
        observed = dict(step.observation)
        if step.terminated or step.truncated:
            return Episode(world.instruction, seen, np.stack(actions), success)


def in_process(run: Run) -> Callable[[list[Observed], str], np.ndarray]:
    """Returns a function of the observations of an episode to the agent's actions `[T, A]`."""
    agent = make_agent(run.agent, run.norm_stats)
    params, step = agent.prepare(jax.device_put(run.params), 1), jax.jit(agent.step)

    def act(observations: list[Observed], instruction: str) -> np.ndarray:
        state, actions = agent.init(run.params, 1), []
        words = read_instruction(run.agent, instruction)[None]
        for t, each in enumerate(observations):
            rows = {name: value[None] for name, value in each.items()}
            now = make_observation(rows, instruction=words)
            state, action = step(params, state, now, np.array([t == 0]))
            actions.append(np.asarray(action[0]))
        return np.stack(actions)

    return act


def openpi_act(robot: Robot) -> Callable[[Observed, str], np.ndarray]:
    """Returns the actor of one episode; its first message asks for a reset."""
    first = [True]

    def act(observed: Observed, instruction: str) -> np.ndarray:
        named = {OPENPI_KEYS.get(name, name): value for name, value in observed.items()}
        message = {**named, "prompt": instruction, **({"reset": True} if first else {})}
        first.clear()
        return np.array(robot.ask(message)["actions"][0])

    return act


def vla_eval_act(robot: Robot) -> Callable[[Observed, str], np.ndarray]:
    """Returns the actor of one episode, for observations by the harness's convention."""

    def act(observed: Observed, instruction: str) -> np.ndarray:
        names = {"image_primary": "agentview", "image_wrist": "wrist"}
        images = {names[name]: image for name, image in observed.items() if name in names}
        message: dict[str, Any] = {"images": images, "task_description": instruction}
        message |= {"states": observed["proprio"]} if "proprio" in observed else {}
        if "environment_state" in observed:
            message["environment_state"] = observed["environment_state"]
        return np.atleast_2d(robot.ask(message)["actions"])[0]

    return act


def openpi_episodes(robot: Robot, world: JaxTable, seeds: list[int]) -> Iterator[Episode]:
    """Plays episodes with openpi's client."""
    for seed in seeds:
        yield play(world, seed, openpi_act(robot))


def vla_eval_episodes(robot: Robot, world: JaxTable, seeds: list[int]) -> Iterator[Episode]:
    """Plays episodes with the harness's connection."""
    for seed in seeds:
        robot.ask({"start": {"task": {"name": "table", "seed": seed}}})
        yield play(world, seed, vla_eval_act(robot))
        robot.ask({"end": {"metrics": {}, "steps": world.max_steps}})


def interleaved(robots: list[Robot], worlds: list[JaxTable], seeds: list[int]) -> list[Episode]:
    """Plays one episode per openpi client, step by step in turn."""
    acts = [openpi_act(robot) for robot in robots]
    observed = [dict(w.reset(seed)) for w, seed in zip(worlds, seeds, strict=True)]
    episodes: list[tuple[list, list]] = [([], []) for _ in robots]
    for _ in range(worlds[0].max_steps):
        for i, world in enumerate(worlds):
            action = acts[i](observed[i], world.instruction)
            episodes[i][0].append(observed[i])
            episodes[i][1].append(action)
            observed[i] = dict(world.step(action).observation)
    return [
        Episode(world.instruction, seen, np.stack(actions), False)
        for world, (seen, actions) in zip(worlds, episodes, strict=True)
    ]


def worst_difference(run: Run, episodes: list[Episode]) -> float:
    """Returns the greatest difference from the agent's actions in process."""
    act = in_process(run)
    found = [abs(e.actions - act(e.observations, e.instruction)).max() for e in episodes]
    return float(max(found))


def main() -> int:
    """Plays the episodes of every client and prints one row each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir")
    parser.add_argument("--openpi", action="append", default=[])
    parser.add_argument("--vla-eval", action="append", default=[])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--option", action="append", default=[], help="for the server")
    parser.add_argument("--port", type=int, help="of a server that runs already")
    arguments = parser.parse_args()
    run, seeds, rows = load_run(arguments.run_dir), [0, 1, 2], []
    world, other = (world_of(run, arguments.steps) for _ in range(2))
    with serve(arguments.run_dir, *arguments.option, port=arguments.port) as server:
        for python in arguments.openpi:
            robot = Robot(python, "openpi_robot.py", server.port)
            rows.append((python, "3 episodes", [*openpi_episodes(robot, world, seeds)]))
            second = Robot(python, "openpi_robot.py", server.port)
            both = interleaved([robot, second], [world, other], [5, 6])
            rows.append((python, "two clients at once", both))
            robot.close()
            second.close()
        for python in arguments.vla_eval:
            robot = Robot(python, "vla_eval_robot.py", server.port)
            rows.append((python, "3 episodes", [*vla_eval_episodes(robot, world, seeds)]))
            robot.close()
    print("| client | episodes | steps | greatest difference |")
    print("| --- | --- | --- | --- |")
    worst = 0.0
    for python, kind, episodes in rows:
        steps = sum(len(each.actions) for each in episodes)
        difference = worst_difference(run, episodes)
        worst = max(worst, difference)
        print(f"| {python} | {kind} | {steps} | {difference:.1e} |")
    return int(worst > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
