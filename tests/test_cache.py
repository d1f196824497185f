"""Cached tokens equal the outputs of the backbone; a cache is reused only if nothing changed."""

import concurrent.futures
import contextlib
import dataclasses
import resource
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny_demos

from train import cache
from train.setup import init_params, make_windows, read_dataset
from vla_jax.data import normalize, token_files
from vla_jax.data.token_files import ShardedArray
from vla_jax.policies import policy
from vla_jax.training import checkpoint
from vla_jax.types import Observation, Tokens

FRAME_BYTES = 4 * (8 * 4 + 1)  # 4 tokens of 8 features in float32, and their mask


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    demos = tiny_demos.write(tmp_path_factory.mktemp("demos") / "table")
    return tiny_demos.imitation(demos, "", backbone=tiny_demos.PERCEIVER)


def tokens_of(config):
    dataset = read_dataset(config)
    norm_stats = normalize.compute_norm_stats(dataset)
    found = cache.frame_tokens(config, dataset, norm_stats)
    return checkpoint.read_params(found.params_folder), found.tokens


@pytest.fixture
def small_shards(monkeypatch):
    """Limits a shard to 50 frames of float32, so that there are several."""
    monkeypatch.setattr(token_files, "SHARD_BYTES", 50 * FRAME_BYTES)


@pytest.mark.slow
def test_cached_tokens_equal_the_outputs_of_the_backbone(config, small_shards):
    # several chunks, the last one of a shard shorter
    params, tokens = tokens_of(dataclasses.replace(config, cache_batch=32))
    dataset = read_dataset(config)
    assert all(isinstance(part, ShardedArray) for part in tokens)
    assert {len(part) for part in tokens} == {dataset.episode_ends[-1]}
    assert len(tokens.tokens.files) > 2
    norm_stats = normalize.compute_norm_stats(dataset)
    blind, seeing = (
        make_windows(
            config, dataset, norm_stats, window_size=6, action_horizon=1, tokens=known
        )[np.arange(4)]
        for known in (tokens, None)
    )  # fmt: skip
    assert blind.observation.image_primary is None
    encode = jax.jit(policy.encode, static_argnums=1)
    encoded = encode(params, config.agent.policy, seeing.observation)
    mask = blind.timestep_mask
    np.testing.assert_allclose(blind.tokens.tokens[mask], encoded.tokens[mask], atol=1e-5)
    np.testing.assert_array_equal(blind.tokens.mask[mask], encoded.mask[mask])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tokens_in_half_precision_are_rounded_and_train_the_policy(dtype, config):
    whole = np.asarray(tokens_of(config)[1].tokens[:50])
    half = dataclasses.replace(config, cache_dtype=dtype)
    tokens, params = tokens_of(half)[1], init_params(jax.random.key(0), config)
    apply = jax.jit(policy.apply, static_argnums=1)
    assert str(tokens.tokens.dtype) == dtype
    rounded = tokens.tokens[:50]
    np.testing.assert_array_equal(rounded, whole.astype(rounded.dtype))
    outputs = [
        apply(
            params,
            config.agent.policy,
            Observation(),
            tokens=Tokens(part[None, :5], np.ones((1, 5, 4), bool)),
        )
        for part in (rounded, rounded.astype(np.float32))
    ]
    jax.tree.map(np.testing.assert_array_equal, *outputs)


@pytest.mark.slow
def test_an_interrupted_computation_continues_after_the_last_file(
    config, small_shards, monkeypatch
):
    changed = with_instruction_steps(config, 5)
    expected = tokens_of(changed)[1]
    folder = expected.tokens.files[0].parent.parent
    shutil.move(folder, folder.with_name("expected"))
    expected = [np.load(file.parents[2] / "expected" / file.parent.name / file.name)
                for file in expected.tokens.files]  # fmt: skip

    encode, passes = cache._encode_frames, []

    def interrupted(*args):
        passes.append(args[2])
        if len(passes) == 2:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(cache, "_encode_frames", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokens_of(changed)
    assert {path.name for path in folder.iterdir()} == {"params", "shard_00000"}
    before = (folder / "shard_00000/tokens.npy").stat().st_mtime_ns
    passes[:] = [None] * 5
    found = tokens_of(changed)[1].tokens
    assert [wanted.start for wanted in passes[5:]] == [50, 100, 150]
    assert (folder / "shard_00000/tokens.npy").stat().st_mtime_ns == before
    for file, array in zip(found.files, expected, strict=True):
        np.testing.assert_array_equal(np.load(file), array)


def test_a_damaged_file_is_found_by_its_checksum_and_a_short_one_by_its_size(config):
    changed = with_instruction_steps(config, 4)
    file = tokens_of(changed)[1].tokens.files[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard_00000 is damaged .*checksum.* delete this folder"):
        tokens_of(changed)
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"shard_00000 is damaged \(tokens.npy has \d+ bytes"):
        tokens_of(changed)


def test_too_large_a_cache_is_refused_before_it_is_computed(config, monkeypatch):
    monkeypatch.setattr(cache, "_encode_frames", None)
    changed = dataclasses.replace(with_instruction_steps(config, 6), max_cache_gb=1e-6)
    with pytest.raises(ValueError, match=r"max_cache_gb must be .* 4 × 8 float32, got 1e-06; use"):
        tokens_of(changed)
    free = shutil._ntuple_diskusage(10**6, 10**6, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(OSError, match=r"needs 0\.\d MB, but its disk has 0\.0 MB left"):
        tokens_of(dataclasses.replace(changed, max_cache_gb=1))


@pytest.mark.parametrize(
    ("dtype", "added", "sentence"),
    [
        ("float16", 1e6, "got float16, whose range those of frame 0 exceed; use --cache-dtype"),
        ("float32", np.nan, "tokens of frame 0 must be finite, got nan in token 0: .* params are"),
    ],
)
def test_tokens_that_are_not_finite_are_refused(dtype, added, sentence, config, monkeypatch):
    changed = dataclasses.replace(config, cache_dtype=dtype, seed=2)
    init = cache.init_backbone

    def bad(*args):
        backbone = init(*args)
        return {**backbone, "narrow": jax.tree.map(lambda x: x + added, backbone["narrow"])}

    monkeypatch.setattr(cache, "init_backbone", bad)
    with pytest.raises(ValueError, match=sentence):
        tokens_of(changed)
    shutil.rmtree(cache.token_folder(changed))  # its params


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_bad_token_is_named_and_masked_ones_are_not(dtype, value):
    tokens, mask = np.zeros((3, 2, 4), dtype), np.ones((3, 2), bool)
    mask[0, 1] = False
    tokens[0, 1, 2] = value
    cache._check_finite(tokens, mask, 100)
    tokens[2, 1, 3] = value
    with pytest.raises(ValueError, match=r"of frame 102 (must be finite, got .* token 1:|exceed)"):
        cache._check_finite(tokens, mask, 100)


def test_one_command_computes_the_tokens_and_another_waits_for_them(config, monkeypatch):
    changed = with_instruction_steps(config, 8)
    encode, waiting = cache._encode_missing, []

    def meanwhile(*args):
        waiting.append(pool.submit(tokens_of, changed))
        with pytest.raises(concurrent.futures.TimeoutError):
            waiting[0].result(1)
        encode(*args)

    def both():
        first = tokens_of(changed)
        return first, waiting[0].result(60)  # it has found all tokens

    monkeypatch.setattr(cache, "_encode_missing", meanwhile)
    warned = pytest.warns(UserWarning, match=r"/\w+ is in use by process \d+ .* waits for it")
    with concurrent.futures.ThreadPoolExecutor() as pool, warned:
        first, second = both()
    assert len(waiting) == 1
    files = first[1].tokens.files
    assert second[1].tokens.files == files
    folder = files[0].parents[1]
    assert not list(folder.parent.glob("*.lock"))
    with pytest.raises(FileExistsError, match="params exists already, perhaps written by another"):
        checkpoint.save_params(folder / "params", {"w": np.ones(3)})


@pytest.mark.parametrize("field", ["cache_batch", "max_cache_gb"])
def test_a_size_that_is_not_positive_is_refused(field, config):
    with pytest.raises(ValueError, match=f"{field} must be (above 0|at least 1e-12), got 0"):
        dataclasses.replace(config, **{field: 0})


@pytest.mark.slow
def test_the_file_is_reused_unless_something_that_it_depends_on_changes(config):
    files = {
        str(tokens_of(changed)[1].tokens.files[0])
        for changed in [
            config,
            config,
            dataclasses.replace(config, stride=7, pack=True),  # irrelevant to single frames
            dataclasses.replace(config, cache_batch=8, max_cache_gb=1),
            dataclasses.replace(config, seed=1),
            with_instruction_steps(config, 2),
        ]
    }
    assert len(files) == 3


def with_instruction_steps(config, steps):
    return dataclasses.replace(
        config, agent=dataclasses.replace(config.agent, instruction_steps=steps)
    )


@pytest.mark.slow
def test_a_full_disk_raises_one_sentence_and_leaves_no_file(config):
    # compiled before: programs that JAX caches on the full disk would be damaged
    tokens_of(with_instruction_steps(config, 4))
    changed = with_instruction_steps(config, 3)
    with full_disk(), pytest.raises(OSError, match=r"could not save into .*\.tokens/\w+ \(.*File"):
        tokens_of(changed)
    folder = tokens_of(changed)[1].tokens.files[0].parents[1]
    shutil.rmtree(folder / "shard_00000")
    with (
        full_disk(),
        pytest.raises(OSError, match=r"\.tokens/\w+ could not be written .*free space"),
    ):
        tokens_of(changed)
    assert [path.name for path in folder.iterdir()] == ["params"]


@contextlib.contextmanager
def full_disk():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_complete_cache_needs_no_params(config, monkeypatch):
    expected = tokens_of(config)[1].tokens.files
    monkeypatch.setattr(cache, "init_backbone", None)
    assert tokens_of(config)[1].tokens.files == expected


@pytest.mark.slow
def test_a_file_that_another_program_has_written_by_now_is_kept(config, small_shards, monkeypatch):
    changed = with_instruction_steps(config, 7)
    files = tokens_of(changed)[1].tokens.files
    before = [file.stat().st_mtime_ns for file in files]
    shutil.rmtree(files[0].parent)
    list_missing, encode = token_files.missing_shards, cache._encode_frames
    monkeypatch.setattr(token_files, "missing_shards", lambda *args: [0, *list_missing(*args), 1])
    monkeypatch.setattr(token_files, "check_shard", lambda *args, **options: None)
    passes = []
    monkeypatch.setattr(
        cache, "_encode_frames", lambda *args: passes.append(args[2]) or encode(*args)
    )
    tokens_of(changed)
    assert [wanted.start for wanted in passes] == [0]
    assert [file.stat().st_mtime_ns for file in files[1:]] == before[1:]
