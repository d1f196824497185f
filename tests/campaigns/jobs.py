"""Small commands of every script that writes files, and what they wrote: shared by campaigns."""

import hashlib
import json
import pathlib
import shutil
import socket
import subprocess
import sys
import time
from typing import NamedTuple

import forked

TEMPORARY = (".part", ".tmp", "orbax-checkpoint-tmp")  # parts of names of unfinished files
# Keys of lines of JSON that depend on the clock, on the folder, or on how often a run was started.
VARYING = {
    "steps_per_second",
    "train_seconds",
    "data_wait",
    "latency",
    "run_dir",
    "dataset",
    "command",
}
# Files whose content depends on the clock or on the place of the folder.
NOT_COMPARED = ("index.html", "config.json", "hashes.json", ".lock")
NOT_COMPARED += ("commit_success.txt", "_CHECKPOINT_METADATA")  # times of writing, by Orbax


class Job(NamedTuple):
    """A command, and the folder that it writes."""

    command: str  # arguments of `python -m`; words in braces are folders
    output: str = "{out}"  # folder to compare
    needs: tuple[str, ...] = ("demos",)  # folders that must exist, keys of PREPARATION
    num_processes: int = 1  # that run the command together

    def words(self, folders: dict[str, str]) -> list[str]:
        """Returns the arguments of `python -m` for the folders of a run."""
        return [word.format(**folders) for word in self.command.split()]

    def per_process(self) -> list["Job"]:
        """Returns the job of each process, which are to be started together."""
        if self.num_processes == 1:
            return [self]
        option = f"{self.command} --distributed 127.0.0.1:{free_port()},{self.num_processes},"
        return [self._replace(command=f"{option}{index}") for index in range(self.num_processes)]


RECORD = "train.record --preset table_jax --max-steps 24 --image-size 16"
IMITATE = (
    "train.imitate --preset table_jax_state --window-size 6 --hidden-size 8 --head-sizes 8 "
    "--batch-size 8 --dropout 0.1 --dataset {demos}"
)
PRETRAIN = "train.pretrain --patch-size 8 --batch-size 8 --dataset {demos}"
OFTEN = "--save-every 5 --log-every 5 --warmup-steps 5 --num-updates"
PREPARATION = {  # commands that write the folders which jobs read
    "demos": f"{RECORD} --num-episodes 40 --dataset {{demos}}",
    "run": f"{IMITATE} --warmup-steps 5 --num-updates 6 --run-dir {{run}}",
    "encoder": f"{PRETRAIN} --warmup-steps 1 --num-updates 2 --run-dir {{encoder}}",
}
JOBS = {
    "imitate": Job(f"{IMITATE} --run-dir {{out}} {OFTEN} 150"),
    "imitate_by_two": Job(
        f"{IMITATE} --mesh data=2 --run-dir {{out}} {OFTEN} 150", num_processes=2
    ),
    "pretrain": Job(f"{PRETRAIN} --width 16 --num-latents 2 --run-dir {{out}} {OFTEN} 50"),
    "reinforce": Job(f"train.reinforce --num-seeds 2 --run-dir {{out}} {OFTEN} 100", needs=()),
    "ppo": Job(f"train.ppo --num-seeds 2 --run-dir {{out}} {OFTEN} 20", needs=()),
    "sarsa": Job(f"train.deep_sarsa --num-seeds 2 --run-dir {{out}} {OFTEN} 100", needs=()),
    "seq2seq": Job(
        "train.scan --hidden-size 8 --embed-size 8 --batch-size 8 --split addprim_turn_left "
        f"--run-dir {{out}} {OFTEN} 50",
        needs=(),
    ),
    "cache": Job(
        "train.cache --preset table_lstm --dataset {demos} --backbone-from {encoder}",
        "{demos}",
        needs=("demos", "encoder"),
    ),
    "frames": Job("train.cache --preset table_lstm --dataset {demos} --frames raw", "{demos}"),
    "record": Job(f"{RECORD} --num-episodes 60 --dataset {{out}}", needs=()),
    "evaluate": Job(
        "vla_jax.evaluate {run} --num-episodes 64 --num-videos 2", "{run}", needs=("demos", "run")
    ),
}


def free_port() -> int:
    """Returns a port of this host that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(command: str, folders: dict[str, str]) -> subprocess.Popen[str]:
    """Starts a command in a process of its own.

    Args:
      command: of a job.
      folders: folders of a run, from `folders_in`.
    """
    words = [word.format(**folders) for word in command.split()]
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=forked.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    """Waits for a process that must succeed."""
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"exit {process.returncode}: {output[-2000:]}")


def temporary(folder: pathlib.Path) -> list[str]:
    """Returns the unfinished files in a folder and beside it."""
    paths = [*folder.parent.glob(f"{folder.name}*"), *folder.rglob("*")]
    return sorted(str(path) for path in paths if any(part in path.name for part in TEMPORARY))


def contents(folder: pathlib.Path) -> dict[str, str]:
    """Returns relative path -> hash of everything that must be equal in two runs."""
    return forked.call(_contents, folder)


def _contents(folder: pathlib.Path) -> dict[str, str]:
    items = [path.parent for path in folder.rglob("_METADATA")]  # arrays that Orbax wrote
    found = {str(item.relative_to(folder)): arrays(item) for item in items}
    for path in sorted(folder.rglob("*")):
        is_orbax = "checkpoints" in path.parts or any(item in path.parents for item in items)
        if path.is_file() and not is_orbax and path.name not in NOT_COMPARED:
            found[str(path.relative_to(folder))] = digest(path)
    return found


def digest(path: pathlib.Path) -> str:
    """Returns a hash of a file, without the values of JSON that vary."""
    content = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        lines = content.decode().splitlines() if path.suffix == ".jsonl" else [content.decode()]
        content = json.dumps([steady(json.loads(line)) for line in lines]).encode()
    return hashlib.sha256(content).hexdigest()[:12]


def steady(data: object) -> object:
    """Returns JSON data without the values that vary."""
    if isinstance(data, dict):
        return {key: steady(value) for key, value in data.items() if key not in VARYING}
    return [steady(value) for value in data] if isinstance(data, list) else data


def arrays(item: pathlib.Path) -> str:
    """Returns a hash of all arrays in a folder, read by Orbax alone."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp
    from etils import epath

    reader = ocp.PyTreeCheckpointer()
    tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(item)).tree
    plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    restored = reader.restore(item.absolute(), restore_args=plain)
    whole = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
        array = np.asarray(leaf)
        whole.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        whole.update(array.tobytes())
    return whole.hexdigest()[:12]


class Whole(NamedTuple):
    """A run without interruption."""

    output: pathlib.Path  # folder that it wrote
    files: dict[str, str]  # from `contents`
    seconds: float


def prepare(job: Job, root: pathlib.Path) -> Whole:
    """Writes what a job reads into `root/prepared`, and runs it once in a copy, `root/whole`."""
    for name in job.needs:
        finish(start(PREPARATION[name], folders_in(root / "prepared")))
    (root / "prepared").mkdir(exist_ok=True)
    shutil.copytree(root / "prepared", root / "whole")
    folders = folders_in(root / "whole")
    begin = time.perf_counter()
    processes = [start(each.command, folders) for each in job.per_process()]
    try:
        for process in processes:
            finish(process)
    finally:
        for process in processes:
            process.kill()
    seconds = time.perf_counter() - begin
    output = pathlib.Path(job.output.format(**folders))
    return Whole(output, contents(output), seconds)


def folders_in(root: pathlib.Path) -> dict[str, str]:
    """Returns the folders of one run of a job."""
    return {name: str(root / name) for name in (*PREPARATION, "out")}
