"""Damage to files of a data set, and how a reader answers: shared by the campaigns of all formats.

A mutation is a function that changes a copy of a data set. A reader must answer with one sentence
that it raises itself, or read the set; every set that it reads although it has changed is listed.
"""

import collections
import contextlib
import hashlib
import itertools
import json
import pathlib
import shutil
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from operator import setitem
from typing import Any, NamedTuple

import numpy as np

WRONG_VALUES = (
    None, "", "text", "{foo}", "../x", "{episode_index:099999999d}", "é" * 300, [], {}, [None], [1],
    {"a": None}, 0, -1, 1, 3.5, float("nan"), float("inf"), 2**70, -(2**70), True, [[[]]],
)  # fmt: skip
SENTENCES = (ValueError, FileNotFoundError)


class Mutation(NamedTuple):
    """One change of a copy of a data set."""

    kind: str  # what is changed, for the table
    label: str  # the change
    change: Callable[[pathlib.Path], None]  # changes the copy in a folder


class Answer(NamedTuple):
    """Answer of a reader to a mutation."""

    mutation: Mutation
    outcome: str  # "sentence", "traceback", "same", or "accepted"
    detail: str
    seconds: float


def nodes(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the paths of all values in JSON data."""
    if path:
        yield path
    items = enumerate(data) if isinstance(data, list) else ()
    for key, value in data.items() if isinstance(data, dict) else items:
        yield from nodes(value, (*path, key))


def with_value(data: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """Returns a copy of JSON data in which `change(parent, key)` was applied at a path."""
    copy = json.loads(json.dumps(data))
    parent = copy
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1])
    return copy


def json_mutations(root: pathlib.Path, name: str, *, is_lines: bool = False) -> Iterator[Mutation]:
    """Yields a mutation for every value of a JSON file and every wrong value, and its removal."""
    text = (root / name).read_text()
    data = [json.loads(line) for line in text.splitlines()] if is_lines else json.loads(text)

    def write(folder: pathlib.Path, changed: Any) -> None:
        rows = [json.dumps(row) for row in changed] if is_lines else [json.dumps(changed)]
        (folder / name).write_text("\n".join(rows) + "\n")

    for path in nodes(data):
        where = "/".join(map(str, path))

        def remove(folder: pathlib.Path, path: tuple[Any, ...] = path) -> None:
            write(folder, with_value(data, path, lambda parent, key: parent.pop(key)))

        yield Mutation(f"{name}: key removed", where, remove)
        for value in WRONG_VALUES:

            def put(folder: pathlib.Path, path: Any = path, value: Any = value) -> None:
                changed = with_value(data, path, lambda parent, key: setitem(parent, key, value))
                write(folder, changed)

            yield Mutation(f"{name}: wrong value", f"{where} = {str(value)[:30]!r}", put)


def byte_mutations(root: pathlib.Path, name: str, count: int, seed: int = 0) -> Iterator[Mutation]:
    """Yields mutations of the bytes of a file: changed, cut, removed, doubled.

    Other seeds than 0 draw other changes and other cuts.
    """
    size = (root / name).stat().st_size
    rng = np.random.default_rng([seed, size])
    fixed = {0, 1, 7, *(size * i // 12 for i in range(1, 12)), size - 1}
    cuts = set(rng.integers(0, size, len(fixed)).tolist()) - fixed if seed else fixed
    for number in range(count):
        places = np.unique(rng.integers(0, size, 2 ** rng.integers(0, 5)))
        values = rng.integers(0, 256, len(places))

        def flip(folder: pathlib.Path, places: Any = places, values: Any = values) -> None:
            content = bytearray((folder / name).read_bytes())
            for place, value in zip(places, values, strict=True):
                content[place] = value
            (folder / name).write_bytes(content)

        yield Mutation(f"{name}: bytes changed", f"#{number} at {places[:4]}", flip)
    for kept in sorted(cuts):

        def cut(folder: pathlib.Path, kept: int = kept) -> None:
            (folder / name).write_bytes((folder / name).read_bytes()[:kept])

        yield Mutation(f"{name}: cut", f"to {kept} of {size} bytes", cut)
    yield Mutation(f"{name}: removed", "", lambda folder: (folder / name).unlink())
    yield Mutation(
        f"{name}: written twice",
        "",
        lambda folder: (folder / name).write_bytes((folder / name).read_bytes() * 2),
    )


def digest_of(value: Any) -> str:
    """Returns a hash of an array, or of anything with a repr."""
    content = value.tobytes() if isinstance(value, np.ndarray) else b""
    shown = f"{value.dtype}{value.shape}" if isinstance(value, np.ndarray) else repr(value)
    return hashlib.sha256(content + shown.encode(errors="replace")).hexdigest()[:12]


def read_everything(path: pathlib.Path) -> dict[str, str]:
    """Reads all numbers and texts of a data set, and the first and last images of every episode.

    Blocks of episodes must be refused by a ValueError or hold what their episodes hold.

    Returns:
      Part -> hash of its content.
    """
    from vla_jax.data import readers
    from vla_jax.data.readers.reader import READERS

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = readers.open(path, kind=None)
    parts: dict[str, list[str]] = collections.defaultdict(list)
    parts["fps, lengths"] = [digest_of((source.fps, source.lengths.tolist()))]
    suggest = READERS[source.kind].fields
    parts["fields"] = [digest_of(suggest(source) if suggest else None)]
    blocks = _read_blocks(source)
    for episode in source.episodes:
        parts["names"].append(episode.name)
        parts["instructions"].append(digest_of(list(episode.instructions)))
        parts["timestamps"].append(digest_of(episode.timestamps))
        for key in episode.columns:
            parts[key].append(digest_of(episode.columns[key]))
        for key, images in episode.images.items():
            parts[key].append(digest_of(images[[0, -1]]))
    for start, stop, block in blocks:
        episodes = source.episodes[start:stop]
        texts = [block.texts[number] for number in block.text_index]
        assert texts == [text for each in episodes for text in each.instructions]
        times = np.concatenate([each.timestamps for each in episodes])
        assert digest_of(block.timestamps) == digest_of(times)
        for key, values in block.columns.items():
            expected = np.concatenate([each.columns[key] for each in episodes])
            assert digest_of(values) == digest_of(expected), key
    return {part: digest_of(values) for part, values in parts.items()}


def _read_blocks(source: Any) -> list[tuple[int, int, Any]]:
    """Returns first and last episode, and numbers, of the blocks that are not refused."""
    blocks, ends = [], [] if source.blocks is None else source.blocks.ends.tolist()
    for start, stop in itertools.pairwise([0, *ends]):
        with contextlib.suppress(ValueError):
            blocks.append((start, stop, source.blocks.read(start, stop, list(source.columns))))
    return blocks


def answer(
    original: pathlib.Path,
    mutation: Mutation,
    folder: pathlib.Path,
    expected: Mapping[str, str],
    read: Callable[[pathlib.Path], dict[str, str]] = read_everything,
) -> Answer:
    """Applies a mutation to a copy of a data set and reads it.

    Args:
      original: the unchanged data set.
      mutation: the change.
      folder: where the copy is made; removed before.
      expected: result of `read` for the original.
      read: reads a whole data set, part -> hash of its content.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder, copy_function=shutil.copyfile)
    mutation.change(folder)
    start = time.perf_counter()
    try:
        found = read(folder)
    except BaseException as error:
        seconds = time.perf_counter() - start
        frames = traceback.extract_tb(error.__traceback__)
        own = any(part in frames[-1].filename for part in ("/vla_jax/", "/train/"))
        text = str(error)
        is_sentence = (
            own
            and isinstance(error, SENTENCES)
            and len(text.splitlines()) == 1
            and len(text) < 1500
            and text.endswith((".", "?"))  # such as: did you mean "lstm"?
        )
        detail = text if is_sentence else f"{type(error).__name__}: {text[:200]} at {frames[-1]}"
        return Answer(mutation, "sentence" if is_sentence else "traceback", detail, seconds)
    seconds = time.perf_counter() - start
    changed = sorted(k for k in {*found, *expected} if found.get(k) != expected.get(k))
    return Answer(mutation, "accepted" if changed else "same", ", ".join(changed), seconds)
