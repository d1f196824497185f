"""Report page `index.html` of a run folder: results, plots and videos."""

import html
import json
import os
import pathlib
import urllib.parse
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vla_jax.evaluation import plots, results
from vla_jax.evaluation.results import Rate, Summary
from vla_jax.files import replacing
from vla_jax.training.logs import read_metrics

Path = str | os.PathLike[str]


_RULES = {"once": "at any step", "at_end": "at the last step"}


class Evaluation(NamedTuple):
    """Results that `evaluate` wrote into a folder."""

    folder: pathlib.Path
    command: str
    is_reference: bool  # True for a reference, such as an expert, instead of a policy
    summary: Summary
    success_rule: str | None  # "once" or "at_end"; None = not known (results of version 0.1.0)


def read_evaluation(folder: Path) -> Evaluation:
    """Reads an evaluation from its folder.

    Raises:
      FileNotFoundError: it has no `summary.json`.
      ValueError: the file is damaged.
    """
    path = pathlib.Path(folder) / "summary.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; finish the evaluation first.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        summary = results.from_json(data["summary"])
        is_reference, rule = "reference" in data["settings"], data.get("success_rule")
        return Evaluation(path.parent, data["command"], is_reference, summary, rule)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); evaluate again.") from error


def write_index(
    run_dir: Path, *, evaluations: Mapping[str, Path] | None = None, title: str | None = None
) -> pathlib.Path:
    """Writes `index.html` and its plots into a run folder; returns the path of the page.

    The page shows every PNG in the folder. Links are relative, so the folder can be moved. Without
    matplotlib no plots are drawn.

    Args:
      run_dir: the folder.
      evaluations: name to folder, in order (references come last); None means all in
        `run_dir/evaluation`. Evaluations of several runs can be compared on one page.
      title: headline; None means the folder's name.

    Raises:
      FileNotFoundError: the run folder or a named evaluation is missing.
      ValueError: a file is damaged.
    """
    run_dir = pathlib.Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"run folder {run_dir} is missing; give one that exists.")
    if evaluations is None:
        paths = sorted(run_dir.glob("evaluation/*/summary.json"))
        evaluations = {path.parent.name: path.parent for path in paths}
    read = {name: read_evaluation(folder) for name, folder in evaluations.items()}
    played = dict(sorted(read.items(), key=lambda item: item[1].is_reference))
    try:
        _draw(run_dir, played)
    except ImportError as error:  # the page is useful without plots too
        warnings.warn(f"the page has no new plots: {error}", stacklevel=2)
    title = title or run_dir.resolve().name
    parts = [
        f"<h1>{_escape(title)}</h1>",
        _cards(played),
        _table(played),
        _plots(run_dir),
        *(_videos(run_dir, name, evaluation) for name, evaluation in played.items()),
        _commands(played),
        _configs(run_dir),
    ]
    page = PAGE.format(title=_escape(title), style=STYLE, body="\n".join(filter(None, parts)))
    index = run_dir / "index.html"
    with replacing(index) as part:
        part.write_text(page, encoding="utf-8")
    return index


def _draw(run_dir: pathlib.Path, played: Mapping[str, Evaluation]) -> None:
    metrics = read_metrics(run_dir / "metrics.jsonl")
    if metrics:
        plots.training(run_dir / "training.png", metrics, title="Training")
    bars = {name: e.summary for name, e in played.items() if not e.is_reference}
    lines = {name: e.summary for name, e in played.items() if e.is_reference}
    if played:
        title = "Success per task, with 95 % intervals"
        plots.success(run_dir / "success.png", bars, references=lines, title=title)


def _cards(played: Mapping[str, Evaluation]) -> str:
    """Returns the HTML of one card per policy with its main result."""
    cards = [
        f'<div class="card"><h3>{_escape(name)}</h3>'
        f'<p class="rate">{results.percent(e.summary.task_mean)}</p>'
        f"<p>mean over tasks, {results.percent_interval(e.summary.task_mean_interval)}<br>"
        f"{_counts(e)}</p></div>"
        for name, e in played.items()
        if not e.is_reference
    ]
    return f'<section class="cards">{"".join(cards)}</section>' if cards else ""


def _counts(evaluation: Evaluation) -> str:
    summary = evaluation.summary
    text = f"{summary.total.episodes} episodes"
    if summary.total.crashed:
        text += f", {summary.total.crashed} crashed"
    if summary.latency:
        text += f" · policy step {summary.latency.p50:.1f} ms (p95 {summary.latency.p95:.1f} ms)"
    if summary.clipped:
        text += f" · {results.percent(summary.clipped)} of the actions clipped"
    if summary.observations_clipped:
        text += f" · {summary.observations_clipped} numbers far outside the training data"
    if evaluation.success_rule:
        text += f" · success {_RULES[evaluation.success_rule]}"
    return text


def _table(played: Mapping[str, Evaluation]) -> str:
    if not played:
        return "<p>Nothing has been evaluated yet.</p>"
    tasks = sorted({task for e in played.values() for task in e.summary.tasks})
    head = [*(task or "–" for task in tasks), "all episodes", "mean over tasks", "steps", "crashed"]
    header = "".join(f"<th>{_escape(name)}</th>" for name in ("", *head))
    rows = "".join(_row(name, e.summary, tasks) for name, e in played.items())
    return (
        "<section><h2>Success</h2><div class='wide'><table>"
        f"<thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div>"
        "<p class='note'>Below each rate: its 95 % interval (Wilson). Episodes in which the "
        "environment or the policy failed (crashed) are not included in the rates.</p></section>"
    )


def _row(name: str, summary: Summary, tasks: Sequence[str]) -> str:
    rates = "".join(map(_cell, [*(summary.tasks.get(task) for task in tasks), summary.total]))
    mean, interval = results.percent(summary.task_mean), summary.task_mean_interval
    shown = f"{rates}<td><b>{mean}</b><small>{results.percent_interval(interval)}</small></td>"
    length = summary.total.mean_length
    steps = "–" if length is None else f"{length:.1f}"
    return (
        f"<tr><th>{_escape(name)}</th>{shown}<td>{steps}</td><td>{summary.total.crashed}</td></tr>"
    )


def _cell(rate: Rate | None) -> str:
    if rate is None or not rate.episodes:
        return "<td>–</td>"
    interval, count = results.percent_interval(rate.interval), f"{rate.successes}/{rate.episodes}"
    return f"<td>{results.percent(rate.rate)}<small>{interval}<br>{count}</small></td>"


def _plots(run_dir: pathlib.Path) -> str:
    shown = "".join(
        f'<img src="{_link(path, run_dir)}" alt="{_escape(path.stem)}" loading="lazy">'
        for path in sorted(run_dir.glob("*.png"))
    )
    return f'<section class="plots">{shown}</section>' if shown else ""


def _videos(run_dir: pathlib.Path, name: str, evaluation: Evaluation) -> str:
    videos = "".join(
        f'<figure><video src="{_link(path, run_dir)}" autoplay loop muted playsinline controls>'
        f"</video><figcaption>{_escape(path.stem.replace('_', ' '))}</figcaption></figure>"
        for path in sorted(evaluation.folder.glob("*.mp4"))
    )
    if not videos:
        return ""
    return f'<section><h2>{_escape(name)}</h2><div class="videos">{videos}</div></section>'


def _commands(played: Mapping[str, Evaluation]) -> str:
    lines = "\n".join(_escape(evaluation.command) for evaluation in played.values())
    return f"<section><h2>Commands</h2><pre>{lines}</pre></section>" if lines else ""


def _configs(run_dir: pathlib.Path) -> str:
    files = [run_dir / f"{name}.json" for name in ("config", "agent", "world")]
    return "".join(
        f"<details><summary>{path.name}</summary>"
        f"<pre>{_escape(path.read_text(encoding='utf-8', errors='replace'))}</pre></details>"
        for path in files
        if path.is_file()
    )


def _escape(text: str) -> str:
    return html.escape(text, quote=True)


def _link(path: pathlib.Path, run_dir: pathlib.Path) -> str:
    relative = pathlib.Path(os.path.relpath(path, run_dir)).as_posix()
    return _escape(urllib.parse.quote(relative))


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --ink: #23272e; --faint: #6b7280; --line: #e3e6ea;
  --ground: #fbfbfc; --card: #fff; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --faint: #9aa3af; --line: #2d3239;
  --ground: #16181c; --card: #1e2126; --accent: #56b4e9; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground);
  max-width: 1080px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
a { color: var(--accent); }
h1 { font-size: 1.7rem; margin: 0 0 1.2rem; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .7rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: .9rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .9rem 1.1rem; }
.card h3 { font-size: .95rem; font-weight: 600; margin: 0; }
.card p { margin: 0; font-size: .82rem; color: var(--faint); }
.card .rate { font-size: 2.1rem; line-height: 1.3; font-weight: 650; color: var(--accent); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
  vertical-align: top; white-space: nowrap; }
th { font-weight: 600; font-size: .88rem; }
tbody th, thead th:first-child { text-align: left; }
td small { display: block; color: var(--faint); font-size: .75rem; line-height: 1.35; }
.note { color: var(--faint); font-size: .82rem; }
.plots img { max-width: 100%; max-height: 22rem; background: #fff; border-radius: 10px;
  border: 1px solid var(--line); margin: 1.2rem .9rem 0 0; }
.videos { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: .9rem; }
figure { margin: 0; }
video { width: 100%; border-radius: 8px; display: block; }
figcaption { font-size: .78rem; color: var(--faint); margin-top: .25rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem;
  overflow-x: auto; font-size: .8rem; }
summary { cursor: pointer; margin-top: .6rem; font-size: .9rem; }
"""
