"""Damages small HDF5 and CALVIN data sets in thousands of ways, and counts the answers.

    PYTHONPATH=.:tests python tests/campaigns/mutations_hdf5.py [--count 600] [--seed 0] [--details]

Of each layout, `count` random mutations of the bytes, and every object and attribute replaced by
wrong ones. Each mutation is tried in a forked process with a time limit, because a crash of the
HDF5 library would end this program: "crash" counts these. "accepted" means that a changed set was
read; `--details` lists which part of it had changed.
"""

import argparse
import collections
import json
import os
import pathlib
import pickle
import resource
import signal
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import h5py
import numpy as np
import tiny_calvin
import tiny_hdf5
from campaigns.mutations import (
    WRONG_VALUES,
    Answer,
    Mutation,
    answer,
    byte_mutations,
    read_everything,
)

LIMIT_SECONDS = 60


class Tried(NamedTuple):
    """Answer of a reader in a process of its own."""

    answer: Answer
    peak_mb: float  # of the process, with the libraries


def small_demo(make: Callable[..., dict[str, Any]], length: int, **options: Any) -> dict[str, Any]:
    """Returns a demo whose images are tiny, so that most bytes of a file describe the others."""

    def shrink(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: shrink(value) for key, value in tree.items()}
        return tree[:, :3, :4] if tree.ndim == 4 else tree

    return shrink(make(length, **options))


def write_robomimic(folder: pathlib.Path) -> None:
    demos = {f"demo_{i}": small_demo(tiny_hdf5.demo, 2 + i, seed=i) for i in range(2)}
    masks = {"train": ["demo_0"]}
    tiny_hdf5.write_demos(
        folder / "x.hdf5", demos, attributes=tiny_hdf5.ENV_ARGS, masks=masks, compression="gzip"
    )


def write_libero(folder: pathlib.Path) -> None:
    demos = {f"demo_{i}": small_demo(tiny_hdf5.libero_demo, 2 + i, seed=i) for i in range(2)}
    problem = {"problem_info": json.dumps({"language_instruction": "open it"})}
    attributes = {**tiny_hdf5.ENV_ARGS, **problem}
    tiny_hdf5.write_demos(folder / "open_it_demo.hdf5", demos, attributes=attributes)


def write_isaac_lab(folder: pathlib.Path) -> None:
    arguments = {"type": 2, "sim_args": {"dt": 0.01, "decimation": 5}}
    demos = {"demo_0": small_demo(tiny_hdf5.isaac_demo, 2)}
    attributes = {"env_args": json.dumps(arguments)}
    tiny_hdf5.write_demos(folder / "dataset.hdf5", demos, attributes=attributes)


def write_aloha(folder: pathlib.Path) -> None:
    tiny_hdf5.write_aloha(folder / "episode_0.hdf5", 2, form="padded")
    tiny_hdf5.write_aloha(folder / "episode_1.hdf5", 2, form="ragged")


def write_robomme(folder: pathlib.Path) -> None:
    tiny_hdf5.write_robomme(folder / "record_dataset_BinFill.h5", (3, 1), shown=1)


def write_calvin(folder: pathlib.Path) -> None:
    segments, texts = [(0, 2), (np.int64(1), np.int64(3))], ["open it", "push"]
    tiny_calvin.write_part(folder / "training", 4, segments, texts)


LAYOUTS: dict[str, Callable[[pathlib.Path], None]] = {
    "robomimic": write_robomimic,
    "libero": write_libero,
    "isaac_lab": write_isaac_lab,
    "aloha": write_aloha,
    "robomme": write_robomme,
    "calvin": write_calvin,
}


def wrong_objects(length: int) -> dict[str, Callable[[Any, str], None]]:
    """Returns functions that write a wrong object at a name of a group."""
    return {
        "nothing": lambda group, name: None,
        "a group": lambda group, name: group.create_group(name),
        "a number": lambda group, name: group.create_dataset(name, data=1),
        "no rows": lambda group, name: group.create_dataset(name, data=np.zeros((0, 7))),
        "one row more": lambda group, name: group.create_dataset(name, data=np.zeros(length + 1)),
        "texts": lambda group, name: group.create_dataset(name, data=["ä"] * length),
        "damaged texts": lambda group, name: group.create_dataset(name, data=[b"\xff"] * length),
        "null": lambda group, name: group.create_dataset(name, data=h5py.Empty("f4")),
        "a compound": lambda g, name: g.create_dataset(name, data=np.zeros(length, "f4,i4")),
        "references": lambda g, name: g.create_dataset(name, (length,), dtype=h5py.ref_dtype),
        "ragged": lambda g, name: g.create_dataset(name, (length,), dtype=h5py.vlen_dtype("f4")),
        "complex": lambda g, name: g.create_dataset(name, data=np.zeros((length, 7), complex)),
        "NaN": lambda group, name: group.create_dataset(name, data=np.full((length, 7), np.nan)),
        "huge, unwritten": lambda group, name: group.create_dataset(
            name, (2**40, 7), "f8", chunks=(2**10, 7)
        ),
        "wide, unwritten": lambda group, name: group.create_dataset(
            name, (length, 2**20, 2**20, 3), "u1", chunks=(1, 2**10, 2**10, 3)
        ),
        "a large chunk": lambda g, name: g.create_dataset(
            name, (length, 7), "f8", maxshape=(None, None), chunks=(2**20, 2**9 - 1)
        ),
        "an opaque type": lambda g, name: g.create_dataset(name, data=np.zeros(length, "V5")),
        "a named type": lambda group, name: group.__setitem__(name, np.dtype("f8")),
        "a loop": lambda group, name: group.__setitem__(name, h5py.SoftLink(group.name)),
        "a link to itself": lambda g, name: g.__setitem__(name, h5py.SoftLink(f"{g.name}/{name}")),
        "a dangling link": lambda group, name: group.__setitem__(name, h5py.SoftLink("/none")),
        "a hard loop": lambda group, name: group.__setitem__(name, group.file["/"]),
        "a foreign link": lambda g, name: g.__setitem__(
            name, h5py.ExternalLink("/etc/passwd", "/")
        ),
        "a lost link": lambda g, name: g.__setitem__(name, h5py.ExternalLink("lost.h5", "/")),
    }


def object_mutations(root: pathlib.Path) -> Iterator[Mutation]:
    """Yields a mutation for every object in a set's files and every wrong object."""
    for path in sorted(root.glob("*.h*5")):
        places: list[str] = []
        with h5py.File(path) as file:
            file.visit(places.append)
        for place in places:
            for label, write in wrong_objects(2).items():

                def change(folder: pathlib.Path, args: Any = (path.name, place, write)) -> None:
                    with h5py.File(folder / args[0], "r+") as file:
                        parent, _, name = args[1].rpartition("/")
                        group = file[parent or "/"]
                        del group[name]
                        args[2](group, name)

                yield Mutation("object replaced", f"{path.name} {place}: {label}", change)


def attribute_mutations(root: pathlib.Path) -> Iterator[Mutation]:
    """Yields a mutation for every attribute and every wrong value, also inside of JSON."""
    values = [*WRONG_VALUES, b"\xff", np.zeros(3), np.arange(2**12), h5py.Empty("f4"), "{" * 5000]
    for path in sorted(root.glob("*.h*5")):
        with h5py.File(path) as file:
            places: list[str] = []
            file.visit(places.append)
            found = [(place, name) for place in places for name in file[place].attrs]
        for place, name in found:
            for value in values:
                shown = [value, json.dumps(value)] if type(value) in (dict, list, str) else [value]
                if name == "env_args":
                    shown.append(
                        json.dumps({"type": value_of(value), "env_kwargs": value_of(value)})
                    )
                    inner = {
                        "control_freq": value_of(value),
                        "dt": value_of(value),
                        "decimation": 1,
                    }
                    shown.append(json.dumps({"env_kwargs": inner, "sim_args": inner, "type": 2}))
                if name == "problem_info":
                    shown.append(json.dumps({"language_instruction": value_of(value)}))
                for each in shown:

                    def change(
                        folder: pathlib.Path, args: Any = (path.name, place, name, each)
                    ) -> None:
                        with h5py.File(folder / args[0], "r+") as file:
                            del file[args[1]].attrs[args[2]]
                            if args[3] is not None:
                                put(file[args[1]].attrs, args[2], args[3])

                    yield Mutation("attribute replaced", f"{place}.{name} = {each!a:.40}", change)


def value_of(value: Any) -> Any:
    return value if isinstance(value, None | bool | int | float | str | list | dict) else "text"


def put(attributes: Any, name: str, value: Any) -> None:
    """Writes an attribute; as text what HDF5 cannot hold."""
    try:
        attributes[name] = value
    except (TypeError, ValueError, OverflowError):
        attributes[name] = repr(value)


def frame_mutations(root: pathlib.Path) -> Iterator[Mutation]:
    """Yields mutations of the arrays in CALVIN's frames and of its annotations."""
    wrong = (
        None, np.zeros(0), np.zeros(7, "f2"), np.zeros(8), np.array(1), np.array(["ä"] * 7),
        np.array([{}], object), np.zeros((2, 7)), np.full(7, np.nan), np.zeros(7, complex),
        np.zeros(7, "f4,i4"),
    )  # fmt: skip
    with np.load(root / "training/episode_0000001.npz") as file:
        keys = file.files
    for number in (0, 1):
        for key in keys:
            for value in wrong:

                def change(folder: pathlib.Path, args: Any = (number, key, value)) -> None:
                    path = folder / f"training/episode_{args[0]:07}.npz"
                    arrays = dict(np.load(path))
                    arrays.pop(args[1])
                    if args[2] is not None:
                        arrays[args[1]] = args[2]
                    np.savez(path, **arrays)

                yield Mutation("array replaced", f"{number} {key}: {value!r:.40}", change)
    pairs = [(0, value) for value in WRONG_VALUES] + [(value, 2) for value in WRONG_VALUES]
    for value in (*WRONG_VALUES, *pairs, (0, 1, 2), np.zeros(2), np.array([0, 1]), b"\xff"):
        for field in ("ann", "indx", "both"):

            def write(folder: pathlib.Path, args: Any = (field, value)) -> None:
                segments = [args[1], (1, 3)] if args[0] != "ann" else [(0, 2), (1, 3)]
                texts = [args[1], "push"] if args[0] != "indx" else ["open it", "push"]
                file = folder / "training/lang_annotations/auto_lang_ann.npy"
                tiny_calvin.write_annotations(file, segments, texts)

            yield Mutation("annotation replaced", f"{field} = {value!a:.40}", write)


def mutations(root: pathlib.Path, count: int, seed: int) -> Iterator[Mutation]:
    """Yields all mutations of a data set."""
    annotations = root / "training/lang_annotations/auto_lang_ann.npy"
    if annotations.exists():
        yield from byte_mutations(root, str(annotations.relative_to(root)), count // 2, seed)
        yield from byte_mutations(root, "training/episode_0000000.npz", count // 4, seed)
        yield from byte_mutations(root, "training/episode_0000002.npz", count // 4, seed)
        yield from frame_mutations(root)
        return
    for path in sorted(root.glob("*.h*5")):
        yield from byte_mutations(root, path.name, count, seed)
    yield from object_mutations(root)
    yield from attribute_mutations(root)


def try_in_process(run: Callable[[], Answer], mutation: Mutation) -> Tried:
    """Runs in a forked process; its death or its end by the time limit is a "crash"."""
    source, target = os.pipe()
    child = os.fork()
    if not child:
        os.close(source)
        signal.alarm(LIMIT_SECONDS)
        found = run()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        content = pickle.dumps((found.outcome, found.detail, found.seconds, peak))
        with os.fdopen(target, "wb") as pipe:
            pipe.write(content)
        os._exit(0)
    os.close(target)
    with os.fdopen(source, "rb") as pipe:
        content = pipe.read()
    _, status = os.waitpid(child, 0)
    if not content:
        return Tried(Answer(mutation, "crash", f"status {status}", float(LIMIT_SECONDS)), 0.0)
    outcome, detail, seconds, peak = pickle.loads(content)
    return Tried(Answer(mutation, outcome, detail, seconds), peak)


def campaign(name: str, count: int, seed: int, every: int) -> Iterator[Tried]:
    """Yields the answers to the mutations of a layout; of objects and attributes every n-th."""
    with tempfile.TemporaryDirectory() as folder:
        root, copy = pathlib.Path(folder) / "original", pathlib.Path(folder) / "copy"
        root.mkdir()
        LAYOUTS[name](root)
        expected = read_everything(root)
        for number, mutation in enumerate(mutations(root, count, seed)):
            if "bytes" in mutation.kind or number % every == 0:
                yield try_in_process(lambda m=mutation: answer(root, m, copy, expected), mutation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=600, help="byte mutations of every file")
    parser.add_argument("--every", type=int, default=1, help="1 = all other mutations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS))
    parser.add_argument("--details", action="store_true", help="list accepted changes")
    options = parser.parse_args()
    outcomes = ("sentence", "same", "accepted", "traceback", "crash")
    print("| layout | mutation | tried |", " | ".join(outcomes), "| worst s | worst MB |")
    print("| --- " * (len(outcomes) + 5), "|", sep="")
    notes: collections.Counter[str] = collections.Counter()
    for name in options.layouts:
        table: dict[str, list[Tried]] = collections.defaultdict(list)
        for tried in campaign(name, options.count, options.seed, options.every):
            kind = tried.answer.mutation.kind.rpartition("/")[2].partition(": ")
            table[kind[2] or kind[0]].append(tried)
            found = tried.answer
            if found.outcome in ("traceback", "crash"):
                notes[f"{name}: {found.outcome} {found.mutation.label}: {found.detail}"] += 1
            if found.outcome == "accepted" and options.details:
                label = found.mutation.label.partition(" ")[2]
                label = "bytes" if "bytes" in found.mutation.kind else label
                notes[f"{name}: accepted {label} -> {found.detail:.100}"] += 1
        for kind, rows in table.items():
            counts = collections.Counter(each.answer.outcome for each in rows)
            numbers = " | ".join(str(counts[outcome]) for outcome in outcomes)
            worst = max(e.answer.seconds for e in rows), max(e.peak_mb for e in rows)
            print(
                f"| {name} | {kind} | {len(rows)} | {numbers} | {worst[0]:.2f} | {worst[1]:.0f} |"
            )
    for note, times in notes.most_common(200):
        print(f"{times}x {note}")


if __name__ == "__main__":
    main()
