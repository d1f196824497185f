"""Progress is a bar on a terminal and a few plain lines elsewhere."""

import io

import pytest
from rich.console import Console

from vla_jax.acting.rollout import Outcome
from vla_jax.training import progress


def tell_all(console, total, chunk=1):
    outcomes = [Outcome(i, "lift", "", i % 2 == 0, 5, "Boom: x" * (i == 3)) for i in range(total)]
    with progress.told("refresh-8", total, console) as tell:
        for count in range(chunk, total + 1, chunk):
            tell(outcomes[:count])


@pytest.mark.parametrize(("total", "chunk", "lines"), [(200, 1, 10), (4, 1, 4), (200, 100, 2)])
def test_without_a_terminal_there_are_at_most_ten_plain_lines(total, chunk, lines):
    file = io.StringIO()
    tell_all(Console(file=file), total, chunk)
    told = file.getvalue().splitlines()
    assert len(told) == lines
    assert told[-1] == f"refresh-8 {total}/{total} episodes  {total // 2} successes, 1 crashed"
    assert file.getvalue().replace("\n", "").isprintable()


def test_on_a_terminal_a_bar_tells_the_successes_so_far():
    file = io.StringIO()
    tell_all(Console(file=file, force_terminal=True, width=120), 8)
    assert "refresh-8" in file.getvalue()
    assert "4 successes, 1 crashed" in file.getvalue()
