"""Runs scripts on disks that are full or read-only, and with limits of the size of files.

    python tests/campaigns/full_disk.py                   # all scripts; as root, for tmpfs
    python tests/campaigns/full_disk.py --jobs imitate

Each job first runs without limits. Then it runs where it can write only a part of those bytes: on a
small file system of its own, which root may mount, and with a limit of the size of each file
(RLIMIT_FSIZE); on a read-only file system; and as a user who may only read the folder. It must end
with one sentence and leave no temporary file. With enough space, the same command must then succeed
with the same files. The children are forked, as in `kills.py`.
"""

import argparse
import contextlib
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import forked
from jobs import JOBS, Job, contents, folders_in, prepare, temporary

PARTS = (0.02, 0.3, 0.9)  # of the bytes that the job writes, or of its largest file
ALONE = [name for name, job in JOBS.items() if job.num_processes == 1]
NOBODY = 65534  # id of a user without rights
SPARE = 2**30  # bytes of a file system that is large enough


class Result(NamedTuple):
    """Outcome of a job on one disk."""

    disk: str
    outcome: str  # "sentence", "traceback", or "ended" where the space was sufficient
    words: str  # last line that was printed
    left: tuple[str, ...]  # temporary files afterwards
    differing: tuple[str, ...]  # files that differ after the second run


@contextlib.contextmanager
def mounted(folder: pathlib.Path) -> Iterator[None]:
    """Mounts a file system in memory."""
    folder.mkdir()
    mount(folder, f"size={SPARE}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def mount(folder: pathlib.Path, options: str) -> None:
    """Mounts a file system in memory, or changes the options of the mounted one."""
    again = ["-o", f"remount,{options}"] if os.path.ismount(folder) else ["-o", options]
    subprocess.run(["mount", "-t", "tmpfs", *again, "tmpfs", str(folder)], check=True)


def used(folder: pathlib.Path) -> int:
    """Returns the bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def largest_new_file(folder: pathlib.Path, before: pathlib.Path) -> int:
    """Returns the bytes of the largest file in `folder` that is not in `before`."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(p.stat().st_size for p in files if not (before / p.relative_to(folder)).exists())


def judge(command: forked.Command) -> tuple[str, str]:
    """Waits for a command; returns its outcome and the last line that it printed."""
    code = command.end()
    output = command.output()
    last = output.strip().splitlines()[-1] if output.strip() else ""
    if code == 0:
        return "ended", last
    is_sentence = last.startswith("error: ") and "Traceback" not in output
    return ("sentence", last) if is_sentence else ("traceback", output[-1500:])


def run_job(job: Job, parts: Sequence[float]) -> Iterator[Result]:
    """Yields what a job does on each disk; `parts` as PARTS."""
    with tempfile.TemporaryDirectory() as temp:
        root = pathlib.Path(temp)
        _, expected, _ = prepare(job, root)
        bytes_written = used(root / "whole") - used(root / "prepared")
        largest = largest_new_file(root / "whole", root / "prepared")
        for part in parts:
            yield limited_files(job, root, int(part * largest), expected)
        if os.geteuid() == 0:
            for part in parts:
                yield small_disk(job, root, int(part * bytes_written), expected)
            yield small_disk(job, root, None, expected)
            yield not_owned(job, root, expected)


def limited_files(job: Job, root: pathlib.Path, size: int, expected: dict[str, str]) -> Result:
    """Runs a job with a limit of the size of each file."""
    folder = root / f"files_{size}"
    shutil.copytree(root / "prepared", folder)
    folders = folders_in(folder)
    limits = forked.Limits(file_bytes=size)
    outcome, words = judge(forked.Command(job.words(folders), root / "log", limits))
    left = temporary(pathlib.Path(job.output.format(**folders)))
    differing = again(job, root, folders, expected)
    return Result(f"files of {size} bytes", outcome, words, tuple(left), differing)


def not_owned(job: Job, root: pathlib.Path, expected: dict[str, str]) -> Result:
    """Runs a job as a user who may read the folder, and not write it."""
    folder = root / "not_owned"
    shutil.copytree(root / "prepared", folder)
    root.chmod(0o755)
    folders = folders_in(folder)
    command = forked.Command(job.words(folders), root / "log", forked.Limits(user=NOBODY))
    outcome, words = judge(command)
    left = temporary(pathlib.Path(job.output.format(**folders)))
    differing = again(job, root, folders, expected)
    return Result("folder of another user", outcome, words, tuple(left), differing)


def small_disk(job: Job, root: pathlib.Path, size: int | None, expected: dict[str, str]) -> Result:
    """Runs a job on a file system with some free bytes; None = a read-only one."""
    folder = root / "disk"
    with mounted(folder):
        shutil.copytree(root / "prepared", folder / "run")
        free = shutil.disk_usage(folder).used + (size or 0)
        mount(folder, "ro" if size is None else f"rw,size={max(free, 4096)}")
        folders = folders_in(folder / "run")
        outcome, words = judge(forked.Command(job.words(folders), root / "log"))
        left = temporary(pathlib.Path(job.output.format(**folders)))
        mount(folder, f"rw,size={SPARE}")
        differing = again(job, root, folders, expected)
    folder.rmdir()
    label = "read-only" if size is None else f"disk of {size} bytes"
    return Result(label, outcome, words, tuple(left), differing)


def again(
    job: Job, root: pathlib.Path, folders: dict[str, str], expected: dict[str, str]
) -> tuple[str, ...]:
    """Runs a job without limits; returns the files that differ from those expected."""
    outcome, words = judge(forked.Command(job.words(folders), root / "log"))
    if outcome != "ended" and "overwrite" not in words:  # it had ended before, and must not again
        return (words,)
    found = contents(pathlib.Path(job.output.format(**folders)))
    return tuple(sorted(k for k in {*found, *expected} if found.get(k) != expected.get(k)))


def main() -> None:
    """Runs the jobs, and prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", nargs="*", default=ALONE, choices=ALONE)
    parser.add_argument(
        "--parts", nargs="*", type=float, default=PARTS, help="of the bytes written"
    )
    args = parser.parse_args()
    for name in args.jobs:
        for result in run_job(JOBS[name], args.parts):
            print(f"{name:10} {result.disk:24} {result.outcome:10} {result.words}", flush=True)
            for path in result.left:
                print(f"{'':10} left behind: {path}")
            for path in result.differing:
                print(f"{'':10} differs: {path}", flush=True)


if __name__ == "__main__":
    with forked.shared_programs():
        main()
