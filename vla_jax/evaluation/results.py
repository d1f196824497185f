"""Success rates with confidence intervals, per task and over all tasks.

Episodes that crashed, because the environment raised or the policy gave an action that is not
finite, are counted separately.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from vla_jax import records
from vla_jax.acting.rollout import Outcome
from vla_jax.files import Path, append_json_line


class Rate(NamedTuple):
    """Success rate over the episodes of one task, or of all tasks."""

    episodes: int  # completed episodes
    successes: int
    rate: float | None  # successes / episodes in [0, 1]; None without episodes
    interval: tuple[float, float]  # 95 % confidence, Wilson
    mean_length: float | None  # environment steps; None without episodes
    crashed: int  # episodes in which the environment or the policy failed, not in `episodes`


class Latency(NamedTuple):
    """Time of one policy step for one robot, including transfers from and to the host."""

    p50: float  # milliseconds
    p95: float  # milliseconds


class Summary(NamedTuple):
    """Results of an evaluation."""

    tasks: dict[str, Rate]  # in alphabetical order
    total: Rate  # all episodes, equally weighted
    task_mean: float | None  # mean of the tasks' rates, the main result
    task_mean_interval: tuple[float, float]  # 95 % confidence
    latency: Latency | None  # None if no policy was timed
    # fraction of the actions of which a number was outside [-1, 1], where the environment clips it;
    # None = not known
    clipped: float | None = None
    # numbers of proprio and environment state, over all episodes, that are so far outside the
    # training data that normalisation clipped them; None = not known
    observations_clipped: int | None = None


def wilson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Returns the Wilson confidence interval of a success rate.

        (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n)

    Args:
      successes: at most `trials`.
      trials: n; 0 gives (0, 1).
      confidence: in (0, 1).

    Returns:
      Low and high, in [0, 1].

    Raises:
      ValueError: successes are not in [0, trials], or confidence is not in (0, 1).

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must be in [0, {trials}], got {successes}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}.")
    if trials == 0:
        return 0.0, 1.0
    z, p = NormalDist().inv_cdf((1 + confidence) / 2), successes / trials
    centre = p + z * z / (2 * trials)
    half = z * math.sqrt(p * (1 - p) / trials + (z / (2 * trials)) ** 2)
    scale = 1 + z * z / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def mean_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Returns the 95 % confidence interval (Student's t) of the mean over seeds.

        x̄ ± t s / √n,    t = 97.5 % quantile of Student's distribution, n − 1 degrees of freedom

    Args:
      values: one per seed, n of them, at least one; with a single value both ends are that value,
        since the spread is unknown.

    Returns:
      Low and high.

    Source: Student 1908, "The Probable Error of a Mean".
    """
    from scipy import special  # slow to import, and only needed after an evaluation

    values = np.asarray(values, np.float64)
    if len(values) == 1:
        return float(values[0]), float(values[0])
    quantile = special.stdtrit(len(values) - 1, 0.975)
    half = quantile * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def summarize(outcomes: Iterable[Outcome], *, latency: Latency | None = None) -> Summary:
    """Returns success rates per task and over all episodes, and their mean over tasks.

    Args:
      outcomes: one per episode.
      latency: of one policy step.
    """
    outcomes = list(outcomes)
    names = sorted({outcome.task for outcome in outcomes})
    tasks = {name: _rate([o for o in outcomes if o.task == name]) for name in names}
    mean, interval = _mean([rate for rate in tasks.values() if rate.episodes])
    counts = [o.observations_clipped for o in outcomes if o.observations_clipped is not None]
    return Summary(
        tasks,
        _rate(outcomes),
        mean,
        interval,
        latency,
        clipped=_clipped(outcomes),
        observations_clipped=sum(counts) if counts else None,
    )


def _clipped(outcomes: Sequence[Outcome]) -> float | None:
    known = [(o.clipped * o.num_steps, o.num_steps) for o in outcomes if o.clipped is not None]
    num_steps = sum(steps for _, steps in known)
    return sum(clipped for clipped, _ in known) / num_steps if num_steps else None


def _rate(outcomes: Sequence[Outcome]) -> Rate:
    ended = [outcome for outcome in outcomes if not outcome.error]
    count, successes = len(ended), sum(outcome.success for outcome in ended)
    return Rate(
        episodes=count,
        successes=successes,
        rate=successes / count if count else None,
        interval=wilson(successes, count),
        mean_length=sum(outcome.num_steps for outcome in ended) / count if count else None,
        crashed=len(outcomes) - count,
    )


def _mean(rates: Sequence[Rate]) -> tuple[float | None, tuple[float, float]]:
    """Returns the mean of independent rates, and its interval computed from their intervals.

    Source: Zou and Donner 2008, "Construction of confidence limits about effect measures".
    """
    known = [(rate.rate, *rate.interval) for rate in rates if rate.rate is not None]
    if not known:
        return None, (0.0, 1.0)
    mean = sum(rate for rate, _, _ in known) / len(known)
    below = math.hypot(*(rate - low for rate, low, _ in known)) / len(known)
    above = math.hypot(*(high - rate for rate, _, high in known)) / len(known)
    return mean, (max(0.0, mean - below), min(1.0, mean + above))


def to_json(summary: Summary) -> dict[str, Any]:
    """Returns the summary as dicts, lists and numbers for JSON."""
    return {
        "tasks": {name: rate._asdict() for name, rate in summary.tasks.items()},
        "total": summary.total._asdict(),
        "task_mean": summary.task_mean,
        "task_mean_interval": list(summary.task_mean_interval),
        "latency": summary.latency and summary.latency._asdict(),
        "clipped": summary.clipped,
        "observations_clipped": summary.observations_clipped,
    }


def from_json(data: Mapping[str, Any]) -> Summary:
    """Returns the summary from the result of `to_json`, also of version 0.1.0, which held less.

    Raises:
      ValueError: a field is missing or damaged.
    """
    rates = ("rate", "interval", "task_mean", "task_mean_interval", "clipped")
    return records.read(Summary, data, bounds=dict.fromkeys(rates, (0, 1)))


def count_successes(outcomes: Sequence[Outcome]) -> str:
    """Returns the numbers of successes and crashes as text."""
    successes = sum(outcome.success for outcome in outcomes)
    crashed = sum(bool(outcome.error) for outcome in outcomes)
    return f"{successes} successes" + (f", {crashed} crashed" if crashed else "")


COLUMNS = ("task", "success", "95 % interval", "episodes", "steps", "crashed")


def rows(summary: Summary) -> list[tuple[str, ...]]:
    """Returns the summary as text: a row per task, all episodes, and the mean over tasks."""
    named = [*summary.tasks.items(), ("all episodes", summary.total)]
    cells = [(name or "–", *_cells(rate)) for name, rate in named]
    mean, interval = percent(summary.task_mean), percent_interval(summary.task_mean_interval)
    return [*cells, ("mean over tasks", mean, interval, "", "", "")]


def _cells(rate: Rate) -> tuple[str, ...]:
    steps = "–" if rate.mean_length is None else f"{rate.mean_length:.1f}"
    counts = f"{rate.successes}/{rate.episodes}"
    return percent(rate.rate), percent_interval(rate.interval), counts, steps, str(rate.crashed)


def percent(rate: float | None) -> str:
    """Returns a rate in per cent as text; a dash for None."""
    return "–" if rate is None else f"{100 * rate:.1f} %"


def percent_interval(interval: tuple[float, float]) -> str:
    """Returns an interval in per cent as text."""
    return f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f} %"


def table(summary: Summary, *, title: str = "") -> Table:
    """Returns the summary as a table for `rich`."""
    drawn = Table(title=title or None)
    for i, column in enumerate(COLUMNS):
        drawn.add_column(column, justify="right" if i else "left")
    *tasks, total, mean = rows(summary)
    for row in tasks:
        drawn.add_row(*row)
    drawn.add_section()
    drawn.add_row(*total)
    drawn.add_row(*mean, style="bold")
    return drawn


def markdown(summary: Summary) -> str:
    """Returns the summary as a Markdown table."""
    ruler = ("---", *("---:" for _ in COLUMNS[1:]))
    return "\n".join(f"| {' | '.join(row)} |" for row in (COLUMNS, ruler, *rows(summary)))


def read_outcomes(path: str | os.PathLike[str]) -> list[Outcome]:
    """Returns the outcomes in an `episodes.jsonl`; an empty list if the file does not exist.

    Raises:
      ValueError: a line is damaged.
    """
    return list(records.read_lines(Outcome, path, bounds={"clipped": (0, 1)}))


def append_outcome(path: Path, outcome: Outcome) -> None:
    """Appends an outcome to an `episodes.jsonl`; it is on disk when this returns."""
    append_json_line(path, outcome._asdict())
