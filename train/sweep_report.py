"""Table of a sweep: mean, range and interval over the seeds of every setting."""

import itertools
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from vla_jax import records
from vla_jax.evaluation import results as intervals
from vla_jax.files import replacing, write_json_lines

TABLE, RESULTS = "sweep.md", "results.jsonl"  # files of the run folder
_TITLE = "Mean and range over seeds, and 95 % interval of the mean"
_HEAD = (
    "cell", "H", "L", "learning rate", "params", "seeds", "final loss", "95 %", "success", "95 %",
    "best run",
)  # fmt: skip
_SHOWN = (0, 1, 2, 3, 5, 6, 8, 9)  # columns on a terminal


class Result(NamedTuple):
    """Result of one training; a line of the results."""

    name: str  # folder of its run, in that of the sweep
    cell: str  # kind of the decoder
    hidden_size: int  # H
    num_layers: int  # L
    learning_rate: float  # peak
    seed: int  # of params and dropout
    num_params: int  # that are trained or frozen in the train state
    num_updates: int  # of the training
    # of the last update; of the last finite one, if it has diverged; None = no update was finite
    loss: float | None
    diverged_at: int | None  # update at which it diverged; None = it has not
    episodes: int  # test episodes; 0 = no test
    successes: int | None  # of them; None = no test
    seconds: float  # training and test of its group, divided by the number of members

    @property
    def success(self) -> float | None:
        """Success rate in [0, 1]; None without a test."""
        return None if self.successes is None else self.successes / self.episodes

    @property
    def setting(self) -> tuple[object, ...]:
        """Everything but the seed."""
        return self.cell, self.hidden_size, self.num_layers, self.learning_rate


def read(path: pathlib.Path) -> Result:
    """Returns the result of a training.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged.
    """
    bounds = {"loss": records.SIGNED, "diverged_at": (1, 2**31)}
    return records.read_file(Result, path, "the result of a training", bounds=bounds, fault=_fault)


def _fault(result: Result) -> str:
    is_possible = result.successes is None or result.successes <= result.episodes > 0
    return "" if is_possible else f"successes must be at most {result.episodes}, the episodes"


def table(results: Sequence[Result]) -> Table:
    """Returns the table for a terminal of 80 columns, one row per setting; the file has more."""
    shown = Table(title=_TITLE, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index in _SHOWN:
        shown.add_column(_HEAD[index])
    for row in rows(results):
        shown.add_row(*(escape(row[index].replace(" [", "\n[")) for index in _SHOWN))
    return shown


def write(run_dir: pathlib.Path, results: Sequence[Result]) -> pathlib.Path:
    """Writes the table as Markdown and a line of JSON per training; returns the table's file."""
    write_json_lines(run_dir / RESULTS, [result._asdict() for result in results])
    lines = [_HEAD, tuple("---" for _ in _HEAD), *rows(results)]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    with replacing(run_dir / TABLE) as part:
        part.write_text(f"{_TITLE}; {_tests(results)}.\n\n{text}\n", encoding="utf-8")
    return run_dir / TABLE


def rows(results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    """Yields the cells of the table, in the order of the results.

    Trainings that diverged are counted, and in no mean.
    """
    for _, same in itertools.groupby(results, lambda result: result.setting):
        yield _row(list(same))


def line(name: str, results: Sequence[Result]) -> str:
    """Returns one line about a group that has just been trained."""
    good = [result for result in results if result.diverged_at is None]
    parts = [f"{name}: loss {_spread(_losses(good), '{:.4f}')}"]
    rates = [result.success for result in good if result.success is not None]
    if rates:
        parts.append(f"success {_percents(rates)}")
    if len(good) < len(results):
        parts.append(f"{len(results) - len(good)} diverged")
    return ", ".join(parts)


def _row(same: Sequence[Result]) -> tuple[str, ...]:
    first, good = same[0], [result for result in same if result.diverged_at is None]
    losses = _losses(good)
    rates = [result.success for result in good if result.success is not None]
    lost = len(same) - len(good)
    return (
        first.cell,
        str(first.hidden_size),
        str(first.num_layers),
        f"{first.learning_rate:g}",
        f"{first.num_params:,}",
        f"{len(same)}" + (f", {lost} diverged" if lost else ""),
        _spread(losses, "{:.4f}"),
        _interval(losses, "{:.4f}"),
        _percents(rates),
        _rate_interval(good) if rates else "–",
        max(good, key=_quality).name if good else "–",
    )


def _quality(result: Result) -> tuple[float, float]:
    """Returns a sort key: the best training has the highest success, then the lowest loss."""
    return result.success or 0.0, -math.inf if result.loss is None else -result.loss


def _losses(results: Sequence[Result]) -> list[float]:
    return [result.loss for result in results if result.loss is not None]


def _spread(values: Sequence[float], form: str) -> str:
    """Returns the mean, and the range if there are several: "0.52 [0.50, 0.55]"."""
    if not values:
        return "–"
    mean, low, high = (form.format(f(values)) for f in (np.mean, np.min, np.max))
    return f"{mean} [{low}, {high}]" if len(values) > 1 else mean


def _interval(values: Sequence[float], form: str) -> str:
    if len(values) < 2:
        return "–"
    low, high = intervals.mean_interval(values)
    return f"{form.format(low)} – {form.format(high)}"


def _percents(rates: Sequence[float]) -> str:
    return _spread([100 * rate for rate in rates], "{:.1f}") + (" %" if rates else "")


def _rate_interval(good: Sequence[Result]) -> str:
    """Returns Student's interval over seeds; of a single training Wilson's over its episodes."""
    if len(good) == 1:
        (only,) = good
        low, high = intervals.wilson(only.successes or 0, only.episodes)
    else:
        low, high = intervals.mean_interval([result.success or 0.0 for result in good])
    return intervals.percent_interval((max(0.0, low), min(1.0, high)))


def _tests(results: Sequence[Result]) -> str:
    first = results[0]
    tested = f"{first.episodes} test episodes each" if first.episodes else "no tests"
    return f"{first.num_updates} updates, {tested}"
