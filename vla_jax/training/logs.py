"""Logs of a training: a line of JSON per log step, optionally TensorBoard, and a progress bar.

    with Logs(run_dir, num_updates=1000, start=step) as logs:
        for batch in logs.timed(batches):
            train_state, metrics = update(train_state, batch, key)
            step += 1
            logs.advance(step)
            if step % 50 == 0:
                logs.write(step, metrics)

The metrics are written to `metrics.jsonl` in the run folder. If the output is not a terminal, at
most about twenty plain lines, without control characters, replace the progress bar.
"""

import contextlib
import json
import math
import pathlib
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
from rich.console import Console

from vla_jax.files import Path, append_json_line, read_json_lines, write_json_lines
from vla_jax.training.progress import progress_bar

Item = TypeVar("Item")
PLAIN_LINES = 20  # per training, if the output is not a terminal
# Least and greatest value of metrics that cannot be everything; losses and returns can.
_RANGES = dict.fromkeys(
    ("steps_per_second", "env_steps", "skipped_updates", "learning_rate", "grad_norm"),
    (0.0, math.inf),
) | {"data_wait": (0.0, 1.0)}


class Logs:
    """The logs of one training; a context manager, since files and the bar must be closed.

    It adds to the metrics of every line `steps_per_second` and `data_wait`, the fraction of time
    in [0, 1] spent waiting for data, both since the previous line.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        num_updates: int,
        start: int = 0,
        name: str = "train",
        tensorboard: bool = False,
        shown: Sequence[str] = ("loss",),
        console: Console | None = None,
    ):
        """Opens the logs of a training that has done `start` of `num_updates` updates.

        Lines after `start` are removed from `metrics.jsonl`: a killed training wrote them, and the
        resumed one writes them again.

        Args:
          run_dir: folder of the run; created if necessary.
          num_updates: length of the training, in updates.
          start: updates already done.
          name: label of the progress bar.
          tensorboard: whether to also write TensorBoard event files.
          shown: names of the metrics to show beside the bar.
          console: output of the bar; None means stderr.

        Raises:
          ImportError: `tensorboard` is set but the extra `tensorboard` is not installed.
        """
        path = pathlib.Path(run_dir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._scalars = _tensorboard_writer(path.parent, start) if tensorboard else None
        write_json_lines(path, [line for line in read_metrics(path) if line["step"] <= start])
        self._path, self._shown = path, shown
        self._last_step, self._last_time, self._waited = start, time.perf_counter(), 0.0
        self._open = contextlib.ExitStack()
        if self._scalars is not None:
            self._open.callback(self._scalars.close)
        self._bar = progress_bar(
            name,
            num_updates,
            unit="updates",
            start=start,
            num_lines=PLAIN_LINES,
            console=console,
        )

    def __enter__(self) -> "Logs":
        """Shows the bar."""
        self._show = self._open.enter_context(self._bar)
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the bar and the files."""
        self._open.close()

    def timed(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yields the items, and measures the time spent waiting for them."""
        iterator = iter(items)
        while True:
            before = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:  # the end of the batches
                return
            self._waited += time.perf_counter() - before
            yield item

    def advance(self, step: int) -> None:
        """Moves the bar to `step` updates done; does not wait for the device."""
        self._show(step)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes the scalars of `metrics` after `step` updates; waits for the device.

        A number that is not finite, such as the mean over a task without episodes, is left out.
        """
        numbers = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        values = {name: number for name, number in numbers.items() if math.isfinite(number)}
        time_now = time.perf_counter()
        seconds = max(time_now - self._last_time, 1e-9)
        values["steps_per_second"] = (step - self._last_step) / seconds
        values["data_wait"] = min(self._waited / seconds, 1.0)
        append_json_line(self._path, {"step": step, **values})
        if self._scalars is not None:
            for name, value in values.items():
                self._scalars.add_scalar(name, value, step)
        shown = "  ".join(f"{name} {values[name]:.4f}" for name in self._shown if name in values)
        speed = f"{values['steps_per_second']:.1f} steps/s  data {values['data_wait']:.0%}"
        self._show(step, f"{shown}  {speed}")
        self._last_step, self._last_time, self._waited = step, time_now, 0.0


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Returns the lines of a `metrics.jsonl`; none if the file is missing.

    Args:
      path: the file; a last line that a killed program did not finish is ignored.

    Numbers that are not finite, which earlier versions wrote, are left out with a warning.

    Raises:
      ValueError: a line is damaged, or a number cannot be.
    """
    lines, before, num_left_out = read_json_lines(path), -1, 0
    for number, line in enumerate(lines, 1):
        if type(line.get("step")) is not int or line["step"] <= before:
            raise ValueError(
                f"{path} has a damaged line {number} (expected the step as a whole number that "
                f"increases, got {json.dumps(line):.80}); delete that line."
            )
        for name, value in list(line.items()):
            if type(value) is float and not math.isfinite(value):
                del line[name]
                num_left_out += 1
            else:
                _check_number(path, number, name, value)
        before = line["step"]
    if num_left_out:
        sentence = f"{path} has {num_left_out} numbers that are not finite: left out."
        warnings.warn(sentence, stacklevel=2)
    return lines


def _check_number(path: Path, number: int, name: str, value: Any) -> None:
    """Raises a ValueError for a value of a line that cannot be."""
    low, high = _RANGES.get(name, (-math.inf, math.inf))
    if type(value) not in (int, float) or not low <= value <= high:
        what = "a number" if low == -math.inf else f"a number in [{low:g}, {high:g}]"
        raise ValueError(
            f"{path} has a damaged line {number} ({name} must be {what}, got {value!r:.40}); "
            "delete that line."
        )


def _tensorboard_writer(run_dir: pathlib.Path, start: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "TensorBoard logs need tensorboardX; run pip install 'vla-jax[tensorboard]'."
        ) from error
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=start + 1)
