"""Short versions of the campaigns on run folders and on kills."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "campaigns"))

import mutations_files
import mutations_options
import mutations_runs


@pytest.mark.slow
@pytest.mark.sampled
def test_a_damaged_run_folder_gives_a_sentence_or_the_same_run():
    """What is accepted are other valid values of options and of the log."""
    answers = mutations_runs.run(every=360, flips=1)
    assert [each for each in answers if each.outcome == "traceback"] == []
    accepted = {each.mutation.kind.split(":")[0] for each in answers if each.outcome == "accepted"}
    assert accepted <= {"config.json", "metrics.jsonl", "world.json"}
    assert sum(each.outcome == "sentence" for each in answers) > len(answers) / 2


@pytest.mark.slow
@pytest.mark.sampled
def test_a_killed_evaluation_ends_with_the_same_files():
    """In a process of its own: the campaign forks, which a process that computes must not."""
    kills = str(Path(__file__).parent / "campaigns" / "kills.py")
    command = [sys.executable, kills, "--jobs", "evaluate", "--kills", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    name, kills, in_a_write, runs, *differing, left = done.stdout.splitlines()[-1].split()
    assert (name, differing, left) == ("evaluate", ["0"], "0")
    assert int(kills) >= 2
    assert int(in_a_write) >= 1
    assert int(runs) >= 1


@pytest.mark.slow
def test_a_wrong_option_of_any_command_gives_a_sentence_or_is_usable():
    tried = list(mutations_options.run(every=600, start=3))
    assert len({each.case.command.module for each in tried}) > 10
    assert [each for each in tried if each.answer.outcome in ("foreign", "traceback")] == []


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize("name", ["tokens", "safetensors", "mixture", "config"])
def test_a_damaged_file_gives_a_sentence_or_the_same_content(name):
    answers = list(mutations_files.run(name, every=3, flips=1, most=15))
    assert [each for each in answers if each.outcome == "traceback"] == []
