import json
import shutil

import numpy as np
import pytest
import tiny_rlds
from campaigns import mutations_rlds
from tiny_rlds import STEP, TEXT, episode, image, members, sequence, tensor, write

from vla_jax.data import readers
from vla_jax.data.frame_cache import FrameCache
from vla_jax.data.raw_frames import RawFrames
from vla_jax.data.readers.rlds import open_x, record_index, rlds, rlds_episodes
from vla_jax.data.readers.rlds.rlds import episode_metadata
from vla_jax.data.readers.rlds.tf_example import decode_varints, find_feature


@pytest.fixture
def root(tmp_path):
    """Two splits, of three files (one of them empty) and of one; one episode of one step."""
    splits = {
        "val": [[episode(1, 0), episode(4, 1)], [], [episode(3, 2)]],
        "train": [[episode(2, 3)]],
    }
    return write(tmp_path / "tiny" / "1.0.0", splits)


def test_episodes_are_in_the_order_of_splits_and_files(root):
    source = readers.open(root)
    assert [each.name for each in source.episodes] == ["val/0", "val/1", "val/2", "train/0"]
    assert source.lengths.tolist() == [1, 4, 3, 2]
    assert readers.open(root, split="train").lengths.tolist() == [2]
    for number, each in enumerate(source.episodes):
        expected = episode(len(each.timestamps), number)
        state = expected["steps/observation/state"].astype(np.float32).astype(np.float64)
        np.testing.assert_array_equal(each.columns["observation/state"], state)
        assert each.columns["action"].shape == (len(each.timestamps), 14)
        assert list(each.instructions) == expected["steps/language_instruction"]
        assert each.columns["is_first"].dtype == bool


def test_a_split_that_is_missing_is_named(root):
    with pytest.raises(ValueError, match=r"has the splits val, train, got 'test'; choose one"):
        readers.open(root, split="test")


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_the_version_is_found_from_the_folders_above(root, levels):
    path = (root, *root.parents)[levels]
    assert readers.open(path).path == root


def test_the_newest_version_is_read(root):
    write(root.parent / "1.10.0", {"train": [[episode(5)]]})
    write(root.parent / "1.9.0", {"train": [[episode(6)]]})
    assert readers.open(root.parent).lengths.tolist() == [5]


def test_several_data_sets_are_refused(root, tmp_path):
    write(tmp_path / "other" / "small" / "1.0.0", {"train": [[episode(5)]]})
    with pytest.raises(ValueError, match=r"several data sets \(other/small/1.0.0, tiny/1.0.0\)"):
        readers.open(tmp_path)


def test_metadata_of_episodes(root):
    metadata = episode_metadata(root)
    assert len(metadata) == 4
    assert metadata[3]["episode_metadata/file_path"] == "/data/é3"
    success = metadata[1]["episode_metadata/success"]
    assert success.dtype == bool
    assert success


def test_an_index_is_kept_and_made_again_when_files_change(root, monkeypatch):
    monkeypatch.setattr(record_index, "_MIN_EPISODES", 1)
    first = readers.open(root)
    assert (root / ".val.index.npz").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(record_index, "_build", None)  # must not be called
        second = readers.open(root)
    np.testing.assert_array_equal(first.lengths, second.lengths)
    shutil.rmtree(root)
    write(root, {"val": [[episode(7)]], "train": [[episode(8)]]})
    (root / ".train.index.npz").write_bytes(b"damaged")
    assert readers.open(root).lengths.tolist() == [7, 8]


@pytest.mark.parametrize(("field", "value"), [("lengths", 2**50), ("lengths", -1), ("shards", 9)])
def test_a_kept_index_with_impossible_numbers_is_made_again(root, monkeypatch, field, value):
    monkeypatch.setattr(record_index, "_MIN_EPISODES", 1)
    first, path = readers.open(root), root / ".val.index.npz"
    with np.load(path) as file:
        arrays = dict(file)
    arrays[field][1] = value
    np.savez(path, **arrays)
    assert readers.open(root).lengths.tolist() == first.lengths.tolist()


def test_a_batch_of_several_cameras_parses_each_record_once(tmp_path, monkeypatch):
    episodes = [episode(length, length) for length in (3, 1, 4)]
    for each in episodes:
        each["steps/wrist"] = each["steps/observation/image"][::-1]
    step = {**STEP, "wrist": image(6, 8, 3)}
    source = readers.open(write(tmp_path / "1.0.0", {"train": [episodes]}, step))
    parsed = []
    parse = rlds_episodes.parse_example
    monkeypatch.setattr(
        rlds_episodes, "parse_example", lambda data: parsed.append(1) or parse(data)
    )
    first, second = (
        RawFrames(source, key, FrameCache(0), episodes=np.arange(3))[np.arange(8)]
        for key in ("observation/image", "wrist")
    )
    assert len(parsed) == 3
    for start, stop in ((0, 3), (3, 4), (4, 8)):
        np.testing.assert_array_equal(first[start:stop], second[start:stop][::-1])


def test_the_index_of_files_that_are_read_only_is_in_the_cache_folder(root, monkeypatch, tmp_path):
    monkeypatch.setattr(record_index, "_MIN_EPISODES", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    replacing = record_index.replacing

    def refusing(path):
        if path.parent == root:
            raise PermissionError
        return replacing(path)

    monkeypatch.setattr(record_index, "replacing", refusing)
    readers.open(root)
    assert len(list((tmp_path / "cache/vla_jax/rlds").iterdir())) == 2


RAGGED = {
    **STEP,
    "boxes": sequence(tensor("float32", 2)),
    "words": sequence(TEXT),
    "tree": sequence(sequence(tensor("int32"))),
    "nested": sequence(members({"a": tensor("int64")})),
    "pair": sequence(tensor("int32"), 2),
}


def test_ragged_values_are_two_columns(tmp_path):
    features = {
        **episode(3),
        "steps/boxes/ragged_flat_values": np.arange(8.0),
        "steps/boxes/ragged_row_lengths_0": np.array([1, 0, 3]),
        "steps/words/ragged_flat_values": ["a", "你好"],
        "steps/words/ragged_row_lengths_0": np.array([2, 0, 0]),
        "steps/tree/ragged_flat_values": np.arange(4),
        "steps/tree/ragged_row_lengths_0": np.array([1, 1, 0]),
        "steps/tree/ragged_row_lengths_1": np.array([3, 1]),
        "steps/nested/a/ragged_flat_values": np.arange(0),
        "steps/nested/a/ragged_row_lengths_0": np.zeros(3, int),
        "steps/pair": np.arange(6),
    }
    root = write(tmp_path / "1.0.0", {"train": [[features]]}, RAGGED)
    source = readers.open(root)
    columns = source.episodes[0].columns
    assert set(columns) == set(source.columns)
    assert columns["boxes/ragged_flat_values"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert columns["boxes/ragged_row_lengths_0"].tolist() == [1, 0, 3]
    assert columns["words/ragged_flat_values"].tolist() == ["a", "你好"]
    assert columns["tree/ragged_flat_values"].dtype == np.int32
    assert columns["tree/ragged_row_lengths_1"].tolist() == [3, 1]
    assert columns["nested/a/ragged_flat_values"].shape == (0,)
    assert columns["pair"].tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("key", "values", "kind"),
    [
        ("observation/natural_language_instruction", ["one", "two"], TEXT),
        ("observation/instruction", [[*b"one", 0], [*b"two", 0]], tensor("int32", 4)),
        ("language_instruction_2", ["one", "two"], TEXT),
    ],
)
def test_instructions_of_other_keys_are_read_where_the_first_is_empty(tmp_path, key, values, kind):
    group, _, name = key.rpartition("/")
    step = {**STEP}
    if group:
        step[group] = members({name: kind})
        step["image"] = image(6, 8, 3)
    else:
        step[name] = kind
    features = episode(2)
    features["steps/image"] = features["steps/observation/image"]
    features[f"steps/{key}"] = values if isinstance(values[0], str) else np.array(values)
    features["steps/language_instruction"] = ["", ""]
    source = readers.open(write(tmp_path / "1.0.0", {"train": [[features]]}, step))
    assert list(source.episodes[0].instructions) == ["one", "two"]
    assert source.episodes[0].instructions[1] == "two"


def test_a_data_set_without_texts_has_empty_instructions(tmp_path):
    step = {"action": tensor("float32", 2)}
    features = {"steps/action": np.zeros((3, 2))}
    source = readers.open(write(tmp_path / "1.0.0", {"train": [[features]]}, step, {}))
    assert list(source.episodes[0].instructions) == ["", "", ""]
    assert not source.images


def test_an_episode_without_steps_is_read_as_such(tmp_path):
    source = readers.open(write(tmp_path / "1.0.0", {"train": [[episode(0), episode(2)]]}))
    assert source.lengths.tolist() == [0, 2]
    assert rlds.fields(source).columns["action"] == ("action",)
    empty = source.episodes[0]
    assert empty.columns["action"].shape == (0, 14)
    assert empty.images["observation/image"][:].shape == (0, 6, 8, 3)


def test_a_feature_without_a_key_is_not_one_of_those_that_count_steps():
    entry = tiny_rlds.delimited(1, tiny_rlds.delimited(2, tiny_rlds.feature(["x"])))
    data = tiny_rlds.delimited(1, entry) + tiny_rlds.example({"steps/a": np.arange(3)})
    key, values = find_feature(data, [b"steps/a"])
    assert (key, values.kind) == ("steps/a", "int")


def test_descriptions_of_older_versions_are_read(root):
    expected = dict(readers.open(root).columns)

    def older(value):
        kind, content = next(iter(value.items()))
        names = {"featuresDict": "FeaturesDict", "sequence": "Sequence", "tensor": "Tensor"}
        if kind == "featuresDict":
            content = {name: older(each) for name, each in content["features"].items()}
        elif kind == "sequence":
            content = {"feature": older(content["feature"]), "length": None}
        elif kind in ("tensor", "image"):
            shape = [int(size) for size in content["shape"]["dimensions"]]
            content = {"shape": shape, "dtype": content["dtype"], "encoding_format": "png"}
        return {"type": f"features.{names.get(kind, kind.capitalize())}", "content": content}

    path = root / "features.json"
    path.write_text(json.dumps(older(json.loads(path.read_text()))))
    assert readers.open(root).columns == expected


def change(path, keys, value):
    data = json.loads(path.read_text())
    inner = data
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "features.json").unlink(), r"features.json is missing: expected the"),
        (lambda root: (root / "dataset_info.json").unlink(), r"dataset_info.json is missing"),
        (
            lambda root: (root / "tiny-val.tfrecord-00002-of-00003").unlink(),
            r"00002-of-00003 is missing \(1 of the 2 files of split 'val'\); download them",
        ),
        (
            lambda root: change(root / "dataset_info.json", ["splits", 0, "shardLengths", 0], "3"),
            r"holds 2 episodes, expected 3 as in dataset_info.json",
        ),
        (
            lambda root: change(root / "dataset_info.json", ["fileFormat"], "riegeli"),
            r"fileFormat must be one of tfrecord, array_record, got 'riegeli'",
        ),
        (
            lambda root: change(root / "features.json", ["featuresDict", "features"], {"a": TEXT}),
            r"expected a sequence 'steps'",
        ),
    ],
)
def test_damaged_descriptions_are_refused_in_a_sentence(root, damage, message):
    damage(root)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        readers.open(root)


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_damaged_records_are_refused_in_a_sentence(root):
    path = root / "tiny-train.tfrecord-00000-of-00001"
    flip(path, -10)
    source = readers.open(root)  # the data is checked when it is read
    with pytest.raises(ValueError, match=r"is damaged: the CRC of the record at byte 0 is wrong"):
        source.episodes[3].columns["action"]
    flip(path, 1)
    with pytest.raises(ValueError, match=r"the CRC of the length at byte 0 is wrong"):
        readers.open(root)
    path.write_bytes(path.read_bytes()[:100])
    flip(path, 1)
    with pytest.raises(ValueError, match=r"is cut: the record at byte 0 has \d+ bytes, got 100"):
        readers.open(root)
    path.write_bytes(b"\x1f\x8b" + bytes(30))
    with pytest.raises(ValueError, match=r"it looks like gzip: decompress it"):
        readers.open(root)


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        (
            "action",
            np.zeros((2, 13)),
            r"action of episode train/0 holds 26 values, expected 2 x",
        ),
        ("action", np.zeros((2, 14), int), r"holds values of type int, expected float"),
        ("language_instruction", ["one"], r"holds 1 values, expected 2 x 1"),
        ("observation/image", [b"png", b""], r"has a damaged image"),
        (
            "observation/image",
            [tiny_rlds.encode(np.zeros((9, 8, 3), np.uint8))] * 2,
            r"has an image of 9x8 pixels, expected \(6, 8\)",
        ),
    ],
)
def test_values_that_do_not_fit_are_refused_in_a_sentence(tmp_path, key, values, message):
    features = {**episode(2), f"steps/{key}": values}
    source = readers.open(write(tmp_path / "1.0.0", {"train": [[features]]}))
    with pytest.raises(ValueError, match=message):
        source.episodes[0].images[key][:] if "image" in key else source.episodes[0].columns[key]


def test_integers_of_any_size_are_decoded():
    numbers = np.array([0, 1, 127, 128, -1, 2**63 - 1, -(2**63)])
    encoded = b"".join(tiny_rlds.varint(int(number)) for number in numbers)
    np.testing.assert_array_equal(decode_varints(np.frombuffer(encoded, np.uint8)), numbers)
    for damaged in (encoded[:-1], b"\x80" * 11 + b"\x01"):
        with pytest.raises(ValueError, match="an integer"):
            decode_varints(np.frombuffer(damaged, np.uint8))


@pytest.mark.parametrize("name", sorted(open_x.OPEN_X))
def test_known_data_sets_have_their_conventions(tmp_path, name):
    fields = open_x.OPEN_X[name].fields
    set_name = {"fractal": "fractal20220817_data", "libero": "libero_10_no_noops"}.get(name, name)
    set_name = "bridge_dataset" if name == "bridge" else set_name
    keys = [key for keys in fields.columns.values() for key in keys]
    tree: dict = {"language_instruction": TEXT}
    features: dict = {"steps/language_instruction": ["", ""]}
    for key in (*keys, *fields.cameras.values()):
        group, _, last = key.rpartition("/")
        place = tree.setdefault(group, members({}))["featuresDict"]["features"] if group else tree
        is_image = key in fields.cameras.values()
        place[last] = image(6, 8, 3) if is_image else tensor("float32", 2)
        pictures = [tiny_rlds.encode(np.zeros((6, 8, 3), np.uint8))] * 2
        features[f"steps/{key}"] = pictures if is_image else np.zeros((2, 2))
    splits = {"train": [[features]]}
    source = readers.open(write(tmp_path / set_name / "1.0.0", splits, tree, {}, set_name))
    assert rlds.fields(source) == fields
    assert fields.robot == name
    assert source.fps == open_x.OPEN_X[name].fps
    np.testing.assert_allclose(source.episodes[0].timestamps, [0, 1 / source.fps])


def test_fields_of_other_data_sets_are_guessed(tmp_path):
    action = np.zeros((4, 14))
    action[:, [6, 13]] = [[0, 1], [1, 1], [1, 0], [0, 0]]
    features = {**episode(4), "steps/action": action}
    features["steps/observation/wrist_image"] = features["steps/observation/image"]
    cameras = {
        "wrist_image": image(6, 8, 3),
        "image": image(6, 8, 3),
        "state": tensor("float64", 3),
    }
    step = {**STEP, "observation": members(cameras)}
    source = readers.open(write(tmp_path / "1.0.0", {"train": [[features]]}, step))
    found = rlds.fields(source)
    assert dict(found.cameras) == {
        "image_primary": "observation/image",
        "image_wrist": "observation/wrist_image",
    }
    assert dict(found.columns) == {"action": ("action",), "proprio": ("observation/state",)}
    assert found.grippers == (6, 13)
    assert found.gripper_range == (0, 1)


def test_array_record_files_are_read(root):
    module = pytest.importorskip("array_record.python.array_record_module")
    expected = readers.open(root)
    for name, numbers in (("val-0-3", [0, 1]), ("val-2-3", [2]), ("train-0-1", [3])):
        split, number, count = name.split("-")
        path = root / f"tiny-{split}.array_record-{int(number):05d}-of-{int(count):05d}"
        writer = module.ArrayRecordWriter(str(path), "group_size:1")
        for each in numbers:
            writer.write(tiny_rlds.example(episode(int(expected.lengths[each]), each)))
        writer.close()
    change(root / "dataset_info.json", ["fileFormat"], "array_record")
    source = readers.open(root)
    np.testing.assert_array_equal(source.lengths, expected.lengths)
    for ours, other in zip(source.episodes, expected.episodes, strict=True):
        np.testing.assert_array_equal(ours.columns["action"], other.columns["action"])
    train = root / "tiny-train.array_record-00000-of-00001"
    train.write_bytes(train.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"damaged or no ArrayRecord file"):
        readers.open(root)


def test_damaged_data_sets_are_refused_in_a_sentence_or_read_as_they_were():
    """A short run of the campaign, whose table has thousands of mutations."""
    outcomes = mutations_rlds.run(7 * 8)
    assert not [o.detail for each in outcomes.values() for o in each if o.result == "traceback"]
    for name in ("bytes of a TFRecord file", "bytes of an ArrayRecord file", "whole files"):
        assert {o.result for o in outcomes[name]} <= {"sentence", "same"}  # never other values
    assert {o.result for o in outcomes["bytes of the kept index"]} == {"same"}
    assert max(o.peak for each in outcomes.values() for o in each) < 50e6
