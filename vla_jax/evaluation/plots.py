"""Plots: training curves, success per task, actions compared with an expert's, attention.

Needs the extra `plots` (matplotlib). Every function writes one PNG. Colours are the colour-blind
safe palette of Okabe and Ito.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np

from vla_jax.evaluation.results import Rate, Summary, mean_interval
from vla_jax.files import replacing

Path = str | os.PathLike[str]
Curve = tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]  # x [N], y [N] or [N, S]
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_INK, _FAINT = "#30343b", "#d9dce1"
_DASHES = ("--", ":", "-.")
_LOOKS = tuple(  # of curves: every colour, then dashed, then dotted
    {"color": colour, "linestyle": style}
    for style in ("-", (0, (6, 1.5)), (0, (1.5, 1.2)))
    for colour in COLOURS
)
_NOT_DRAWN = ("step", "steps_per_second", "data_wait", "grad_norm", "learning_rate")


class Panel(NamedTuple):
    """One panel of `curves`."""

    title: str
    x_label: str
    y_label: str
    curves: Mapping[str, Curve]  # name -> x, y; several seeds: mean and band
    levels: Mapping[str, float] = {}  # name -> y of a horizontal line
    log: str = ""  # axes with a logarithmic scale: "x", "y", "xy"
    y_range: tuple[float, float] | None = None
    x_ticks: Sequence[float] = ()  # marks of the x axis; () = chosen by matplotlib
    references: Mapping[str, Curve] = {}  # name -> x, y of a dashed line, as the levels are
    # values of the seeds [S] -> ends of the band; default: the 95 % interval of the mean
    band: Callable[[np.ndarray], tuple[float, float]] = mean_interval


def training(path: Path, metrics: Sequence[Mapping[str, float]], *, title: str = "") -> None:
    """Plots the loss terms and the other metrics of a training.

    Args:
      path: PNG to write.
      metrics: lines of a `metrics.jsonl`, with `step` in updates.
      title: title of the figure.

    Raises:
      ValueError: there are no lines.
      ImportError: matplotlib is missing.
    """
    if not metrics:
        raise ValueError(f"metrics for {path} must be at least one line, got none.")
    names = list(dict.fromkeys(name for line in metrics for name in line))
    losses = [name for name in names if name.startswith("loss")]
    others = [name for name in names if name not in (*losses, *_NOT_DRAWN)]
    panels = [(label, part) for label, part in (("loss", losses), ("metric", others)) if part]
    figure = _figure(4.6 * len(panels), 3.2)
    for axes, (label, part) in zip(_panels(figure, 1, len(panels)), panels, strict=True):
        for name, colour in zip(part, _cycle(len(part)), strict=True):
            points = [(line["step"], line[name]) for line in metrics if name in line]
            axes.plot(*np.array(points).T, color=colour, label=name, linewidth=1.6)
        positive = all(line[name] > 0 for line in metrics for name in part if name in line)
        if positive and label == "loss":
            axes.set_yscale("log")
        axes.set(xlabel="updates", ylabel=label)
        axes.legend(frameon=False, fontsize=8)
    _write(figure, path, title)


def success(
    path: Path,
    summaries: Mapping[str, Summary],
    *,
    references: Mapping[str, Summary] | None = None,
    title: str = "",
) -> None:
    """Plots the success rate of each policy on each task, with 95 % intervals.

    Args:
      path: PNG to write.
      summaries: name of a policy to its results, drawn as bars.
      references: name to results, drawn as horizontal lines.
      title: title of the figure.

    Raises:
      ValueError: there are no results.
      ImportError: matplotlib is missing.
    """
    references = references or {}
    if not summaries and not references:
        raise ValueError(f"summaries for {path} must hold at least one policy, got none.")
    tasks = sorted({task for s in (*summaries.values(), *references.values()) for task in s.tasks})
    groups = tasks if len(tasks) == 1 else [*tasks, "mean over tasks"]
    figure = _figure(max(5.0, 1.2 + len(groups) * (0.7 + 0.35 * len(summaries))), 3.6)
    (axes,) = _panels(figure, 1, 1)
    width = 0.8 / max(1, len(summaries))
    for i, ((name, summary), colour) in enumerate(
        zip(summaries.items(), _cycle(len(summaries)), strict=True)
    ):
        offset = (i - (len(summaries) - 1) / 2) * width
        _bars(axes, _rates(summary, tasks), offset, width, colour, name)
    for i, (name, summary) in enumerate(references.items()):
        _lines(axes, _rates(summary, tasks), _DASHES[i % len(_DASHES)], name)
    axes.set_xticks(range(len(groups)), [group or "–" for group in groups])
    axes.set(ylabel="success rate / %", ylim=(0, 112), yticks=range(0, 101, 25))
    axes.grid(visible=False, axis="x")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    _write(figure, path, title)


def actions(
    path: Path,
    predicted: np.ndarray,
    expert: np.ndarray,
    *,
    names: Sequence[str],
    control_hz: float,
    title: str = "",
) -> None:
    """Plots the predicted and the demonstrated actions of one episode.

    Args:
      path: PNG to write.
      predicted: `[T, A]`, arm in [-1, 1], gripper +1 open / -1 closed.
      expert: `[T, A]`.
      names: names of the `A` dims.
      control_hz: actions per second.
      title: above the panels.

    Raises:
      ValueError: the shapes differ, or there are not `A` names.
      ImportError: matplotlib is missing.
    """
    if predicted.shape != expert.shape or predicted.shape[1:] != (len(names),):
        raise ValueError(
            f"predicted and expert must be [T, {len(names)}] with one T, got {predicted.shape} "
            f"and {expert.shape}; give the names of all dims."
        )
    columns = 4
    rows = -(-len(names) // columns)
    figure = _figure(10, 1.9 * rows)
    seconds = np.arange(len(expert)) / control_hz
    panels = _panels(figure, rows, columns)
    for i, (axes, name) in enumerate(zip(panels, names, strict=False)):
        axes.plot(seconds, expert[:, i], color=_INK, linewidth=2.6, alpha=0.35, label="expert")
        axes.plot(seconds, predicted[:, i], color=COLOURS[0], linewidth=1.4, label="predicted")
        axes.set(ylim=(-1.15, 1.15), yticks=(-1, 0, 1))
        axes.set_title(name, fontsize=9, loc="left", color=_INK)
        if i + columns >= len(names):  # the last of its column
            axes.set_xlabel("time / s")
            axes.tick_params(labelbottom=True)
    panels[0].set_ylabel("normalised action")
    panels[len(names) - 1].set_yticks((-1, 1), ("closed", "open"))
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    _write(figure, path, title)


def growth(
    path: Path,
    curves: Mapping[str, Sequence[tuple[float, Sequence[float], float]]],
    *,
    title: str = "",
) -> None:
    """Plots the time of an operation against each size, and the time predicted from its FLOPs.

    Args:
      path: PNG to write.
      curves: axis to points: size; minimum, median and maximum time, ms; predicted time, ms.
      title: above the panels.

    Raises:
      ValueError: there are no curves.
      ImportError: matplotlib is missing.
    """
    if not curves:
        raise ValueError(f"curves for {path} must be at least one, got none.")
    figure = _figure(3.0 * len(curves) + 0.6, 3.2)
    panels = _panels(figure, 1, len(curves), sharex=False)
    for axes, (name, points) in zip(panels, curves.items(), strict=True):
        sizes = [size for size, _, _ in points]
        lowest, median, highest = np.array([times for _, times, _ in points]).T
        predicted = [time for _, _, time in points]
        axes.fill_between(sizes, lowest, highest, color=COLOURS[0], alpha=0.2, linewidth=0)
        axes.plot(sizes, median, color=COLOURS[0], marker="o", markersize=3, label="measured")
        axes.plot(sizes, predicted, color=_INK, linestyle="--", linewidth=1, label="from FLOPs")
        axes.set(xscale="log", yscale="log", xlabel=name)
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.minorticks_off()
    panels[0].set_ylabel("time / ms")
    panels[0].legend(frameon=False, fontsize=8)
    _write(figure, path, title)


def curves(path: Path, panels: Sequence[Panel], *, columns: int = 3, title: str = "") -> None:
    """Plots panels of curves; curves of the same name look the same in all panels.

    Args:
      path: PNG to write.
      panels: in row-major order.
      columns: panels per row.
      title: above the panels.

    Raises:
      ValueError: there are no panels.
      ImportError: matplotlib is missing.
    """
    if not panels:
        raise ValueError(f"panels for {path} must be at least one, got none.")
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(max(4.2 * columns, 5.0), 3.1 * rows + 0.5)
    names = dict.fromkeys(name for panel in panels for name in panel.curves)
    looks = dict(zip(names, cycle(_LOOKS), strict=False))
    drawn = _panels(figure, rows, columns, sharex=False)
    handles = {}
    for axes, panel in zip(drawn, panels, strict=False):
        for name, (x, y) in panel.curves.items():
            handles[name] = _draw_curve(axes, np.asarray(x), np.asarray(y), panel.band, looks[name])
        dashes, name_style = cycle(_DASHES), {"ha": "right", "fontsize": 7, "color": _INK}
        for name, level in panel.levels.items():
            axes.axhline(level, color=_INK, linestyle=next(dashes), linewidth=1)
            where = {"xy": (1.0, level), "xycoords": ("axes fraction", "data")}
            axes.annotate(name, **where, va="bottom", **name_style)
        for name, (x, y) in panel.references.items():
            axes.plot(x, y, color=_INK, linestyle=next(dashes), linewidth=1)
            axes.annotate(name, (x[-1], y[-1]), va="bottom", **name_style)
        axes.set(xlabel=panel.x_label, ylabel=panel.y_label, ylim=panel.y_range)
        if panel.x_ticks:
            axes.set_xticks(panel.x_ticks)
        axes.set(**{f"{axis}scale": "log" for axis in panel.log})
        axes.set_title(panel.title, fontsize=9, loc="left", color=_INK)
    for axes in drawn[len(panels) :]:
        axes.set_axis_off()
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False,
        fontsize=8,
    )  # fmt: skip
    _write(figure, path, title)


def histograms(
    path: Path,
    values: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    levels: Mapping[str, Sequence[float]] | None = None,
    columns: int = 4,
    title: str = "",
) -> None:
    """Plots the distribution of each of some values.

    Args:
      path: PNG to write.
      values: name -> values `[N]` and their weights `[N]`.
      levels: name -> values marked by a dashed line, such as quantiles.
      columns: panels per row.
      title: above the panels.

    Raises:
      ValueError: there are no values.
      ImportError: matplotlib is missing.
    """
    if not values:
        raise ValueError(f"values for {path} must hold at least one name, got none.")
    rows = -(-len(values) // columns)
    figure = _figure(2.7 * columns, 1.7 * rows + 0.4)
    panels = _panels(figure, rows, columns, sharex=False)
    for axes, (name, (numbers, weights)) in zip(panels, values.items(), strict=False):
        axes.hist(numbers, bins=40, weights=weights, color=COLOURS[0], linewidth=0)
        for level in (levels or {}).get(name, ()):
            axes.axvline(level, color=COLOURS[5], linestyle="--", linewidth=1)
        axes.set_title(name, fontsize=8, loc="left", color=_INK)
        axes.set_yticks([])
    for axes in panels[len(values) :]:
        axes.set_axis_off()
    _write(figure, path, title)


def _draw_curve(
    axes: Any,
    x: np.ndarray,
    y: np.ndarray,
    band: Callable[[np.ndarray], tuple[float, float]],
    look: Mapping[str, Any],
) -> Any:
    if y.ndim == 2:
        low, high = np.array([band(of_seeds) for of_seeds in y]).T
        axes.fill_between(x, low, high, color=look["color"], alpha=0.2, linewidth=0)
        y = y.mean(axis=1)
    (line,) = axes.plot(x, y, linewidth=1.6, **look)
    return line


def attention(
    path: Path,
    weights: np.ndarray,
    source: Sequence[str],
    target: Sequence[str],
    *,
    title: str = "",
) -> None:
    """Plots the attention weights of each step as a heat map.

    Args:
      path: PNG to write.
      weights: `[T, S]` in [0, 1].
      source: names of the S positions.
      target: names of the T steps.
      title: title of the figure.

    Raises:
      ValueError: there are not S and T names.
      ImportError: matplotlib is missing.
    """
    if weights.shape != (len(target), len(source)):
        raise ValueError(
            f"weights must be [{len(target)}, {len(source)}] for as many names, got "
            f"{weights.shape}; cut the padding off."
        )
    figure = _figure(2.4 + 0.55 * len(source), 1.4 + 0.24 * len(target))
    (axes,) = _panels(figure, 1, 1)
    image = axes.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(source)), source, rotation=40, ha="right")
    axes.set_yticks(range(len(target)), target)
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, label="weight", shrink=0.6)
    _write(figure, path, title)


def _rates(summary: Summary, tasks: Sequence[str]) -> list[tuple[float, float, float]]:
    """Returns rate, low, high in %, or NaN, of each task, then of the mean of several tasks."""
    blank = Rate(0, 0, None, (0.0, 1.0), None, 0)
    known = [(r.rate, *r.interval) for r in (summary.tasks.get(task, blank) for task in tasks)]
    if len(tasks) != 1:  # without any task there is one bar, too
        known.append((summary.task_mean, *summary.task_mean_interval))
    return [
        (np.nan, np.nan, np.nan) if rate is None else (100 * rate, 100 * low, 100 * high)
        for rate, low, high in known
    ]


def _bars(axes: Any, rates, offset: float, width: float, colour: str, name: str) -> None:
    rate, low, high = np.array(rates).T
    x = np.arange(len(rates)) + offset
    axes.bar(x, rate, 0.92 * width, color=colour, label=name)
    axes.errorbar(
        x, rate, yerr=np.maximum(0, [rate - low, high - rate]), fmt="none", ecolor=_INK,
        elinewidth=1, capsize=2.5,
    )  # fmt: skip
    for place, value, top in zip(x, rate, high, strict=True):
        if np.isfinite(value):
            axes.text(
                place, top + 2, f"{value:.0f}", ha="center", fontsize=8, color=_INK,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            )  # fmt: skip


def _lines(axes: Any, rates, dashes: str, name: str) -> None:
    rate = np.array(rates)[:, 0]
    x = np.arange(len(rates))
    axes.hlines(rate, x - 0.46, x + 0.46, colors=_INK, linestyles=dashes, linewidth=1.3, label=name)


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; run pip install 'vla-jax[plots]'.") from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _panels(figure: Any, rows: int, columns: int, *, sharex: bool = True) -> list[Any]:
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=sharex).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_FAINT)
        axes.tick_params(colors=_INK, labelsize=8, color=_FAINT)
        axes.grid(color=_FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
    return panels


def _write(figure: Any, path: Path, title: str) -> None:
    if title:
        figure.suptitle(title, fontsize=11, color=_INK, x=0.01, ha="left")
    with replacing(path) as part:
        figure.savefig(part, dpi=150, format="png")
