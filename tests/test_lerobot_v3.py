"""Reader of LeRobot v3.0 data sets."""

import json
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_lerobot import (
    CAMERAS,
    NAMES,
    TASKS,
    change_info,
    change_table,
    data_path,
    make_episodes,
    read,
)

from vla_jax.data import normalize
from vla_jax.data.dataset import episode_instructions
from vla_jax.data.readers.lerobot import writer


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("written") / "data"
    return writer.write(root, make_episodes(), fps=10, names=NAMES, robot_type="table")


@pytest.fixture
def root(written, tmp_path):
    """A copy that a test may modify."""
    return shutil.copytree(written, tmp_path / "data", ignore=shutil.ignore_patterns(".frames"))


def test_numbers_are_read_exactly_and_images_within_40_db(written):
    data = read(written)
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
    assert episode_instructions(data) == TASKS
    assert data.fps == 10
    assert data.names["action"] == ("dx", "gripper")
    assert "environment_state" not in data.names


def test_norm_stats_read_no_video(root):
    shutil.rmtree(root / "videos")
    data = read(root, cameras=())
    assert data.frames == {}
    expected = np.concatenate([episode.action for episode in make_episodes()])
    stats = normalize.compute_norm_stats(data)["action"]
    np.testing.assert_allclose(stats.q99, np.quantile(expected, 0.99, axis=0), rtol=1e-6)


def test_only_requested_fields_are_read(written):
    data = read(written, cameras=("image_wrist",), columns=("proprio",))
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
    data = read(root, feature_keys=(("image_wrist", new),))
    assert set(data.frames) == {"image_primary", "image_wrist"}
    message = (
        "image_wrist must be read from a camera of .*'observation.images.hnd'; .*'.*images.hand'"
    )
    with pytest.raises(ValueError, match=message):
        read(root, feature_keys=(("image_wrist", "observation.images.hnd"),))


def test_the_fingerprint_depends_on_the_content_and_not_on_the_folder(written, root):
    before = read(written).fingerprint
    assert read(root).fingerprint == before
    change_table(
        data_path(root), "observation.environment_state", lambda c: pa.array(c.to_numpy() + 1)
    )
    assert read(root).fingerprint != before


def test_a_missing_folder_or_info_is_refused(root):
    with pytest.raises(FileNotFoundError, match=r"data set .*elsewhere is missing; record it"):
        read(root.with_name("elsewhere"))
    (root / "meta/info.json").unlink()
    with pytest.raises(ValueError, match=r"no reader recognises the data set"):
        read(root)
    with pytest.raises(FileNotFoundError, match=r"meta/info\.json"):
        read(root, kind="lerobot_v3")


@pytest.mark.parametrize("version", [None, "v4.0"])
def test_another_version_is_refused(root, version):
    change_info(root, codebase_version=version)
    with pytest.raises(ValueError, match=r"codebase_version .* must be one of v2\.0, v2\.1, v3\.0"):
        read(root)


def test_damaged_or_incomplete_info_is_refused(root):
    path = root / "meta/info.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match=r"info\.json must be JSON"):
        read(root)
    path.write_text(json.dumps({"codebase_version": "v3.0", "fps": 10}))
    with pytest.raises(ValueError, match=r"features in .*info\.json must be an object"):
        read(root)


PARQUET = [
    "data/chunk-000/file-000.parquet",
    "meta/tasks.parquet",
    "meta/episodes/chunk-000/file-000.parquet",
]


@pytest.mark.parametrize("name", PARQUET)
def test_a_missing_parquet_file_is_named(root, name):
    (root / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"\.parquet"):
        read(root)


@pytest.mark.parametrize("name", PARQUET)
@pytest.mark.parametrize("kept", [0.0, 0.6])
def test_a_truncated_parquet_file_is_named(root, name, kept):
    path = root / name
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(ValueError, match=f"{name} cannot be read, it is damaged or cut short"):
        read(root)


def test_a_missing_column_is_named(root):
    path = data_path(root)
    pq.write_table(pq.read_table(path).drop_columns("timestamp"), path)
    with pytest.raises(ValueError, match=r"must have the column 'timestamp'"):
        read(root)


def test_a_missing_or_truncated_video_is_named(root):
    path = root / "videos/observation.images.wrist/chunk-000/file-000.mp4"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"images\.wrist/.*mp4 cannot be decoded"):
        read(root)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"images\.wrist/.*mp4 is missing"):
        read(root)


def test_a_video_shorter_than_its_episodes_is_named_with_both_counts(root):
    other = root / "videos/observation.images.primary/chunk-000/file-000.mp4"
    short = writer.write(root.with_name("short"), list(make_episodes())[:2], fps=10)
    shutil.copy(short / other.relative_to(root), other)
    with pytest.raises(
        ValueError, match=r"images\.primary/.*mp4 must hold a frame at 1 s .* got 10 frames"
    ):
        read(root)


def test_a_wrong_rate_is_refused(root):
    with pytest.raises(ValueError, match=r"fps of .* must be 30 Hz \(expected_fps\), got 10 Hz"):
        read(root, expected_fps=30)
    change_info(root, fps=30)
    with pytest.raises(ValueError, match=r"must fit its timestamps, got 30 Hz but steps of 0\.1 s"):
        read(root)


def test_contradictory_counts_are_refused(root):
    change_info(root, total_frames=23)
    with pytest.raises(ValueError, match=r"3 episodes with 23 frames .* got 3 with 22"):
        read(root)
    change_info(root, total_frames=22)
    pq.write_table(pq.read_table(data_path(root)).slice(0, 20), data_path(root))
    with pytest.raises(ValueError, match=r"rows of episode 2 .* must be 12 .* got '10 of 20 rows'"):
        read(root)


def test_a_missing_dimension_of_the_action_is_refused(root):
    change_table(
        data_path(root),
        "action",
        lambda c: pa.array([row[:1] for row in c.to_pylist()], pa.list_(pa.float32())),
    )
    with pytest.raises(
        ValueError, match=r"column 'action' .* must hold values of shape \(2,\) .* got \(1,\)"
    ):
        read(root)


def test_nan_is_refused_or_skipped(root):
    def spoil(column):
        rows = column.to_pylist()
        rows[8] = [float("nan"), 1.0]
        return pa.array(rows, column.type)

    change_table(data_path(root), "action", spoil)
    with pytest.raises(ValueError, match=r"got NaN in number 0 of action at step 1 of episode 1"):
        read(root)
    with pytest.warns(UserWarning, match=r"left out 1 of 3 episodes"):
        data = read(root, skip_bad_episodes=True)
    assert data.episode_ends.tolist() == [7, 19]
    assert episode_instructions(data) == (TASKS[0], TASKS[2])
    episodes = list(make_episodes())
    expected = np.concatenate([episodes[e].observation["image_wrist"] for e in (0, 2)])
    assert np.abs(data.frames["image_wrist"].astype(int) - expected).mean() < 3


def test_an_empty_task_is_refused(root):
    change_table(root / "meta/tasks.parquet", "task_index", lambda _: pa.array([0, 7]))
    with pytest.raises(
        ValueError, match=r"task_index .* must be one of the 2 tasks in meta/, got 1"
    ):
        read(root)
    table = pq.read_table(root / "meta/tasks.parquet").drop_columns("task")
    pq.write_table(table, root / "meta/tasks.parquet")
    with pytest.raises(ValueError, match="must have the column task_index and one of texts"):
        read(root)


def test_unknown_fields_and_keys_are_refused_with_the_most_similar_one(root):
    with pytest.raises(ValueError, match=r"needs the camera image_top, .*--cameras top=KEY"):
        read(root, cameras=("image_top",))
    with pytest.raises(
        ValueError, match=r"from a camera .* got 'observation\.image\.top'; .*Did you"
    ):
        read(
            root,
            cameras=("image_primary",),
            feature_keys=(("image_primary", "observation.image.top"),),
        )
    with pytest.raises(ValueError, match=r"from a camera .* got 'observation\.state'"):
        read(root, feature_keys=(("image_primary", "observation.state"),))
    with pytest.raises(
        ValueError, match=r"column must be .* got 'observation\.images\.wrist'; choose"
    ):
        read(root, feature_keys=(("proprio", "observation.images.wrist"),))
    with pytest.raises(ValueError, match=r"\[5:\] of episode 0 of .* must select numbers, got 0"):
        read(root, feature_keys=(("action", "action[5:]"),))
    with pytest.raises(ValueError, match=r"dataset\.cameras must be NAME=KEY, .*got 'primary'"):
        read(root, config_cameras=("primary",))


def test_columns_can_be_selected_and_concatenated(root):
    keys = (
        ("proprio", "observation.state[1:]+observation.environment_state"),
        ("goal", "action[0]"),
    )
    data, whole = read(root, feature_keys=keys), read(root)
    expected = [whole.columns["proprio"][:, 1:], whole.columns["environment_state"]]
    np.testing.assert_array_equal(data.columns["proprio"], np.concatenate(expected, axis=1))
    np.testing.assert_array_equal(data.columns["goal"], whole.columns["action"][:, :1])
    data = read(root, config_cameras=("top=observation.images.wrist",))
    assert sorted(data.frames) == ["image_primary", "image_top"]
    data = read(root, config_cameras=("top=observation.images.wrist",), cameras=("image_top",))
    assert set(data.frames) == {"image_top"}


def test_rotated_images_are_upside_down(root):
    upright, rotated = read(root), read(root, rotate_images=True)
    for name, images in upright.frames.items():
        np.testing.assert_array_equal(rotated.frames[name], images[:, ::-1, ::-1])
    assert rotated.fingerprint != upright.fingerprint


@pytest.mark.parametrize("package", ["pyarrow", "av"])
def test_a_missing_package_is_named_with_its_extra(package, root, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=r"reading .* needs .*pip install 'vla-jax\[data\]'"):
            read(root)
        with pytest.raises(ImportError, match=r"writing .* needs .*pip install 'vla-jax\[data\]'"):
            writer.write(tmp_path / "new", make_episodes(), fps=10)
    assert not (tmp_path / "new").exists()


def test_a_data_set_written_by_lerobot_is_read(golden, tmp_path):
    """Golden files of lerobot 0.4.4: `LeRobotDataset.create`, `add_frame`, `save_episode`."""
    data = read(
        golden / "lerobot_0_4_4",
        feature_keys=(("image_primary", "observation.images.top"),),
        gripper="open_one_closed_zero",
        decoded_dir=str(tmp_path),
    )
    episodes = np.repeat([0, 1], [5, 3])
    steps = np.array([0, 1, 2, 3, 4, 0, 1, 2])
    assert data.episode_ends.tolist() == [5, 8]
    assert episode_instructions(data) == ("lift the red block", "touch the blue block")
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
