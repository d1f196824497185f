"""Table and curves of the memory suite."""

import pathlib
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from rich.table import Table

from train.memory_grid import GridCell, Score, identity
from vla_jax.envs.memory_table import memory_task, tasks
from vla_jax.envs.memory_table.memory_env import JaxMemoryConfig
from vla_jax.evaluation import plots
from vla_jax.evaluation.plots import Panel
from vla_jax.files import delete, replacing

TABLE, CURVES = "memory_suite.md", "curves.png"  # files of the run folder
_Points = dict[float, tuple[np.ndarray, float]]  # x -> success of each seed [S], chance


def key(cell: GridCell) -> tuple[object, ...]:
    """Returns what distinguishes a cell from the others of a grid."""
    return tuple(identity(cell).values())


def line(score: Score) -> str:
    """Returns one line about a score that has just been measured."""
    cell = score.cell
    return (
        f"{cell.world.task:13s} {axes(cell):22s} {cell.decoder:15s} {percent(score.success):>16s}"
        f"   chance {chance(score):>5s}   {score.seconds:4.0f} s"
    )


def chance(score: Score) -> str:
    """Returns the success of the best policy without memory, such as "25 %" or "0.2 %"."""
    return small_percent(score.chance)


def small_percent(share: float) -> str:
    """Returns a share in [0, 1] with a decimal if it is below a tenth: "25 %" or "0.2 %"."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1f} %"


def percent(success: np.ndarray) -> str:
    """Returns the mean over seeds, and the range if there are several: "97 % [95, 99]"."""
    rates = 100 * np.asarray(success)
    spread = f" [{rates.min():.0f}, {rates.max():.0f}]" if len(rates) > 1 else ""
    return f"{rates.mean():.0f} %{spread}"


def table(scores: Sequence[Score], decoders: Sequence[str]) -> Table:
    """Returns the table of the grid, one row per world and policy: 80 columns are enough."""
    shown = Table(title="Success rate, mean and range over seeds", title_justify="left")
    for name in ("task", "", "chance", "policy", "success"):
        shown.add_column(name, no_wrap=bool(name))  # three axes take several lines
    for row in by_world(scores):
        first = next(iter(row.values()))
        named = (first.cell.world.task, axes(first.cell), chance(first))
        for name in decoders:
            if name in row:
                shown.add_row(*named, name, percent(row[name].success))
                named = ("", "", "")  # once for each world
        shown.add_section()
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
    else:
        delete(run_dir / CURVES)  # of an earlier call


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
        suite = tasks.get(world.task).suite
        rows.append((suite, world.task, axes(first.cell), chance(first), *rates))
    return rows


def axes(cell: GridCell) -> str:
    """Returns the axes of a cell that differ from the task's defaults: "items 4"."""
    own, default = identity(cell), JaxMemoryConfig()
    return ", ".join(
        f"{name} {own[name]}"
        for name in ("delay", "items", "updates")
        if own[name] != getattr(default, name)
    )


def _by_axis(value: Callable[[JaxMemoryConfig], int], scores: Sequence[Score]) -> _Points:
    """Returns the points of a curve over a number of the worlds."""
    points = {float(value(score.cell.world)): (score.success, score.chance) for score in scores}
    return dict(sorted(points.items()))


def _by_group(scores: Sequence[Score]) -> _Points:
    """Returns the points of a curve over the number in the groups, of the widest config.

    Chance is that of all groups: a policy without memory does not know the group.
    """
    if not scores:
        return {}
    widest = max(scores, key=lambda score: len(score.groups))
    return {
        float(name.split()[-1]): (np.array(rates), widest.chance)
        for name, rates in widest.groups.items()
    }


def _delay(world: JaxMemoryConfig) -> int:
    return world.delay


def _items(world: JaxMemoryConfig) -> int:
    return memory_task.items(tasks.get(world.task), world)


_PANELS = (  # task, its points, title, label of the x axis
    ("lit", partial(_by_axis, _delay), "Forgetting: lit", "delay / steps"),
    ("sequence", partial(_by_axis, _items), "Capacity: sequence", "blocks to remember"),
    ("cups_swapped", _by_group, "Updating: cups_swapped", "swaps"),
    ("touch_times", _by_group, "Updating: touch_times", "touches"),
)


def _panel(
    scores: Sequence[Score],
    decoders: Sequence[str],
    task: str,
    find: Callable[[Sequence[Score]], _Points],
    title: str,
    x_label: str,
) -> Panel | None:
    """Returns a panel of success over an axis; None if fewer than two values were measured."""
    own = [score for score in scores if score.cell.world.task == task]
    curves, chances = {}, dict[float, float]()
    for name in decoders:
        points = find([score for score in own if score.cell.decoder == name])
        if len(points) > 1:
            rates, levels = zip(*points.values(), strict=True)
            curves[name] = (np.array(list(points)), np.stack(rates))
            chances |= zip(points, levels, strict=True)
    if not curves:
        return None
    values = sorted(chances)
    return Panel(
        title, x_label, "success rate", curves, y_range=(0, 1.02), x_ticks=values, band=_range,
        references={"chance": (values, [chances[x] for x in values])},
    )  # fmt: skip


def _range(rates: np.ndarray) -> tuple[float, float]:
    return float(rates.min()), float(rates.max())
