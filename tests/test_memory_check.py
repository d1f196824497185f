"""A training that cannot fit into memory is refused before data are read."""

import dataclasses

import jax
import pytest
import tiny_demos

from train import cache, imitate, memory_check
from train.imitate import make_loss
from train.setup import compute_norm_stats, make_windows, param_shapes, read_dataset, trained_shapes
from vla_jax.backbones import registry
from vla_jax.data.packing import Packed
from vla_jax.training import memory_estimate, parallel
from vla_jax.training.memory_estimate import MemoryEstimate
from vla_jax.training.optim import OptimConfig

ESTIMATE = MemoryEstimate(4 * 10**9, 3 * 10**9, 6 * 10**9, 0, 10**9)
BACKBONES = {"state": tiny_demos.STATE, "perceiver": tiny_demos.PERCEIVER}


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    return tiny_demos.write(tmp_path_factory.mktemp("demos") / "table")


@pytest.fixture
def config(demos, tmp_path):
    return tiny_demos.imitation(demos, tmp_path / "run")


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
def test_the_example_batch_has_the_shapes_of_real_ones(backbone, pack, demos):
    config = tiny_demos.imitation(demos, "", backbone=backbone, pack=pack)
    dataset, decoder = read_dataset(config), config.agent.policy.decoder
    windows = make_windows(
        config,
        dataset,
        compute_norm_stats(config, dataset),
        window_size=decoder.window_size,
        action_horizon=decoder.action_horizon,
    )
    with imitate.make_batches(config, Packed(windows) if pack else windows) as batches:
        real = next(batches)
    example = memory_check.example_batch(config)
    for part, wanted in zip(example.observation, real.observation, strict=True):
        assert part is None or (part.shape, part.dtype) == (wanted.shape, wanted.dtype)
    assert example.observation.instruction is not None
    rest = [jax.tree.map(describe, batch._replace(observation=None)) for batch in (example, real)]
    assert rest[0] == rest[1]


def describe(leaf):
    return leaf.shape, str(leaf.dtype)


def test_cached_tokens_replace_the_images(demos):
    config = tiny_demos.imitation(
        demos, "", backbone=tiny_demos.PERCEIVER, frozen_backbone=True
    )  # fmt: skip
    batch = memory_check.example_batch(config)
    assert batch.observation.image_primary is None
    assert batch.tokens.tokens.shape == (8, 6, 4, 8)
    estimate = memory_check.estimate_memory(config, make_loss(config), trained_shapes(config))
    assert estimate.gradients == estimate.params  # those of the decoder alone


def test_the_computation_of_cached_tokens_is_checked_before_it_starts(demos, tmp_path, monkeypatch):
    config = tiny_demos.imitation(
        demos, tmp_path / "run", backbone=tiny_demos.PERCEIVER, frozen_backbone=True, seed=3
    )
    monkeypatch.setattr(cache, "init_backbone", None)
    monkeypatch.setattr(memory_estimate, "available_bytes", lambda _: 10**4)
    for script in (cache.cache, imitate.imitate):
        monkeypatch.setattr(imitate, "check_memory", lambda *_: None)
        with pytest.raises(
            ValueError, match=r"for the computation of cached tokens \(params .*use a"
        ):
            script(config)


def test_the_estimate_of_encoding_agrees_with_the_compiled_pass(demos):
    config = tiny_demos.imitation(demos, "", backbone=tiny_demos.PERCEIVER, cache_batch=16)
    mesh, backbone = parallel.make_mesh("data=1"), config.agent.policy.backbone
    found = memory_check.estimate_encoding(config, mesh)
    shapes = param_shapes(config)["backbone"]
    batch = registry.get(backbone).example(backbone)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((16, 1, *x.shape), x.dtype), batch)
    compiled = cache._encode.lower(shapes, backbone, "float32", batch).compile().memory_analysis()
    inputs = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
    assert found.params == sum(4 * leaf.size for leaf in jax.tree.leaves(shapes))
    assert 0.6 < (found.activations - inputs) / compiled.temp_size_in_bytes < 1.6


def test_a_training_that_cannot_fit_is_refused_before_data_are_read(config, monkeypatch):
    monkeypatch.setattr(imitate, "read_training_inputs", refuse_to_read)
    monkeypatch.setattr(memory_estimate, "available_bytes", lambda _: 10**4)
    with pytest.raises(ValueError, match=r"memory per device must be .*got 0\.0 GB; train fewer"):
        imitate.imitate(config)


def refuse_to_read(config):
    raise AssertionError("the data set was read")


def test_half_of_the_activations_may_be_missing(config, monkeypatch):
    monkeypatch.setattr(memory_check, "estimate_memory", lambda *_: ESTIMATE)
    monkeypatch.setattr(memory_estimate, "available_bytes", lambda _: ESTIMATE.least)
    memory_check.check_memory(config, make_loss(config))
    monkeypatch.setattr(memory_estimate, "available_bytes", lambda _: ESTIMATE.least - 1)
    with pytest.raises(ValueError, match=r"13\.5 GB for this training \(params 4\.00 GB, grad"):
        memory_check.check_memory(config, make_loss(config))


@pytest.mark.parametrize(("available", "end"), [(24 * 10**9, " of 24.0 GB available"), (None, "")])
def test_the_estimate_is_printed_for_large_models_only(available, end, config, monkeypatch, capsys):
    monkeypatch.setattr(memory_estimate, "available_bytes", lambda _: available)
    monkeypatch.setattr(memory_check, "estimate_memory", lambda *_: ESTIMATE)
    memory_check.check_memory(config, make_loss(config))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(memory_check, "LARGE", 100)
    memory_check.check_memory(config, make_loss(config))
    assert capsys.readouterr().err == (
        "memory per device for this training: params 4.00 GB, gradients 3.00 GB, "
        "optimiser 6.00 GB, EMA 0.00 GB, "
        f"activations 1.00 GB; total 14.0 GB{end}\n"
    )


def test_activations_are_unknown_for_a_backbone_without_an_example(config, monkeypatch):
    member = registry.BACKBONES["state"]._replace(example=None)
    monkeypatch.setitem(registry.BACKBONES, "state", member)
    assert memory_check.example_batch(config) is None
    estimate = memory_check.estimate_memory(config, make_loss(config), param_shapes(config))
    assert estimate.activations is None
    assert memory_check.describe(estimate).endswith("activations unknown")


def test_training_a_backbone_whose_tokens_are_cached_is_refused(config):
    optim = OptimConfig(warmup_steps=0, train=("backbone/*/kernel",))
    changed = dataclasses.replace(config, frozen_backbone=True, optim=optim)
    with pytest.raises(ValueError, match="train must match no param of the backbone"):
        imitate.imitate(changed)
