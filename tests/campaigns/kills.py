"""Kills scripts at random moments, runs the same command again, and compares the results.

    python tests/campaigns/kills.py                        # all scripts, 20 kills each
    python tests/campaigns/kills.py --jobs imitate --kills 100

Each job first runs without interruption. Then it is killed (SIGKILL to all of its processes) and
started again, up to five times, and runs to its end; this is repeated until there were enough
kills. Every other kill is at a random moment; the others wait for such a moment, and then for the
next temporary file, so that they are in the middle of a write. The files must equal those of the
uninterrupted run: arrays, tables and videos to the bit, JSON except for durations. Temporary files
must be gone. Runs that are killed are forked from a process that has imported the script, and share
a cache of compiled programs: the moments lie in the work of the script and not in its start.
Several processes compile anew at every start, so that some of their moments lie there.
"""

import argparse
import pathlib
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import forked
from jobs import JOBS, Job, contents, folders_in, prepare, temporary

KILLS_PER_RUN = 5  # at most; then the command runs to its end
LATEST = 0.03  # s after a temporary file was seen


class Kill(NamedTuple):
    """One kill."""

    seconds: float  # after the start
    in_write: bool  # a temporary file was there


class Commands:
    """The commands of all processes of a job, which run and are killed together."""

    def __init__(self, job: Job, folder: pathlib.Path) -> None:
        """Starts the job in a folder of `jobs.folders_in`, with log files beside its output."""
        self._commands = [
            forked.Command(each.words(folders_in(folder)), folder / f"log{index}")
            for index, each in enumerate(job.per_process())
        ]

    def wait(self, seconds: float | None = None) -> bool:
        """Waits; returns False if a command still runs after so many seconds."""
        end = None if seconds is None else time.monotonic() + seconds
        left = [
            command.wait(None if end is None else max(0, end - time.monotonic()))
            for command in self._commands
        ]
        return all(left)

    def wait_for(self, happened: Callable[[], bool]) -> bool:
        """Waits until something happened; returns False if all ended before, with success."""
        return self._commands[0].wait_for(happened) or not self.wait()

    def kill(self) -> bool:
        """Kills all at once (SIGKILL); returns False if they had ended before, with success."""
        return forked.kill_together(self._commands) or not self.wait()


def kill(
    commands: Commands, output: pathlib.Path, *, after: float, in_write: bool, rng: random.Random
) -> Kill | None:
    """Kills what has been started; None if it ended before, with success.

    Args:
      commands: of the job.
      output: folder that it writes.
      after: seconds to wait.
      in_write: wait for the next temporary file too.
      rng: of the short time after that.
    """
    begin = time.perf_counter()
    if commands.wait(after):
        return None
    if in_write:
        if not commands.wait_for(lambda: bool(temporary(output))):
            return None
        time.sleep(rng.uniform(0, LATEST))
    seconds = time.perf_counter() - begin
    return Kill(seconds, bool(temporary(output))) if commands.kill() else None


class Result(NamedTuple):
    """Outcome of the kills of a job."""

    kills: int
    unfinished: int  # kills that left a temporary file
    runs: int  # runs that ended after kills
    differing: tuple[str, ...]  # files that differ from those of the uninterrupted run
    left: tuple[str, ...]  # temporary files after the end


def run_job(name: str, job: Job, kills: int, rng: random.Random, root: pathlib.Path) -> Result:
    """Kills a job so many times, and compares the runs that ended.

    Args:
      name: of the job, for the lines that are printed.
      job: command and folders.
      kills: at least.
      rng: of the moments.
      root: empty folder for all runs.
    """
    _, expected, seconds = prepare(job, root)
    done = unfinished = runs = 0
    differing, left = set(), set()
    while done < kills or runs == 0:
        folder = root / f"run{runs}"
        shutil.copytree(root / "prepared", folder)
        output = pathlib.Path(job.output.format(**folders_in(folder)))
        wanted = rng.randint(1, KILLS_PER_RUN) if runs else 0  # the first one gives the time
        begin = time.perf_counter()
        for _ in range(wanted):
            # In a run that is killed once at any moment of it, otherwise sooner: it must not end.
            after = rng.uniform(0, 1) * seconds * 2 / (wanted + 1)
            in_write, start = done % 2 == 1, time.perf_counter()
            commands = Commands(job, folder)
            if (each := kill(commands, output, after=after, in_write=in_write, rng=rng)) is None:
                seconds = min(seconds, time.perf_counter() - start)  # the first one compiled
                break
            done, unfinished = done + 1, unfinished + each.in_write
            print(f"{name} run {runs} kill {done}: {each.seconds:.2f} s", end=" ")
            print("in a write" if each.in_write else "", flush=True)
        else:
            Commands(job, folder).wait()
        if not wanted:
            seconds = time.perf_counter() - begin
        found = contents(output)
        wrong = {key for key in {*found, *expected} if found.get(key) != expected.get(key)}
        busy = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"{name} run {runs} ended; differing: {sorted(wrong)}", end="; ")
        print(f"{busy.ru_utime + busy.ru_stime:.0f} s of CPU so far", flush=True)
        differing |= wrong
        left |= set(temporary(output))
        runs += 1
        if not wrong:
            shutil.rmtree(folder)
    return Result(done, unfinished, runs - 1, tuple(sorted(differing)), tuple(sorted(left)))


def main() -> None:
    """Runs the jobs, and prints a line for each kill and for each job."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--kills", type=int, default=20, help="kills of each job")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    args = parser.parse_args()
    print("job             kills  in a write  runs  differing files  temporary files left")
    for name in args.jobs:
        with tempfile.TemporaryDirectory() as temp:
            root = pathlib.Path(temp)
            result = run_job(name, JOBS[name], args.kills, random.Random(args.seed), root)
        print(
            f"{name:14}  {result.kills:5}  {result.unfinished:10}  {result.runs:4}  "
            f"{' '.join(result.differing) or '0':15}  {' '.join(result.left) or '0'}",
            flush=True,
        )


if __name__ == "__main__":
    with forked.shared_programs():
        main()
