"""The index page shows all results in a run folder, and its links point to existing files."""

import html.parser
import json
import sys
import urllib.parse

import numpy as np
import pytest

from vla_jax.acting.rollout import Outcome
from vla_jax.evaluation import report, results, video
from vla_jax.evaluation.results import Latency

NASTY = "<script>alert('x')</script>"


def write_evaluation(folder, *, successes=3, settings=None, task="lift"):
    folder.mkdir(parents=True)
    outcomes = [Outcome(i, task, "lift it", i < successes, 9, "", 0.5, i) for i in range(4)]
    outcomes.append(Outcome(4, task, "", False, 0, "Boom: x"))
    summary = results.summarize(outcomes, latency=Latency(1.25, 2.5))
    data = {
        "command": f"python -m vla_jax.evaluate {folder.parents[1].name}",
        "settings": settings or {},
        "summary": results.to_json(summary),
    }
    (folder / "summary.json").write_text(json.dumps(data))
    video.write_mp4(folder / video.file_name(1, task, True), [np.zeros((8, 8, 3), np.uint8)], 10)


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "my run"
    write_evaluation(folder / "evaluation" / "refresh-8")
    write_evaluation(folder / "evaluation" / "expert", successes=4, settings={"reference": "e"})
    lines = [json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "config.json").write_text(json.dumps({"note": NASTY}))
    return folder


class Page(html.parser.HTMLParser):
    """Links, tags and text of a page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.tags, self.words = [], [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.words += data


def test_the_index_shows_numbers_plots_videos_command_and_config(run_dir):
    page = Page(report.write_index(run_dir))
    for words in ("my run", "75.0 %", "3/4", "100.0 %", "4 episodes, 1 crashed", "1.2 ms", NASTY):
        assert words in page.words
    assert "50.0 % of the actions clipped · 6 numbers far outside the training data" in page.words
    assert "python -m vla_jax.evaluate my run" in page.words
    links = {urllib.parse.unquote(link) for link in page.links}
    assert {"training.png", "success.png", "evaluation/expert/1_lift_success.mp4"} <= links
    assert all((run_dir / link).is_file() for link in links)
    assert page.tags.count("video") == 2


def test_a_task_that_a_policy_was_not_evaluated_on_has_no_rate(run_dir):
    write_evaluation(run_dir / "evaluation" / "other", task="touch")
    text = report.write_index(run_dir).read_text(encoding="utf-8")
    assert text.count("<td>–</td>") == 3  # touch for the two others, lift for this one
    assert "0/0" not in text


def test_policies_are_listed_before_references(run_dir):
    words = Page(report.write_index(run_dir)).words
    assert words.index("refresh-8") < words.index("expert")


@pytest.mark.parametrize("where", ["title", "name", "task", "config"])
def test_text_from_files_and_names_is_escaped(run_dir, where):
    nasty = {"where": run_dir / "evaluation" / "refresh-8"}
    title, evaluations = None, nasty
    if where == "title":
        title = NASTY
    elif where == "name":
        evaluations = {NASTY: nasty["where"]}
    elif where == "task":
        write_evaluation(run_dir / "evaluation" / "other", task=NASTY)
        evaluations = {"other": run_dir / "evaluation" / "other"}
    page = Page(report.write_index(run_dir, evaluations=evaluations, title=title))
    assert "script" not in page.tags
    assert "alert('x')" in page.words


def test_evaluations_of_several_runs_can_share_one_page(run_dir, tmp_path):
    other = tmp_path / "other"
    write_evaluation(other / "evaluation" / "memoryless", successes=1)
    chosen = {
        "LSTM": run_dir / "evaluation" / "refresh-8",
        "memoryless": other / "evaluation" / "memoryless",
    }
    page = Page(report.write_index(tmp_path, evaluations=chosen, title="Two policies"))
    assert "Two policies" in page.words
    assert page.words.index("LSTM") < page.words.index("memoryless")
    assert all((tmp_path / urllib.parse.unquote(link)).is_file() for link in page.links)


def test_without_matplotlib_the_page_has_no_plots(run_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match="no new plots: plots need matplotlib"):
        page = Page(report.write_index(run_dir))
    assert "75.0 %" in page.words
    assert "img" not in page.tags


def test_the_page_of_a_run_without_evaluations_says_so(tmp_path):
    assert "Nothing has been evaluated yet" in Page(report.write_index(tmp_path)).words


def test_missing_or_damaged_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run folder .* is missing"):
        report.write_index(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"summary\.json is missing"):
        report.write_index(tmp_path, evaluations={"a": tmp_path})
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match=r"summary\.json is damaged"):
        report.write_index(tmp_path, evaluations={"a": tmp_path})
