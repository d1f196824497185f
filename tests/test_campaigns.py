"""Short versions of the campaigns on run folders and on kills."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "campaigns"))

import jobs
import kills
import mutations_runs


@pytest.mark.slow
def test_a_damaged_run_folder_gives_a_sentence_or_the_same_run():
    """What is accepted are other valid values of options and of the log."""
    answers = mutations_runs.run(every=120, flips=1)
    assert [each for each in answers if each.outcome == "traceback"] == []
    accepted = {each.mutation.kind.split(":")[0] for each in answers if each.outcome == "accepted"}
    assert accepted <= {"config.json", "metrics.jsonl", "world.json"}
    assert sum(each.outcome == "sentence" for each in answers) > len(answers) / 2


@pytest.mark.slow
def test_a_killed_evaluation_ends_with_the_same_files():
    result = kills.run_job(jobs.JOBS["evaluate"], 1, random.Random(0))
    assert result.kills >= 1
    assert result.differing == ()
    assert result.left == ()
