"""Page of an inspected data set: one HTML file with tables, sampled frames and plots inside."""

import base64
import html
import io
import pathlib
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vla_jax.data.inspection.frame_samples import FrameSamples
from vla_jax.data.inspection.survey import Survey
from vla_jax.data.quantile_sketch import weighted_values
from vla_jax.evaluation import data_tables, plots
from vla_jax.evaluation.report import PAGE, STYLE
from vla_jax.files import Path, replacing

NUM_EPISODES, NUM_FRAMES = 6, 8  # rows and columns of a contact sheet, at most
MAX_PANELS = 32  # dimensions that are drawn
_GAP = 3  # pixels between frames
NUM_TASKS = 40  # rows of the table of tasks, at most


def write_page(path: Path, survey: Survey, report: Mapping[str, Any]) -> pathlib.Path:
    """Writes the page and returns its path; without matplotlib it has no plots.

    Args:
      path: HTML file to write.
      survey: result of the pass over the data.
      report: the same as JSON (`inspection_json.to_json`).

    Raises:
      OSError: the file cannot be written.
      ImportError: Pillow is missing.
    """
    path = pathlib.Path(path)
    parts = [
        f"<h1>{_escape(pathlib.Path(report['path']).resolve().name)}</h1>",
        f"<p class='note'>{_escape(report['path'])}</p>",
        _cards(report),
        _findings(report),
        *(_camera(key, survey, report) for key in survey.raw.images),
        _plots(survey, report),
        *(_statistics(name, stats) for name, stats in report["statistics"].items()),
        _section("The reader assumes", _pairs(data_tables.assumptions(report))),
        _tasks(report),
        _columns(report),
        _section("On disk", _pairs(data_tables.summary(report))),
    ]
    title = _escape(f"{path.stem}: {report['path']}")
    body = "\n".join(filter(None, parts))
    with replacing(path) as part:
        part.write_text(
            PAGE.format(title=title, style=STYLE + _MORE_STYLE, body=body), encoding="utf-8"
        )
    return path


def _cards(report: Mapping[str, Any]) -> str:
    episodes = report["episodes"]
    problems = sum(finding["level"] == "problem" for finding in report["findings"])
    rate = f"{data_tables.number(report['fps'])} Hz" if report["fps"] else "rate not stated"
    length = data_tables.duration(episodes["seconds"]).removeprefix(", ")
    lengths = f"{episodes['shortest']} … {episodes['longest']} steps"
    cards = (
        ("Episodes", str(episodes["total"]), lengths),
        ("Frames", str(episodes["frames"]), f"{length} at {rate}" if length else rate),
        ("Tasks", str(len(report["tasks"])), f"{len(report['cameras'])} cameras"),
        (
            "On disk",
            data_tables.file_size(report["size"]["bytes"]),
            f"{report['kind']} {report['version']}",
        ),
        ("Problems", str(problems), f"{len(report['findings']) - problems} notes"),
    )
    drawn = "".join(
        f'<div class="card"><h3>{name}</h3><p class="rate">{_escape(value)}</p>'
        f"<p>{_escape(note)}</p></div>"
        for name, value, note in cards
    )
    return f'<section class="cards">{drawn}</section>'


def _findings(report: Mapping[str, Any]) -> str:
    items = "".join(
        f'<li class="{finding["level"]}"><b>{_escape(finding["kind"])}</b> '
        f"{_escape(finding['text'])}</li>"
        for finding in report["findings"]
    )
    content = f'<ul class="findings">{items}</ul>' if items else "<p>Nothing looks wrong.</p>"
    return _section("What looks wrong", content)


def _camera(key: str, survey: Survey, report: Mapping[str, Any]) -> str:
    camera = report["cameras"][key]
    rotated = survey.fields.rotate_images
    size = " × ".join(map(str, camera["shape"][:2]))
    texts = [camera["field"] or "read by no field", f"{size} pixels"]
    if camera["brightness"] is not None:
        texts.append(f"mean brightness {camera['brightness']:.0f} of 255")
    if rotated:
        texts.append("shown rotated by 180°, as the reader gives it")
    tasks = {episode.name: episode.task for episode in survey.episodes}
    strips = "".join(
        f'<figure><img class="strip" src="{_strip(samples, rotated=rotated)}" '
        f'alt="frames of episode {_escape(samples.episode)}"><figcaption>'
        f"episode {_escape(samples.episode)}, steps {samples.steps[0]} to {samples.steps[-1]} · "
        f"{_escape(tasks.get(samples.episode, '') or 'no task')}</figcaption></figure>"
        for samples in _chosen(survey.samples[key], NUM_EPISODES)
        if len(samples.steps)
    )
    note = f"<p class='note'>{_escape(' · '.join(texts))}</p>"
    return _section(f"Camera {key}", note + strips)


def _strip(samples: FrameSamples, *, rotated: bool) -> str:
    """Returns some frames side by side as a PNG; what they do not fill is transparent."""
    frames = np.stack(_chosen(samples.thumbnails, NUM_FRAMES))
    frames = frames[:, ::-1, ::-1] if rotated else frames
    _, height, width, _ = frames.shape
    strip = np.zeros((height, NUM_FRAMES, width + _GAP, 4), np.uint8)
    strip[:, : len(frames), :width, :3] = frames.swapaxes(0, 1)
    strip[:, : len(frames), :width, 3] = 255
    return _png(strip.reshape(height, -1, 4)[:, :-_GAP])


def _plots(survey: Survey, report: Mapping[str, Any]) -> str:
    """Returns histograms of the actions and the curves of one episode; "" without matplotlib."""
    field = survey.statistics.get("action")
    if field is None or not field.moments.count.any():
        return ""
    labels = [f"{d} · {name}" for d, name in enumerate(field.names)][:MAX_PANELS]
    dims = report["statistics"]["action"]["dims"]
    values = {label: weighted_values(field.sketch, d) for d, label in enumerate(labels)}
    marks = {label: [dims[d]["q01"], dims[d]["q99"]] for d, label in enumerate(labels)}
    shown = {label: pair for label, pair in values.items() if len(pair[0])}
    drawn = []
    try:
        drawn.append(_figure(lambda path: plots.histograms(path, shown, levels=marks)))
        if survey.curve is not None:
            drawn.append(_curves(survey, labels))
    except ImportError as error:  # the page is useful without plots too
        warnings.warn(f"the page has no plots: {error}", stacklevel=2)
        return ""
    note = "Values over all episodes; dashed: the quantiles q01 and q99."
    curves = f"<h2>Actions of episode {_escape(survey.curve.episode)}</h2>" if survey.curve else ""
    return _section("Actions", f"<p class='note'>{note}</p>{curves.join(drawn)}")


def _curves(survey: Survey, labels: Sequence[str]) -> str:
    assert survey.curve is not None
    seconds, actions = survey.curve.seconds, survey.curve.values
    steps = min(len(seconds), len(actions))
    seconds, unit = (seconds, "time / s") if np.isfinite(seconds).all() else (
        np.arange(len(seconds)), "step"
    )  # fmt: skip
    panels = [
        plots.Panel(label, unit, "", {"on disk": (seconds[:steps], actions[:steps, d])})
        for d, label in enumerate(labels)
    ]
    return _figure(lambda path: plots.curves(path, panels, columns=4))


def _statistics(name: str, stats: Mapping[str, Any]) -> str:
    names = data_tables.STATISTICS
    rows = [
        [str(i), _escape(dim["name"]), *(data_tables.number(dim[key]) for key in names)]
        for i, dim in enumerate(stats["dims"])
    ]
    error = stats["quantile_rank_error"]
    note = f"<p class='note'>Ranks of q01 and q99 within {100 * error:.2g} %.</p>" if error else ""
    return _section(f"{name}: statistics", _table(["", "name", *names], rows) + note)


def _tasks(report: Mapping[str, Any]) -> str:
    tasks = list(report["tasks"].items())
    rows = [[_escape(text) or "(none)", str(count)] for text, count in tasks[:NUM_TASKS]]
    if len(tasks) > NUM_TASKS:
        rest = sum(count for _, count in tasks[NUM_TASKS:])
        rows.append([f"{len(tasks) - NUM_TASKS} others", str(rest)])
    return _section("Tasks", _table(["text", "episodes"], rows))


def _columns(report: Mapping[str, Any]) -> str:
    rows = [
        [
            _escape(key),
            column["dtype"],
            " × ".join(map(str, column["shape"])) or "1",
            data_tables.column_range(column),
        ]
        for key, column in report["columns"].items()
    ]
    return _section("Columns", _table(["column", "dtype", "shape", "values"], rows))


def _pairs(rows: Mapping[str, str]) -> str:
    return _table([], [[_escape(label), _escape(text)] for label, text in rows.items()], "pairs")


def _table(head: Iterable[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    header = "".join(f"<th>{name}</th>" for name in head)
    body = "".join(
        f"<tr><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    return (
        f"<div class='wide'><table class='{kind}'><thead><tr>{header}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_escape(title)}</h2>{content}</section>"


def _figure(draw: Callable[[pathlib.Path], None]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "plot.png"
        draw(path)
        return f'<p class="plots"><img src="{_data_url(path.read_bytes())}" alt="plot"></p>'


def _png(image: np.ndarray) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(file, "png", optimize=True)
    return _data_url(file.getvalue())


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _chosen(items: Sequence[Any] | np.ndarray, count: int) -> list[Any]:
    """Returns `count` of the items, or all, at equal distances and in order."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[i] for i in places]


def _escape(text: str) -> str:
    return html.escape(text, quote=True)


_MORE_STYLE = """
.cards { grid-template-columns: repeat(auto-fill, minmax(175px, 1fr)); }
.card .rate { font-size: 1.8rem; }
h2 { overflow-wrap: anywhere; }
.findings { list-style: none; padding: 0; margin: 0; display: grid; gap: .5rem; }
.findings li { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  border-left: 4px solid #e69f00; padding: .5rem .8rem; font-size: .9rem;
  overflow-wrap: anywhere; }
.findings .note { color: var(--ink); }
.findings .problem { border-left-color: #d55e00; }
.findings b { margin-right: .4rem; }
.strip { width: 100%; border-radius: 6px; display: block; image-rendering: auto; }
section figure { margin: 0 0 .8rem; }
.plots img { max-height: none; width: 100%; margin: .4rem 0 0; box-sizing: border-box; }
.pairs td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.pairs th { width: 11rem; }
"""
