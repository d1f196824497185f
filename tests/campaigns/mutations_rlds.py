"""Damages small RLDS data sets in thousands of ways, and counts what the reader makes of it.

    PYTHONPATH=.:tests python tests/campaigns/mutations_rlds.py --count 6000

Kinds of damage: bytes of a record file; bytes of a record whose CRC is made right again; values of
features.json and dataset_info.json; whole files; bytes of an ArrayRecord file; bytes of the kept
index. Results: `sentence` (one line that this library wrote and that names the file), `same`
(everything is read as before), `other` (read without an error and different), `traceback`.
"""

import argparse
import collections
import copy
import json
import pathlib
import random
import shutil
import struct
import tempfile
import time
import traceback
import tracemalloc
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from tiny_rlds import METADATA, STEP, TEXT, episode, example, record, sequence, tensor, write

from vla_jax.data.readers.rlds import record_index, rlds

STEP_TYPES = {**STEP, "boxes": sequence(tensor("float32", 2)), "words": sequence(TEXT)}
VALUES = (
    None, True, -1, 0, 2, "-1", "7", 10**30, "9999999999", 1e308, "", "x", "../x", "\0", [], {},
    [1, -5, "x"], ["4", "4"], {"type": "x", "content": []}, "int32", "uint16", "string", "zlib",
)  # fmt: skip


class Outcome(NamedTuple):
    """Answer of the reader to one damaged data set."""

    result: str  # "sentence", "same", "other" or "traceback"
    detail: str
    seconds: float
    peak: int  # bytes


def features(length: int, number: int) -> dict[str, Any]:
    rows = np.arange(length) % 3
    return {
        **episode(length, number),
        "steps/boxes/ragged_flat_values": np.arange(2.0 * rows.sum()),
        "steps/boxes/ragged_row_lengths_0": rows,
        "steps/words/ragged_flat_values": ["word"] * int(rows.sum()),
        "steps/words/ragged_row_lengths_0": rows,
    }


def make(root: pathlib.Path) -> pathlib.Path:
    splits = {"train": [[features(3, 0), features(1, 1)], [features(4, 2)]]}
    return write(root, splits, STEP_TYPES, METADATA)


def make_array_record(root: pathlib.Path) -> pathlib.Path:
    from array_record.python import array_record_module

    make(root)
    for shard, numbers in enumerate(([(3, 0), (1, 1)], [(4, 2)])):
        path = root / f"tiny-train.array_record-{shard:05d}-of-00002"
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for length, number in numbers:
            writer.write(example(features(length, number)))
        writer.close()
    path = root / "dataset_info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fileFormat": "array_record"}))
    return root


def read(root: pathlib.Path) -> list[Any]:
    """Everything that the reader gives of a data set."""
    if not rlds.probe(root):
        raise ValueError(f"{root}: not recognised.")
    source = rlds.open(root)
    rlds.fields(source)
    content: list[Any] = [sorted(source.columns.items()), source.lengths.tolist()]
    for each, metadata in zip(source.episodes, rlds.episode_metadata(root), strict=True):
        content.append((each.name, list(each.instructions), each.timestamps.tolist()))
        for mapping in (each.columns, metadata):
            content += [(k, v.dtype.str, v.shape, v.tolist()) for k, v in mapping.items()]
        content += [(key, images[:].tobytes()) for key, images in each.images.items()]
    return content


def try_reading(root: pathlib.Path, expected: list[Any]) -> Outcome:
    tracemalloc.reset_peak()
    start = time.perf_counter()
    try:
        content = read(root)
        result = "same" if repr(content) == repr(expected) else "other"
        detail = "" if result == "same" else difference(content, expected)
    except Exception as error:
        result, detail = judge(error, root)
    return Outcome(result, detail, time.perf_counter() - start, tracemalloc.get_traced_memory()[1])


def difference(content: list[Any], expected: list[Any]) -> str:
    if len(content) != len(expected) or content[:2] != expected[:2]:
        return "types or lengths"
    return next(str(a[0]) for a, b in zip(content, expected, strict=True) if repr(a) != repr(b))


def judge(error: Exception, root: pathlib.Path) -> tuple[str, str]:
    """A sentence is raised by this library on purpose, has one line, and names the file."""
    message = str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1].filename
    is_ours = "vla_jax" in frame or "mutations" in frame
    is_sentence = (
        isinstance(error, ValueError | FileNotFoundError)
        and is_ours
        and "\n" not in message
        and message.endswith(".")
        and str(root) in message
    )
    if is_sentence:
        return "sentence", message.replace(str(root), "")[:150]
    return "traceback", f"{type(error).__name__}: {message[:200]} ({pathlib.Path(frame).name})"


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    kind = rng.randrange(7)
    used = np.flatnonzero(np.frombuffer(data, np.uint8))  # not the padding of ArrayRecord files
    at = int(rng.choice(used))
    size = min(rng.choice((1, 4, 8, 64, 500)), len(data) - at)
    if kind in (0, 1):
        for _ in range(rng.choice((1, 1, 3, 20))):
            changed[rng.choice(used)] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del changed[at:]
    elif kind == 3:
        del changed[at : at + size]
    elif kind == 4:
        changed[at:at] = rng.randbytes(size)
    elif kind == 5:
        changed[at : at + size] = rng.choice((bytes(size), b"\xff" * size, b"\x80" * size))
    else:
        changed[at : at + size] = changed[:size]
    return bytes(changed)


def damage_file(root: pathlib.Path, rng: random.Random) -> None:
    path = rng.choice(sorted(root.glob("tiny-*")))
    path.write_bytes(damage_bytes(path.read_bytes(), rng))


def damage_record(root: pathlib.Path, rng: random.Random) -> None:
    """Damages the data of a record and writes the right CRC."""
    path = root / "tiny-train.tfrecord-00000-of-00002"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    path.write_bytes(record(damage_bytes(data[12 : 12 + length], rng)) + data[16 + length :])


def damage_json(path: pathlib.Path, rng: random.Random) -> None:
    """Replaces, deletes, renames or nests a random value; or damages the text."""
    if rng.random() < 0.1:
        path.write_bytes(damage_bytes(path.read_bytes(), rng))
        return
    data = json.loads(path.read_text())
    places: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            places.append((value, key))
            if isinstance(inner, dict | list):
                collect(inner)

    collect(data)
    holder, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(("renamed", "", "a/b", "ä"))] = holder.pop(key)
    elif kind == 2:
        other, place = rng.choice(places)
        holder[key] = copy.deepcopy(other[place])
    else:
        holder[key] = rng.choice(VALUES)
    text = json.dumps(data)
    if rng.random() < 0.02:
        text = '{"a":' * 100_000 + "1" + "}" * 100_000
    path.write_text(text)


def damage_files(root: pathlib.Path, rng: random.Random) -> None:
    path = rng.choice(sorted(root.iterdir()))
    kind = rng.randrange(5)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.write_bytes(b"")
    elif kind == 2:
        path.unlink()
        path.mkdir()
    elif kind == 3:
        path.rename(path.with_name("renamed"))
    else:
        path.write_bytes(rng.choice(sorted(root.iterdir())).read_bytes())


KINDS: dict[str, Callable[[pathlib.Path, random.Random], None]] = {
    "bytes of a TFRecord file": damage_file,
    "bytes of a record, CRC right": damage_record,
    "features.json": lambda root, rng: damage_json(root / "features.json", rng),
    "dataset_info.json": lambda root, rng: damage_json(root / "dataset_info.json", rng),
    "whole files": damage_files,
    "bytes of an ArrayRecord file": damage_file,
    "bytes of the kept index": lambda root, rng: damage_index(root / ".train.index.npz", rng),
}


def damage_index(path: pathlib.Path, rng: random.Random) -> None:
    path.write_bytes(damage_bytes(path.read_bytes(), rng))


def run(count: int, seed: int = 0) -> dict[str, list[Outcome]]:
    """Tries `count` mutations, the same number of every kind."""
    outcomes: dict[str, list[Outcome]] = collections.defaultdict(list)
    minimum, record_index._MIN_EPISODES = record_index._MIN_EPISODES, 1
    tracemalloc.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for number, (name, damage) in enumerate(KINDS.items()):
                maker = make_array_record if "ArrayRecord" in name else make
                whole = maker(pathlib.Path(folder) / f"{number}" / "1.0.0")
                expected = read(whole)
                if "index" not in name:
                    (whole / ".train.index.npz").unlink()
                for each in range(count // len(KINDS)):
                    root = pathlib.Path(folder) / "damaged"
                    shutil.copytree(whole, root)
                    damage(root, random.Random(f"{name} {seed} {each}"))
                    outcomes[name].append(try_reading(root, expected))
                    shutil.rmtree(root)
    finally:
        tracemalloc.stop()
        record_index._MIN_EPISODES = minimum
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=6000, help="number of mutations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--details", action="store_true", help="print the kinds of every result")
    options = parser.parse_args()
    outcomes = run(options.count, options.seed)
    results = ("sentence", "same", "other", "traceback")
    print("| damage | tried |", " | ".join(results), "| worst s | worst MB |")
    print("| --- " * (len(results) + 4), "|", sep="")
    for name, each in outcomes.items():
        counts = collections.Counter(outcome.result for outcome in each)
        worst = max(o.seconds for o in each), max(o.peak for o in each) / 1e6
        numbers = " | ".join(str(counts[result]) for result in results)
        print(f"| {name} | {len(each)} | {numbers} | {worst[0]:.2f} | {worst[1]:.1f} |")
    for name, each in outcomes.items():
        shown = ("traceback", "other") if not options.details else results
        details = collections.Counter(
            (o.result, o.detail) for o in each if o.result in shown
        ).most_common(40)
        for (result, detail), times in details:
            print(f"{name}: {result} {times}x {detail}")


if __name__ == "__main__":
    main()
