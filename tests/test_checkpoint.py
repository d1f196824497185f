"""Checkpoints: restored = saved, resumed = uninterrupted, and no saved step is ever lost."""

import json
import logging
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.training import checkpoint, checksums, optim, parallel, step_record, update
from vla_jax.training.optim import OptimConfig

OPTIM = OptimConfig(
    learning_rate=0.01, warmup_steps=2, ema_decay=0.9, accumulation_steps=2, freeze=("backbone/*",)
)
METADATA = {"config": {"name": "a", "decay": None}, "loader": {"next_index": 6}, "q01": [0.5, 1]}


def make_params():
    kernel = jnp.linspace(-1.0, 1.0, 6).reshape(3, 2)
    return {"backbone": {"kernel": kernel.astype(jnp.bfloat16)}, "head": {"kernel": kernel}}


def dropout_loss(params, batch, key):
    keep = jax.random.bernoulli(key, 0.5, batch.shape)
    return jnp.mean(jnp.square((batch * keep) @ params["head"]["kernel"] - 1.0)), {}


OPTIMIZER = optim.make_optimizer(OPTIM, 10, make_params())


def make_state():
    return update.init_train_state(make_params(), OPTIMIZER, ema=True)


def train(state, steps):
    """Continues the training on four devices; the batch and the dropout depend on the step."""
    mesh = parallel.make_mesh("data=4")
    step_fn = update.make_update(dropout_loss, OPTIMIZER, ema_decay=OPTIM.ema_decay)
    step_fn, state = parallel.jit_update(step_fn, mesh), parallel.replicate(state, mesh)
    for step in steps:
        batch = np.random.default_rng(step).normal(size=(8, 3)).astype(np.float32)
        state, _ = step_fn(state, parallel.shard_batch(batch, mesh), jax.random.key(0))
    return state


def save_all(directory, steps, state, *, keep=2):
    checkpoints = checkpoint.open_checkpoints(directory, keep=keep)
    for step in steps:
        checkpoint.save(checkpoints, step, state, METADATA)
    checkpoint.close(checkpoints)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder with step 3 of a short training, and its train state."""
    directory, state = tmp_path_factory.mktemp("saved"), train(make_state(), range(3))
    save_all(directory, [3], state)
    return directory, state


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_the_restored_state_equals_the_saved_one(saved):
    directory, state = saved
    restored, metadata = checkpoint.restore(directory, jax.eval_shape(make_state))
    assert_same(restored, state)
    assert metadata == METADATA == checkpoint.read_metadata(directory)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(restored))


def test_a_resumed_training_equals_an_uninterrupted_one_to_the_bit(saved):
    directory, _ = saved
    resumed = train(checkpoint.restore(directory, make_state())[0], range(3, 6))
    assert_same(resumed, train(make_state(), range(6)))


def test_a_save_stores_the_values_of_its_call_although_the_state_is_donated(tmp_path):
    checkpoints = checkpoint.open_checkpoints(tmp_path)
    state = train(make_state(), range(1))
    expected = jax.device_get(state)
    checkpoint.save(checkpoints, 1, state, {})
    train(state, range(1, 3))
    checkpoint.close(checkpoints)
    assert_same(checkpoint.restore(tmp_path, expected)[0], expected)


@pytest.mark.parametrize(("ema", "field"), [(False, "params"), (True, "ema_params")])
def test_params_are_read_without_knowing_the_optimizer(ema, field, saved):
    directory, state = saved
    params = checkpoint.restore_params(directory, make_params(), ema=ema)
    assert_same(params, getattr(state, field))
    assert_same(checkpoint.restore_params(directory, ema=ema), params)


def test_an_ema_of_the_trained_params_is_completed_by_the_frozen_ones(tmp_path):
    state = update.init_train_state(make_params(), OPTIMIZER, ema=True, freeze=OPTIM.freeze)
    state = state.replace(ema_params=jax.tree.map(lambda leaf: leaf + 1, state.ema_params))
    save_all(tmp_path, [1], state)
    assert_same(checkpoint.restore(tmp_path, state)[0], state)
    expected = update.averaged_params(state)
    assert np.any(expected["head"]["kernel"] != state.params["head"]["kernel"])
    for like in (None, make_params()):
        assert_same(checkpoint.restore_params(tmp_path, like, ema=True), expected)
    part = {"backbone": make_params()["backbone"]}
    assert_same(checkpoint.restore_params(tmp_path, part, ema=True), part)


def test_a_checkpoint_with_an_ema_of_frozen_params_is_resumed_without_it(saved):
    directory, state = saved  # all params have an EMA, as in earlier versions
    like = update.init_train_state(make_params(), OPTIMIZER, ema=True, freeze=OPTIM.freeze)
    restored, _ = checkpoint.restore(directory, like)
    assert jax.tree.structure(restored) == jax.tree.structure(like)
    assert_same(restored.ema_params["head"], state.ema_params["head"])
    assert_same((restored.params, restored.opt_state), (state.params, state.opt_state))


def test_exported_params_are_read_like_a_checkpoint(saved, tmp_path):
    directory, state = saved
    path = checkpoint.export_params(directory, tmp_path, ema=True)
    assert path == tmp_path / "3"
    assert_same(checkpoint.restore_params(tmp_path), state.ema_params)
    assert checkpoint.read_metadata(tmp_path) == METADATA
    with pytest.raises(ValueError, match="holds no ema_params; train with ema_decay"):
        checkpoint.restore_params(tmp_path, ema=True)
    with pytest.raises(FileExistsError, match="exists already; choose another target"):
        checkpoint.export_params(directory, tmp_path)


ONE_DEVICE = """
import sys, jax, numpy as np
from vla_jax.training import checkpoint
assert jax.device_count() == 1
params = checkpoint.restore_params(sys.argv[1])
total = sum(jax.numpy.asarray(leaf, "float32").sum() for leaf in jax.tree.leaves(params))
print(float(total))
"""


def test_a_checkpoint_of_four_devices_is_read_on_one(saved):
    directory, state = saved
    args = [sys.executable, "-c", ONE_DEVICE, str(directory)]
    completed = subprocess.run(args, capture_output=True, text=True, timeout=60, check=True)
    total = sum(np.asarray(leaf, np.float32).sum() for leaf in jax.tree.leaves(state.params))
    np.testing.assert_allclose(float(completed.stdout), total, atol=1e-6)
    assert completed.stderr == ""


def test_the_latest_steps_are_kept_and_older_ones_are_removed(tmp_path):
    save_all(tmp_path, [1, 2, 3], make_state(), keep=2)
    assert checkpoint.latest_step(tmp_path) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    assert checkpoint.restore(tmp_path, make_state(), step=2)[1] == METADATA
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        checkpoint.open_checkpoints(tmp_path, keep=0)


def test_a_step_is_saved_once_and_steps_increase(saved):
    directory, state = saved
    checkpoints = checkpoint.open_checkpoints(directory)
    assert checkpoint.save(checkpoints, 3, state, {}) is False
    with pytest.raises(ValueError, match=r"step must be above 3, the latest in .*, got 2"):
        checkpoint.save(checkpoints, 2, state, {})
    with pytest.raises(TypeError, match=r"metadata must be JSON .*float32"):
        checkpoint.save(checkpoints, 4, state, {"mean": np.float32(1)})
    checkpoint.close(checkpoints)
    assert checkpoint.read_metadata(directory) == METADATA


def test_a_missing_checkpoint_is_reported(saved, tmp_path):
    directory, _ = saved
    assert checkpoint.latest_step(tmp_path) is checkpoint.latest_step(tmp_path / "nowhere") is None
    for missing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*; train first"):
            checkpoint.read_metadata(missing)
    with pytest.raises(FileNotFoundError, match=r"no step 7 in .*; choose from 3"):
        checkpoint.restore(directory, make_state(), step=7)


OTHER_PARAMS = {
    "shape": (
        {"kernel": jnp.zeros((3, 4))},
        r"kernel is float32\[3, 2\], expected float32\[3, 4\]",
    ),
    "dtype": (
        {"kernel": jnp.zeros((3, 2), jnp.bfloat16)},
        "kernel is float32.*, expected bfloat16",
    ),
    "missing": ({}, r"kernel is float32\[3, 2\], expected nothing"),
    "extra": (
        {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)},
        "bias is missing, expected float32",
    ),
}


@pytest.mark.parametrize(("head", "sentence"), OTHER_PARAMS.values(), ids=OTHER_PARAMS)
def test_a_checkpoint_of_another_shape_is_reported_with_its_path(head, sentence, saved):
    directory, _ = saved
    other = {**make_params(), "head": head}
    with pytest.raises(ValueError, match=f"does not fit the policy: head/{sentence}"):
        checkpoint.restore_params(directory, other)
    with pytest.raises(ValueError, match="does not fit the policy: params/head/"):
        checkpoint.restore(directory, make_state().replace(params=other))


def test_parts_that_are_not_requested_are_not_read(saved):
    directory, state = saved
    wanted = {"head": make_params()["head"]}
    params = checkpoint.restore_params(directory, wanted)
    assert params.keys() == wanted.keys() < make_params().keys()
    assert_same(params["head"], state.params["head"])


@pytest.mark.parametrize("pattern", ["state/d/*", "state/_METADATA", "_CHECKPOINT_METADATA"])
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_can_be_read(
    pattern, tmp_path, caplog
):
    save_all(tmp_path, [1, 2], make_state())
    for path in (tmp_path / "2").glob(pattern):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"2 cannot be read .*; delete it to use the step before"):
        checkpoint.restore(tmp_path, make_state())
    assert_same(checkpoint.restore(tmp_path, make_state(), step=1)[0], make_state())
    assert caplog.text == ""


def test_a_full_disk_is_reported_once_and_training_and_saving_can_continue(tmp_path, caplog):
    small, big = {"x": np.ones(10)}, {"x": np.random.default_rng(0).bytes(400_000)}
    big = {"x": np.frombuffer(big["x"], np.uint8)}
    checkpoints = checkpoint.open_checkpoints(tmp_path)
    checkpoint.save(checkpoints, 1, small, METADATA)
    checkpoint.wait(checkpoints)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as if the disk were full
    try:
        checkpoint.save(checkpoints, 2, big, METADATA)
        with pytest.raises(OSError, match=r"could not save into .* \(File too large\)"):
            checkpoint.wait(checkpoints)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert_same(checkpoint.restore(tmp_path, small)[0], small)
    checkpoint.save(checkpoints, 3, big, METADATA)
    checkpoint.close(checkpoints)
    assert_same(checkpoint.restore(tmp_path, big)[0], big)
    assert caplog.text == ""


KILLED = """
import os, signal, sys, numpy as np
from vla_jax.training import checkpoint
checkpoints = checkpoint.open_checkpoints(sys.argv[1])
checkpoint.save(checkpoints, 1, {"x": np.ones(10)}, {"loader": 1})
checkpoint.wait(checkpoints)
noise = np.random.default_rng(0).normal(size=4_000_000)
checkpoint.save(checkpoints, 2, {"x": noise}, {"loader": 2})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_during_a_save_leaves_the_previous_step(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # step 1 and the incomplete step 2
    assert checkpoint.latest_step(tmp_path) == 1
    like = {"x": np.ones(10)}
    restored, metadata = checkpoint.restore(tmp_path, like)
    assert_same(restored, like)
    assert metadata == {"loader": 1}
    save_all(tmp_path, [2], like)
    for _ in range(100):  # the leftovers are removed in the background
        if sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]:
            break
        time.sleep(0.05)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_a_folder_that_cannot_be_created_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"could not save into .*file/run"):
        checkpoint.open_checkpoints(tmp_path / "file" / "run")


def test_logs_of_other_libraries_are_not_suppressed(caplog):
    logging.getLogger("absl").error("of somebody else")
    assert "of somebody else" in caplog.text


def test_metadata_and_checksums_are_stored_in_the_step_as_json(saved):
    directory, state = saved
    stored = json.loads((directory / "3" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert stored["metadata"] == METADATA
    assert stored["integrity"]["step"] == 3
    assert stored["integrity"]["arrays"] == checksums.of_tree(state)


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "copy")


def change_record(folder, change):
    path = folder / "_CHECKPOINT_METADATA"
    stored = json.loads(path.read_text())
    change(stored["custom_metadata"])
    path.write_text(json.dumps(stored))


def restored_or_refused(directory, like):
    """The train state, or the error of a damaged step."""
    try:
        return checkpoint.restore(directory, like)[0], ""
    except ValueError as error:
        return None, str(error)


def test_flipped_bits_in_the_arrays_are_never_restored(copied, saved):
    like = jax.eval_shape(make_state)
    files = sorted((copied / "3" / "state").glob("**/d/*"))
    rng = np.random.default_rng(0)
    num_refused = 0
    for _ in range(10):
        file = files[rng.integers(len(files))]
        intact = file.read_bytes()
        content = bytearray(intact)
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        file.write_bytes(content)
        restored, refusal = restored_or_refused(copied, like)
        file.write_bytes(intact)
        if restored is None:
            num_refused += 1
            assert "delete it to use the step before" in refusal
        else:  # a byte that nothing reads
            assert_same(restored, saved[1])
    assert num_refused >= 2  # the others are bytes that nothing reads


def test_an_array_of_other_values_is_named(copied):
    change_record(copied / "3", alter_checksum)
    with pytest.raises(ValueError, match=r"read .the checksum of array params/head/kernel differs"):
        checkpoint.restore_params(copied)
    sharding = parallel.make_shardings(
        jax.eval_shape(make_state), parallel.make_mesh("data=1,fsdp=2"), FSDP
    )
    placed = parallel.with_shardings(jax.eval_shape(make_state), sharding)
    with pytest.raises(ValueError, match="the checksum of array params/head/kernel differs"):
        checkpoint.restore(copied, placed)


FSDP = (("head/kernel", jax.sharding.PartitionSpec(None, "fsdp")),)


def alter_checksum(record):
    """Changes the checksum of an array, so that its values differ from it."""
    record["integrity"]["arrays"]["params/head/kernel"] ^= 1
    integrity = {name: value for name, value in record["integrity"].items() if name != "text"}
    record["integrity"]["text"] = step_record.text_checksum(record["metadata"], integrity)


RECORDS = {
    "another value": (lambda r: r["metadata"]["q01"].append(9), "checksum of its metadata differs"),
    "no metadata": (lambda r: r.pop("metadata"), "its metadata is broken"),
    "unknown entry": (lambda r: r.update(integrityz=r.pop("integrity")), "its metadata is broken"),
    "no checksum": (lambda r: r["integrity"].pop("text"), "checksum of its metadata differs"),
}


@pytest.mark.parametrize(("change", "reason"), RECORDS.values(), ids=RECORDS)
def test_damaged_metadata_is_refused(change, reason, copied):
    change_record(copied / "3", change)
    with pytest.raises(ValueError, match=f"3 cannot be read .*{reason}"):
        checkpoint.read_metadata(copied)


def test_a_step_under_the_name_of_another_is_refused(copied):
    (copied / "3").rename(copied / "20")
    with pytest.raises(ValueError, match=r"20 cannot be read .its files are those of step 3"):
        checkpoint.restore(copied, make_state())


def test_an_average_that_is_gone_is_not_replaced_by_the_params(copied, tmp_path):
    path = copied / "3" / "state" / "_METADATA"
    stored = json.loads(path.read_text())
    leaves = {name: leaf for name, leaf in stored["tree_metadata"].items() if "ema" not in name}
    path.write_text(json.dumps(stored | {"tree_metadata": leaves}))
    with pytest.raises(ValueError, match="its list of arrays is broken at ema_params/backbone"):
        checkpoint.has_ema(copied)
    change_record(copied / "3", lambda record: record.pop("integrity"))
    with pytest.raises(ValueError, match="3 must hold ema_params"):
        checkpoint.has_ema(copied)


def test_a_step_of_an_earlier_version_is_read_with_a_warning(copied, saved):
    change_record(copied / "3", lambda record: record.pop("integrity"))
    with pytest.warns(UserWarning, match="3 was saved by an earlier version, without checksums"):
        assert_same(checkpoint.restore(copied, jax.eval_shape(make_state))[0], saved[1])
