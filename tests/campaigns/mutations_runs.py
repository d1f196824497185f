"""Damages the files of a run folder in thousands of ways, and counts the answers.

    python tests/campaigns/mutations_runs.py
    python tests/campaigns/mutations_runs.py --every 20 --flips 2

A run of four updates is written once. Each mutation changes one file in a copy, which is then read
as acting and resuming read it: config, agent, statistics, world, metrics and the whole checkpoint.
The answer must be one sentence of this library, or the same content; a change that is read as
something else is listed by file and value.
"""

import argparse
import collections
import pathlib
import resource
import sys
import tempfile
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/campaigns")]

import jax  # noqa: E402
import tiny_demos  # noqa: E402
from mutations import Answer, Mutation, answer, byte_mutations, digest_of  # noqa: E402
from mutations import json_mutations as mutations_of_json  # noqa: E402

from train import setup  # noqa: E402
from train.configs import ImitateConfig  # noqa: E402
from train.imitate import imitate  # noqa: E402
from vla_jax import config as configs  # noqa: E402
from vla_jax import runs  # noqa: E402
from vla_jax.data import normalize  # noqa: E402
from vla_jax.training import checkpoint  # noqa: E402
from vla_jax.training.logs import read_metrics  # noqa: E402

MEMORY = 12 * 2**30  # bytes of address space
OUTCOMES = ("sentence", "same", "accepted", "traceback")
JSON_FILES = ("agent.json", "norm_stats.json", "world.json", "config.json")


def make_run(root: pathlib.Path) -> pathlib.Path:
    """Trains four updates; returns the run folder."""
    return imitate(tiny_demos.imitation(tiny_demos.write(root / "demos"), root / "run"))


def read_run(folder: pathlib.Path) -> dict[str, str]:
    """Reads a run folder as acting and resuming do; returns part -> hash."""
    config = configs.load(ImitateConfig, folder / "config.json")
    setup.check(config)
    metrics = read_metrics(folder / "metrics.jsonl")
    run = runs.load_run(folder)
    directory = folder.absolute() / "checkpoints"
    tree, record = checkpoint._stored(directory / str(run.step))
    whole = checkpoint._load(directory / str(run.step), checkpoint._as_numpy(tree), record)
    return {
        "config": digest_of(config),
        "metrics": digest_of(metrics),
        "agent": digest_of(run.agent),
        "norm_stats": digest_of(normalize.to_json(run.norm_stats)),
        "world": digest_of(run.world),
        "step": digest_of(run.step),
        "params": digest_of([digest_of(leaf) for leaf in jax.tree.leaves(run.params)]),
        "train state": digest_of([digest_of(leaf) for leaf in jax.tree.leaves(whole)]),
    }


def mutations_of_run(
    folder: pathlib.Path, every: int, flips: int, seed: int = 0
) -> Iterator[Mutation]:
    """Yields every n-th mutation of JSON values, and changes of the bytes of every file.

    The seed is the number of the first of the values, and draws the changes of bytes.
    """
    for name in JSON_FILES:
        for number, mutation in enumerate(mutations_of_json(folder, name)):
            if number % every == seed % every:
                yield mutation
    for number, mutation in enumerate(mutations_of_json(folder, "metrics.jsonl", is_lines=True)):
        if number % every == seed % every:
            yield mutation
    latest = checkpoint.latest_step(folder / "checkpoints")
    names = [*JSON_FILES, "metrics.jsonl"]
    names += [
        str(path.relative_to(folder))
        for path in sorted((folder / "checkpoints" / str(latest)).rglob("*"))
        if path.is_file() and path.stat().st_size
    ]
    for name in names:
        yield from byte_mutations(folder, name, flips, seed)


def group(kind: str) -> str:
    """Returns the row of the table for a kind of mutation."""
    name, _, change = kind.rpartition(": ")
    return f"{'checkpoint' if name.startswith('checkpoints') else name}: {change}"


def run(every: int, flips: int, seed: int = 0) -> list[Answer]:
    """Tries all mutations."""
    with tempfile.TemporaryDirectory() as temp:
        root = pathlib.Path(temp)
        whole = make_run(root)
        expected = read_run(whole)
        return [
            answer(whole, mutation, root / "damaged", expected, read_run)
            for mutation in mutations_of_run(whole, every, flips, seed)
        ]


def main() -> None:
    """Prints a table, tracebacks, and what was accepted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--every", type=int, default=3, help="try every n-th value of JSON")
    parser.add_argument("--flips", type=int, default=40, help="changes of bytes of each file")
    parser.add_argument("--seed", type=int, default=0, help="of the values and the changes")
    parser.add_argument("--details", action="store_true", help="list all accepted changes")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    answers = run(options.every, options.flips, options.seed)
    table = collections.defaultdict(list)
    for each in answers:
        table[group(each.mutation.kind)].append(each)
    print("| damage | tried |", " | ".join(OUTCOMES), "| worst s |")
    print("| --- " * (len(OUTCOMES) + 3), "|", sep="")
    for name, rows in {**table, "all": answers}.items():
        counts = collections.Counter(row.outcome for row in rows)
        numbers = " | ".join(str(counts[outcome]) for outcome in OUTCOMES)
        print(f"| {name} | {len(rows)} | {numbers} | {max(r.seconds for r in rows):.1f} |")
    for each in answers:
        if each.outcome == "traceback" or (options.details and each.outcome == "accepted"):
            print(f"{each.outcome}: {each.mutation.kind} {each.mutation.label}: {each.detail}")


if __name__ == "__main__":
    main()
