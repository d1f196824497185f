"""Shards of tokens: read like one array, complete or absent, damage is reported."""

import json
import pickle

import ml_dtypes
import numpy as np
import pytest

from vla_jax.data import token_files
from vla_jax.data.token_files import ShardedArray, TokenSizes

F, N, D = 25, 3, 4
PER_SHARD = 10


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """A shard holds ten frames of float32."""
    monkeypatch.setattr(token_files, "SHARD_BYTES", PER_SHARD * N * (4 * D + 1))


def make_rows(dtype="float32"):
    draw = np.random.default_rng(0)
    tokens = draw.normal(size=(F, N, D)).astype(np.float32)
    return tokens.astype(np.dtype(dtype)), draw.random((F, N)) > 0.5


def write(folder, dtype="float32", shards=None):
    sizes, (tokens, mask) = TokenSizes(F, N, D, dtype), make_rows(dtype)
    for shard in range(sizes.num_shards) if shards is None else shards:
        frames = sizes.frames(shard)
        halves = np.array_split(np.arange(frames.start, frames.stop), 2)
        token_files.write_shard(
            folder, shard, sizes, ((tokens[rows], mask[rows]) for rows in halves)
        )
    return sizes


def test_sizes_follow_from_the_shape_and_the_dtype():
    sizes = TokenSizes(F, N, D, "float32")
    assert sizes.total_bytes == F * N * (4 * D + 1)
    assert (sizes.frames_per_shard, sizes.num_shards) == (10, 3)
    assert [sizes.frames(shard) for shard in range(3)] == [
        range(10), range(10, 20), range(20, 25)
    ]  # fmt: skip
    assert TokenSizes(F, N, D, "bfloat16").frames_per_shard == 18
    assert TokenSizes(F, N, 10**9, "float16").frames_per_shard == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_shards_are_read_like_one_array(dtype, tmp_path):
    sizes = write(tmp_path, dtype)
    assert token_files.missing_shards(tmp_path, sizes) == []
    for shard in range(sizes.num_shards):
        token_files.check_shard(tmp_path, shard, sizes, checksums=True)
    found = token_files.open_tokens(tmp_path, sizes)
    for array, expected in zip(found, make_rows(dtype), strict=True):
        assert (array.shape, array.dtype, array.ndim) == (
            expected.shape, expected.dtype, expected.ndim
        )  # fmt: skip
        assert len(array) == F
        for index in (
            3, -1, slice(None), slice(2, 24, 5), slice(None, None, -7), np.array([3, 5]),
            np.array([[0, 24, 11], [9, 10, -1]]), np.zeros((2, 0), int), np.array(17),
        ):  # fmt: skip
            rows = array[index]
            np.testing.assert_array_equal(rows, expected[index])
            assert rows.dtype == expected.dtype
            assert type(rows) is np.ndarray
    with pytest.raises(IndexError):
        found.tokens[np.array([F])]


def test_worker_processes_open_the_files_again(tmp_path):
    sizes = write(tmp_path, "bfloat16")
    tokens = token_files.open_tokens(tmp_path, sizes).tokens
    pickled = pickle.dumps(tokens)
    assert len(pickled) < 1000
    copy = pickle.loads(pickled)
    assert type(copy) is ShardedArray
    assert copy.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(copy[:], tokens[:])


def test_shards_that_are_not_written_are_missing(tmp_path):
    sizes = write(tmp_path, shards=[1])
    assert token_files.missing_shards(tmp_path, sizes) == [0, 2]
    assert token_files.missing_shards(tmp_path / "absent", sizes) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"shard_00000 is damaged .* is missing"):
        token_files.open_tokens(tmp_path, sizes)


def fail(sizes):
    yield np.zeros((1, N, D), np.float32), np.ones((1, N), bool)
    raise KeyError("in the backbone")


def test_an_interrupted_shard_leaves_nothing(tmp_path):
    sizes = write(tmp_path, shards=[0])
    with pytest.raises(KeyError):
        token_files.write_shard(tmp_path, 1, sizes, fail(sizes))
    one = [(np.zeros((1, N, D), np.float32), np.ones((1, N), bool))]
    with pytest.raises(ValueError, match="shard 1 must have 10 frames, got 1"):
        token_files.write_shard(tmp_path, 1, sizes, one)
    assert [path.name for path in tmp_path.iterdir()] == ["shard_00000"]


def damage(path, kind):
    content = bytearray(path.read_bytes())
    if kind == "bit":
        content[-1] ^= 1
    path.write_bytes(content[: len(content) // 2] if kind == "half" else content)
    if kind == "gone":
        path.unlink()


@pytest.mark.parametrize("name", ["tokens.npy", "mask.npy", "files.json"])
@pytest.mark.parametrize("kind", ["half", "gone", "bit"])
def test_damage_is_reported_with_its_remedy(name, kind, tmp_path):
    sizes = write(tmp_path)
    damage(tmp_path / "shard_00001" / name, kind)
    remedy = r"shard_00001 is damaged \(.*\); delete this folder"
    if kind == "bit" and name != "files.json":  # found by the checksum only
        token_files.open_tokens(tmp_path, sizes)
        with pytest.raises(ValueError, match=f"{remedy}"):
            token_files.check_shard(tmp_path, 1, sizes, checksums=True)
    else:
        with pytest.raises(ValueError, match=remedy):
            token_files.open_tokens(tmp_path, sizes)


def exchange(first, second):
    spare = first.with_name("spare")
    for old, new in ((first, spare), (second, first), (spare, second)):
        old.rename(new)


def test_shards_in_the_place_of_others_are_refused(tmp_path):
    folders = [tmp_path / name for name in ("a", "b")]
    sizes, _ = map(write, folders)
    exchange(*folders)  # of two data sets with the same sizes
    with pytest.raises(ValueError, match=r"written as b/shard_00000, .* instead of a/shard_00000"):
        token_files.open_tokens(folders[0], sizes)
    exchange(*folders)
    exchange(folders[0] / "shard_00000", folders[0] / "shard_00001")
    sentence = r"shard_00000 is damaged \(it was written as a/shard_00001, frames 10 to 19, instead"
    with pytest.raises(ValueError, match=sentence):
        token_files.open_tokens(folders[0], sizes)
    with pytest.raises(ValueError, match=sentence):
        token_files.check_shards(folders[0], range(sizes.num_shards), sizes)


def forget_place(folder):
    for index in folder.glob("*/files.json"):
        files = json.loads(index.read_text())
        del files["place"]
        index.write_text(json.dumps(files))


def test_shards_of_earlier_versions_are_read_with_a_warning(tmp_path):
    sizes, (expected, _) = write(tmp_path), make_rows()
    forget_place(tmp_path)
    with pytest.warns(UserWarning, match="written by an earlier version, without the places of"):
        found = token_files.open_tokens(tmp_path, sizes)
    np.testing.assert_array_equal(found.tokens[:], expected)


def test_files_of_other_sizes_are_reported(tmp_path):
    sizes = write(tmp_path)._replace(num_frames=F - 1)
    with pytest.raises(ValueError, match=r"written as .*frames 20 to 24, instead of .* 20 to 23"):
        token_files.check_shard(tmp_path, 2, sizes, checksums=False)
    forget_place(tmp_path)
    with (
        pytest.warns(UserWarning, match="by an earlier version"),
        pytest.raises(ValueError, match=r"tokens are \[5, 3, 4\] instead of \[4, 3, 4\]"),
    ):
        token_files.check_shard(tmp_path, 2, sizes, checksums=False)
