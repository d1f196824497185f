"""Progress over the whole grid of the memory suite, with the time left."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_ESTIMATE = 600.0  # s over which the speed is averaged: cells differ in speed


class GridProgress(NamedTuple):
    """Functions that show the progress of a grid."""

    update: Callable[[int, float], None]  # (number of the cell, finished share in [0, 1])
    describe: Callable[[str], None]  # text beside the bar
    left: Callable[[], str]  # "12 min left", for plain lines


@contextlib.contextmanager
def grid_progress(costs: Sequence[float], console: Console) -> Iterator[GridProgress]:
    """Yields the functions; on a terminal there is a bar.

    Args:
      costs: of the cells, in any unit of work; they decide how much of the bar a cell fills.
      console: with the bar.
    """
    began, shares = time.monotonic(), [0.0] * len(costs)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
               TimeRemainingColumn(), TextColumn("left"))  # fmt: skip
    with Progress(
        *columns,
        console=console,
        disable=not console.is_terminal,
        speed_estimate_period=_ESTIMATE,
    ) as bar:
        task = bar.add_task("memory suite", total=sum(costs))

        def done() -> float:
            return sum(cost * share for cost, share in zip(costs, shares, strict=True))

        def update(number: int, share: float) -> None:
            shares[number] = share
            bar.update(task, completed=done())

        def describe(text: str) -> None:
            bar.update(task, description=text)

        def left() -> str:
            finished = done()
            if not finished:
                return "time left not known"
            seconds = (time.monotonic() - began) * (sum(costs) - finished) / finished
            return f"{seconds / 60:.0f} min left" if seconds >= 90 else f"{seconds:.0f} s left"

        yield GridProgress(update, describe, left)
