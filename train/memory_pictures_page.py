"""Page `index.html` of the memory suite from pictures: the table, and a page for each task."""

import html
import pathlib
from collections.abc import Mapping, Sequence

from vla_jax.evaluation import report, results
from vla_jax.evaluation.report import PAGE, STYLE, Evaluation
from vla_jax.files import replacing

TITLE = "Memory suite from pictures"
_NOTE = (
    "Below each rate: its 95 % interval (Wilson). Chance: the best policy without memory. A task "
    "links to its own page, with the rates by group and the videos; the large number there is the "
    "mean over the groups, the rate here that of all episodes."
)


def write(
    run_dir: pathlib.Path,
    evaluations: Mapping[str, Mapping[str, pathlib.Path]],
    *,
    chance: Sequence[str],
    introduction: str,
) -> pathlib.Path:
    """Writes the page, and that of each task into its folder; links are relative.

    Args:
      run_dir: with a folder for each task.
      evaluations: task, then decoder, to the folder of the evaluation; the same decoders for all.
      chance: of each task, such as "25 %".
      introduction: what was trained and tested.

    Returns:
      The path of the page.

    Raises:
      FileNotFoundError: an evaluation is missing.
      ValueError: a file of one is damaged.
    """
    lines, plots = [], []
    for (task, folders), guess in zip(evaluations.items(), chance, strict=True):
        page = report.write_index(run_dir / task, evaluations=folders, title=f"{TITLE}: {task}")
        link = f"<a href='{html.escape(task)}/{page.name}'>{html.escape(task)}</a>"
        rates = "".join(_rate(report.read_evaluation(folder)) for folder in folders.values())
        if (run_dir / task / "success.png").exists():  # not without matplotlib
            plots.append(
                f"<section class='plots'><h2>{html.escape(task)}</h2>"
                f"<img src='{html.escape(task)}/success.png' alt='success by group'></section>"
            )
        lines.append(f"<tr><th>{link}</th><td>{html.escape(guess)}</td>{rates}</tr>")
    head = ("task", "chance", *next(iter(evaluations.values())))
    header = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = (
        f"<h1>{TITLE}</h1><p>{html.escape(introduction)}</p>"
        f"<div class='wide'><table><thead><tr>{header}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
        f"<p class='note'>{_NOTE}</p>{''.join(plots)}"
    )
    index = run_dir / "index.html"
    with replacing(index) as part:
        part.write_text(PAGE.format(title=TITLE, style=STYLE, body=body), encoding="utf-8")
    return index


def _rate(evaluation: Evaluation) -> str:
    total = evaluation.summary.total
    interval = results.percent_interval(total.interval)
    return f"<td>{results.percent(total.rate)}<small>{interval}</small></td>"
