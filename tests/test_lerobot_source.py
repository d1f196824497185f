"""Raw view of LeRobot data sets: times of frames, tasks, images in Parquet, versions, scale."""

import io
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_lerobot
from PIL import Image
from tiny_lerobot import change_info, change_table, data_path

from vla_jax.data import readers
from vla_jax.data.dataset import Episode
from vla_jax.data.readers.fields import GripperRange
from vla_jax.data.readers.lerobot import lerobot_fields, parquet_files, writer
from vla_jax.data.readers.lerobot.info import dimension_names

sys.path.insert(0, str(pathlib.Path(__file__).parent / "campaigns"))
import mutations_lerobot
import open_many_episodes

DATASETS = pathlib.Path(__file__).parent / "datasets"
KEY = "observation.images.primary"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
T = 5


def numbered(first):
    """An episode whose frames have their number as grey level."""
    level = (20 + 10 * (first + np.arange(T))).astype(np.uint8)
    images = np.broadcast_to(level[:, None, None, None], (T, 32, 32, 3)).copy()
    action = np.ones((T, 2), np.float32)
    return Episode({"image_primary": images, "proprio": np.zeros((T, 1), np.float32)}, action, "x")


@pytest.fixture(scope="module")
def two_numbered(tmp_path_factory):
    root = tmp_path_factory.mktemp("numbered") / "data"
    return writer.write(root, [numbered(0), numbered(T)], fps=10)


@pytest.fixture
def root(two_numbered, tmp_path):
    """A copy of two episodes of numbered frames that a test may modify."""
    return shutil.copytree(two_numbered, tmp_path / "data")


def set_starts(root, starts, key=KEY):
    change_table(root / EPISODES, f"videos/{key}/from_timestamp", lambda _: pa.array(starts))


def frame_numbers(root, episode):
    images = readers.open(root).episodes[episode].images[KEY]
    return np.round((images[:].mean((1, 2, 3)) - 20) / 10).astype(int).tolist()


@pytest.mark.parametrize("starts", [[0.0, 0.5], [0.0, 0.0], [0.0, 0.4], [0.5, 0.0], [0.2, 0.3]])
def test_frames_belong_to_steps_by_time(root, starts):
    set_starts(root, starts)
    for episode, start in enumerate(starts):
        first = round(10 * start)
        assert frame_numbers(root, episode) == list(range(first, first + T))
    data = tiny_lerobot.read(root, cameras=("image_primary",))
    levels = np.round((data.frames["image_primary"].mean((1, 2, 3)) - 20) / 10)
    assert levels.tolist() == [round(10 * start) + step for start in starts for step in range(T)]


@pytest.mark.parametrize("start", [-1.2, 0.6, 0.55, 0.4502, 1e300])
def test_a_step_without_a_frame_is_refused(root, start):
    set_starts(root, [0.0, start])
    assert frame_numbers(root, 0) == list(range(T))
    with pytest.raises(ValueError, match=r"video .*mp4 must hold a frame at .* s \(within 0\.0001"):
        frame_numbers(root, 1)


def test_each_camera_has_its_own_times(root):
    video = root / f"videos/{KEY}/chunk-000/file-000.mp4"
    with av.open(str(video)) as file:
        images = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    with av.open(str(video), "w") as out:
        stream = out.add_stream("libx264rgb", rate=10, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = 32, 32, "rgb24"
        for image in [np.full((32, 32, 3), 250, np.uint8)] * 3 + images:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())
    set_starts(root, [0.30000001, 0.7999999])
    assert frame_numbers(root, 0) == [0, 1, 2, 3, 4]
    assert frame_numbers(root, 1) == [5, 6, 7, 8, 9]


def test_the_task_may_change_within_an_episode(root):
    tasks = pa.table({"task_index": [0, 1], "task": ["öffne ✓", "x"]})
    pq.write_table(tasks, root / "meta/tasks.parquet")
    change_table(data_path(root), "task_index", lambda _: pa.array([0, 0, 1, 1, 0] + [1] * T))
    episodes = readers.open(root).episodes
    assert episodes[0].instructions == ["öffne ✓", "öffne ✓", "x", "x", "öffne ✓"]
    assert episodes[1].instructions == ["x"] * T


def add_column(root, name, column, **feature):
    """Adds a column, and its feature to info.json."""
    table = pq.read_table(data_path(root))
    pq.write_table(table.append_column(name, column), data_path(root), row_group_size=3)
    features = json.loads((root / "meta/info.json").read_text())["features"]
    change_info(root, features={**features, name: {"names": None, **feature}})


def encoded(image, form):
    file = io.BytesIO()
    Image.fromarray(image).save(file, form)
    return file.getvalue()


@pytest.mark.parametrize("is_file", [False, True])
def test_images_in_parquet_are_read(root, is_file):
    pictures = np.random.default_rng(0).integers(0, 256, (2 * T, 6, 8, 3), np.uint8)
    rows = []
    for step, picture in enumerate(pictures):
        content = encoded(picture, "PNG")
        (root / f"{step}.png").write_bytes(content)
        rows.append(
            {"bytes": None, "path": f"{step}.png"} if is_file else {"bytes": content, "path": "a"}
        )
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    add_column(root, "camera", pa.array(rows, kind), dtype="image", shape=[6, 8, 3])
    images = readers.open(root).episodes[1].images["camera"]
    np.testing.assert_array_equal(images[:], pictures[T:])
    np.testing.assert_array_equal(images[[3, 0, 3]], pictures[[T + 3, T, T + 3]])
    change_info(root, features={**json.loads((root / "meta/info.json").read_text())["features"],
                                "camera": {"dtype": "image", "shape": [6, 9, 3]}})  # fmt: skip
    with pytest.raises(ValueError, match=r"must be 6 x 9 pixels .*, got 6 x 8"):
        readers.open(root).episodes[0].images["camera"][0]


def test_columns_have_lerobots_types(root):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2 * T, 14))
    add_column(root, "a", pa.array(values.tolist()), dtype="float64", shape=[14])
    add_column(root, "b", pa.array(np.arange(2 * T, dtype=np.uint8)), dtype="uint8", shape=[1])
    add_column(root, "c", pa.array([f"né{i}" for i in range(2 * T)]), dtype="string", shape=[1])
    add_column(root, "d", pa.array(np.arange(2 * T) % 2 == 0), dtype="bool", shape=[1])
    matrices = rng.normal(size=(2 * T, 2, 3)).astype(np.float32)
    add_column(root, "e", pa.array(matrices.tolist()), dtype="float32", shape=[2, 3])
    source = readers.open(root)
    columns = source.episodes[1].columns
    np.testing.assert_array_equal(columns["a"], values[T:].astype(np.float32))
    assert [columns[key].dtype.name for key in "abde"] == ["float32", "int64", "bool", "float32"]
    assert columns["b"].tolist() == list(range(T, 2 * T))
    assert columns["c"].tolist() == [f"né{i}" for i in range(T, 2 * T)]
    np.testing.assert_array_equal(columns["e"], matrices[T:])
    features = json.loads((root / "meta/info.json").read_text())["features"]
    change_info(root, features={key: f for key, f in features.items() if key not in "be"})
    np.testing.assert_array_equal(readers.open(root).episodes[1].columns["e"], matrices[T:])
    assert readers.open(root).columns["b"].dtype == "int64"
    assert source.columns["e"].shape == (2, 3)


def test_gaps_in_the_indices_and_rows_in_another_order_are_read(root):
    change_table(data_path(root), "action", lambda c: pa.array([[float(i), 1] for i in range(10)]))
    change_table(data_path(root), "episode_index", lambda _: pa.array([3] * T + [9] * T))
    change_table(root / EPISODES, "episode_index", lambda _: pa.array([3, 9]))
    rows = pq.read_table(data_path(root)).take([5, 1, 0, 7, 2, 4, 3, 6, 9, 8])
    pq.write_table(rows, data_path(root), row_group_size=2)
    episodes = readers.open(root).episodes
    assert [episode.name for episode in episodes] == ["3", "9"]
    assert episodes[1].columns["action"][:, 0].tolist() == [5, 6, 7, 8, 9]
    assert frame_numbers(root, 1) == [5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("frame_index", [0, 1, 1, 3, 4], "frame_index of episode 0 .* must be different .*, got 1"),
        ("timestamp", [0, 0.1, None, 0.3, 0.4], "'timestamp' .* a value in every row, got 1 null"),
        ("timestamp", [0, 0.1, float("nan"), 0.3, 0.4], "timestamp of episode 0 .* be finite"),
        ("task_index", [0, 0, 0, 0, 5], "task_index .* must be one of the 1 tasks .*, got 5"),
        ("episode_index", [0, 0, 0, 1, 0], "rows of episode 0 .* must be 5 .*, got '4 of 10"),
    ],
)
def test_contradictory_rows_are_refused(root, column, values, message):
    def change(old):
        return pa.array([*values, *old.to_pylist()[T:]], old.type)

    change_table(data_path(root), column, change)
    with pytest.raises(ValueError, match=message):
        readers.open(root).episodes[0]


def test_v2_0_and_unequal_episodes_of_v2_are_read(tmp_path):
    root = shutil.copytree(DATASETS / "lerobot_v21/dataset", tmp_path / "data")
    (root / "meta/episodes_stats.jsonl").unlink()
    change_info(root, codebase_version="v2.0", total_episodes=3, total_frames=27)
    lines = (root / "meta/episodes.jsonl").read_text().splitlines()
    (root / "meta/episodes.jsonl").write_text("\n".join([lines[3], lines[0], "", lines[1]][:2]))
    with pytest.raises(ValueError, match=r"must hold 3 episodes with 27 frames .* got 2 with 17"):
        readers.open(root)
    change_info(root, total_episodes=2, total_frames=17)
    source = readers.open(root)
    assert [episode.name for episode in source.episodes] == ["0", "3"]
    assert source.kind == "lerobot_v2"
    (root / "data/chunk-000/episode_000003.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"episode_000003\.parquet is missing"):
        readers.open(root)


def test_splits_are_positions_of_episodes(root):
    change_info(root, splits={"train": "0:1", "val": "1:2"})
    source = readers.open(root, split="val")
    assert [episode.name for episode in source.episodes] == ["1"]
    assert source.fingerprint != readers.open(root).fingerprint
    with pytest.raises(ValueError, match=r"split must be one of \['train', 'val'\]"):
        readers.open(root, split="test")


def test_numbers_are_read_without_videos_but_not_with_some_missing(root):
    shutil.copy(
        root / f"videos/{KEY}/chunk-000/file-000.mp4", root / f"videos/{KEY}/chunk-000/file-001.mp4"
    )
    change_table(root / EPISODES, f"videos/{KEY}/file_index", lambda _: pa.array([0, 1]))
    readers.open(root)
    (root / f"videos/{KEY}/chunk-000/file-001.mp4").unlink()
    with pytest.raises(FileNotFoundError, match=r"file-001\.mp4 is missing, one of 1"):
        readers.open(root)
    shutil.rmtree(root / "videos")
    episode = readers.open(root).episodes[0]
    assert episode.columns["action"].shape == (T, 2)
    with pytest.raises(FileNotFoundError, match=r"file-000\.mp4 is missing"):
        episode.images[KEY][0]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "b"], ("a", "b")),
        ({"b": 1, "a": 0}, ("a", "b")),
        ({"motors": ["a", "b"]}, ("a", "b")),
        ({"left": {"a": 0}, "right": ["b"]}, ("a", "b")),
        ([["a", "b"]], ("a", "b")),
        (None, ()),
        (5, ()),
        ([1, 2], ()),
    ],
)
def test_names_of_dimensions_are_read_in_all_forms(names, expected):
    assert dimension_names(names) == expected


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["high", "left_wrist"], {"image_primary": "high", "image_wrist": "left_wrist"}),
        (["hand_eye", "side"], {"image_primary": "side", "image_wrist": "hand_eye"}),
        (["side", "top"], {"image_primary": "top", "image_side": "side"}),
        (["depth", "a", "b"], {"image_a": "a", "image_b": "b", "image_depth": "depth"}),
        (["depth", "a"], {"image_primary": "a", "image_depth": "depth"}),
        (["laptop", "phone"], {"image_laptop": "laptop", "image_phone": "phone"}),
        (["laptop", "cam_top_2"], {"image_primary": "cam_top_2", "image_laptop": "laptop"}),
        (["hand_r", "hand_l"], {"image_wrist": "hand_r", "image_hand_l": "hand_l"}),
    ],
)  # fmt: skip
def test_cameras_are_named_by_a_rule(keys, expected):
    prefix = "observation.images."
    found = lerobot_fields.name_cameras({prefix + key: "" for key in keys})
    assert found == {field: prefix + key for field, key in expected.items()}


@pytest.mark.parametrize(
    ("robot_type", "size", "names", "grippers", "expected"),
    [
        ("so101_follower", 6, None, (5,), GripperRange(0, 100)),
        ("aloha", 14, None, (6, 13), GripperRange(0, 1)),
        ("bi_so100_follower", 12, None, (5, 11), GripperRange(0, 100)),
        ("calvin", 7, None, (6,), GripperRange(-1, 1)),
        ("panda", 7, None, (6,), GripperRange(1, -1)),
        ("pusht", 2, None, (), GripperRange(-1, 1)),
        ("unknown", 4, None, None, GripperRange(-1, 1)),
        ("so100", 5, None, None, GripperRange(0, 100)),
        ("table_mujoco", 7, None, (6,), GripperRange(-1, 1)),
        ("unknown", 3, ["x", "gripper", "y"], (1,), GripperRange(-1, 1)),
        ("unknown", 2, ["x", "y"], (), GripperRange(-1, 1)),
    ],
)
def test_grippers_come_from_names_or_the_robot(root, robot_type, size, names, grippers, expected):
    change_table(data_path(root), "action", lambda c: pa.array([[0.0] * size] * len(c)))
    features = json.loads((root / "meta/info.json").read_text())["features"]
    features["action"] |= {"shape": [size], "names": names}
    change_info(root, robot_type=robot_type, features=features)
    fields = lerobot_fields.suggest_fields(readers.open(root))
    assert fields.grippers == grippers
    assert fields.gripper_range == expected


def test_an_action_without_declared_grippers_is_refused(root):
    change_table(data_path(root), "action", lambda c: pa.array([[50.0] * 6] * len(c)))
    features = json.loads((root / "meta/info.json").read_text())["features"]
    features["action"] |= {"shape": [6], "names": None}
    change_info(root, robot_type="my_arm", features=features)
    with pytest.raises(ValueError, match=r"which of the 6 numbers .*--dataset\.grippers INDEX"):
        tiny_lerobot.read(root)
    for options, grippers, action in (
        ({"grippers": ()}, (), [50.0] * 6 + [0]),
        ({"grippers": (2,), "gripper_range": (0.0, 100.0)}, (2,), [50.0] * 5 + [0]),
        ({"robot": "so100"}, (5,), [50.0] * 5 + [0]),
        ({"robot": "so100", "grippers": (0,)}, (0,), [50.0] * 5 + [0]),
    ):
        data = tiny_lerobot.read(root, **options)
        assert data.action_layout.grippers == grippers
        np.testing.assert_array_equal(data.columns["action"][0], action)
    with pytest.raises(ValueError, match="which of the 6 numbers"):
        tiny_lerobot.read(root, robot="calvin")
    with pytest.raises(ValueError, match=r"dataset\.robot is 'so10'; .*Did you mean 'so10"):
        tiny_lerobot.read(root, robot="so10")


def test_a_recording_names_its_gripper(root):
    assert readers.open(root).columns["action"].names[-1] == "gripper"
    assert tiny_lerobot.read(root).action_layout.grippers == (1,)


def test_modality_json_names_parts_and_cameras(tmp_path):
    root = mutations_lerobot.make_v3(tmp_path / "data")
    fields = lerobot_fields.suggest_fields(readers.open(root))
    assert fields.cameras["image_primary"] == KEY
    assert fields.columns["proprio"] == ("observation.state[0:2]", "observation.state[2:3]")
    assert fields.columns["action"] == ("action[0:1]", "action[1:2]")
    assert fields.grippers == (1,)
    modality = {**mutations_lerobot.MODALITY, "action": {"arm": {"start": 0, "end": 3}}}
    (root / "meta/modality.json").write_text(json.dumps(modality))
    with pytest.raises(ValueError, match=r"action\['arm'\] .* must be start < end <= 2"):
        lerobot_fields.suggest_fields(readers.open(root))


def test_blocks_that_are_kept_have_a_bound_in_bytes(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    columns = {key: np.arange(4000.0) for key in "abc"}
    pq.write_table(pa.table(columns), path, row_group_size=1000)
    for limit in (0, 8000, 20_000):  # a block of one row group has 8000 bytes
        monkeypatch.setattr(parquet_files, "HELD_BYTES", limit)
        rows = parquet_files.ParquetRows()
        for start in (0, 1500, 40):
            for key in "abc":
                values = rows.read(path, key, np.arange(start, start + 5))
                assert values.to_pylist() == [*range(start, start + 5)]
                assert sum(block.values.nbytes for block in rows._held().values()) <= limit
        assert len(rows._held()) == limit // 8000


def test_many_episodes_are_opened_in_columns(tmp_path):
    open_many_episodes.build_v3(tmp_path / "v3", 3000)
    source = readers.open(tmp_path / "v3", kind="lerobot_v3")
    assert len(pickle.dumps(source)) < 3000 * 8 * 20  # numbers of 8 bytes per episode
    for index in (0, 999, 1000, 2999):
        assert source.episodes[index].columns["episode_index"].tolist() == [index] * 20
    assert source.blocks.ends.tolist() == [1000, 2000, 3000]
    block = source.blocks.read(1000, 2000, ["action"])
    episodes = source.episodes[1000:2000:331]
    for number, episode in zip(range(0, 1000, 331), episodes, strict=True):
        rows = slice(20 * number, 20 * number + 20)
        np.testing.assert_array_equal(block.columns["action"][rows], episode.columns["action"])
        np.testing.assert_array_equal(block.timestamps[rows], episode.timestamps)
        assert [block.texts[each] for each in block.text_index[rows]] == episode.instructions
    open_many_episodes.build_v2(tmp_path / "v2", 1500)
    assert len(readers.open(tmp_path / "v2", kind="lerobot_v2").episodes) == 1500


SHORT_CAMPAIGN = """
import collections, json, pathlib, sys
sys.path.insert(0, sys.argv[2])
import mutations_lerobot
folder = pathlib.Path(sys.argv[1])
v3, v2 = mutations_lerobot.make_v3(folder / "v3"), mutations_lerobot.make_v2(folder / "v2")
jobs = list(mutations_lerobot.all_mutations(v3, v2, flips=4))
answers = mutations_lerobot.run(jobs[::97], folder)
counts = collections.Counter(each.outcome for each in answers)
print(json.dumps({"jobs": len(jobs), **counts}))
"""


def test_damaged_sets_are_answered_with_one_sentence(tmp_path):
    """A short version of the campaign; in a process of its own, as it forks."""
    folder = pathlib.Path(__file__).parent
    paths = os.pathsep.join([str(folder.parent), str(folder)])
    done = subprocess.run(
        [sys.executable, "-c", SHORT_CAMPAIGN, str(tmp_path), str(folder / "campaigns")],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts.pop("jobs") > 5000
    assert "traceback" not in counts
    assert counts["sentence"] > sum(counts.values()) / 2
