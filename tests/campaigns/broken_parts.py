"""Kills the processes that load batches, and damages the cache of compiled programs.

    python tests/campaigns/broken_parts.py

A training whose loading process is killed must end within a minute with one sentence, and the same
command must end with the files of an uninterrupted run. So must every run with a damaged cache:
JAX may compile again, and must not run a program that was changed.
"""

import argparse
import os
import pathlib
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable

from jobs import JOBS, Job, contents, finish, folders_in, prepare, start, temporary

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


def damaged(
    job: Job, root: pathlib.Path, kind: str, expected: dict[str, str], rng: random.Random
) -> str:
    """Runs a job with a cache in which every file is damaged; returns what happens."""
    cache = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    for path in cache.glob("*-cache"):
        path.write_bytes(DAMAGE[kind](path.read_bytes(), rng))
    folders = folders_in(root / kind)
    shutil.copytree(root / "prepared", root / kind)
    process = start(job.command, folders)
    words, _ = process.communicate()
    found = contents(pathlib.Path(job.output.format(**folders)))
    differing = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
    return f"exit {process.returncode}, differing {differing}: {words.strip()[:1500]}"


def main() -> None:
    """Prints a line for each case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=["workers", "cache"])
    args = parser.parse_args()
    job, rng = JOBS["imitate"], random.Random(0)
    with tempfile.TemporaryDirectory() as temp:
        root = pathlib.Path(temp)
        _, expected, _ = prepare(job, root)
        for number in (0, 1) if "workers" in args.cases else ():
            name = f"worker{number}"
            print(name, kill_worker(job, root, name, number), flush=True)
            print(name, "differing:", resumed(job, root, name, expected), flush=True)
        for kind in DAMAGE if "cache" in args.cases else ():
            print("cache", kind, damaged(job, root, kind, expected, rng), flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as programs:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = programs
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        main()
