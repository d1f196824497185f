"""Writer of LeRobot v3.0 data sets."""

import errno
import json
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_lerobot import CAMERAS, LENGTHS, NAMES, TASKS, data_path, make_episodes, read

from vla_jax.data.dataset import episode_instructions
from vla_jax.data.readers.lerobot import shards, writer


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("written") / "data"
    return writer.write(root, make_episodes(), fps=10, names=NAMES, robot_type="table")


@pytest.fixture
def root(written, tmp_path):
    """A copy that a test may modify."""
    return shutil.copytree(written, tmp_path / "data", ignore=shutil.ignore_patterns(".frames"))


def test_the_folder_has_the_layout_of_lerobot(written):
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


def test_frames_are_numbered_as_in_lerobot(written):
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


def test_episodes_contain_the_positions_of_their_frames(written):
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
    np.testing.assert_allclose(times, np.arange(22) / 10, atol=1e-4)  # tolerance of lerobot


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


def test_statistics_equal_those_of_numpy(written):
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


def test_large_files_are_split_and_read_in_order(tmp_path, monkeypatch, written):
    monkeypatch.setattr(shards, "DATA_MB", -1)
    monkeypatch.setattr(shards, "VIDEO_MB", -1)
    monkeypatch.setattr(shards, "CHUNK_FILES", 2)
    split = writer.write(tmp_path / "split", make_episodes(), fps=10)
    assert (split / "data/chunk-001/file-000.parquet").exists()
    assert (split / "videos/observation.images.wrist/chunk-001/file-000.mp4").exists()
    one, many = read(written), read(split)
    for name in one.columns:
        np.testing.assert_array_equal(one.columns[name], many.columns[name])
    for name in CAMERAS:
        difference = one.frames[name].astype(int) - many.frames[name]
        assert np.abs(difference).mean() < 2


def test_an_interrupted_recording_is_reported_as_incomplete(tmp_path):
    def interrupted():
        yield from list(make_episodes())[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer.write(tmp_path / "data", interrupted(), fps=10)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "data.tmp").mkdir()  # of a process that was killed
    with pytest.raises(FileNotFoundError, match=r"interrupted \(.*data\.tmp remains\)"):
        read(tmp_path / "data")
    writer.write(tmp_path / "data", make_episodes(), fps=10)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_the_writer_overwrites_a_data_set_only_on_request(root):
    with pytest.raises(FileExistsError, match="data exists; choose another folder or overwrite"):
        writer.write(root, make_episodes(), fps=10)
    writer.write(root, list(make_episodes())[:1], fps=10, overwrite=True)
    assert len(read(root).instructions) == 1
    assert [path.name for path in root.parent.iterdir()] == ["data"]


def test_a_second_writer_of_the_same_data_set_is_refused(tmp_path):
    def episodes():
        yield from make_episodes()
        with pytest.raises(BlockingIOError, match=r"data is in use by process .* another folder"):
            writer.write(tmp_path / "data", make_episodes(), fps=10)

    writer.write(tmp_path / "data", episodes(), fps=10)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_full_disk_is_not_kept_full(tmp_path):
    def episodes():
        yield from make_episodes()
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"could not be written .* free space and record again"):
        writer.write(tmp_path / "data", episodes(), fps=10)
    assert list(tmp_path.iterdir()) == []


def test_the_writer_refuses_invalid_data(tmp_path):
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
from vla_jax.data.readers.lerobot import writer
from vla_jax.data.dataset import Episode

def episodes():
    rng = np.random.default_rng(0)
    while True:
        images = rng.integers(0, 256, (20, 64, 64, 3), np.uint8)
        yield Episode({"image_primary": images}, np.ones((20, 2)), "go")

resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    writer.write(sys.argv[1], episodes(), fps=10, overwrite=True)
except OSError as error:
    print(error)
"""


def test_a_full_disk_raises_one_sentence_and_the_old_data_set_is_kept(root):
    command = [sys.executable, "-c", FULL_DISK, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "could not be written" in done.stdout
    assert "an earlier one is unchanged; free space" in done.stdout
    assert episode_instructions(read(root)) == TASKS


def test_an_error_of_the_recorder_is_not_reported_as_a_full_disk(tmp_path):
    def recorder():
        yield next(make_episodes())
        raise ConnectionResetError("the robot went away")

    with pytest.raises(ConnectionResetError, match="the robot went away"):
        writer.write(tmp_path / "data", recorder(), fps=10)
