"""Kills scripts at random moments, runs the same command again, and compares the results.

    python tests/campaigns/kills.py                        # all scripts, 20 kills each
    python tests/campaigns/kills.py --jobs imitate --kills 100

Each job first runs without interruption. Then it is killed (SIGKILL to its whole process group)
after a random part of that time and started again, up to five times, and runs to its end; this is
repeated until there were enough kills. Its files must equal those of the uninterrupted run: arrays,
tables and videos to the bit, JSON except for durations. Temporary files must be gone.
"""

import argparse
import os
import pathlib
import random
import shutil
import signal
import subprocess
import tempfile
from typing import NamedTuple

from jobs import JOBS, Job, contents, finish, folders_in, prepare, start, temporary

KILLS_PER_RUN = 5  # at most; then the command runs to its end


def killed(process: subprocess.Popen[str], seconds: float) -> bool:
    """Kills a process group after some time; False if the process ended before, with success."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True
    if process.returncode:
        raise RuntimeError(f"exit {process.returncode}: {output[-2000:]}")
    return False


class Result(NamedTuple):
    """Outcome of the kills of a job."""

    kills: int
    unfinished: int  # kills that left a temporary file
    runs: int  # runs that ended after kills
    differing: tuple[str, ...]  # files that differ from those of the uninterrupted run
    left: tuple[str, ...]  # temporary files after the end


def run_job(job: Job, kills: int, rng: random.Random) -> Result:
    """Kills a job so many times, and compares the runs that ended."""
    with tempfile.TemporaryDirectory() as temp:
        root = pathlib.Path(temp)
        _, expected, seconds = prepare(job, root)
        done = unfinished = runs = 0
        differing, left = set(), set()
        while done < kills:
            shutil.copytree(root / "prepared", root / f"run{runs}")
            folders = folders_in(root / f"run{runs}")
            output = pathlib.Path(job.output.format(**folders))
            for _ in range(rng.randint(1, KILLS_PER_RUN)):
                if not killed(start(job.command, folders), rng.uniform(0.2, 1.0) * seconds):
                    break
                done += 1
                unfinished += bool(temporary(output))
            else:
                finish(start(job.command, folders))
            found = contents(output)
            differing |= {k for k in {*found, *expected} if found.get(k) != expected.get(k)}
            left |= set(temporary(output))
            runs += 1
    return Result(done, unfinished, runs, tuple(sorted(differing)), tuple(sorted(left)))


def main() -> None:
    """Runs the jobs, and prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--kills", type=int, default=20, help="kills of each job")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    args = parser.parse_args()
    print("job         kills  in a write  runs  differing files  temporary files left")
    for name in args.jobs:
        result = run_job(JOBS[name], args.kills, random.Random(args.seed))
        print(
            f"{name:10}  {result.kills:5}  {result.unfinished:10}  {result.runs:4}  "
            f"{' '.join(result.differing) or '0':15}  {' '.join(result.left) or '0'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
