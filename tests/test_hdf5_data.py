"""HDF5 layouts in the variants that the original tools write, and in damaged ones."""

import functools
import json
import multiprocessing
import os
import pathlib
import pickle
import subprocess
import sys

import h5py
import numpy as np
import pytest
import tiny_hdf5
from PIL import Image
from tiny_hdf5 import demo, write_demos

from vla_jax.data import readers
from vla_jax.data.readers.hdf5 import demo_groups, hdf5_files
from vla_jax.data.readers.hdf5.libero import instruction_from_name
from vla_jax.data.readers.reader import READERS


def fields(source):
    return READERS[source.kind].fields(source)


def names(source):
    return [episode.name for episode in source.episodes]


@pytest.fixture
def robomimic(tmp_path):
    """A set with ten and more demos, one of a single step."""
    demos = {f"demo_{i}": demo(1 + i % 3, seed=i) for i in range(12)}
    masks = {"train": ["demo_10", "demo_2", "demo_1"], "valid": ["demo_11"]}
    path = tmp_path / "image.hdf5"
    return write_demos(path, demos, attributes=tiny_hdf5.ENV_ARGS, masks=masks), demos


def test_demos_are_sorted_by_number(robomimic):
    path, demos = robomimic
    source = readers.open(path)
    assert names(source) == [f"demo_{i}" for i in range(12)]
    assert source.lengths.tolist() == [1 + i % 3 for i in range(12)]
    for episode in source.episodes:
        np.testing.assert_array_equal(episode.columns["actions"], demos[episode.name]["actions"])
        image = demos[episode.name]["obs"]["agentview_image"]
        np.testing.assert_array_equal(episode.images["obs/agentview_image"][:], image)


def test_opening_looks_into_no_more_than_one_demo(robomimic, monkeypatch):
    path, _ = robomimic
    looked, original = [], demo_groups._num_samples
    monkeypatch.setattr(
        demo_groups, "_num_samples", lambda data, name: looked.append(name) or original(data, name)
    )
    source = readers.open(path)
    assert set(looked) == {b"demo_0"}
    assert source.lengths[4] == 2
    assert set(looked) == {b"demo_0", b"demo_4"}
    assert pickle.loads(pickle.dumps(source)).lengths.tolist() == [1 + i % 3 for i in range(12)]


def test_a_split_is_a_filter_key_sorted_by_number(robomimic):
    path, _ = robomimic
    assert names(readers.open(path, split="train")) == ["demo_1", "demo_2", "demo_10"]
    assert names(readers.open(path, split="valid")) == ["demo_11"]
    with pytest.raises(ValueError, match=r"'train', 'valid'.*got 'test'"):
        readers.open(path, split="test")


def test_several_files_are_numbered(tmp_path):
    for name in ("b", "a"):
        write_demos(tmp_path / f"{name}.hdf5", {"demo_3": demo(2), "demo_1": demo(3)})
    source = readers.open(tmp_path)
    assert names(source) == ["0/demo_1", "0/demo_3", "1/demo_1", "1/demo_3"]
    (tmp_path / "b.hdf5").unlink()
    assert names(readers.open(tmp_path)) == ["demo_1", "demo_3"]


def test_two_arms_without_num_samples_and_compressed(tmp_path):
    demos = {"demo_0": demo(4, arms=2, cameras=("a_image", "b_image", "robot1_eye_in_hand_image"))}
    write_demos(tmp_path / "x.h5", demos, samples=False, compression="gzip", chunks=True)
    source = readers.open(tmp_path)
    column = source.episodes[0].columns["actions"]
    assert column.dtype == np.float64
    np.testing.assert_array_equal(column, demos["demo_0"]["actions"])
    found = fields(source)
    assert found.grippers == (6, 13)
    assert found.cameras == {
        "image_primary": "obs/a_image",
        "image_wrist": "obs/robot1_eye_in_hand_image",
        "image_b": "obs/b_image",
    }
    assert "obs/robot1_eef_pos" in found.columns["proprio"]
    np.testing.assert_array_equal(
        source.episodes[0].images["obs/a_image"][[0, 2, 3]],
        demos["demo_0"]["obs"]["a_image"][[0, 2, 3]],
    )


def test_texts_bools_and_types_are_kept(tmp_path):
    tree = demo(2)
    tree["note"] = np.array(["é", "漢字"], h5py.string_dtype())
    tree["big"] = np.arange(2, dtype=">i4")
    tree["compound"] = np.zeros(2, [("a", "f4")])
    write_demos(tmp_path / "x.hdf5", {"demo_0": tree})
    columns = readers.open(tmp_path).episodes[0].columns
    assert columns["note"].tolist() == ["é", "漢字"]
    assert columns["note"].dtype.kind == "U"
    assert columns["dones"].dtype == bool
    assert columns["big"].tolist() == [0, 1]
    assert "compound" not in columns


def test_a_key_that_one_episode_lacks_is_explained(tmp_path):
    short = demo(2)
    del short["dones"]
    more = {**demo(3), "extra": np.zeros((3, 1))}
    write_demos(tmp_path / "x.hdf5", {"demo_0": demo(2), "demo_1": short, "demo_2": more})
    source = readers.open(tmp_path)
    assert "dones" not in source.episodes[1].columns
    with pytest.raises(ValueError, match=r"data/demo_1 must hold 'dones' as the first"):
        source.episodes[1].columns["dones"]
    with pytest.raises(KeyError):
        source.episodes[1].columns["nothing"]
    assert source.episodes[2].columns["extra"].shape == (3, 1)


def test_a_bad_episode_is_an_error_when_it_is_read(tmp_path):
    bad = demo(3)
    bad["obs"]["robot0_eef_pos"] = bad["obs"]["robot0_eef_pos"][:2]
    empty = {"obs": demo(2)["obs"], "actions": np.zeros((0, 7))}
    write_demos(tmp_path / "x.hdf5", {"demo_0": empty, "demo_1": bad, "demo_2": demo(2)})
    with h5py.File(tmp_path / "x.hdf5", "a") as file:
        file["data/demo_3/obs/a"] = [1]
        file["data"].copy("demo_2", "demo_4")
        file["data/demo_4"].attrs["num_samples"] = 1
        wrong_samples = np.arange(4096), np.zeros(1, "i4,f4"), "2"
        for name, wrong in zip(("demo_5", "demo_6", "demo_7"), wrong_samples, strict=True):
            file["data"].copy("demo_2", name)
            file[f"data/{name}"].attrs["num_samples"] = wrong
    source = readers.open(tmp_path)
    assert len(source.episodes[2].columns["actions"]) == 2
    for index, message in (
        (0, "at least one step, got none"),
        (1, "robot0_eef_pos must have 3 rows, one per action, got 2"),
        (3, "must hold /data/demo_3/actions, got 'obs'"),
        (4, "must have 1 rows"),
        (5, "num_samples of /data/demo_5 must be the number of its actions, expected 2"),
        (6, "num_samples of /data/demo_6 must be one text or number"),
        (7, "num_samples of /data/demo_7 must be the number of its actions, expected 2"),
    ):
        with pytest.raises(ValueError, match=message):
            source.episodes[index]


def test_libero_files_without_attributes(tmp_path):
    for stem in ("KITCHEN_SCENE10_close_the_top_drawer_demo", "pick_up_the_cup_demo"):
        demos = {"demo_0": tiny_hdf5.libero_demo(2), "demo_7": tiny_hdf5.libero_demo(3)}
        write_demos(tmp_path / f"{stem}.hdf5", demos, samples=False)
    source = readers.open(tmp_path)
    assert source.kind == "libero"
    assert names(source) == ["0/demo_0", "0/demo_7", "1/demo_0", "1/demo_7"]
    texts = [episode.instructions[-1] for episode in source.episodes[::2]]
    assert texts == ["close the top drawer", "pick up the cup"]
    assert source.fps == 20
    found = fields(source)
    assert found.rotate_images
    assert found.gripper_range == (1.0, -1.0)
    assert names(readers.open(tmp_path / "pick_up_the_cup_demo.hdf5")) == ["demo_0", "demo_7"]


@pytest.mark.parametrize(
    ("stem", "text"),
    [
        ("LIVING_ROOM_SCENE2_put_both_soups_in_the_basket_demo", "put both soups in the basket"),
        ("STUDY_SCENE1_pick_up_the_book", "pick up the book"),
        ("put_the_wine_bottle_on_the_rack_demo", "put the wine bottle on the rack"),
    ],
)
def test_the_instruction_in_a_file_name(stem, text):
    assert instruction_from_name(stem) == text


def test_libero_instruction_comes_from_the_attribute(tmp_path):
    problem = {"problem_info": json.dumps({"language_instruction": "größer"})}
    path = write_demos(
        tmp_path / "a_demo.hdf5", {"demo_0": tiny_hdf5.libero_demo(2)}, attributes=problem
    )
    assert readers.open(tmp_path).episodes[0].instructions == ("größer",) * 2
    with h5py.File(path, "a") as file:
        file["data"].attrs["problem_info"] = "{'language"
    with pytest.raises(ValueError, match="problem_info of /data must be JSON"):
        readers.open(tmp_path)


def test_isaac_lab_keys_are_nested(tmp_path):
    arguments = {"type": 2, "sim_args": {"dt": 0.01, "decimation": 5}}
    tree = tiny_hdf5.isaac_demo(4)
    write_demos(
        tmp_path / "dataset.hdf5", {"demo_0": tree},
        attributes={"env_args": json.dumps(arguments)}, compression="gzip",
    )  # fmt: skip
    source = readers.open(tmp_path)
    assert (source.kind, source.fps) == ("isaac_lab", 20.0)
    episode = source.episodes[0]
    assert not [key for key in episode.columns if key.startswith("initial_state")]
    np.testing.assert_array_equal(
        episode.columns["states/articulation/robot/root_pose"],
        tree["states"]["articulation"]["robot"]["root_pose"],
    )
    found = fields(source)
    assert found.cameras["image_primary"] == "obs/policy/table_cam"
    assert found.cameras["image_wrist"] == "obs/wrist_cam"
    assert found.columns["proprio"][0] == "obs/policy/eef_pos"


@pytest.mark.parametrize("form", ["raw", "padded", "ragged"])
def test_aloha_episodes(form, tmp_path):
    for number in (0, 2, 10):
        tiny_hdf5.write_aloha(tmp_path / f"episode_{number}.hdf5", 3, form=form, seed=number)
    source = pickle.loads(pickle.dumps(readers.open(tmp_path)))
    assert source.kind == "aloha"
    assert names(source) == ["episode_0", "episode_2", "episode_10"]
    assert source.columns["action"] == ("float64", (14,), ())
    assert "compress_len" not in source.columns
    images = source.episodes[1].images["observations/images/cam_high"]
    drawn = tiny_hdf5.draw(3, 16, 24, 2)
    assert images.shape == drawn.shape
    difference = np.abs(images[[2, 0]].astype(int) - drawn[[2, 0]]).mean()
    assert difference < (1e-9 if form == "raw" else 3)
    found = fields(source)
    assert found.grippers == (6, 13)
    assert list(found.cameras) == ["image_primary", "image_wrist", "image_cam_right_wrist"]


@pytest.mark.parametrize("form", ["padded", "ragged"])
def test_a_damaged_picture_is_explained(form, tmp_path):
    path = tmp_path / "episode_0.hdf5"
    tiny_hdf5.write_aloha(path, 3, form=form)
    with h5py.File(path, "r+") as file:
        dataset = file["observations/images/cam_high"]
        dataset[1] = np.zeros(8 if form == "ragged" else dataset.shape[1], np.uint8)
    images = readers.open(tmp_path).episodes[0].images["observations/images/cam_high"]
    assert images[[0, 2]].shape == (2, 16, 24, 3)
    with pytest.raises(ValueError, match="at step 1 cannot be read"):
        images[:]


def test_robomme_steps_are_groups(tmp_path):
    tiny_hdf5.write_robomme(tmp_path / "record_dataset_BinFill.h5", (12, 3))
    source = readers.open(tmp_path)
    assert (source.kind, source.lengths.tolist()) == ("robomme", [12, 3])
    assert names(source) == ["episode_0", "episode_1"]
    first, second = source.episodes
    assert first.instructions == ("goal 0 é",) * 12
    assert first.columns["action_mask"].tolist() == [False] * 2 + [True] * 10
    actions = first.columns["action/joint_action"]
    assert np.isnan(actions[:2]).all()
    assert actions[2:, 0].tolist() == list(range(2, 12))  # timestep_10 follows timestep_9
    assert second.columns["action_mask"].all()
    assert first.columns["info/simple_subgoal"][3] == "step 3 ü"
    assert first.columns["obs/front_depth"].shape == (12, 4, 4, 1)
    np.testing.assert_array_equal(first.images["obs/front_rgb"][4:9], tiny_hdf5.draw(12)[4:9])
    assert fields(source).columns["action_mask"] == ("action_mask",)


def test_robomme_files_with_a_group_per_task(tmp_path):
    tiny_hdf5.write_robomme(tmp_path / "a.h5", task="BinFill")
    tiny_hdf5.write_robomme(tmp_path / "b.h5")
    found = names(readers.open(tmp_path))
    assert found == ["0/BinFill/episode_0", "0/BinFill/episode_1", "1/episode_0", "1/episode_1"]


def test_links_lead_no_further_than_the_folder(tmp_path):
    secret = write_demos(tmp_path / "secret.hdf5", {"demo_0": demo(2)})
    folder = tmp_path / "set"
    folder.mkdir()
    inner = write_demos(folder / "z.hdf5", {"demo_0": demo(2)})
    with h5py.File(folder / "a.hdf5", "w") as file:
        file["data/demo_0"] = h5py.ExternalLink("z.hdf5", "/data/demo_0")
        file["data/demo_1"] = h5py.ExternalLink(str(secret), "/data/demo_0")
        file["away"] = h5py.ExternalLink(str(secret), "/data")
        file["data/demo_2"] = h5py.SoftLink("/away/demo_0")
        file["data/demo_3"] = h5py.SoftLink("/data/demo_0")
        file["data/demo_4/actions"] = np.zeros((2, 7))
        file["data/demo_4/obs/up"] = h5py.SoftLink("/data/demo_4")
        layout = h5py.VirtualLayout((2, 7), "f8")
        layout[:] = h5py.VirtualSource(str(secret), "data/demo_0/actions", (2, 7))
        file["data"].create_group("demo_5").create_virtual_dataset("actions", layout)
        raw = [(str(secret), 0, h5py.h5f.UNLIMITED)]
        file["data"].create_group("demo_6").create_dataset("actions", (2, 7), "u1", external=raw)
    source = readers.open(folder / "a.hdf5", kind="robomimic")
    actions = source.episodes[0].columns["actions"]
    with h5py.File(inner) as file:
        np.testing.assert_array_equal(actions, file["data/demo_0/actions"])
    np.testing.assert_array_equal(source.episodes[3].columns["actions"], actions)
    for index, message in ((1, "outside the folder"), (2, "outside the folder"), (4, "nested")):
        with pytest.raises(ValueError, match=message):
            source.episodes[index]
    for index in (5, 6):
        with pytest.raises(ValueError, match="outside the folder"):
            source.episodes[index].columns["actions"]


def test_declared_sizes_are_not_believed(tmp_path):
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        group = file.create_group("data/demo_0")
        group.create_dataset("actions", (10**9, 7), "f8", chunks=(1000, 7))
        group.attrs["num_samples"] = 10**9
        file["data"].copy("demo_0", "demo_1")
        file["data/demo_1/actions"][:1000] = 0
        file["data"].create_group("demo_2")["actions"] = np.zeros((2, 7))
    source = readers.open(tmp_path)
    for index, message in ((0, "no data were written"), (1, "as large as its data on disk")):
        with pytest.raises(ValueError, match=message):
            source.episodes[index]


@pytest.mark.parametrize("cut", [0, 7, 100, 3000])
def test_a_cut_file_is_explained(cut, tmp_path, robomimic):
    path, _ = robomimic
    short = tmp_path / "short.hdf5"
    short.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"short\.hdf5: its header cannot be read"):
        readers.open(short)


def test_unknown_files_are_explained(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["something"] = 1
    with pytest.raises(ValueError, match="must hold /data, got 'something'"):
        readers.open(tmp_path)
    write_demos(tmp_path / "x.h5", {"demo_0": demo(2), "take_2": demo(2)})
    with pytest.raises(ValueError, match=r"must be named demo_<number>, got 'take_2'"):
        readers.open(tmp_path)


def test_few_files_are_open_at_once(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(hdf5_files, "MAX_OPEN_FILES", 3)
    original = hdf5_files.open_file
    monkeypatch.setattr(hdf5_files, "open_file", lambda p: opened.append(original(p)) or opened[-1])
    for number in range(8):
        tiny_hdf5.write_aloha(tmp_path / f"episode_{number}.hdf5", 2)
    source = readers.open(tmp_path)
    for episode in [*source.episodes, *source.episodes]:
        episode.columns["action"]
    assert len(opened) > 8
    assert sum(bool(file) for file in opened) <= 3


def _sum(source, index):
    return float(source.episodes[index].columns["actions"].sum())


def test_another_process_opens_the_file_itself(robomimic):
    path, demos = robomimic
    source = readers.open(path)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.map(functools.partial(_sum, source), [3, 10])
    assert found == [float(demos[f"demo_{i}"]["actions"].sum()) for i in (3, 10)]


def test_without_h5py_the_extra_is_named(robomimic, monkeypatch):
    path, _ = robomimic
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"vla-jax\[data\]"):
        readers.open(path)


def test_a_huge_image_is_refused(tmp_path):
    tiny_hdf5.write_aloha(tmp_path / "episode_0.hdf5", 2, form="padded")
    image = tiny_hdf5.jpeg(np.asarray(Image.new("RGB", (9000, 8000))))
    with h5py.File(tmp_path / "episode_0.hdf5", "a") as file:
        del file["observations/images/cam_high"]
        file["observations/images/cam_high"] = np.stack([image, image])
    with pytest.raises(ValueError, match="too many"):
        readers.open(tmp_path)


def test_random_damage_is_explained():
    """A short version of the campaign; in a process of its own, as it forks."""
    folder = pathlib.Path(__file__).parent
    command = [sys.executable, "campaigns/mutations_hdf5.py", "--count", "5", "--every", "120"]
    paths = os.pathsep.join([str(folder.parent), str(folder)])
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines()[2:] if line.startswith("|")]
    assert sum(int(row[3]) for row in rows) > 50
    assert not [row for row in rows if (int(row[7]), int(row[8])) != (0, 0)], done.stdout
