"""Low-rank adaptation: factors, their training, merging, and limits of the config."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_vlm import CONFIGS, params

from vla_jax import trees
from vla_jax.backbones.registry import BACKBONES
from vla_jax.nn import lora
from vla_jax.nn.lora import LoraConfig
from vla_jax.training import optim, update
from vla_jax.types import Observation

TARGETS = ("language/layers/query", "language/layers/down", "vision/layers/*")
LORA = LoraConfig(rank=2, alpha=4.0, targets=TARGETS)


CONFIG = CONFIGS["paligemma"]
RUN = jax.jit(BACKBONES["paligemma"].apply, static_argnums=1)


def observe(config, seed=0):
    random = np.random.default_rng(seed)
    size = config.image_shape
    pictures = random.integers(0, 256, (2, 2, *size, 3)).astype(np.uint8)
    member = BACKBONES[config.kind]
    ids = np.stack([member.tokenize(config, words) for words in ("lift", "push it")])
    return Observation(
        image_primary=pictures[0],
        image_wrist=pictures[1],
        proprio=random.normal(size=(2, 8)).astype(np.float32),
        instruction=ids,
    )


def linear_map(dtype=jnp.float32, lead=()):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"kernel": (6, 5), "lora_a": (6, 2), "lora_b": (2, 5)}
    arrays = {
        name: jax.random.normal(key, (*lead, *shape))
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    scale = 0.5 * (1 + jnp.arange(lead[0] if lead else 1, dtype=jnp.float32).reshape(lead))
    return {**arrays, "kernel": arrays["kernel"].astype(dtype), "lora_scale": scale}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("lead", [(), (3,)])
def test_a_merged_kernel_is_the_kernel_plus_the_scaled_product(dtype, lead):
    adapted = linear_map(dtype, lead)
    merged = lora.merge({"a": {"b": adapted}, "c": {"scale": jnp.ones(3)}})
    assert set(merged["a"]["b"]) == {"kernel"}
    assert merged["a"]["b"]["kernel"].dtype == dtype
    kernel, a, b, scale = (
        np.asarray(adapted[name], np.float64)
        for name in ("kernel", "lora_a", "lora_b", "lora_scale")
    )
    expected = kernel + scale[..., None, None] * (a @ b)
    tolerance = 1e-6 if dtype == jnp.float32 else 1 / 128
    found = np.asarray(merged["a"]["b"]["kernel"], np.float64)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance / 10)


def test_new_factors_change_nothing_and_have_the_scale_of_the_config():
    plain = params(CONFIG)
    adapted = lora.add(jax.random.key(0), plain, LORA)
    query = adapted["language"]["layers"]["query"]
    assert query["lora_a"].shape == (2, 16, 2)
    assert np.abs(query["lora_a"]).max() <= 16**-0.5
    assert not query["lora_b"].any()
    np.testing.assert_array_equal(query["lora_scale"], [2, 2])
    assert "lora_a" not in adapted["language"]["layers"]["key"]
    before, after = (RUN(p, CONFIG, observe(CONFIG)).tokens for p in (plain, adapted))
    np.testing.assert_array_equal(before, after)
    options = dataclasses.replace(CONFIG.options, lora=LORA)
    config = dataclasses.replace(CONFIG, options=options)
    init = jax.eval_shape(lambda key: BACKBONES[config.kind].init(key, config), jax.random.key(0))
    assert not trees.first_difference(init, adapted)


def test_training_changes_only_the_factors_and_the_learned_token_and_merging_keeps_outputs():
    start = {"backbone": lora.add(jax.random.key(0), params(CONFIG), LORA)}
    observation = observe(CONFIG)

    def loss_fn(params, batch, key):
        tokens = BACKBONES["paligemma"].apply(params["backbone"], CONFIG, batch).tokens
        return jnp.square(tokens - 1).mean(), {}

    settings = optim.OptimConfig(
        learning_rate=1e-2,
        warmup_steps=0,
        freeze=("backbone/*",),
        train=("backbone/*/lora_a", "backbone/*/lora_b", "backbone/action_token"),
    )
    state, step = make_training(loss_fn, settings, start)
    losses = []
    for number in range(3):
        state, metrics = step(state, observation, jax.random.key(number))
        losses.append(float(metrics["loss"]))
    assert losses[2] < losses[0]
    before, after = map(trees.leaves_by_path, (start, state.params))
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {
        path for path in before if path.endswith(("/lora_a", "/lora_b", "/action_token"))
    }
    trained = state.params["backbone"]
    unmerged, merged = (RUN(p, CONFIG, observation).tokens for p in (trained, lora.merge(trained)))
    np.testing.assert_allclose(merged, unmerged, atol=2e-5)
    base = RUN(start["backbone"], CONFIG, observation).tokens
    assert np.abs(unmerged - base).max() > 1e-3


def make_training(loss_fn, settings, start):
    optimizer = optim.make_optimizer(settings, 10, start)
    globs = {"freeze": settings.freeze, "train": settings.train}
    state = update.init_train_state(start, optimizer, **globs)
    return state, jax.jit(update.make_update(loss_fn, optimizer, **globs))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"rank": -1}, "rank must be at least 0, got -1"),
        ({"rank": 2, "alpha": 0.0}, "alpha must be above 0 and finite, got 0.0"),
        ({"rank": 2, "alpha": float("nan")}, "alpha must be above 0 and finite, got nan"),
        ({"rank": 2, "alpha": float("inf")}, "alpha must be above 0 and finite, got inf"),
        ({"rank": 2, "targets": ()}, "targets must name at least one linear map"),
    ],
)
def test_a_config_out_of_range_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        LoraConfig(**fields)


def test_a_target_without_a_map_is_refused():
    plain = params(CONFIG)
    with pytest.raises(ValueError, match=r"'language/layers/quary' of lora\.targets"):
        lora.add(jax.random.key(0), plain, LoraConfig(2, targets=("language/layers/quary",)))


def test_the_scale_follows_rank_and_alpha():
    assert LoraConfig().scale == 0
    assert LoraConfig(4, 8.0).scale == 2
    assert LoraConfig(4, 8.0, rank_stabilized=True).scale == 4
