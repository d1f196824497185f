"""LeRobot v3.0 data sets: written, read back, and refused where they are damaged."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla_jax.data import normalize
from vla_jax.data.dataset import Episode
from vla_jax.data.readers.lerobot import reader, shards, writer

LENGTHS = (7, 3, 12)
TASKS = ("lift the red block", "touch the blue block", "lift the red block")
NAMES = {"action": ["dx", "gripper"], "proprio": ["x", "y", "z"]}
CAMERAS = {"image_primary": "observation.images.primary", "image_wrist": "observation.images.wrist"}


def draw(length, rng):
    """Small coloured blocks that move over a shaded table `[T, 32, 32, 3]`."""
    y, x = np.mgrid[:32, :32]
    table = np.stack([150 + x / 2, 140 + y / 2, 120 + 0 * x], axis=-1)
    images = np.repeat(table[None], length, axis=0)
    for colour in ([200, 30, 30], [40, 60, 210], [230, 200, 40]):
        r, c = rng.integers(0, 20, 2)
        for t in range(length):
            images[t, r : r + 4, c + t // 2 : c + 6 + t // 2] = colour
    return images.astype(np.uint8)


def make_episodes():
    rng = np.random.default_rng(0)
    for length, task in zip(LENGTHS, TASKS, strict=True):
        action = rng.uniform(-1, 1, (length, 2)).astype(np.float32)
        action[:, -1] = np.sign(action[:, -1])
        observation = {
            "image_primary": draw(length, rng),
            "image_wrist": draw(length, rng),
            "proprio": rng.normal(size=(length, 3)).astype(np.float32),
            "environment_state": rng.normal(size=(length, 1)).astype(np.float32),
        }
        yield Episode(observation, action, task)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("written") / "data"
    return writer.write(root, make_episodes(), fps=10, names=NAMES, robot_type="table")


@pytest.fixture
def root(written, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(written, tmp_path / "data", ignore=shutil.ignore_patterns(".frames"))


def change_info(root, **fields):
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({**info, **fields}))


def change_table(path, name, change):
    table = pq.read_table(path)
    place = table.column_names.index(name)
    pq.write_table(table.set_column(place, name, change(table[name])), path)


def data_path(root):
    return root / "data/chunk-000/file-000.parquet"


def test_numbers_come_back_exactly_and_images_within_40_db(written):
    data = reader.read(written)
    episodes = list(make_episodes())
    for name in ("proprio", "environment_state", "action"):
        expected = [{**e.observation, "action": e.action}[name] for e in episodes]
        np.testing.assert_array_equal(data.columns[name], np.concatenate(expected))
        assert data.columns[name].dtype == np.float32
    for name in CAMERAS:
        expected = np.concatenate([episode.observation[name] for episode in episodes])
        error = np.mean((data.frames[name].astype(float) - expected) ** 2)
        assert 10 * np.log10(255**2 / error) > 40
    assert data.episode_ends.tolist() == [7, 10, 22]
    assert data.instructions == TASKS
    assert data.fps == 10
    assert data.names["action"] == ("dx", "gripper")
    assert data.names["environment_state"] == ()


def test_the_folder_is_laid_out_as_lerobot_has_it(written):
    files = {p.relative_to(written).as_posix() for p in written.rglob("*") if p.is_file()}
    assert {path for path in files if not path.startswith(".frames")} == {
        "meta/info.json",
        "meta/stats.json",
        "meta/tasks.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        "data/chunk-000/file-000.parquet",
        "videos/observation.images.primary/chunk-000/file-000.mp4",
        "videos/observation.images.wrist/chunk-000/file-000.mp4",
    }
    info = json.loads((written / "meta/info.json").read_text())
    features = info.pop("features")
    assert info == {
        "codebase_version": "v3.0",
        "robot_type": "table",
        "total_episodes": 3,
        "total_frames": 22,
        "total_tasks": 2,
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": 10,
        "splits": {"train": "0:3"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    assert features["action"] == {"dtype": "float32", "shape": [2], "names": ["dx", "gripper"]}
    camera = features["observation.images.wrist"]
    assert (camera["dtype"], camera["shape"]) == ("video", [32, 32, 3])
    assert camera["names"] == ["height", "width", "channels"]
    assert camera["info"]["video.fps"] == 10
    times = {"dtype": "float32", "shape": [1], "names": None}
    assert features["timestamp"] == times
    for key in ("frame_index", "episode_index", "index", "task_index"):
        assert features[key] == {**times, "dtype": "int64"}


def test_frames_are_numbered_as_lerobot_has_them(written):
    table = pq.read_table(data_path(written))
    assert table.schema.field("action").type == pa.list_(pa.float32(), 2)
    assert table.schema.field("observation.environment_state").type == pa.float32()
    assert table.schema.field("timestamp").type == pa.float32()
    steps = np.concatenate([np.arange(length) for length in LENGTHS])
    np.testing.assert_array_equal(table["frame_index"], steps)
    np.testing.assert_array_equal(table["timestamp"], np.float32(steps / 10))
    np.testing.assert_array_equal(table["index"], np.arange(22))
    np.testing.assert_array_equal(table["episode_index"], np.repeat(range(3), LENGTHS))
    np.testing.assert_array_equal(table["task_index"], np.repeat([0, 1, 0], LENGTHS))
    assert pq.ParquetFile(data_path(written)).num_row_groups == 3


def test_episodes_say_where_their_frames_lie(written):
    rows = pq.read_table(written / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [row["tasks"] for row in rows] == [[task] for task in TASKS]
    assert [row["length"] for row in rows] == list(LENGTHS)
    assert [row["dataset_from_index"] for row in rows] == [0, 7, 10]
    assert [row["dataset_to_index"] for row in rows] == [7, 10, 22]
    for key in CAMERAS.values():
        assert [row[f"videos/{key}/from_timestamp"] for row in rows] == [0.0, 0.7, 1.0]
        assert [row[f"videos/{key}/to_timestamp"] for row in rows] == [0.7, 1.0, 2.2]
        assert np.shape(rows[0][f"stats/{key}/mean"]) == (3, 1, 1)
    for row in rows:
        for name in ("data", "meta/episodes", *(f"videos/{key}" for key in CAMERAS.values())):
            assert (row[f"{name}/chunk_index"], row[f"{name}/file_index"]) == (0, 0)


def test_every_frame_is_found_at_its_timestamp(written):
    av = pytest.importorskip("av")
    path = written / "videos/observation.images.primary/chunk-000/file-000.mp4"
    with av.open(str(path)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    np.testing.assert_allclose(times, np.arange(22) / 10, atol=1e-4)  # lerobot's tolerance


def test_the_task_is_the_index_of_a_pandas_frame(written):
    schema = pq.read_schema(written / "meta/tasks.parquet")
    pandas = json.loads(schema.metadata[b"pandas"])
    assert pandas["index_columns"] == ["task"]
    table = pq.read_table(written / "meta/tasks.parquet").to_pydict()
    assert table == {
        "task_index": [0, 1],
        "task": ["lift the red block", "touch the blue block"],
    }


def test_pandas_restores_the_index_of_tasks(written):
    pd = pytest.importorskip("pandas")
    tasks = pd.read_parquet(written / "meta/tasks.parquet")
    assert tasks.index.name == "task"
    assert tasks.loc["touch the blue block"].task_index == 1
    assert list(tasks.columns) == ["task_index"]


def test_statistics_are_those_of_numpy(written):
    stats = json.loads((written / "meta/stats.json").read_text())
    episodes = list(make_episodes())
    action = np.concatenate([episode.action for episode in episodes]).astype(np.float64)
    for name in ("min", "max", "mean", "std"):
        np.testing.assert_allclose(stats["action"][name], getattr(action, name)(0), rtol=1e-6)
    assert stats["action"]["count"] == [22]
    weighted = [len(e.action) * np.quantile(e.action, 0.99, axis=0) for e in episodes]
    np.testing.assert_allclose(stats["action"]["q99"], sum(weighted) / 22, rtol=1e-5)
    pixels = np.concatenate(
        [
            e.observation["image_wrist"][np.linspace(0, n - 1, min(n, 8)).astype(int)]
            for e, n in zip(episodes, LENGTHS, strict=True)
        ]
    )
    camera = stats["observation.images.wrist"]
    for name in ("min", "max", "mean", "std"):
        expected = getattr(pixels / 255, name)((0, 1, 2)).reshape(3, 1, 1)
        np.testing.assert_allclose(camera[name], expected, rtol=1e-6)
    assert camera["count"] == [7 + 3 + 8]


def test_norm_stats_never_touch_a_video(root):
    shutil.rmtree(root / "videos")
    data = reader.read(root, cameras=())
    assert data.frames == {}
    expected = np.concatenate([episode.action for episode in make_episodes()])
    stats = normalize.compute_norm_stats(data)["action"]
    np.testing.assert_allclose(stats.q99, np.quantile(expected, 0.99, axis=0), rtol=1e-6)


def test_large_files_are_split_and_read_back_in_order(tmp_path, monkeypatch, written):
    monkeypatch.setattr(shards, "DATA_MB", -1)
    monkeypatch.setattr(shards, "VIDEO_MB", -1)
    monkeypatch.setattr(shards, "CHUNK_FILES", 2)
    split = writer.write(tmp_path / "split", make_episodes(), fps=10)
    assert (split / "data/chunk-001/file-000.parquet").exists()
    assert (split / "videos/observation.images.wrist/chunk-001/file-000.mp4").exists()
    one, many = reader.read(written), reader.read(split)
    for name in one.columns:
        np.testing.assert_array_equal(one.columns[name], many.columns[name])
    for name in CAMERAS:
        difference = one.frames[name].astype(int) - many.frames[name]
        assert np.abs(difference).mean() < 2


def test_only_what_is_asked_for_is_read(written):
    data = reader.read(written, cameras=("image_wrist",), columns=("proprio",))
    assert set(data.frames) == {"image_wrist"}
    assert set(data.columns) == {"proprio", "action"}


def test_other_keys_are_mapped_to_our_fields(root):
    old, new = "observation.images.wrist", "observation.images.hand"
    (root / "videos" / old).rename(root / "videos" / new)
    for path in (root / "meta/info.json",):
        path.write_text(path.read_text().replace(old, new))
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.rename_columns([n.replace(old, new) for n in table.column_names]), path)
    data = reader.read(root, feature_keys={"image_wrist": new})
    assert set(data.frames) == {"image_primary", "image_wrist"}
    message = "feature must be one of .*'observation.images.hnd', did you mean '.*images.hand'"
    with pytest.raises(ValueError, match=message):
        reader.read(root, feature_keys={"image_wrist": "observation.images.hnd"})


def test_the_fingerprint_changes_with_the_content_and_survives_a_copy(written, root):
    before = reader.read(written).fingerprint
    assert reader.read(root).fingerprint == before
    change_table(
        data_path(root), "observation.environment_state", lambda c: pa.array(c.to_numpy() + 1)
    )
    assert reader.read(root).fingerprint != before


def test_a_missing_folder_or_info_is_refused(root):
    with pytest.raises(FileNotFoundError, match=r"must hold meta/info\.json, which is missing"):
        reader.read(root.with_name("elsewhere"))
    (root / "meta/info.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold meta/info\.json"):
        reader.read(root)


def test_an_interrupted_recording_is_no_data_set_and_is_named(tmp_path):
    def interrupted():
        yield from list(make_episodes())[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer.write(tmp_path / "data", interrupted(), fps=10)
    with pytest.raises(FileNotFoundError, match=r"interrupted \(.*data\.tmp is left over\)"):
        reader.read(tmp_path / "data")
    writer.write(tmp_path / "data", make_episodes(), fps=10)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("version", ["v2.1", None, "v4.0"])
def test_another_version_is_refused(root, version):
    change_info(root, codebase_version=version)
    with pytest.raises(ValueError, match=f"must have LeRobot's version v3.0, got {version}; conv"):
        reader.read(root)


def test_damaged_or_incomplete_info_is_refused(root):
    path = root / "meta/info.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match=r"info\.json must be JSON"):
        reader.read(root)
    path.write_text(json.dumps({"codebase_version": "v3.0", "fps": 10}))
    with pytest.raises(ValueError, match=r"info\.json must hold \['features', 'total_episodes'"):
        reader.read(root)


PARQUET = [
    "data/chunk-000/file-000.parquet",
    "meta/tasks.parquet",
    "meta/episodes/chunk-000/file-000.parquet",
]


@pytest.mark.parametrize("name", PARQUET)
def test_a_missing_parquet_file_is_named(root, name):
    (root / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"\.parquet"):
        reader.read(root)


@pytest.mark.parametrize("name", PARQUET)
@pytest.mark.parametrize("kept", [0.0, 0.6])
def test_a_truncated_parquet_file_is_named(root, name, kept):
    path = root / name
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(ValueError, match=f"{name} cannot be read, it is damaged or cut short"):
        reader.read(root)


def test_a_missing_column_is_named(root):
    path = data_path(root)
    pq.write_table(pq.read_table(path).drop_columns("timestamp"), path)
    with pytest.raises(ValueError, match=r"must have the columns .*\['timestamp'\] missing"):
        reader.read(root)


def test_a_missing_or_truncated_video_is_named(root):
    path = root / "videos/observation.images.wrist/chunk-000/file-000.mp4"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"images\.wrist/.*mp4 cannot be decoded"):
        reader.read(root)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"images\.wrist/.*mp4 is missing"):
        reader.read(root)


def test_a_video_shorter_than_its_episodes_is_named_with_both_counts(root):
    other = root / "videos/observation.images.primary/chunk-000/file-000.mp4"
    short = writer.write(root.with_name("short"), list(make_episodes())[:2], fps=10)
    shutil.copy(short / other.relative_to(root), other)
    with pytest.raises(ValueError, match=r"images\.primary/.*mp4 must hold 22 frames, got 10"):
        reader.read(root)


def test_a_wrong_rate_is_refused(root):
    with pytest.raises(ValueError, match=r"fps of .* must be 30 Hz as asked for, got 10 Hz"):
        reader.read(root, expected_fps=30)
    change_info(root, fps=30)
    with pytest.raises(ValueError, match=r"got 30 Hz in meta/info.json but 10 Hz at frame 1"):
        reader.read(root)


def test_counts_that_contradict_each_other_are_refused(root):
    change_info(root, total_frames=23)
    with pytest.raises(ValueError, match=r"3 episodes with 23 frames .* got 3 with 22"):
        reader.read(root)
    change_info(root, total_frames=22)
    pq.write_table(pq.read_table(data_path(root)).slice(0, 20), data_path(root))
    with pytest.raises(ValueError, match=r"must hold 22 frames, as many of each .* got 20"):
        reader.read(root)


def test_a_number_missing_from_the_action_is_refused(root):
    change_table(
        data_path(root),
        "action",
        lambda c: pa.array([row[:1] for row in c.to_pylist()], pa.list_(pa.float32())),
    )
    with pytest.raises(ValueError, match=r"'action' must have 2 numbers per frame .* got 1 in"):
        reader.read(root)


def test_not_a_number_is_refused_or_skipped(root):
    def spoil(column):
        rows = column.to_pylist()
        rows[8] = [float("nan"), 1.0]
        return pa.array(rows, column.type)

    change_table(data_path(root), "action", spoil)
    with pytest.raises(ValueError, match=r"action must be finite, got NaN .* episode 1 at step 1"):
        reader.read(root)
    with pytest.warns(UserWarning, match=r"left out 1 of 3 episodes"):
        data = reader.read(root, on_bad="skip")
    assert data.episode_ends.tolist() == [7, 19]
    assert data.instructions == (TASKS[0], TASKS[2])
    episodes = list(make_episodes())
    expected = np.concatenate([episodes[e].observation["image_wrist"] for e in (0, 2)])
    assert np.abs(data.frames["image_wrist"].astype(int) - expected).mean() < 3


def test_a_task_without_words_is_refused(root):
    change_table(root / "meta/tasks.parquet", "task_index", lambda _: pa.array([0, 7]))
    with pytest.raises(ValueError, match=r"must name every task, got no task_index 1"):
        reader.read(root)
    table = pq.read_table(root / "meta/tasks.parquet").drop_columns("task")
    pq.write_table(table, root / "meta/tasks.parquet")
    with pytest.raises(ValueError, match="must have the column task_index and one of texts"):
        reader.read(root)


def test_unknown_fields_and_keys_are_refused_with_the_nearest(root):
    with pytest.raises(ValueError, match=r"field must be .*'image_wist', did you mean 'image_w"):
        reader.read(root, cameras=("image_wist",))
    with pytest.raises(ValueError, match=r"'observation\.image\.top', did you mean 'observ"):
        reader.read(root, feature_keys={"image_primary": "observation.image.top"})
    with pytest.raises(ValueError, match=r"'observation\.state' must be stored as video"):
        reader.read(root, feature_keys={"image_primary": "observation.state"})
    with pytest.raises(ValueError, match=r"images\.wrist' must be stored as float32 .* got video"):
        reader.read(root, feature_keys={"proprio": "observation.images.wrist"})


def test_the_writer_keeps_what_is_there_unless_told(root):
    with pytest.raises(FileExistsError, match="data exists; choose another folder or overwrite"):
        writer.write(root, make_episodes(), fps=10)
    writer.write(root, list(make_episodes())[:1], fps=10, overwrite=True)
    assert len(reader.read(root).instructions) == 1
    assert [path.name for path in root.parent.iterdir()] == ["data"]


def test_the_writer_refuses_what_no_data_set_can_hold(tmp_path):
    with pytest.raises(ValueError, match="at least one episode, got none"):
        writer.write(tmp_path / "data", [], fps=10)
    episodes = list(make_episodes())
    episodes[1].action[0, 0] = np.nan
    with pytest.raises(ValueError, match="action must be finite, got NaN or infinity in episode 1"):
        writer.write(tmp_path / "data", episodes, fps=10)
    assert not (tmp_path / "data").exists()


FULL_DISK = """
import resource, sys
import numpy as np
from vla_jax.data import lerobot_writer
from vla_jax.data.dataset import Episode

def episodes():
    rng = np.random.default_rng(0)
    while True:
        images = rng.integers(0, 256, (20, 64, 64, 3), np.uint8)
        yield Episode({"image_primary": images}, np.ones((20, 2)), "go")

resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    lerobot_writer.write(sys.argv[1], episodes(), fps=10, overwrite=True)
except OSError as error:
    print(error)
"""


def test_a_full_disk_is_one_sentence_and_the_old_data_set_is_kept(root):
    command = [sys.executable, "-c", FULL_DISK, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "could not be written" in done.stdout
    assert "nothing that was there before is lost; free space" in done.stdout
    assert reader.read(root).instructions == TASKS


def test_an_error_of_the_recorder_is_not_taken_for_a_full_disk(tmp_path):
    def recorder():
        yield next(make_episodes())
        raise ConnectionResetError("the robot went away")

    with pytest.raises(ConnectionResetError, match="the robot went away"):
        writer.write(tmp_path / "data", recorder(), fps=10)


def test_images_kept_in_parquet_are_refused(root):
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["observation.images.wrist"]["dtype"] = "image"
    change_info(root, features=info["features"])
    with pytest.raises(ValueError, match=r"images\.wrist' must be stored as video .* got image"):
        reader.read(root)


@pytest.mark.parametrize("package", ["pyarrow", "av"])
def test_a_missing_package_is_named_with_its_extra(package, root, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=r"reading .* needs .*pip install 'vla-jax\[data\]'"):
            reader.read(root)
        with pytest.raises(ImportError, match=r"writing .* needs .*pip install 'vla-jax\[data\]'"):
            writer.write(tmp_path / "new", make_episodes(), fps=10)
    assert not (tmp_path / "new").exists()


def test_a_data_set_that_lerobot_wrote_is_read(golden, tmp_path):
    """Golden files of lerobot 0.4.4: `LeRobotDataset.create`, `add_frame`, `save_episode`."""
    data = reader.read(
        golden / "lerobot_0_4_4",
        feature_keys={"image_primary": "observation.images.top"},
        gripper="open_one_closed_zero",
        cache_dir=tmp_path,
    )
    episodes = np.repeat([0, 1], [5, 3])
    steps = np.array([0, 1, 2, 3, 4, 0, 1, 2])
    assert data.episode_ends.tolist() == [5, 8]
    assert data.instructions == ("lift the red block", "touch the blue block")
    assert data.names == {"proprio": ("x", "y", "z"), "action": ("dx", "gripper")}
    state = np.stack([episodes, steps, np.full(8, 0.5)], axis=1)
    np.testing.assert_array_equal(data.columns["proprio"], state)
    action = np.stack([steps / 10, np.where(steps % 2, 1, -1)], axis=1).astype(np.float32)
    np.testing.assert_array_equal(data.columns["action"], action)
    y, x = np.mgrid[:32, :48]
    for image, episode, step in zip(data.frames["image_primary"], episodes, steps, strict=True):
        blue = np.full_like(x, 40 + 15 * step)
        drawn = np.stack([100 + x + 10 * episode, 80 + 2 * y, blue], axis=-1)
        assert np.abs(image - drawn).mean() < 2  # AV1 at lerobot's default quality
