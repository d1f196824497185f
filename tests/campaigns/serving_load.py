"""Load on a policy server: many sessions at a rate, steps per second, memory.

    python tests/campaigns/serving_load.py runs/demo/lstm --sessions 64 --hz 10 --seconds 60
    python tests/campaigns/serving_load.py RUN --openpi FOLDER   # with openpi_server, openpi_client
    python tests/campaigns/serving_load.py RUN --come-and-go 10000
    python tests/campaigns/serving_load.py RUN --starts 5    # the first reply after each start

Server and clients run on this machine and share its cores, over loopback. Every reply is checked
for its session and step, and the actions of the first steps against the agent in process.
FOLDER: `pip install --no-deps --target FOLDER openpi-server==0.1.0 openpi-client==0.1.2`.
"""

import argparse
import asyncio
import pathlib
import sys
import time
from typing import NamedTuple

import numpy as np
from served import cpu_seconds, resident_mb, serve
from websockets.asyncio.client import connect

from vla_jax.serving import messages

PROMPT = "lift the red block"
Shapes = dict[str, tuple[int, ...]]


class Episode(NamedTuple):
    """Answers that one robot got."""

    actions: list[np.ndarray]  # [A] per step
    seconds: list[float]  # round trip of every step
    wrong: int  # replies of another session or step


class Load(NamedTuple):
    """Result of one run of many robots."""

    episodes: list[Episode]
    seconds: float  # wall time
    server_cpu: float  # seconds


def shapes_of(run_dir: str) -> Shapes:
    """Returns key on the wire -> shape of the observations that a run's policy takes."""
    from vla_jax.runs import load_run
    from vla_jax.serving import observations

    run = load_run(run_dir)
    blank = observations.blank(observations.make_spec(run.agent, run.norm_stats))
    names = {"image_primary": "observation/image", "image_wrist": "observation/wrist_image"}
    names |= {"proprio": "observation/state"}
    return {names.get(part, part): value.shape for part, value in blank.items()}


def observation(shapes: Shapes, robot: int, step: int) -> dict[str, np.ndarray]:
    """Returns what a robot sees at a step: random, and the same whenever it is asked for."""
    rng = np.random.default_rng([robot, step])
    return {
        key: rng.integers(0, 256, shape, np.uint8)
        if len(shape) == 3
        else rng.uniform(-0.5, 0.5, shape).astype(np.float32)
        for key, shape in shapes.items()
    }


async def act(
    port: int, shapes: Shapes, robot: int, *, until: float, period: float, named: bool, limit: int
) -> Episode:
    """Runs one robot: at a period, or without a pause if it is 0.

    Args:
      port: of the server.
      shapes: from `shapes_of`.
      robot: number.
      until: `time.monotonic` to stop at.
      period: seconds between two observations; 0 = as fast as the answers come.
      named: the server knows sessions.
      limit: greatest number of steps.
    """
    done = Episode([], [], 0)
    wrong, name = 0, f"robot-{robot}"
    async with connect(
        f"ws://127.0.0.1:{port}", compression=None, max_size=None, proxy=None, ping_interval=None
    ) as socket:
        await socket.recv()
        due = time.monotonic() + period * np.random.default_rng(robot).random()
        for step in range(limit):
            if time.monotonic() >= until:
                break
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            due += period
            request = {**observation(shapes, robot, step), "prompt": PROMPT}
            if named:
                request |= {"session_id": name, "step": step}
            data = messages.pack(request)
            sent = time.perf_counter()
            await socket.send(data)
            answer = await socket.recv()
            done.seconds.append(time.perf_counter() - sent)
            if isinstance(answer, str):
                raise RuntimeError(answer)
            reply = messages.unpack(answer)
            if named:
                session = reply["session"]
                wrong += (session["id"], session["step"]) != (name, step)
            done.actions.append(reply["actions"][0])
        if named and done.actions:
            await socket.send(messages.pack({"endpoint": "reset", "session_id": name}))
            await socket.recv()
    return done._replace(wrong=wrong)


async def _act_all(num: int, **options) -> list[Episode]:
    return await asyncio.gather(*(act(robot=robot, **options) for robot in range(num)))


def run(
    server, shapes: Shapes, num: int, *, seconds: float, hz: float = 0, named=True, limit=10**9
) -> Load:
    """Runs some robots at once for a time."""
    cpu, began = cpu_seconds(server.pid), time.monotonic()
    episodes = asyncio.run(
        _act_all(
            num,
            port=server.port,
            shapes=shapes,
            until=began + seconds,
            period=1 / hz if hz else 0.0,
            named=named,
            limit=limit,
        )
    )
    return Load(episodes, time.monotonic() - began, cpu_seconds(server.pid) - cpu)


def in_process(run_dir: str, num: int, num_steps: int) -> np.ndarray:
    """Returns the actions `[num_steps, num, A]` of the agent for the same observations."""
    import jax

    from vla_jax.acting.agent import make_agent, read_instruction
    from vla_jax.runs import load_run
    from vla_jax.types import make_observation

    run, shapes = load_run(run_dir), shapes_of(run_dir)
    parts = {"observation/image": "image_primary", "observation/wrist_image": "image_wrist"}
    parts |= {"observation/state": "proprio"}
    agent = make_agent(run.agent, run.norm_stats)
    state, step = agent.init(run.params, num), jax.jit(agent.step)
    words = np.stack([read_instruction(run.agent, PROMPT)] * num)
    actions = []
    for t in range(num_steps):
        seen = [observation(shapes, robot, t) for robot in range(num)]
        rows = {parts.get(k, k): np.stack([each[k] for each in seen]) for k in shapes}
        now = make_observation(rows, instruction=words)
        state, action = step(run.params, state, now, np.full(num, t == 0))
        actions.append(np.asarray(action))
    return np.stack(actions)


def report(title: str, load: Load) -> str:
    """Returns one row of a table."""
    times = 1000 * np.concatenate([each.seconds for each in load.episodes])
    p50, p95, p99 = np.percentile(times, [50, 95, 99])
    wrong = sum(each.wrong for each in load.episodes)
    rate = len(times) / load.seconds
    return (
        f"| {title} | {len(load.episodes)} | {len(times)} | {rate:.0f} | {p50:.1f} | {p95:.1f} | "
        f"{p99:.1f} | {wrong} | {1000 * load.server_cpu / len(times):.2f} |"
    )


def paced(server, run_dir: str, arguments) -> list[str]:
    """Runs sessions at a rate and compares their first actions with those in process."""
    shapes = shapes_of(run_dir)
    load = run(server, shapes, arguments.sessions, seconds=arguments.seconds, hz=arguments.hz)
    count = min(arguments.checked, *(len(each.actions) for each in load.episodes))
    expected = in_process(run_dir, arguments.sessions, count)
    found = np.stack([np.stack(each.actions[:count]) for each in load.episodes], axis=1)
    worst = np.abs(found - expected).max()
    steps = [len(each.actions) for each in load.episodes]
    return [
        report(f"{arguments.hz:g} Hz each", load),
        f"steps per session {min(steps)} to {max(steps)}; greatest difference from the agent in "
        f"process {worst:.1e}, over {count} steps of every session",
    ]


async def _visit(port: int, shapes: Shapes, first: int, count: int) -> None:
    """Begins and ends sessions: every other one named, and every tenth of those is abandoned."""
    for number in range(first, first + count):
        async with connect(
            f"ws://127.0.0.1:{port}", compression=None, proxy=None, ping_interval=None
        ) as socket:
            await socket.recv()
            named = {"session_id": f"visit-{number}"} if number % 2 else {}
            for step in range(2):
                seen = {**observation(shapes, number, step), "prompt": PROMPT}
                await socket.send(messages.pack({**seen, **named, "reset": step == 0}))
                answer = await socket.recv()
                if isinstance(answer, str):
                    raise RuntimeError(answer)
            if named and number % 20 != 1:
                await socket.send(messages.pack({"endpoint": "reset", **named}))
                await socket.recv()


def come_and_go(server, shapes: Shapes, count: int, *, at_once: int = 4) -> list[str]:
    """Measures the server's memory while sessions begin and end."""

    async def visit(first: int, number: int) -> None:
        each = number // at_once
        jobs = (_visit(server.port, shapes, first + i * each, each) for i in range(at_once))
        await asyncio.gather(*jobs)

    rows, visited = [], 0
    for part in (count // 10, count - count // 10 - count // 2, count // 2):
        asyncio.run(visit(visited, part))
        visited += part
        rows.append((visited, resident_mb(server.pid)))
    (_, first), *_, (_, last) = rows
    table = [f"| {number} | {memory:.1f} |" for number, memory in rows]
    return [*table, f"change after the first tenth: {100 * (last / first - 1):+.2f} %"]


def first_replies(run_dir: str, starts: int, *, hz: float, options: list[str]) -> list[str]:
    """Measures the first reply after each start, the median at a rate, and after pauses."""
    from websockets.sync.client import connect as connect_sync

    shapes, rows = shapes_of(run_dir), []
    data = [messages.pack({**observation(shapes, 0, t), "prompt": PROMPT}) for t in range(60)]
    for _ in range(starts):
        with (
            serve(run_dir, *options) as server,
            connect_sync(f"ws://127.0.0.1:{server.port}", compression=None, proxy=None) as socket,
        ):
            socket.recv()
            times = []
            for pause in [1.0, *[1 / hz] * 59, *[0.0] * 300, *[1.0] * 5]:
                time.sleep(pause)
                sent = time.perf_counter()
                socket.send(data[len(times) % len(data)])
                socket.recv()
                times.append(1000 * (time.perf_counter() - sent))
        first, paced, fast, late = (
            times[0],
            *map(np.median, (times[1:60], times[60:360], times[-5:])),
        )
        rows.append(
            f"first reply {first:.2f} ms; median at {hz:g} Hz {paced:.2f} ms ({first / paced:.2f} "
            f"times); median without pauses {fast:.2f} ms; after pauses of 1 s {late:.2f} ms"
        )
    return rows


def throughput(run_dir: str, arguments) -> list[str]:
    """Measures steps per second of both servers, in turns."""
    shapes, rows = shapes_of(run_dir), []
    sessions = str(max(arguments.robots))
    with (
        serve(run_dir, "--sessions", sessions, *arguments.option) as ours,
        serve(
            run_dir,
            module="tests.campaigns.openpi_peer",
            environment={"PYTHONPATH": f"{pathlib.Path(__file__).parents[2]}:{arguments.openpi}"},
        ) as theirs,
    ):
        run(theirs, shapes, 1, seconds=600, named=False, limit=3)  # compiles
        for num in arguments.robots:
            rates: dict[str, list[float]] = {"vla_jax": [], "openpi-server": []}
            for _ in range(arguments.rounds):
                for name, server in (("vla_jax", ours), ("openpi-server", theirs)):
                    named = name == "vla_jax"
                    load = run(server, shapes, num, seconds=arguments.seconds, named=named)
                    rows.append(report(name, load))
                    rates[name].append(
                        sum(len(each.seconds) for each in load.episodes) / load.seconds
                    )
            one, other = (np.median(each) for each in rates.values())
            rows.append(f"{num} robots: {one / other:.2f} times the steps of openpi-server")
    return rows


def main() -> None:
    """Runs what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir")
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--hz", type=float, default=10)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--checked", type=int, default=50, help="steps to compare in process")
    parser.add_argument("--openpi", help="folder with openpi_server: compare steps per second")
    parser.add_argument("--robots", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--starts", type=int, help="starts whose first reply is measured")
    parser.add_argument("--come-and-go", type=int, help="sessions to begin and end")
    parser.add_argument("--option", action="append", default=[], help="for the server")
    parser.add_argument("--port", type=int, help="of a server that runs already")
    arguments = parser.parse_args()
    if arguments.starts:
        measured = first_replies(
            arguments.run_dir, arguments.starts, hz=arguments.hz, options=arguments.option
        )
        print(*measured, sep="\n")
        return
    print("| | robots | steps | steps/s | p50 ms | p95 ms | p99 ms | wrong | server CPU ms/step |")
    if arguments.openpi:
        lines = throughput(arguments.run_dir, arguments)
    else:
        sessions = ["--sessions", str(arguments.sessions + 8)]
        brief = ["--session-ttl-s", "5"] if arguments.come_and_go else []
        options = [*sessions, *brief, *arguments.option]
        with serve(arguments.run_dir, *options, port=arguments.port) as server:
            if arguments.come_and_go:
                shapes = shapes_of(arguments.run_dir)
                lines = come_and_go(server, shapes, arguments.come_and_go)
            else:
                lines = paced(server, arguments.run_dir, arguments)
    print(*lines, sep="\n")


if __name__ == "__main__":
    sys.exit(main())
