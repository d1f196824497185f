"""Progress of a long job: a bar on a terminal, a few plain lines elsewhere.

    with progress_bar("table_lstm", 1000, unit="updates") as show:
        for step in range(1, 1001):
            ...
            show(step, f"loss {loss:.4f}")

Plain lines are free of control characters, for log files.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

NUM_LINES = 10  # plain lines at most


class Show(Protocol):
    """Shows the progress of a job."""

    def __call__(self, completed: int, text: str | None = None) -> None:
        """Updates the progress.

        Args:
          completed: units done.
          text: shown beside the bar; None keeps the previous text and prints no plain line.
        """
        ...


@contextlib.contextmanager
def progress_bar(
    name: str,
    total: int,
    *,
    unit: str,
    start: int = 0,
    num_lines: int = NUM_LINES,
    console: Console | None = None,
) -> Iterator[Show]:
    """Yields a function `show(completed, text)`.

    Args:
      name: name of the job.
      total: units of the whole job.
      unit: plural noun.
      start: units already done.
      num_lines: plain lines over the whole job, at most.
      console: output; None means stderr.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _plain_lines(name, total, unit, start, num_lines, console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=total, completed=start, text="")

        def show(completed: int, text: str | None = None) -> None:
            bar.update(task, completed=completed)
            if text is not None:
                bar.update(task, text=text)

        yield show


def _plain_lines(
    name: str, total: int, unit: str, start: int, num_lines: int, console: Console
) -> Show:
    """Returns a function that prints a line after every `1 / num_lines` of the job."""
    total = max(total, 1)  # a job without any units
    began, printed = time.monotonic(), start * num_lines // total

    def show(completed: int, text: str | None = None) -> None:
        nonlocal printed
        line_number = completed * num_lines // total
        if text is None or line_number <= printed:
            return
        printed = line_number
        left = (time.monotonic() - began) / (completed - start) * (total - completed)
        line = f"{name} {completed}/{total} {unit}  {text}  {left:.0f} s left"
        print(line, file=console.file, flush=True)

    return show
