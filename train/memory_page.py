"""Page `index.html` of the memory suite: table, curves and films."""

import html
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from train import memory_report
from train.memory_decoders import WINDOW
from train.memory_films import EpisodeFilm
from train.memory_grid import CloningConfig, Score
from vla_jax.envs.memory_table import tasks
from vla_jax.evaluation.report import PAGE, STYLE
from vla_jax.files import replacing

INDEX = "index.html"
_BASELINES = {
    "fc": "has no memory",
    "first_and_now": "has none either, but sees the first observation and the instruction at every "
    "step",
    "lstm_window": f"remembers the last {WINDOW} steps",
}
_FILMS = (
    "<h2>Films</h2><p>Of each task: the expert, then a success of the best policy and a failure, "
    "if it has one; of the first seed, in new episodes. What happens in the dark is shown dimmed."
    "</p>"
)


def write(
    run_dir: pathlib.Path,
    scores: Sequence[Score],
    decoders: Sequence[str],
    cloning: CloningConfig,
    films: Mapping[str, Sequence[EpisodeFilm]],
) -> pathlib.Path:
    """Writes the page into the run folder; its links are relative, so the folder can be moved.

    Args:
      run_dir: the folder, with the curves and the films.
      scores: of the grid.
      decoders: columns of the table.
      cloning: training and test, for the text.
      films: by task.

    Returns:
      The path of the page.
    """
    title = "Memory suite"
    parts = [
        f"<h1>{title}</h1>",
        _introduction(cloning),
        _table(scores, decoders, cloning),
        _curves(run_dir),
        _groups(scores, decoders),
        _FILMS if films else "",
        *(_suite(suite, films) for suite in tasks.SUITES),
    ]
    page = PAGE.format(title=title, style=STYLE + _MORE_STYLE, body="\n".join(filter(None, parts)))
    path = run_dir / INDEX
    with replacing(path) as part:
        part.write_text(page, encoding="utf-8")
    return path


def _introduction(cloning: CloningConfig) -> str:
    asked = (
        " In training alone a linear layer is also asked at every step for what must be remembered."
        if cloning.recall_weight
        else ""
    )
    return (
        "<p>Something is shown, time passes, then the robot acts. Policies clone an expert that "
        "sees what must be remembered, on the JAX table, from its state: "
        f"{cloning.num_demonstrations} demonstrations of the task, {cloning.num_updates} updates, "
        f"{_count(cloning.num_seeds, 'seed')}, {cloning.num_episodes} test episodes of each."
        f"{asked}</p>"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _table(scores: Sequence[Score], decoders: Sequence[str], cloning: CloningConfig) -> str:
    head = ("task", "", "chance", *decoders)
    header = "".join(f"<th>{_escape(name).replace('_', '_<wbr>')}</th>" for name in head)
    lines, suite = [], ""
    for row in sorted(memory_report.by_world(scores), key=_place):
        first = next(iter(row.values()))
        world = first.cell.world
        if tasks.get(world.task).suite != suite:
            suite = tasks.get(world.task).suite
            lines.append(f"<tr class='suite'><th colspan='{len(head)}'>{suite}</th></tr>")
        rates = "".join(_rate(row.get(name)) for name in decoders)
        lines.append(
            f"<tr><th>{_escape(world.task)}</th><td>{memory_report.axes(first.cell)}</td>"
            f"<td>{memory_report.chance(first)}</td>{rates}</tr>"
        )
    return (
        "<section><h2>Success rate</h2><div class='wide'><table class='grid'>"
        f"<thead><tr>{header}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        "<p class='note'>Mean over seeds, below it their range. The seeds of a cell share the "
        "demonstrations and the test episodes; "
        f"{cloning.num_episodes} episodes give a rate near 50 % to "
        f"±\u00a0{98 / np.sqrt(cloning.num_episodes):.0f}\u00a0% in 95 % of the cases. "
        "Chance: the best policy without memory. The colour grows with the success above chance. "
        "Delay: mean steps between what is shown and the first action. Items: how many things to "
        "remember. Updates: the greatest "
        f"number of repetitions or swaps.</p><p class='note'>{_policies(decoders)}</p></section>"
    )


def _policies(decoders: Sequence[str]) -> str:
    """Returns which policies have a memory of the whole episode."""
    parts = [f"<b>{name}</b> {text}" for name, text in _BASELINES.items() if name in decoders]
    if set(decoders) - _BASELINES.keys():
        parts.append(f"{'all others' if parts else 'all'} remember the whole episode")
    return f"Policies: {'; '.join(parts)}."


def _place(row: Mapping[str, Score]) -> tuple[int, int]:
    """Returns what sorts the rows by suite and task."""
    name = next(iter(row.values())).cell.world.task
    return tasks.SUITES.index(tasks.get(name).suite), list(tasks.TASKS).index(name)


def _rate(score: Score | None) -> str:
    if score is None:
        return "<td></td>"
    rates = 100 * np.asarray(score.success)
    spread = f"<small>{rates.min():.0f} … {rates.max():.0f}</small>" if len(rates) > 1 else ""
    above = max(0.0, (rates.mean() - 100 * score.chance) / (1 - score.chance))
    return f"<td style='--above: {above:.0f}%'>{rates.mean():.0f} %{spread}</td>"


def _curves(run_dir: pathlib.Path) -> str:
    if not (run_dir / memory_report.CURVES).exists():
        return ""
    return (
        "<section class='plots'><h2>Delay, items and updates</h2>"
        f"<img src='{memory_report.CURVES}' alt='success over delay, items and updates'>"
        "<p class='note'>Lines: mean over seeds. Bands: from the lowest to the highest seed. "
        "Dashed: chance. Swaps and touches are those of an episode, of policies trained on all of "
        "them.</p></section>"
    )


def _groups(scores: Sequence[Score], decoders: Sequence[str]) -> str:
    """Returns a table of each task whose results have several groups, folded."""
    shown = []
    for row in memory_report.by_world(scores):
        cell = next(iter(row.values())).cell
        names = list(dict.fromkeys(name for score in row.values() for name in score.groups))
        if len(names) < 2:
            continue
        header = "".join(f"<th>{_escape(name)}</th>" for name in ("", *decoders))
        lines = [
            f"<tr><th>{_escape(name)}</th>"
            + "".join(_group_rate(row.get(decoder), name) for decoder in decoders)
            + "</tr>"
            for name in names
        ]
        title = " ".join(filter(None, (cell.world.task, memory_report.axes(cell))))
        shown.append(
            f"<details><summary>{_escape(title)} by group</summary><div class='wide'><table>"
            f"<thead><tr>{header}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
            "</details>"
        )
    return f"<section>{''.join(shown)}</section>" if shown else ""


def _group_rate(score: Score | None, group: str) -> str:
    if score is None or group not in score.groups:
        return "<td></td>"
    return f"<td>{100 * float(np.mean(score.groups[group])):.0f} %</td>"


def _suite(suite: str, films: Mapping[str, Sequence[EpisodeFilm]]) -> str:
    own = {task: films[task] for task in tasks.TASKS if films.get(task)}
    own = {task: shown for task, shown in own.items() if tasks.get(task).suite == suite}
    if not own:
        return ""
    return (
        f"<section><h3>{suite.capitalize()}</h3>{''.join(map(_task, own, own.values()))}</section>"
    )


def _task(task: str, films: Sequence[EpisodeFilm]) -> str:
    figures = "".join(_figure(task, film) for film in films)
    return f"<h4>{_escape(task)}</h4><div class='videos'>{figures}</div>"


def _figure(task: str, film: EpisodeFilm) -> str:
    verdict = "success" if film.success else "failure"
    group = f" ({_escape(film.group)})" if film.group != task else ""
    return (
        f'<figure class="{verdict}"><video src="{_escape(film.path)}" autoplay loop muted '
        f"playsinline controls></video><figcaption><b>{_escape(film.actor)}</b> · "
        f"“{_escape(film.sentence)}”{group}<br>"
        f"To remember: {_escape(film.shown)}<br>"
        f'<span class="verdict">{_escape(film.did)}</span></figcaption></figure>'
    )


def _escape(text: str) -> str:
    return html.escape(text, quote=True)


_MORE_STYLE = """
.grid td { background: color-mix(in srgb, var(--accent) calc(var(--above, 0%) * .45),
  transparent); }
.grid .suite th { text-align: left; color: var(--faint); font-weight: 500; padding-top: 1.1rem; }
.plots h2 { margin-bottom: 0; }
.plots img { max-height: none; width: 100%; box-sizing: border-box; margin-right: 0; }
.grid thead th { white-space: normal; vertical-align: bottom; }
.grid th:first-child { position: sticky; left: 0; background: var(--ground); }
h3 { font-size: 1rem; margin: 1.8rem 0 0; }
h4 { font-size: .95rem; margin: 1.4rem 0 .5rem; }
.videos { grid-template-columns: repeat(3, minmax(0, 1fr)); }
@media (max-width: 700px) { .videos { grid-template-columns: 1fr; } }
.verdict { font-weight: 600; color: #d55e00; }
.success .verdict { color: var(--accent); }
"""
