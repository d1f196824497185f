"""How an evaluation is going: a bar on a terminal, at most ten plain lines elsewhere."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vla_jax.acting.rollout import Outcome

_PLAIN_LINES = 10
Tell = Callable[[Sequence[Outcome]], None]


@contextlib.contextmanager
def told(name: str, num_episodes: int, console: Console) -> Iterator[Tell]:
    """Yields a function to call with all outcomes so far, whenever there are more.

    Args:
      name: what is being played.
      num_episodes: how many there will be.
      console: where to tell it.
    """
    if not console.is_terminal:
        yield lambda outcomes: _tell_line(name, num_episodes, outcomes, console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=num_episodes, told="")
        yield lambda outcomes: bar.update(task, completed=len(outcomes), told=_words(outcomes))


def _tell_line(name: str, total: int, outcomes: Sequence[Outcome], console: Console) -> None:
    count = len(outcomes)
    if count * _PLAIN_LINES // total > (count - 1) * _PLAIN_LINES // total:
        line = f"{name} {count}/{total} episodes  {_words(outcomes)}"
        print(line, file=console.file, flush=True)


def _words(outcomes: Sequence[Outcome]) -> str:
    successes = sum(outcome.success for outcome in outcomes)
    crashed = sum(bool(outcome.error) for outcome in outcomes)
    return f"{successes} successes" + (f", {crashed} crashed" if crashed else "")
