"""Table and curves of the memory suite."""

import pathlib
from collections.abc import Sequence

import numpy as np
from rich.table import Table

from train.memory_grid import GridCell, Score, identity
from vla_jax.envs.memory_table import tasks
from vla_jax.evaluation import plots
from vla_jax.evaluation.plots import Panel
from vla_jax.files import replacing

TABLE, CURVES = "memory_suite.md", "curves.png"  # files of the run folder
_PANELS = (  # task, axis of its configs or "group", title, label of the x axis
    ("lit", "delay", "Forgetting: lit", "delay / steps"),
    ("sequence", "items", "Capacity: sequence", "blocks to remember"),
    ("cups_swapped", "group", "Updating: cups_swapped", "swaps"),
    ("touch_times", "group", "Updating: touch_times", "touches"),
)


def key(cell: GridCell) -> tuple[object, ...]:
    """Returns what distinguishes a cell from the others of a grid."""
    return tuple(identity(cell).values())


def line(score: Score) -> str:
    """Returns one line about a score that has just been measured."""
    cell = score.cell
    return (
        f"{cell.world.task:13s} {axes(cell):22s} {cell.decoder:15s} {percent(score.success):>16s}"
        f"   chance {100 * score.chance:3.0f} %   {score.seconds:4.0f} s"
    )


def percent(success: np.ndarray) -> str:
    """Returns the mean over seeds, and the range if there are several: "97 % [95, 99]"."""
    rates = 100 * np.asarray(success)
    spread = f" [{rates.min():.0f}, {rates.max():.0f}]" if len(rates) > 1 else ""
    return f"{rates.mean():.0f} %{spread}"


def table(scores: Sequence[Score], decoders: Sequence[str]) -> Table:
    """Returns the table of the grid, one row per task."""
    shown = Table(title="Success rate, mean and range over seeds", title_justify="left")
    for name in ("suite", "task", "", "chance", *decoders):
        shown.add_column(name)
    for row in _rows(scores, decoders):
        shown.add_row(*row)
    return shown


def write(run_dir: pathlib.Path, scores: Sequence[Score], decoders: Sequence[str]) -> None:
    """Writes the table as Markdown, and the curves as PNG."""
    head = ("suite", "task", "", "chance", *decoders)
    lines = [head, tuple("---" for _ in head), *_rows(scores, decoders)]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    with replacing(run_dir / TABLE) as part:
        part.write_text(text + "\n")
    panels = [panel for kind in _PANELS if (panel := _panel(scores, decoders, *kind))]
    if panels:
        plots.curves(run_dir / CURVES, panels, columns=2, title="Memory suite")


def by_world(scores: Sequence[Score]) -> list[dict[str, Score]]:
    """Returns the scores by decoder, one dict per row of the table."""
    rows: dict[tuple[object, ...], dict[str, Score]] = {}
    for score in scores:
        rows.setdefault(key(score.cell)[:-1], {})[score.cell.decoder] = score
    return list(rows.values())


def _rows(scores: Sequence[Score], decoders: Sequence[str]) -> list[tuple[str, ...]]:
    rows = []
    for row in by_world(scores):
        first = next(iter(row.values()))
        rates = [percent(row[name].success) if name in row else "" for name in decoders]
        world = first.cell.world
        suite, chance = tasks.get(world.task).suite, f"{100 * first.chance:.0f} %"
        rows.append((suite, world.task, axes(first.cell), chance, *rates))
    return rows


def axes(cell: GridCell) -> str:
    """Returns the axes of a cell that differ from the task's defaults: "items 4"."""
    world = cell.world
    named = {"delay": world.delay, "items": world.items, "updates": world.updates}
    default = {"delay": type(world)().delay, "items": 0, "updates": 0}
    return ", ".join(f"{name} {value}" for name, value in named.items() if value != default[name])


def _panel(
    scores: Sequence[Score],
    decoders: Sequence[str],
    task: str,
    axis: str,
    title: str,
    x_label: str,
) -> Panel | None:
    """Returns a panel of success over an axis; None if fewer than two values were measured."""
    own = [score for score in scores if score.cell.world.task == task]
    curves, chance = {}, 0.0
    for name in decoders:
        of_decoder = [score for score in own if score.cell.decoder == name]
        points = _by_group(of_decoder) if axis == "group" else _by_axis(of_decoder, axis)
        if len(points) > 1:
            curves[name] = (np.array(list(points)), _drop_one_seed(np.stack(list(points.values()))))
    if not curves:
        return None
    chance = min(score.chance for score in own)
    values = sorted({float(x) for points, _ in curves.values() for x in points})
    return Panel(title, x_label, "success rate", curves, levels={"chance": chance}, y_range=(0, 1),
                 x_ticks=values)  # fmt: skip


def _drop_one_seed(rates: np.ndarray) -> np.ndarray:
    """Returns rates `[N, S]`, or `[N]` if there is one seed, whose interval is unknown."""
    return rates[:, 0] if rates.shape[1] == 1 else rates


def _by_axis(scores: Sequence[Score], axis: str) -> dict[float, np.ndarray]:
    """Returns the success of each seed by the value of an axis."""
    values = {}
    for score in scores:
        value = getattr(score.cell.world, axis) or tasks.get(score.cell.world.task).items
        values[value] = score.success
    return dict(sorted(values.items()))


def _by_group(scores: Sequence[Score]) -> dict[float, np.ndarray]:
    """Returns the success of each seed by the number in the groups, of the widest config."""
    if not scores:
        return {}
    widest = max(scores, key=lambda score: len(score.groups))
    return {float(name.split()[-1]): np.array(rates) for name, rates in widest.groups.items()}
