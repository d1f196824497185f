"""Kills the processes that load batches, and damages the cache of compiled programs.

    python tests/campaigns/broken_parts.py

A training whose loading process is killed must end within a minute with one sentence, and the same
command must end with the files of an uninterrupted run. A program with a damaged cache must have
the same result: JAX may compile again, and must not run what was changed.
"""

import argparse
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from forked import ROOT
from jobs import JOBS, Job, contents, finish, folders_in, prepare, start, temporary

PROGRAM = """
import jax
from vla_jax.command_line import exit_codes

def scan(x):
    return jax.lax.scan(lambda c, _: (jax.numpy.tanh(c @ x), c.sum()), x, None, length=20)

with exit_codes():
    print(*jax.tree.leaves(jax.jit(scan)(jax.random.normal(jax.random.key(0), (33, 33)))))
"""
WORKERS = " --num-workers 2"
LONGEST = 60  # s from the death of a process to the end of the command


def children(pid: int) -> list[int]:
    """Returns the processes that load batches for a process."""
    found = subprocess.run(["pgrep", "-P", str(pid), "-f", "spawn_main"], capture_output=True)
    return sorted(int(word) for word in found.stdout.split())


def kill_worker(job: Job, root: pathlib.Path, name: str, number: int) -> str:
    """Kills one of the processes after the first log; returns the end of what is printed."""
    folders = folders_in(root / name)
    shutil.copytree(root / "prepared", root / name)
    output = pathlib.Path(job.output.format(**folders))
    process = start(job.command + WORKERS, folders)
    log = output / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.01)
    workers = children(process.pid)
    os.kill(workers[number], signal.SIGKILL)
    begin = time.perf_counter()
    try:
        words, _ = process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        process.kill()
        return f"HANGS; {len(workers)} workers"
    seconds = time.perf_counter() - begin
    alive = [pid for pid in workers if pathlib.Path(f"/proc/{pid}").exists()]
    return (
        f"exit {process.returncode} after {seconds:.1f} s, processes left {alive}, temporary files "
        f"{temporary(output)}: {words.strip()[-1500:]}"
    )


def resumed(job: Job, root: pathlib.Path, name: str, expected: dict[str, str]) -> list[str]:
    """Runs the command again; returns the files that differ."""
    folders = folders_in(root / name)
    finish(start(job.command + WORKERS, folders))
    found = contents(pathlib.Path(job.output.format(**folders)))
    return sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))


def flip(content: bytes, rng: random.Random) -> bytes:
    """Flips one bit."""
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "half": lambda content, rng: content[: len(content) // 2],
    "empty": lambda content, rng: b"",
    "text": lambda content, rng: b"no program",
    "flipped": flip,
    "zeros": lambda content, rng: content[:100] + bytes(len(content) - 100),
}


def run_program(cache: pathlib.Path) -> tuple[int, str, str]:
    """Runs some compiled functions; returns exit code, their result, and the messages."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def damage_cache(cache: pathlib.Path, flips: int, rng: random.Random) -> None:
    """Prints what happens with a cache in which every file is damaged, for each kind of damage."""
    _, expected, _ = run_program(cache)
    intact = {path: path.read_bytes() for path in cache.glob("*-cache")}
    for kind in [*DAMAGE, *["flipped"] * flips]:
        for path, content in intact.items():
            path.write_bytes(DAMAGE[kind](content, rng))
        code, result, messages = run_program(cache)
        outcome = "the same" if (code, result) == (0, expected) else f"OTHER, exit {code}"
        print(f"cache of {len(intact)} files {kind}: {outcome}; {messages.strip()}", flush=True)


def main() -> None:
    """Prints a line for each case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=["workers", "cache"])
    parser.add_argument("--flips", type=int, default=5, help="further caches with a flipped bit")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temp:
        root = pathlib.Path(temp)
        if "cache" in args.cases:
            damage_cache(root / "cache", args.flips, random.Random(0))
        if "workers" in args.cases:
            job = JOBS["imitate"]
            _, expected, _ = prepare(job, root)
            for number in (0, 1):
                name = f"worker{number}"
                print(name, kill_worker(job, root, name, number), flush=True)
                print(name, "differing:", resumed(job, root, name, expected), flush=True)


if __name__ == "__main__":
    main()
