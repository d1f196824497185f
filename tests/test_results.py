"""Rates, intervals and tables; reference values from Newcombe (1998, table I, method 3)."""

import json
import math

import numpy as np
import pytest
from rich.console import Console

from vla_jax.acting.rollout import Outcome
from vla_jax.evaluation import results
from vla_jax.evaluation.results import Latency


def outcomes(task, successes, failures, crashed=0, first_seed=0):
    verdicts = [(True, "")] * successes + [(False, "")] * failures + [(False, "Boom: x")] * crashed
    return [
        Outcome(first_seed + i, task, f"{task} it", success, 10 + i, error)
        for i, (success, error) in enumerate(verdicts)
    ]


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (60, 60, 0.9398, 1.0),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_equals_the_published_intervals(successes, trials, low, high):
    assert results.wilson(successes, trials) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_the_rate_is_z_standard_deviations_from_each_wilson_bound(confidence):
    z = {0.8: 1.281552, 0.95: 1.959964, 0.99: 2.575829}[confidence]
    for bound in results.wilson(14, 60, confidence):
        assert abs(14 / 60 - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / 60))


def test_wilson_refuses_invalid_counts_and_confidence():
    with pytest.raises(ValueError, match=r"successes must be in \[0, 3\], got 4"):
        results.wilson(4, 3)
    with pytest.raises(ValueError, match="confidence must be in"):
        results.wilson(1, 3, confidence=1.0)


def test_crashed_episodes_are_counted_separately_from_failed_ones():
    summary = results.summarize(outcomes("lift", 3, 1, crashed=2))
    rate = summary.tasks["lift"]
    assert (rate.episodes, rate.successes, rate.crashed) == (4, 3, 2)
    assert rate.rate == 0.75
    assert rate.interval == results.wilson(3, 4)
    assert rate.mean_length == pytest.approx((10 + 11 + 12 + 13) / 4)
    assert summary.total == rate


def test_the_headline_is_the_mean_over_tasks():
    played = outcomes("touch", 9, 1) + outcomes("place", 1, 1) + outcomes("lift", 0, 0, crashed=3)
    summary = results.summarize(played)
    assert list(summary.tasks) == ["lift", "place", "touch"]
    assert summary.task_mean == pytest.approx((0.9 + 0.5) / 2)
    assert summary.total.rate == pytest.approx(10 / 12)
    assert summary.tasks["lift"].rate is None
    below = [rate.rate - rate.interval[0] for name, rate in summary.tasks.items() if name != "lift"]
    low, high = summary.task_mean_interval
    assert low == pytest.approx(0.7 - math.sqrt(below[0] ** 2 + below[1] ** 2) / 2)
    assert low < 0.7 < high


def test_the_mean_over_one_task_has_the_interval_of_that_task():
    summary = results.summarize(outcomes("touch", 7, 3))
    assert summary.task_mean_interval == pytest.approx(results.wilson(7, 10))


def test_without_episodes_the_rate_is_none():
    summary = results.summarize([])
    assert summary.task_mean is None
    assert summary.total.rate is None
    assert "–" in results.markdown(summary)


@pytest.mark.parametrize("latency", [None, Latency(1.5, 2.5)])
def test_a_summary_survives_json(latency):
    played = outcomes("touch", 2, 1) + outcomes("", 0, 0, crashed=1)
    summary = results.summarize(played, latency=latency)
    assert results.from_json(json.loads(json.dumps(results.to_json(summary)))) == summary
    assert results.from_json(results.to_json(summary)) == summary


def test_the_rich_table_and_markdown_have_the_same_cells():
    summary = results.summarize(outcomes("touch", 2, 2) + outcomes("lift", 1, 0, crashed=1))
    lines = results.markdown(summary).splitlines()
    assert lines[2] == "| lift | 100.0 % | 20.7 – 100.0 % | 1/1 | 10.0 | 1 |"
    assert lines[-1].startswith("| mean over tasks | 75.0 % |")
    console = Console(width=120)
    with console.capture() as capture:
        console.print(results.table(summary))
    for row in results.rows(summary):
        assert all(cell in capture.get() for cell in row)


def test_outcomes_are_read_as_written_except_a_truncated_last_line(tmp_path):
    path, played = tmp_path / "episodes.jsonl", outcomes("touch", 2, 1, crashed=1)
    assert results.read_outcomes(path) == []
    for outcome in played:
        results.append_outcome(path, outcome)
    with path.open("a") as file:
        file.write('{"seed": 7, "ta')
    assert results.read_outcomes(path) == played


def test_a_damaged_outcomes_file_is_refused(tmp_path):
    path = tmp_path / "episodes.jsonl"
    path.write_text("{oh\n")
    with pytest.raises(ValueError, match="has a damaged line"):
        results.read_outcomes(path)


@pytest.mark.parametrize("num_seeds", [4, 16])
def test_the_interval_of_a_mean_over_seeds_has_its_nominal_coverage(num_seeds):
    drawn = np.random.default_rng(0).normal(5, 2, (2000, num_seeds))
    low, high = np.array([results.mean_interval(values) for values in drawn]).T
    assert np.mean((low < 5) & (high > 5)) == pytest.approx(0.95, abs=0.015)


def test_the_interval_of_a_single_seed_has_zero_width():
    assert results.mean_interval([0.5]) == (0.5, 0.5)
