"""CALVIN's variants and damages; equality with the original is in `test_raw_datasets`."""

import concurrent.futures
import os
import pathlib
import pickle
import struct

import numpy as np
import pytest
import tiny_calvin
from tiny_calvin import frame, write_part

from vla_jax.data import readers
from vla_jax.data.readers.calvin import pickled_data
from vla_jax.data.readers.reader import READERS


def names(source):
    return [episode.name for episode in source.episodes]


@pytest.fixture
def folder(tmp_path):
    texts = ["öffne die Schublade", "push", "again"]
    play = [(16, 19), (3, 15)]
    write_part(tmp_path / "training", 20, [(3, 9), (5, 5), (3, 9)], texts, play=play)
    write_part(tmp_path / "validation", 4, [(30, 33)], ["end"], digits=6, first=30)
    return tmp_path


def test_segments_overlap_repeat_and_have_any_length(folder):
    source = readers.open(folder)
    assert names(source) == [*(f"training/segment{i}" for i in range(3)), "validation/segment0"]
    assert source.lengths.tolist() == [7, 1, 7, 4]
    assert source.episodes[0].instructions == ("öffne die Schublade",) * 7
    for episode, first in zip(source.episodes, (3, 5, 3, 30), strict=True):
        for key, value in frame(first).items():
            where = episode.images if key in episode.images else episode.columns
            np.testing.assert_array_equal(where[key][0], value)
            assert np.asarray(where[key][0]).dtype == value.dtype


def test_the_tactile_image_of_six_channels_is_a_column(folder):
    source = readers.open(folder)
    assert list(source.images) == ["rgb_static", "rgb_gripper"]
    assert source.columns["rgb_tactile"] == ("uint8", (8, 10, 6), ())


def test_fields_are_relative_actions_unless_there_are_none(folder):
    source = readers.open(folder)
    found = READERS["calvin"].fields(source)
    assert found.columns == {"action": ("rel_actions",), "proprio": ("robot_obs",)}
    assert found.gripper_range == (-1.0, 1.0)
    assert found.cameras == {"image_primary": "rgb_static", "image_wrist": "rgb_gripper"}


def test_parts_and_play_episodes_are_splits(folder):
    assert names(readers.open(folder, split="validation")) == ["validation/segment0"]
    assert names(readers.open(folder / "training"))[0] == "training/segment0"
    play = readers.open(folder, split="training/play")
    assert names(play) == ["training/play0", "training/play1"]
    assert play.lengths.tolist() == [4, 13]
    assert play.episodes[0].columns["robot_obs"][0, 0] == 16
    assert set(play.episodes[1].instructions) == {""}
    assert len(readers.open(folder, split="play").episodes) == 3
    with pytest.raises(ValueError, match=r"split must be one of .*'training/play'.* got 'test'"):
        readers.open(folder, split="test")


def test_without_annotations_the_recordings_are_named(folder):
    (folder / "validation/lang_annotations/auto_lang_ann.npy").unlink()
    with pytest.raises(FileNotFoundError, match="split 'validation/play'"):
        readers.open(folder)
    assert readers.open(folder, split="validation/play").lengths.tolist() == [4]
    assert READERS["calvin"].probe(folder / "validation")


def test_annotations_in_the_folder_of_a_language_model(folder):
    (folder / "training/lang_annotations").rename(folder / "training/lang_MiniLM")
    assert len(readers.open(folder, split="training").episodes) == 3


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_annotations_of_other_numpy_and_pickle_versions(protocol, tmp_path):
    folder = write_part(tmp_path / "training", 6, [], [])
    indices = [(np.int64(0), np.int32(2)), [1, 3], np.array([2, 5])]
    content = {
        "language": {"ann": np.array(["a", "b", "ü"]), "emb": np.zeros((3, 4), ">f4")},
        "info": {"indx": indices},
    }
    array = np.empty((), object)
    array[()] = content
    pickled = pickle.dumps(array, protocol=protocol)
    if protocol < 4:  # names of NumPy 1
        pickled = pickled.replace(b"cnumpy._core.", b"cnumpy.core.")
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(117) + b"\n"
    path = folder / "lang_annotations/auto_lang_ann.npy"
    path.write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + pickled)
    if protocol == 2:  # bytes are written as a call of a codec
        with pytest.raises(ValueError, match=r"_codecs\.encode, which is not allowed"):
            readers.open(tmp_path)
        return
    source = readers.open(tmp_path)
    assert source.lengths.tolist() == [3, 3, 4]
    assert [episode.instructions[0] for episode in source.episodes] == ["a", "b", "ü"]


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_nothing_in_a_pickle_is_executed(folder):
    target = folder / "executed"
    path = folder / "training/lang_annotations/auto_lang_ann.npy"
    np.save(path, {"language": Evil(target)}, allow_pickle=True)
    with pytest.raises(ValueError, match=r"refers to posix.system, which is not allowed"):
        readers.open(folder)
    assert not target.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x04N", "exhausted"),
        (b"\x80\x04.", "damaged"),
        (b"\x80\x04\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "expected|not allowed"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\x00\x00.", "expected"),
        (b"\x80\x02Nr\xff\xff\xff\x7f0.", "not allowed"),
        (b"\x80\x04(((.", "damaged"),
        (b"\x80\x04cos\nsystem\n(S'ls'\ntR.", "os.system"),
        (b"\x80\x04Ph\n.", "not allowed"),
        (b"\x80\x04]]b.", "damaged|fills"),
    ],
)
def test_damaged_pickles_are_explained(data, message):
    with pytest.raises(ValueError, match=message):
        pickled_data.load(data)


@pytest.mark.parametrize(
    ("segments", "texts", "message"),
    [
        ([(0, 3)], [], "one entry per segment, got 0 and 1"),
        ([(3, 1)], ["a"], "entry 0 of info.indx"),
        ([(0, 2), (-1, 1)], ["a", "b"], "entry 1 of info.indx"),
        ([(0, 10**8)], ["a"], "entry 0 of info.indx"),
        ([(0, 10**30)], ["a"], "entry 0 of info.indx"),
        ([(0.0, 1.0)], ["a"], "entry 0 of info.indx"),
        ([(0, 1, 2)], ["a"], "entry 0 of info.indx"),
        ([(None, 1)], ["a"], "entry 0 of info.indx"),
        ([7], ["a"], "expected a list, got int"),
        ([(0, 1)], [b"a"], "language.ann must hold a text for segment 0"),
        ([(0, 1)], ["\ud800"], "language.ann must hold a text for segment 0"),
        ([], [], "at least one episode"),
    ],
)
def test_wrong_annotations_are_explained(segments, texts, message, folder):
    path = folder / "training/lang_annotations/auto_lang_ann.npy"
    tiny_calvin.write_annotations(path, segments, texts)
    with pytest.raises(ValueError, match=message):
        readers.open(folder, split="training")


def test_frames_are_read_lazily_and_a_missing_one_is_named(folder):
    missing = folder / "training/episode_0000007.npz"
    missing.unlink()
    source = readers.open(folder)
    episode = source.episodes[0]
    assert episode.images["rgb_static"][[0, -1]].shape == (2, 8, 10, 3)
    with pytest.raises(FileNotFoundError, match=r"episode_0000007\.npz is missing"):
        episode.columns["actions"]


def change(path: pathlib.Path, **arrays):
    np.savez_compressed(path, **{**np.load(path), **arrays})


def test_a_frame_of_another_kind_is_explained(folder):
    change(folder / "training/episode_0000004.npz", actions=np.zeros(8))
    change(folder / "training/episode_0000006.npz", rel_actions=np.array([{}], object))
    path = folder / "training/episode_0000008.npz"
    np.savez(path, actions=np.arange(7))
    (folder / "training/episode_0000009.npz").write_bytes(path.read_bytes()[:-30])
    columns = readers.open(folder).episodes[0].columns
    with pytest.raises(ValueError, match=r"actions must be int64 \(7,\) .* got float64 \(8,\)"):
        columns["actions"]
    with pytest.raises(ValueError, match=r"rel_actions must be float64"):
        columns["rel_actions"]
    with pytest.raises(ValueError, match="must hold the array 'scene_obs'"):
        columns["scene_obs"]
    (folder / "training/episode_0000008.npz").write_bytes(b"")
    with pytest.raises(ValueError, match="is damaged"):
        columns["scene_obs"]


def test_a_folder_without_frames_is_explained(folder):
    for path in (folder / "validation").glob("*.npz"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="one file per frame"):
        readers.open(folder)


def test_threads_and_copies_read_the_same(folder):
    source = pickle.loads(pickle.dumps(readers.open(folder)))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda e: e.images["rgb_static"][:], [source.episodes[0]] * 8))
    for images in found:
        np.testing.assert_array_equal(images, found[0])
