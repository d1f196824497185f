"""Thousands of damaged LeRobot data sets, and how the reader answers to each.

    python tests/campaigns/mutations_lerobot.py [--flips 200] [--every 1] [--show accepted]

prints a table of the answers. Every mutation is read in a child process with bounded memory, so
that a crash of a library is counted and not the end.
"""

import argparse
import collections
import io
import json
import multiprocessing
import pathlib
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/campaigns")]

import tiny_lerobot  # noqa: E402
from mutations import (  # noqa: E402
    Answer,
    Mutation,
    answer,
    byte_mutations,
    json_mutations,
    read_everything,
)

from vla_jax.data.readers.lerobot import writer  # noqa: E402

STILL = "observation.images.still"
MODALITY = {
    "state": {"arm": {"start": 0, "end": 2}, "rest": {"start": 2, "end": 3}},
    "action": {"arm": {"start": 0, "end": 1}, "gripper": {"start": 1, "end": 2}},
    "video": {"top": {"original_key": "observation.images.primary"}},
    "annotation": {"human.task": {"original_key": "task_index"}},
}
MEMORY = 6 * 2**30  # bytes of address space of a child


def png(level: int) -> bytes:
    """A grey PNG of 8 x 6 pixels."""
    file = io.BytesIO()
    Image.fromarray(np.full((8, 6, 3), level, np.uint8)).save(file, "PNG")
    return file.getvalue()


def make_v3(root: pathlib.Path) -> pathlib.Path:
    """Writes a v3.0 set with two videos, images in Parquet, texts, and modality.json."""
    writer.write(root, tiny_lerobot.make_episodes(), fps=10, names=tiny_lerobot.NAMES)
    path = tiny_lerobot.data_path(root)
    table = pq.read_table(path)
    stills = [{"bytes": png(step), "path": None} for step in range(table.num_rows)]
    table = table.append_column(STILL, pa.array(stills))
    table = table.append_column("note", pa.array([f"é{i}" for i in range(table.num_rows)]))
    pq.write_table(table, path, row_group_size=5)
    features = json.loads((root / "meta/info.json").read_text())["features"]
    features[STILL] = {"dtype": "image", "shape": [8, 6, 3], "names": None}
    features["note"] = {"dtype": "string", "shape": [1], "names": None}
    tiny_lerobot.change_info(root, features=features)
    (root / "meta/modality.json").write_text(json.dumps(MODALITY))
    return root


def make_v2(root: pathlib.Path) -> pathlib.Path:
    """Copies the v2.1 set that lerobot wrote."""
    source = ROOT / "tests/datasets/lerobot_v21/dataset"
    return pathlib.Path(shutil.copytree(source, root))


def with_rows(column: Any, change: Callable[[list[Any]], list[Any]]) -> Any:
    """A column whose values were changed by a function of a list."""
    return pa.array(change(column.to_pylist()), column.type)


TABLE_CHANGES: dict[str, Callable[[Any, str], Any]] = {
    "removed": lambda t, n: t.drop_columns([n]),
    "renamed": lambda t, n: t.rename_columns([f"{c}?" if c == n else c for c in t.column_names]),
    "null in the middle": lambda t, n: put(t, n, with_rows(t[n], lambda v: [*v[:1], None, *v[2:]])),
    "all null": lambda t, n: put(t, n, pa.nulls(t.num_rows, t[n].type)),
    "null type": lambda t, n: put(t, n, pa.nulls(t.num_rows)),
    "as text": lambda t, n: put(t, n, pa.array([str(v) for v in t[n].to_pylist()])),
    "one value": lambda t, n: put(t, n, with_rows(t[n], lambda v: v[:1] * len(v))),
    "reversed": lambda t, n: put(t, n, with_rows(t[n], lambda v: v[::-1])),
    "in lists": lambda t, n: put(t, n, pa.array([[v] for v in t[n].to_pylist()])),
    "as structs": lambda t, n: put(t, n, pa.array([{"a": v} for v in t[n].to_pylist()])),
    "-7": lambda t, n: put(t, n, pa.array([-7] * t.num_rows)),
    "1.5": lambda t, n: put(t, n, pa.array([1.5] * t.num_rows)),
    "NaN": lambda t, n: put(t, n, pa.array([float("nan")] * t.num_rows)),
    "1e300": lambda t, n: put(t, n, pa.array([1e300] * t.num_rows)),
    "2**62": lambda t, n: put(t, n, pa.array([2**62] * t.num_rows)),
    "2**64 - 1": lambda t, n: put(t, n, pa.array([2**64 - 1] * t.num_rows, pa.uint64())),
    "ragged": lambda t, n: put(t, n, pa.array([[0.0] * (i % 3) for i in range(t.num_rows)])),
    "dates": lambda t, n: put(t, n, pa.array(range(t.num_rows), pa.timestamp("s"))),
    "dictionary": lambda t, n: put(
        t, n, pa.array([str(v) for v in t[n].to_pylist()]).dictionary_encode()
    ),
    "rows reversed": lambda t, n: t.take(list(range(t.num_rows))[::-1]),
    "no rows": lambda t, n: t.slice(0, 0),
    "a row missing": lambda t, n: t.slice(1),
    "rows twice": lambda t, n: pa.concat_tables([t, t]),
    "column twice": lambda t, n: t.append_column(n, t[n]),
}


def put(table: Any, name: str, column: Any) -> Any:
    """A table with another column."""
    return table.set_column(table.column_names.index(name), name, column)


def table_mutations(root: pathlib.Path, name: str) -> Iterator[Mutation]:
    """Yields every change of every column of a Parquet file that is not a statistic."""
    for column in pq.read_schema(root / name).names:
        if column.startswith("stats/"):
            continue
        for label, change in TABLE_CHANGES.items():

            def apply(folder: pathlib.Path, column: str = column, change: Any = change) -> None:
                table = pq.read_table(folder / name)
                pq.write_table(change(table, column), folder / name)

            yield Mutation(f"{name}: column {label}", column, apply)


def all_mutations(v3: pathlib.Path, v2: pathlib.Path, flips: int) -> Iterator[tuple[Any, Mutation]]:
    """Yields data sets and their mutations."""
    episodes = "meta/episodes/chunk-000/file-000.parquet"
    data, video = "data/chunk-000/file-000.parquet", "videos/{}/chunk-000/file-000.mp4"
    for name in ("meta/info.json", "meta/modality.json"):
        yield from ((v3, mutation) for mutation in json_mutations(v3, name))
        yield from ((v3, mutation) for mutation in byte_mutations(v3, name, flips))
    for name in ("meta/tasks.parquet", episodes, data):
        yield from ((v3, mutation) for mutation in table_mutations(v3, name))
        yield from ((v3, mutation) for mutation in byte_mutations(v3, name, 3 * flips))
    name = video.format("observation.images.wrist")
    yield from ((v3, mutation) for mutation in byte_mutations(v3, name, 3 * flips))
    yield from ((v2, mutation) for mutation in json_mutations(v2, "meta/info.json"))
    for name in ("meta/episodes.jsonl", "meta/tasks.jsonl"):
        yield from ((v2, mutation) for mutation in json_mutations(v2, name, is_lines=True))
        yield from ((v2, mutation) for mutation in byte_mutations(v2, name, flips))
    name = "data/chunk-000/episode_000001.parquet"
    yield from ((v2, mutation) for mutation in table_mutations(v2, name))
    yield from ((v2, mutation) for mutation in byte_mutations(v2, name, 2 * flips))
    name = "videos/chunk-000/observation.images.wrist/episode_000001.mp4"
    yield from ((v2, mutation) for mutation in byte_mutations(v2, name, flips))


def run(jobs: list[tuple[Any, Mutation]], folder: pathlib.Path) -> list[Answer]:
    """Answers to all mutations; those at which the process died count as tracebacks."""
    answers: list[Answer] = []
    context = multiprocessing.get_context("fork")
    while len(answers) < len(jobs):
        receive, send = context.Pipe(duplex=False)
        child = context.Process(target=_work, args=(jobs[len(answers) :], folder, send))
        child.start()
        send.close()
        try:
            while True:
                if not receive.poll(60):
                    break
                # functions of a mutation cannot be sent
                outcome = receive.recv()
                answers.append(Answer(jobs[len(answers)][1], *outcome))
        except EOFError:
            pass
        if child.is_alive() and len(answers) < len(jobs):
            child.terminate()
        child.join()
        if len(answers) < len(jobs):
            detail = f"the process ended with {child.exitcode}"
            answers.append(Answer(jobs[len(answers)][1], "traceback", detail, 0.0))
    return answers


def _work(jobs: Any, folder: pathlib.Path, send: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    expected = {root: read_everything(root) for root in dict.fromkeys(root for root, _ in jobs)}
    for root, mutation in jobs:
        send.send(tuple(answer(root, mutation, folder / "copy", expected[root]))[1:])
    send.close()


def show(answers: list[Answer], shown: str) -> None:
    """Prints the table, and the answers of one outcome."""
    kinds: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for each in answers:
        kinds[each.mutation.kind][each.outcome] += 1
    outcomes = ("sentence", "same", "accepted", "traceback")
    print("| mutation | tried | " + " | ".join(outcomes) + " |")
    for kind, counts in kinds.items():
        row = [sum(counts.values()), *(counts[outcome] for outcome in outcomes)]
        print(f"| {kind} | " + " | ".join(map(str, row)) + " |")
    total = collections.Counter(each.outcome for each in answers)
    slowest = max(answers, key=lambda each: each.seconds)
    print(f"total {len(answers)}: {dict(total)}")
    print(f"slowest {slowest.seconds:.2f} s: {slowest.mutation[:2]}")
    for each in answers:
        if each.outcome in shown.split(","):
            print(f"{each.outcome}: {each.mutation.kind}: {each.mutation.label}: {each.detail}")


def main() -> None:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=100, help="byte mutations per file, times 1-3")
    parser.add_argument("--every", type=int, default=1, help="try every n-th mutation")
    parser.add_argument("--show", default="traceback", help="outcomes to list, with commas")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        jobs = list(all_mutations(make_v3(folder / "v3"), make_v2(folder / "v2"), args.flips))
        show(run(jobs[:: args.every], folder), args.show)


if __name__ == "__main__":
    main()
