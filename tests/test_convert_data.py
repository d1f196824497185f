"""Conversion of data sets to LeRobot v3.0.

lerobot cannot be installed beside this library (it needs another NumPy). It has read the sets that
`lerobot_verdict.py` converts, and every number, text and picture was equal to what this library
reads; `golden/lerobot_verdict.json` holds the versions and a hash of the content of each set. The
tests here check that a conversion still has that content, and that it is that of the source.
"""

import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import lerobot_verdict
import numpy as np
import pytest
import tiny_raw

from vla_jax import convert_data as command
from vla_jax.convert_data import ConvertDataConfig, convert_data
from vla_jax.data.conversion import conversion_parts
from vla_jax.data.conversion.conversion_parts import make_parts
from vla_jax.data.conversion.conversion_plan import make_plan
from vla_jax.data.conversion.conversion_run import convert
from vla_jax.data.raw import Feature
from vla_jax.data.readers.field_columns import field_column
from vla_jax.data.readers.fields import FieldMap
from vla_jax.data.readers.lerobot.stored_fields import read_fields
from vla_jax.data.readers.reader import READERS, open_source

LOSS = 3.0  # mean difference of levels by the video codec, on images of 32 to 80 pixels
HERE = pathlib.Path(__file__).parent
SETS = lerobot_verdict.SETS


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Returns a function that converts a set once."""
    done = {}

    def make(name):
        if name not in done:
            root = tmp_path_factory.mktemp("converted") / name
            done[name] = lerobot_verdict.convert_set(name, root)
        return done[name]

    return make


def files(root):
    """Returns path -> hash of every file."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def check_equal(source, plan, target):
    """Compares a source with what was made of it."""
    assert [len(e.timestamps) for e in target.episodes] == source.lengths.tolist()
    for before, after in zip(source.episodes, target.episodes, strict=True):
        assert list(after.instructions) == list(before.instructions)
        steps = np.arange(len(after.timestamps))
        np.testing.assert_allclose(after.timestamps, steps / plan.fps, atol=1e-5)
        for key, keys in plan.columns.items():
            is_whole = len(keys) == 1 and keys[0] in before.columns
            values = before.columns[keys[0]] if is_whole else field_column(before.columns, keys)
            found = after.columns[key]
            kind = "float32" if values.dtype.kind == "f" else "int64"
            if values.dtype.kind in "fiu":
                assert found.dtype == kind
                values = values.astype(kind)
            np.testing.assert_array_equal(found, values.reshape(found.shape), err_msg=key)
        for key, camera in plan.cameras.items():
            images = before.images[camera][:]
            images = images[:, ::-1, ::-1] if plan.rotate_images else images
            difference = np.abs(after.images[key][:].astype(int) - images)
            assert difference.mean(axis=(1, 2, 3)).max() < LOSS


@pytest.mark.parametrize("name", SETS)
def test_a_converted_set_holds_what_its_source_holds(name, converted):
    source = open_source(HERE / "datasets" / name / "dataset")
    fields = READERS[source.kind].fields(source)
    plan = make_plan(source, fields, fps=SETS[name].fps)
    target = open_source(converted(name))
    assert target.kind == "lerobot_v3"
    assert not plan.omitted
    check_equal(source, plan, target)
    after = READERS[target.kind].fields(target)
    assert list(after.cameras) == list(fields.cameras)
    assert (after.grippers, after.gripper_range) == (fields.grippers, fields.gripper_range)
    assert after.columns["action"] == ("action",)


@pytest.mark.parametrize("name", [*SETS, "tiny"])
def test_lerobot_has_read_a_set_with_this_content(name, converted):
    verdict = json.loads(lerobot_verdict.VERDICT.read_text())
    assert verdict["read_by"]["lerobot"] == "0.4.4"
    root = converted(name)
    assert lerobot_verdict.content(root) == verdict["sets"][name]["content"]
    info = json.loads((root / "meta/info.json").read_text())
    assert info["total_frames"] == verdict["sets"][name]["frames"]


def test_columns_of_every_type_are_kept(converted):
    source = tiny_raw.make_raw(tiny_raw.make_episodes(), "nowhere")
    root = converted("tiny")
    target = open_source(root)
    plan = make_plan(source, tiny_raw.FIELDS)
    check_equal(source, plan, target)
    assert target.columns["observation.state"].shape == (4,)
    assert target.columns["observation.state"].names == (
        "joints[0]",
        "joints[1]",
        "joints[2]",
        "hand",
    )
    assert target.columns["observation.matrix"] == Feature("float32", (2, 3))
    assert target.columns["phase"].dtype == "str"
    assert target.columns["is_last"].dtype == "bool"
    assert sorted(path.name for path in root.glob("data/*/*")) == [
        "file-000.parquet",
        "file-001.parquet",
        "file-002.parquet",
    ]
    assert read_fields(root).gripper_range == tiny_raw.FIELDS.gripper_range
    stats = json.loads((root / "meta/stats.json").read_text())
    action = np.concatenate([e["columns"]["action"] for e in tiny_raw.make_episodes()])
    np.testing.assert_allclose(stats["action"]["std"], action.astype(float).std(0), rtol=1e-6)
    assert np.shape(stats["observation.matrix"]["mean"]) == (2, 3)
    assert stats["index"]["max"] == [34]
    assert stats["task_index"]["max"] == [1]


def test_parts_depend_on_the_lengths_only(monkeypatch):
    monkeypatch.setattr(conversion_parts, "PART_FRAMES", 10)
    parts = make_parts(np.array([4, 7, 30, 1, 2, 3]))
    assert [list(part.episodes) for part in parts] == [[0, 1], [2], [3, 4, 5]]
    assert len(make_parts(np.full(100_000, 100))) <= conversion_parts.MAX_PARTS
    assert make_parts(np.array([], int)) == []


def small(monkeypatch, lengths=tiny_raw.LENGTHS):
    """Returns a source of several parts, and its plan."""
    monkeypatch.setattr(conversion_parts, "PART_FRAMES", 10)
    raw = tiny_raw.make_raw(tiny_raw.make_episodes(lengths), "nowhere")
    return raw, make_plan(raw, tiny_raw.FIELDS)


def test_processes_and_interruptions_do_not_change_the_files(tmp_path, monkeypatch):
    raw, plan = small(monkeypatch)
    expected = files(convert(raw, tmp_path / "alone", plan).root)
    assert files(convert(raw, tmp_path / "parallel", plan, num_workers=2).root) == expected
    written = conversion_parts.write_part

    def killed(root, raw, plan, part, *, skip_bad):
        if part.index == 1:
            (root / "parts/00001.parquet").write_text("a part of a file")
            raise KeyboardInterrupt
        return written(root, raw, plan, part, skip_bad=skip_bad)

    monkeypatch.setattr("vla_jax.data.conversion.conversion_run.write_part", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(raw, tmp_path / "resumed", plan)
    assert not (tmp_path / "resumed").exists()
    resumed = []

    def counted(root, raw, plan, part, *, skip_bad):
        resumed.append(part.index)
        return written(root, raw, plan, part, skip_bad=skip_bad)

    monkeypatch.setattr("vla_jax.data.conversion.conversion_run.write_part", counted)
    assert files(convert(raw, tmp_path / "resumed", plan).root) == expected
    assert resumed == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "parallel", "resumed"]


def test_an_interruption_of_the_last_step_is_resumed(tmp_path, monkeypatch):
    raw, plan = small(monkeypatch)
    expected = files(convert(raw, tmp_path / "alone", plan).root)
    with monkeypatch.context() as patch:
        path = "vla_jax.data.conversion.conversion_run.write_description"
        patch.setattr(path, lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(raw, tmp_path / "resumed", plan)
    assert files(convert(raw, tmp_path / "resumed", plan).root) == expected


@pytest.mark.slow
def test_a_killed_command_is_resumed(tmp_path):
    words = ["-m", "vla_jax.convert_data", str(HERE / "datasets/calvin/dataset")]
    options = ["--num-workers", "2"]
    alone, resumed = tmp_path / "alone", tmp_path / "resumed"
    subprocess.run([sys.executable, *words, str(alone), *options], check=True, timeout=120)
    process = subprocess.Popen([sys.executable, *words, str(resumed), *options])
    while process.poll() is None and not (tmp_path / "resumed.tmp/parts").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    if not resumed.exists():
        subprocess.run([sys.executable, *words, str(resumed), *options], check=True, timeout=120)
    assert files(resumed) == files(alone)


def test_another_conversion_does_not_continue_an_unfinished_one(tmp_path, monkeypatch):
    raw, plan = small(monkeypatch)
    (tmp_path / "data.tmp").mkdir()
    with pytest.raises(FileExistsError, match=r"data.tmp is in the way; delete it"):
        convert(raw, tmp_path / "data", plan)
    (tmp_path / "data.tmp/conversion.json").write_text('{"fingerprint": "0", "skip_bad": false}')
    with pytest.raises(ValueError, match="other settings: fingerprint was '0' and is"):
        convert(raw, tmp_path / "data", plan)
    convert(raw, tmp_path / "data", plan, overwrite=True)
    with pytest.raises(FileExistsError, match="data exists; choose another folder or --overwrite"):
        convert(raw, tmp_path / "data", plan)
    assert convert(raw, tmp_path / "data", plan, overwrite=True).num_episodes == 4
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("place", ["episode", "column", "image"])
def test_bad_episodes_are_left_out_on_request(place, tmp_path, monkeypatch):
    episodes = tiny_raw.make_episodes((12, 7, 15))
    monkeypatch.setattr(conversion_parts, "PART_FRAMES", 10)
    raw = tiny_raw.make_raw(episodes, "nowhere")
    if place == "episode":
        episodes[1] = OSError("file x is cut\nshort")
    elif place == "column":
        episodes[1]["columns"]["count"] = np.arange(5)
    else:
        episodes[1]["images"]["observation/top"] = np.zeros((7, 16, 16, 3), np.uint8)
    plan = make_plan(raw, tiny_raw.FIELDS)
    with pytest.raises(ValueError, match="episode 1 cannot be converted: "):
        convert(raw, tmp_path / "data", plan)
    done = convert(raw, tmp_path / "data", plan, skip_bad=True, overwrite=True)
    assert (done.num_episodes, done.num_frames, list(done.bad)) == (2, 27, [1])
    target = open_source(tmp_path / "data")
    np.testing.assert_array_equal(
        target.episodes[1].columns["action"], tiny_raw.make_columns(15, 2)["action"]
    )
    episodes[:] = [ValueError("nothing is left")] * 3
    with pytest.raises(ValueError, match="no episode can be converted: nothing is left"):
        convert(raw, tmp_path / "none", plan, skip_bad=True)


def test_names_and_fields_can_be_chosen():
    raw = tiny_raw.make_raw(tiny_raw.make_episodes(), "nowhere")
    fields = FieldMap(
        cameras={"image_primary": "observation/top"}, columns={"action": ("action[:3]",)}
    )
    plan = make_plan(raw, fields, names={"count": "number", "observation/top": "observation.top"})
    assert plan.columns["action"] == ("action[:3]",)
    assert plan.columns["source.action"] == ("action",)
    assert plan.columns["number"] == ("count",)
    assert plan.cameras == {
        "observation.top": "observation/top",
        "observation.images.wrist": "observation/wrist",
    }
    assert plan.fields.cameras == {"image_primary": "observation.top"}
    ragged = raw._replace(columns={**raw.columns, "ragged": Feature("float32", (-1,))})
    assert make_plan(ragged, fields).omitted == ("ragged",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": {"cuont": "x"}}, r"names must be of .*, got 'cuont'"),
        ({"names": {"count": "a/b"}}, "must be a LeRobot feature without '/'"),
        ({"names": {"count": "index"}}, "must be a LeRobot feature"),
        ({"names": {"count": "x", "phase": "x"}}, "names must differ"),
    ],
)
def test_wrong_names_are_refused(options, message):
    raw = tiny_raw.make_raw(tiny_raw.make_episodes(), "nowhere")
    with pytest.raises(ValueError, match=message):
        make_plan(raw, tiny_raw.FIELDS, **options)


def test_the_command_reports_what_it_wrote(tmp_path, capsys, recwarn, monkeypatch):
    episodes = tiny_raw.make_episodes()
    episodes[0]["timestamps"] = episodes[0]["timestamps"] * 2
    (tmp_path / "tiny").write_text("")
    monkeypatch.setitem(READERS, "tiny", tiny_raw.reader(episodes))
    command.main([str(tmp_path), str(tmp_path / "out"), "--num-workers", "0", "--action", "action"])
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: 4 episodes, 35 frames\n"
    assert "timestamps of 1 episodes differ from steps / 10 Hz" in str(recwarn.pop().message)
    monkeypatch.setitem(READERS, "tiny", tiny_raw.reader(episodes, fps=None))
    with pytest.raises(ValueError, match="does not state its rate; give it with --fps"):
        convert_data(tmp_path, tmp_path / "other", ConvertDataConfig(num_workers=0))
    for argv in (["nowhere", "x"], [str(tmp_path), "x", "--num-workers", "-1"]):
        with pytest.raises(SystemExit) as stopped:
            command.main(argv)
        assert stopped.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
