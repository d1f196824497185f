"""Gives wrong values to the options of every command, and counts the answers.

    python tests/campaigns/mutations_options.py
    python tests/campaigns/mutations_options.py --every 20 --only train.scan

The answer must be one sentence that names the option, before anything slow starts, or the value
must be one that the command can use: these are listed with `--details`.
"""

import argparse
import collections
import json
import os
import pathlib
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/campaigns")]

import option_commands  # noqa: E402
from option_commands import COMMANDS, Answer, Command  # noqa: E402

MEMORY = 16 * 2**30  # bytes of address space
OUTCOMES = ("sentence", "accepted", "foreign", "traceback")
WRONG_VALUES = (
    "nan", "inf", "-inf", "-1", "0", "1e308", "1000000000", "1" + "0" * 20, "", "demos",
    "missing/file", "é" * 40, "text", "x" * 5000, "1.5", "../..", "*", "None", "\x07",
)  # fmt: skip


class Case(NamedTuple):
    """A command with one wrong option."""

    command: Command
    option: str  # the option that is wrong
    label: str  # the value, short
    argv: Sequence[str]  # all arguments


def cases_of(command: Command, known: set[str]) -> Iterator[Case]:
    """Yields the command itself; each option with all wrong values, with none, twice, misspelt.

    Options in `known` are left out; the others are added to it.
    """
    base = command.base.split()
    yield Case(command, "", "", base)
    options = option_commands.options_of(command)
    fresh = {name: action for name, action in options.items() if name not in known}
    known.update(fresh)
    for name, action in fresh.items():
        for value in WRONG_VALUES:
            label = value if len(value) < 20 else f"{value[:3]}…×{len(value)}"
            yield Case(command, name, label, [*base, name, value])
        yield Case(command, name, "without a value", [*base, name])
        yield Case(command, name, "misspelt", [*base, f"{name}x", "1"])
        if action.choices:
            first, *_, last = (*action.choices, *action.choices)
            yield Case(command, name, "twice", [*base, name, str(first), name, str(last)])


def try_case(case: Case, root: pathlib.Path) -> Answer:
    """Runs a case in a copy of the prepared folders."""
    folder = root / "tried"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(root / "prepared", folder)
    before = pathlib.Path.cwd()
    os.chdir(folder)
    try:
        return option_commands.run(case.command, case.argv)
    finally:
        os.chdir(before)


def names_option(case: Case, detail: str) -> bool:
    """Returns True if a message names the option, in any spelling, or its value's word."""
    field = case.option.lstrip("-").removeprefix("no-").rpartition(".")[2]
    return any(word in detail for word in (field, field.replace("-", "_"), case.option))


class Tried(NamedTuple):
    """A case and its answer."""

    case: Case
    answer: Answer


def run(every: int, only: str = "", start: int = 0) -> Iterator[Tried]:
    """Tries every n-th case of every command, one after the other."""
    with tempfile.TemporaryDirectory() as temp:
        root = pathlib.Path(temp)
        option_commands.prepare(root / "prepared")
        number = 0
        known = collections.defaultdict(set)  # options that an earlier preset has too
        for command in COMMANDS:
            if only not in command.name:
                continue
            for case in cases_of(command, known[command.module]):
                number += 1
                if number % every == start % every:
                    yield Tried(case, try_case(case, root))


def show(tried: Sequence[Tried]) -> None:
    """Prints the table of all commands."""
    table = collections.defaultdict(list)
    for each in tried:
        table[each.case.command.name].append(each)
    print("| command | tried |", " | ".join(OUTCOMES), "| do not name it | worst s | worst MB |")
    print("| --- " * (len(OUTCOMES) + 5), "|", sep="")
    for name, rows in {**table, "all": list(tried)}.items():
        counts = collections.Counter(row.answer.outcome for row in rows)
        numbers = " | ".join(str(counts[outcome]) for outcome in OUTCOMES)
        unnamed = sum(
            row.answer.outcome == "sentence" and not names_option(row.case, row.answer.detail)
            for row in rows
        )
        seconds = max(row.answer.seconds for row in rows)
        megabytes = max(row.answer.megabytes for row in rows)
        print(f"| {name} | {len(rows)} | {numbers} | {unnamed} | {seconds:.1f} | {megabytes:.0f} |")


def main() -> None:
    """Prints a table, everything that is not a sentence of the project, and what was accepted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="try every n-th case")
    parser.add_argument("--start", type=int, default=0, help="number of the first of them")
    parser.add_argument("--only", default="", help="part of the names of the commands to try")
    parser.add_argument("--json", default="", help="file to which all answers are appended")
    parser.add_argument("--details", action="store_true", help="list all that was accepted")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    tried = []
    for each in run(options.every, options.only, options.start):
        tried.append(each)
        if options.json:
            row = [each.case.command.name, each.case.option, each.case.label, *each.answer]
            with pathlib.Path(options.json).open("a") as file:
                file.write(json.dumps(row) + "\n")
    show(tried)
    listed = ("foreign", "traceback", *(("accepted",) if options.details else ()))
    for each in tried:
        if each.answer.outcome in listed:
            case, answer = each
            print(
                f"{answer.outcome}: {case.command.name} {case.option} {case.label}: {answer.detail}"
            )


if __name__ == "__main__":
    main()
