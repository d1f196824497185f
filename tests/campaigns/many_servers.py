"""Two servers behind HAProxy, one of which is killed in mid-episode: its named sessions go on.

    PYTHONPATH=tests:. python tests/campaigns/many_servers.py --num-robots 8 --num-steps 200

Both servers have a folder of snapshots, and HAProxy has the rules of examples/serving/haproxy.cfg.
Robots with named sessions send deterministic observations at 20 Hz; one server is killed with
SIGKILL and, later in the same episodes, started again. Every action is compared with the agent's in
process. Needs haproxy (Debian: apt-get install haproxy).
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from typing import NamedTuple

import jax
import numpy as np
import tiny_run

from vla_jax.acting.agent import make_agent, read_instruction
from vla_jax.serving.client import Client
from vla_jax.types import Observation

ROOT = pathlib.Path(__file__).parents[2]
PROMPT = "lift the red block"
HZ = 20.0
STARTUP = 300.0  # s until a server has compiled and listens
DOWN = 2.0  # s between the kill and the new start


class Result(NamedTuple):
    """Outcome of one campaign."""

    robots_per_server: tuple[int, ...]
    num_steps: int  # of each robot
    difference: float  # greatest difference of an action from the agent in process
    longest_wait: float  # s that a robot waited for an action
    downtime: float  # s from the kill until the server listened again


def observations(robot, num_steps):
    """Returns the raw numbers `[T, ...]` that a robot sends."""
    rng = np.random.default_rng(robot)
    shapes = {"proprio": 8, "environment_state": 22}
    return {n: rng.normal(size=(num_steps, s)).astype(np.float32) for n, s in shapes.items()}


def expected_actions(num_robots, num_steps):
    """Returns the actions `[T, B, A]` of the agent in process."""
    agent, params = make_agent(tiny_run.AGENT, tiny_run.norm_stats()), tiny_run.params(10)
    seen = [observations(robot, num_steps) for robot in range(num_robots)]
    words = np.tile(read_instruction(tiny_run.AGENT, PROMPT), (num_robots, 1))
    step, state, actions = jax.jit(agent.step), agent.init(params, num_robots), []
    for t in range(num_steps):
        parts = {name: np.stack([each[name][t] for each in seen]) for name in seen[0]}
        observation = Observation(**parts, instruction=words)
        state, action = step(params, state, observation, np.full(num_robots, t == 0))
        actions.append(action)
    return np.stack(actions)


def play(robot, port, num_steps):
    """Returns the actions `[T, A]` that a robot got, and the time in s that it waited for each."""
    seen, actions, waits = observations(robot, num_steps), [], []
    url = f"ws://127.0.0.1:{port}"
    with Client(url, session_id=f"robot-{robot}", patience=STARTUP) as client:
        for t in range(num_steps):
            start = time.monotonic()
            frame = {name: numbers[t] for name, numbers in seen.items()}
            actions.append(client.infer(frame, prompt=PROMPT).actions[0])
            waits.append(time.monotonic() - start)
            time.sleep(max(0.0, 1 / HZ - waits[-1]))
    return np.stack(actions), waits


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def start_server(folder, port):
    """Starts a server with its own folder of snapshots."""
    options = ["--port", str(port), "--snapshot", str(folder / f"snapshot_{port}")]
    options += ["--sessions", "32", "--max-batch", "4"]
    command = [sys.executable, "-m", "vla_jax.serve", str(folder / "run"), *options]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with (folder / f"server_{port}.log").open("a") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=os.environ | cache, stdout=log, stderr=subprocess.STDOUT
        )


def wait_until_ready(process, port):
    """Returns once a server answers `/healthz`."""
    deadline = time.monotonic() + STARTUP
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server on port {port} ended with {process.returncode}")
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5).close()
            return
        time.sleep(0.05)
    raise RuntimeError(f"the server on port {port} was not ready within {STARTUP:g} s")


def sessions_of(port):
    """Returns the number of named sessions of a server."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
        lines = page.read().decode().splitlines()
    return sum(int(float(x.split()[-1])) for x in lines if x.startswith("vla_serve_sessions{"))


def start_proxy(folder, front, ports):
    """Starts HAProxy with the rules of the example, on other ports."""
    text = (ROOT / "examples/serving/haproxy.cfg").read_text()
    for port, other in zip((8000, 8001, 8002), (front, *ports), strict=True):
        text = text.replace(f"127.0.0.1:{port}", f"127.0.0.1:{other}")
    (folder / "haproxy.cfg").write_text(text)
    with (folder / "haproxy.log").open("w") as log:
        command = ["haproxy", "-db", "-f", str(folder / "haproxy.cfg")]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def run(num_robots, num_steps, folder):
    """Runs the campaign in an empty folder; returns its `Result`."""
    tiny_run.write(folder / "run")
    front, *ports = free_ports(3)
    with contextlib.ExitStack() as stack:
        servers = [start_server(folder, port) for port in ports]
        stack.callback(lambda: [stop(each) for each in servers])
        for server, port in zip(servers, ports, strict=True):
            wait_until_ready(server, port)
        proxy = start_proxy(folder, front, ports)
        stack.callback(stop, proxy)
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(num_robots))
        robots = [pool.submit(play, robot, front, num_steps) for robot in range(num_robots)]
        time.sleep(num_steps / HZ / 3)
        shares = tuple(map(sessions_of, ports))
        killed = int(np.argmax(shares))
        servers[killed].send_signal(signal.SIGKILL)
        servers[killed].wait()
        start = time.monotonic()
        time.sleep(DOWN)
        servers[killed] = start_server(folder, ports[killed])
        wait_until_ready(servers[killed], ports[killed])
        downtime = time.monotonic() - start
        played = [robot.result() for robot in robots]
    actions = np.stack([each[0] for each in played], axis=1)
    difference = float(np.abs(actions - expected_actions(num_robots, num_steps)).max())
    return Result(shares, num_steps, difference, max(max(each[1]) for each in played), downtime)


def stop(process):
    process.terminate()
    process.wait(timeout=30)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-robots", type=int, default=8)
    parser.add_argument("--num-steps", type=int, default=200)
    options = parser.parse_args()
    if shutil.which("haproxy") is None:
        raise SystemExit("haproxy is not installed; Debian: apt-get install haproxy")
    with tempfile.TemporaryDirectory() as folder:
        result = run(options.num_robots, options.num_steps, pathlib.Path(folder))
    print(json.dumps(result._asdict()))
    if not result.difference < 1e-5:
        raise SystemExit("an action differs from the agent's in process")


if __name__ == "__main__":
    main()
