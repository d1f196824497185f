"""Inspection of data sets: statistics, findings, JSON, page."""

import json
import re
import unicodedata

import numpy as np
import pytest
import tiny_raw

from vla_jax import inspect_data as command
from vla_jax.data.inspection.findings import findings
from vla_jax.data.inspection.survey import survey
from vla_jax.data.readers import reader as readers
from vla_jax.data.readers.fields import FieldMap
from vla_jax.inspect_data import InspectConfig, inspect_data


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Returns a function that makes episodes readable at a path."""

    def register(episodes, **options):
        folder = tmp_path / "source"
        folder.mkdir(exist_ok=True)
        (folder / "tiny").write_text("x" * 100)
        monkeypatch.setitem(readers.READERS, "tiny", tiny_raw.reader(episodes, **options))
        return folder

    return register


def found(episodes, fields=tiny_raw.FIELDS, fps=tiny_raw.FPS, **options):
    """Returns kind -> text of the findings in episodes."""
    result = survey(tiny_raw.make_raw(episodes, "nowhere", fps=fps), fields, **options)
    return {finding.kind: finding.text for finding in findings(result)}


def test_the_report_holds_what_the_episodes_hold(opened):
    episodes = tiny_raw.make_episodes()
    report = inspect_data(opened(episodes)).report
    assert report["kind"] == "tiny"
    assert report["size"] == {"bytes": 100, "files": {"": {"files": 1, "bytes": 100}}}
    counts = report["episodes"]
    assert (counts["total"], counts["frames"], counts["seconds"]) == (4, 35, 3.5)
    assert (counts["shortest"], counts["median"], counts["longest"]) == (1, 9.5, 15)
    assert report["tasks"] == {tiny_raw.TASKS[0]: 2, tiny_raw.TASKS[1]: 2}
    camera = report["cameras"]["observation/wrist"]
    assert (camera["field"], camera["shape"]) == ("image_wrist", [24, 40, 3])
    assert camera["sampled_frames"] == 12 + 7 + 12 + 1
    action = np.concatenate([e["columns"]["action"] for e in episodes]).astype(np.float64)
    for d, dim in enumerate(report["statistics"]["action"]["dims"]):
        for name in ("min", "max", "mean", "std"):
            np.testing.assert_allclose(dim[name], getattr(action[:, d], name)(), rtol=1e-9)
        assert dim["q01"] == np.quantile(action[:, d], 0.01)
        assert dim["q99"] == np.quantile(action[:, d], 0.99)
    names = [dim["name"] for dim in report["statistics"]["proprio"]["dims"]]
    assert names == ["joints[0]", "joints[1]", "joints[2]", "hand"]
    assert report["columns"]["observation/matrix"]["shape"] == [2, 3]
    assert report["columns"]["phase"] == {"dtype": "str", "shape": [], "names": []}
    assert report["assumed"]["gripper_range"] == {"closed": 0.0, "opened": 1.0}
    assert report["assumed"]["fps_of_timestamps"] == pytest.approx(10)


def test_good_episodes_have_no_problem():
    episodes = tiny_raw.make_episodes((12, 7, 15))
    assert set(found(episodes)) == {"changing task"}


def test_arrays_of_varying_shape_have_no_statistics(opened):
    episodes = tiny_raw.make_episodes((12, 7))
    for episode in episodes:
        boxes = np.empty(len(episode["timestamps"]), object)
        for t in range(len(boxes)):
            boxes[t] = np.ones((t % 3, 4), np.float32)
        episode["columns"]["boxes"] = boxes
    report = inspect_data(opened(episodes)).report
    assert report["episodes"]["total"] == 2
    assert "unreadable episodes" not in found(episodes)
    assert report["columns"]["boxes"] == {"dtype": "object", "shape": [], "names": []}


def test_constant_and_clipped_dimensions_are_found():
    episodes = tiny_raw.make_episodes((40, 40))
    for episode in episodes:
        columns = episode["columns"]
        columns["action"][:, 0] = np.clip(columns["action"][:, 0], -0.5, 1)
        columns["action"][:, 1] = 0.25
        columns["observation/joints"][:, 2] *= 1e-6
        columns["observation/hand"][:] = np.sign(columns["observation/hand"])
        columns["count"][:] = 7
    kinds = found(episodes)
    assert re.match(r"action\[0\] has \d+ % at the minimum -0.5", kinds["clipped values"])
    assert kinds["constant dimension"].startswith("action[1] stays within 0.0e+00 of 0.25")
    assert kinds["near-constant dimension"].startswith("proprio[2] (joints[2]) stays within")
    assert kinds["two values"].startswith("proprio[3] (hand) takes two values only, -1 and 1")
    assert kinds["constant column"] == "column count is constant (7)."


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda g: 2 * g - 1, "got values from -1 to 1; declare its range"),
        (lambda g: 100 * g, "got values from 0 to 100"),
        (lambda g: 0.1 * g, "but it has values from 0 to 0.1 only"),
    ],
)
def test_grippers_that_contradict_their_range_are_found(change, text):
    episodes = tiny_raw.make_episodes((40,))
    action = episodes[0]["columns"]["action"]
    action[:, -1] = change(action[:, -1])
    expected = "gripper action[3] is assumed to be 0 closed … 1 open"
    assert found(episodes)["gripper range"].startswith(expected)
    assert text in found(episodes)["gripper range"]


def test_bad_frames_are_found():
    episodes = tiny_raw.make_episodes((40, 40, 40))
    episodes[0]["images"]["observation/top"][:] = 1
    episodes[1]["images"]["observation/top"][:] = (0, 130, 0)
    wrist = episodes[2]["images"]["observation/wrist"]
    wrist[10:] = wrist[10]
    kinds = found(episodes)
    assert kinds["black frames"].endswith("12 of 36 sampled frames, in episode demo_0.")
    assert kinds["frames of one colour"].endswith("12 of 36 sampled frames, in episode demo_1.")
    frozen = r"observation/wrist: .* in episode demo_2; in demo_2 from step 1\d to 39"
    assert re.match(frozen, kinds["frozen frames"])


def test_bad_numbers_and_times_are_found():
    episodes = tiny_raw.make_episodes((40, 40, 40, 1))
    episodes[0]["columns"]["observation/matrix"][3, 1, 2] = np.nan
    episodes[0]["timestamps"][20:] += 0.06
    episodes[1]["timestamps"][5] = episodes[1]["timestamps"][4]
    kinds = found(episodes)
    assert kinds["NaN or infinity"].startswith("observation/matrix[5] has 1 values")
    assert kinds["timestamps"] == "1 steps at which time does not increase, in episode demo_1."
    assert kinds["dropped frames"].endswith("in 2 episodes (demo_0, demo_1).")
    assert kinds["length-1 episodes"].endswith("in episode demo_3.")
    assert found(episodes[2:3], fps=30.0)["frame rate"] == (
        "the timestamps advance at 10 Hz, the data set states 30 Hz."
    )
    assert found(episodes[2:3], fps=None)["frame rate"] == "the data set states no rate (fps)."


def test_bad_texts_are_found():
    texts = [
        "open  the Drawer",
        tiny_raw.TASKS[1],
        "",
        unicodedata.normalize("NFD", "über"),
        "über",
    ]
    episodes = tiny_raw.make_episodes((7,) * 5)
    for episode, text in zip(episodes, texts, strict=True):
        episode["instructions"] = [text] * 7
    result = survey(tiny_raw.make_raw(episodes, "nowhere"), tiny_raw.FIELDS)
    equal = [f.text for f in findings(result) if f.kind == "texts nearly equal"]
    assert len(equal) == 2
    assert "'open  the Drawer', 'open the drawer'" in equal[0]
    kinds = found(episodes)
    assert kinds["no task"] == "no instruction in episode demo_2."
    assert kinds["Unicode form"].startswith("1 texts are not in Unicode's form NFC")


def test_repeated_episodes_and_unnamed_fields_are_found():
    episodes = tiny_raw.make_episodes((7, 7))
    episodes[1]["columns"] = episodes[0]["columns"]
    assert found(episodes)["repeated episodes"].endswith("demo_1 has those of demo_0.")
    kinds = found(episodes, fields=FieldMap())
    assert "no action" in kinds
    assert kinds["unnamed cameras"].endswith("observation/top, observation/wrist.")


def test_unreadable_episodes_are_counted(opened):
    episodes = tiny_raw.make_episodes((7, 7, 7))
    raw = tiny_raw.make_raw(episodes, "nowhere")
    episodes[1] = ValueError("file x is cut short;\n copy it again.")
    result = survey(raw, tiny_raw.FIELDS)
    assert len(result.episodes) == 2
    texts = {finding.kind: finding.text for finding in findings(result)}
    expected = "episode 1 left out. Episode 1: file x is cut short; copy it again."
    assert texts["unreadable episodes"] == expected
    episodes[0] = episodes[2] = episodes[1]
    with pytest.raises(ValueError, match="none of the 3 episodes of nowhere can be read: file x"):
        survey(raw, tiny_raw.FIELDS)


def test_episodes_are_sampled_at_equal_distances():
    raw = tiny_raw.make_raw(tiny_raw.make_episodes((2,) * 9), "nowhere")
    result = survey(raw, tiny_raw.FIELDS, num_episodes=3, num_sampled=1)
    assert [e.name for e in result.episodes] == ["demo_0", "demo_4", "demo_8"]
    assert [len(samples) for samples in result.samples.values()] == [1, 1]


def test_the_page_is_one_file(opened, tmp_path):
    episodes = tiny_raw.make_episodes()
    episodes[0]["instructions"] = ["<script>alert(1)</script>"] * 12
    config = InspectConfig(out=str(tmp_path / "out"), html=str(tmp_path / "page.html"))
    result = inspect_data(opened(episodes), config)
    assert result.pages == (tmp_path / "page.html", tmp_path / "out/index.html")
    page = result.pages[0].read_text(encoding="utf-8")
    assert page == result.pages[1].read_text(encoding="utf-8").replace(
        "<title>index", "<title>page"
    )
    images = re.findall(r'<img [^>]*src="([^"]{0,30})', page)
    assert len(images) == 2 * 4 + 2  # a strip per camera and episode, histograms, curves
    assert all(image.startswith("data:image/png;base64,") for image in images)
    assert "<script" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert json.loads((tmp_path / "out/inspection.json").read_text()) == result.report


def test_the_command_prints_tables_or_json(opened, capsys):
    folder = opened(tiny_raw.make_episodes())
    command.main([str(folder)])
    printed = capsys.readouterr().out
    for text in ("observation/wrist", "open the drawer", "0 closed, 1 open", "length-1 episodes"):
        assert text in printed
    command.main([str(folder), "--json", "--num-episodes", "2"])
    report = json.loads(capsys.readouterr().out)
    assert report["episodes"]["read"] == 2


def test_cameras_can_be_mapped(opened):
    folder = opened(tiny_raw.make_episodes())
    config = command.InspectConfig(cameras=("left=observation/wrist",))
    assumed = command.inspect_data(folder, config).report["assumed"]
    assert assumed["cameras"] == {
        "image_primary": "observation/top",
        "image_left": "observation/wrist",
    }
    with pytest.raises(ValueError, match="image_left must be read from a camera"):
        command.inspect_data(folder, command.InspectConfig(cameras=("left=side",)))


def test_wrong_input_is_one_sentence(opened, capsys, tmp_path):
    for argv in (["nowhere"], [str(tmp_path), "--kind", "tinny"], ["x", "--num-episodes", "0"]):
        with pytest.raises(SystemExit) as stopped:
            command.main(argv)
        assert stopped.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
