"""Cached tokens equal the outputs of the backbone; a cache is reused only if nothing changed."""

import dataclasses
import pathlib
import resource

import jax
import numpy as np
import pytest
import tiny_demos

from train import cache
from train.setup import init_params, make_windows, read_dataset
from vla_jax.data import normalize
from vla_jax.policies import policy


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    demos = tiny_demos.write(tmp_path_factory.mktemp("demos") / "table")
    return tiny_demos.imitation(demos, "", backbone=tiny_demos.PERCEIVER)


def tokens_of(config, *, seed=0):
    dataset = read_dataset(config)
    params = init_params(jax.random.key(seed), config)
    norm_stats = normalize.compute_norm_stats(dataset)
    return params, cache.frame_tokens(params, config, dataset, norm_stats)


@pytest.mark.slow
def test_cached_tokens_equal_the_outputs_of_the_backbone(config, monkeypatch):
    monkeypatch.setattr(cache, "CHUNK", 32)  # several chunks, the last one shorter
    params, tokens = tokens_of(config)
    dataset = read_dataset(config)
    assert all(isinstance(part, np.memmap) for part in tokens)
    assert {len(part) for part in tokens} == {dataset.episode_ends[-1]}
    assert len(tokens.tokens) % 32
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


def test_the_file_is_reused_unless_something_that_it_depends_on_changes(config):
    files = {
        str(tokens_of(changed, seed=seed)[1].tokens.filename)
        for changed, seed in [
            (config, 0),
            (config, 0),
            (dataclasses.replace(config, stride=7, pack=True), 0),  # irrelevant to single frames
            (config, 1),
            (with_instruction_steps(config, 2), 0),
        ]
    }
    assert len(files) == 3


def with_instruction_steps(config, steps):
    return dataclasses.replace(
        config, agent=dataclasses.replace(config.agent, instruction_steps=steps)
    )


def test_a_full_disk_raises_one_sentence_and_leaves_no_file(config):
    changed = with_instruction_steps(config, 3)
    folder = pathlib.Path(config.dataset.path) / ".tokens"
    before = set(folder.glob("*"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=r"\.tokens/\w+ could not be written .*free space"):
            tokens_of(changed)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert set(folder.glob("*")) == before
