"""Progress is a bar in a terminal and a few plain lines elsewhere."""

import io

import pytest
from rich.console import Console

from vla_jax.training.progress import progress_bar


def run_job(console, total, *, chunk=1, start=0):
    with progress_bar("job", total, unit="episodes", start=start, console=console) as show:
        for count in range(start + chunk, total + 1, chunk):
            show(count)
            show(count, f"{count // 2} successes")


@pytest.mark.parametrize(
    ("total", "chunk", "start", "lines"),
    [(200, 1, 0, 10), (4, 1, 0, 4), (200, 100, 0, 2), (200, 1, 100, 5)],
)
def test_without_a_terminal_at_most_ten_plain_lines_are_printed(total, chunk, start, lines):
    file = io.StringIO()
    run_job(Console(file=file), total, chunk=chunk, start=start)
    printed = file.getvalue().splitlines()
    assert len(printed) == lines
    assert printed[-1] == f"job {total}/{total} episodes  {total // 2} successes  0 s left"
    assert file.getvalue().replace("\n", "").isprintable()


def test_a_line_gives_the_remaining_time(monkeypatch):
    clock, file = iter([0.0, 10.0]), io.StringIO()
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with progress_bar("job", 30, unit="steps", start=10, console=Console(file=file)) as show:
        show(15, "half of the rest")
    assert file.getvalue() == "job 15/30 steps  half of the rest  30 s left\n"


def test_in_a_terminal_a_bar_shows_the_last_text():
    file = io.StringIO()
    run_job(Console(file=file, force_terminal=True, width=120), 8)
    for text in ("job", "8/8", "4 successes", "left"):
        assert text in file.getvalue()
