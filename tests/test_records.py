"""Files of results: what was written is read back, damage is refused with file and field."""

import copy
import json
import math
import re

import numpy as np
import pytest

from train import chains, memory_grid, memory_records, sweep, sweep_report
from train.chains import ChainsConfig
from train.memory_config import MemoryConfig
from train.memory_grid import CloningConfig, GridCell, Score
from train.memory_records import MemoryTraining
from train.memory_training import TaskResult
from train.sweep_report import Result
from vla_jax.acting.rollout import Outcome
from vla_jax.config import to_dict
from vla_jax.envs.memory_table.memory_env import JaxMemoryConfig
from vla_jax.evaluation import results

CELL = GridCell(JaxMemoryConfig(task="lit", delay=4), "lstm")
CLONING = CloningConfig(num_seeds=2, recall_weight=0.0)
CHAINS = ChainsConfig(length=2, cloning=CLONING)
CHAINS_OF = chains._settings(CHAINS, None)
MEMORY = MemoryConfig(adding=(5,), recall=(4,), windows=(3, 4))


def json_of(value):
    return json.loads(json.dumps(value))


def memory_line(**parts):
    config = {name: to_dict(MEMORY)[name] for name in memory_records._settings(MEMORY)}
    record = {"settings": config, "result": None, "norms": None, "window_errors": None}
    return json_of(record | parts)


NORMS = {"before": [1.0, None], "after": [1.0, 0.5], "larger": [1.0, 2.0]}
# name -> file, its content (a list = one object per line), reader
FAMILY = {
    "evaluate": (
        "episodes.jsonl",
        [Outcome(3, "lift", "lift it", True, 20, "", 0.5, 2)._asdict()],
        results.read_outcomes,
    ),
    "memory_suite": (
        "results.jsonl",
        [
            memory_grid.to_json(
                Score(CELL, np.array([0.5, 1.0]), {"lit": [0.5, 1.0]}, 0.25, 2.0),
                CLONING,
            )
        ],
        lambda file: list(memory_grid.read_scores(file.parent, [CELL], CLONING)),
    ),
    "chains": (
        "results.jsonl",
        [
            chains.ChainScore(
                "lstm", False, [[1.0, 0.5], [0.5, 0.0]], [1.5, 0.5], 3.0, CHAINS_OF
            )._asdict()
        ],
        lambda file: chains._read(file.parent, CHAINS, CHAINS_OF),
    ),
    "memory": (
        "results.jsonl",
        [
            memory_line(
                training=MemoryTraining("rnn", "adding", 5, 0)._asdict(),
                result=TaskResult("adding", "rnn", 5, 0, [0.2], 0.1, {10: 0.3}, 50, 1.0)._asdict(),
                norms=NORMS,
            ),
            memory_line(
                training=MemoryTraining("rnn", "windows", 20, 0, (3, 4))._asdict(),
                window_errors=[0.5, 0.1],
            ),
        ],
        lambda file: [*memory_records.read(MEMORY, file.parent).values()],
    ),
    "sweep": (
        "result.json",
        Result("a", "lstm", 8, 1, 1e-3, 0, 99, 5, -0.5, 3, 4, 2, 1.5)._asdict(),
        lambda file: [sweep_report.read(file)],
    ),
    "group": ("group.json", {"members": ["a", "b"]}, lambda file: [sweep._names(file)]),
}
SIGNED = {"loss"}
OPTIONAL = {
    "clipped", "observations_clipped", "result", "norms", "window_errors", "windows",
    "diverged_at", "successes", "before", "after", "larger",
    "loss",  # of a training without a finite update
}  # fmt: skip
FREE = {  # may be absent
    "clipped", "observations_clipped", "lit", "10", "norms", "window_errors", "result", "windows",
}  # fmt: skip
SETTINGS = {"of", "settings", "cloning", "all_at_start"}  # other ones are no damage


def leaves(value, path=()):
    """Yields the path of every value inside, numbers and strings of lists and dicts included."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in items:
        yield (*path, key)
        if isinstance(each, dict | list):
            yield from leaves(each, (*path, key))


def damaged(content):
    """Yields name of a field, and the content with one value of it changed or removed."""
    for path in list(leaves(content)):
        names = [part for part in path if isinstance(part, str)]
        if not names or (len(names) > 1 and names[0] in SETTINGS):
            continue
        for value in ("removed", None, math.nan, math.inf, "x", -7, [], {}, True):
            changed = copy.deepcopy(content)
            place = changed
            for part in path[:-1]:
                place = place[part]
            before = place[path[-1]]
            if type(value) is type(before) and value != -7:
                continue
            if value == -7 and (names[-1] in SIGNED or not isinstance(before, int | float)):
                continue
            if value is None and OPTIONAL & set(names):
                continue
            if value == "removed" and (path[-1] in FREE or not isinstance(path[-1], str)):
                continue
            if not before and value in ([], {}):
                continue
            place[path[-1]] = value
            if value == "removed":
                del place[path[-1]]
            yield names, value, changed


def write(folder, name, content):
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    lines = content if isinstance(content, list) else [content]
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / name


@pytest.mark.parametrize("name", FAMILY)
def test_what_was_written_is_read_back(name, tmp_path):
    file, content, read = FAMILY[name]
    found = read(write(tmp_path, file, content))
    assert len(found) == (len(content) if isinstance(content, list) else 1)


def refusal(read, path):
    """Returns the sentence that refuses a file, or the number of records in it."""
    try:
        return len(read(path))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", FAMILY)
def test_a_damaged_value_is_refused_with_file_and_field(name, tmp_path):
    file, content, read = FAMILY[name]
    complete, tried = refusal(read, write(tmp_path, file, content)), 0
    for names, value, changed in damaged(json_of(content)):
        answer, tried = refusal(read, write(tmp_path, file, changed)), tried + 1
        if SETTINGS & set(names) and isinstance(answer, int):
            assert answer < complete
            continue
        sizes = "must be (one per window|of 2 seeds|that of its training)"
        sentence = f"{re.escape(str(tmp_path / file))} .*({names[-1]}|{sizes})"
        assert re.search(sentence, str(answer)), (names, value, answer)
    assert tried > 5
