"""Damages caches, weights, models and configs in thousands of ways, and counts the answers.

    python tests/campaigns/mutations_files.py
    python tests/campaigns/mutations_files.py --every 20 --flips 2 --only tokens

Each mutation changes one file in a copy of a small folder, which is then read as the commands read
it: see `surfaces.py`. The answer must be one sentence of this library, or the same content; a
change that is read as something else is listed by file and value.
"""

import argparse
import collections
import json
import pathlib
import random
import resource
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/campaigns")]

from mutations import Answer, Mutation, answer, byte_mutations, json_mutations  # noqa: E402
from surfaces import SURFACES, Surface  # noqa: E402

MEMORY = 12 * 2**30  # bytes of address space
OUTCOMES = ("sentence", "same", "accepted", "traceback")


def mutations_of(
    surface: Surface, folder: pathlib.Path, every: int, flips: int, seed: int
) -> list[Mutation]:
    """Returns every n-th mutation of JSON values, and changes of the bytes of every file.

    The seed is the number of the first of the values, and draws the changes of bytes.
    """
    found: list[Mutation] = []
    for name in _files(folder, surface.json):
        found += list(json_mutations(folder, name))[seed % every :: every]
    for name in _files(folder, surface.bytes):
        found += byte_mutations(folder, name, flips, seed)
    return random.Random(0).sample(found, len(found))


def _files(folder: pathlib.Path, globs: Sequence[str]) -> Iterator[str]:
    paths = {path for glob in globs for path in folder.glob(glob)}
    for path in sorted(paths):
        if path.is_file() and path.stat().st_size:
            yield str(path.relative_to(folder))


def run(
    name: str, every: int, flips: int, most: int | None = None, seed: int = 0
) -> Iterator[Answer]:
    """Tries the mutations of a surface, one after the other.

    Args:
      name: of the surface.
      every: try every n-th value of JSON.
      flips: changes of bytes of each file.
      most: mutations to try, drawn from all of them; None = all.
      seed: others are tried with another one.
    """
    surface = SURFACES[name]
    with tempfile.TemporaryDirectory() as temp, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole, tried = pathlib.Path(temp) / "whole", pathlib.Path(temp) / "tried"
        whole.mkdir()
        surface.make(whole)
        shutil.copytree(whole, tried)
        expected = surface.read(tried)
        for mutation in mutations_of(surface, whole, every, flips, seed)[:most]:
            yield answer(whole, mutation, tried, expected, surface.read)


def main() -> None:
    """Prints a table, tracebacks, and what was accepted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="try every n-th value of JSON")
    parser.add_argument("--flips", type=int, default=40, help="changes of bytes of each file")
    parser.add_argument("--most", type=int, default=None, help="mutations of each surface")
    parser.add_argument("--seed", type=int, default=0, help="of the values and the changes")
    parser.add_argument("--only", nargs="+", default=list(SURFACES), help="surfaces to damage")
    parser.add_argument("--details", action="store_true", help="list all accepted changes")
    parser.add_argument("--json", default="", help="file to which all answers are appended")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    table = collections.defaultdict(list)
    chosen = options.every, options.flips, options.most, options.seed
    for name in options.only:
        for each in run(name, *chosen):
            table[name].append(each)
            if options.json:
                row = [name, *each.mutation[:2], each.outcome, each.detail, each.seconds]
                with pathlib.Path(options.json).open("a") as file:
                    file.write(json.dumps(row) + "\n")
            if each.outcome == "traceback" or (options.details and each.outcome == "accepted"):
                print(f"{each.outcome}: {name} {each.mutation[:2]}: {each.detail}", flush=True)
    print("| damage | tried |", " | ".join(OUTCOMES), "| worst s |")
    print("| --- " * (len(OUTCOMES) + 3), "|", sep="")
    everything = [each for rows in table.values() for each in rows]
    for name, rows in {**table, "all": everything}.items():
        counts = collections.Counter(row.outcome for row in rows)
        numbers = " | ".join(str(counts[outcome]) for outcome in OUTCOMES)
        print(f"| {name} | {len(rows)} | {numbers} | {max(r.seconds for r in rows):.1f} |")


if __name__ == "__main__":
    main()
