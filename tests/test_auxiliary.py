"""Auxiliary losses compared with NumPy: never across the window, an episode or a masked step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_demos

from train.imitate import make_loss
from train.setup import init_params
from vla_jax.training import auxiliary, captions
from vla_jax.training.auxiliary import AuxiliaryConfig, AuxiliaryPrediction
from vla_jax.training.loss_terms import LossWeights
from vla_jax.training.update import Counted
from vla_jax.types import Batch, Observation, Tokens

B, W, F, N, D, H, S, V = 3, 6, 2, 2, 3, 4, 3, 7
SIZE, PATCH = 4, 2  # pixels
TOKENS = AuxiliaryConfig(forward_horizon=F, forward_sizes=(5,))
PIXELS = dataclasses.replace(TOKENS, forward_target="pixels", forward_patch_size=PATCH)
BOTH = dataclasses.replace(TOKENS, caption=True, caption_size=5)
FRAMES = {"tokens": N * D}
PICTURES = dict.fromkeys(auxiliary.CAMERAS, SIZE * SIZE * 3)


def draw_batch(seed=0, *, cameras=auxiliary.CAMERAS):
    """Returns a batch with left padding, an episode start and a masked step inside, and tokens."""
    random = np.random.default_rng(seed)
    shape = (B, W, SIZE, SIZE, 3)
    pictures = {name: random.integers(0, 256, shape, np.uint8) for name in cameras}
    mask, reset = np.ones((B, W), bool), np.zeros((B, W), bool)
    mask[0, :2] = mask[1, 4] = False
    reset[2, 3] = True
    instruction = random.integers(1, V, (B, W, S)).astype(np.int32)
    instruction[:, 3:] = 0
    observation = Observation(**pictures, instruction=instruction)
    no_action = np.zeros((B, W, 1, 1), np.float32)
    batch = Batch(observation, None, mask, no_action, no_action[..., 0] > 0, reset)
    return batch, random.normal(size=(B, W, N, D)).astype(np.float32)


def draw_features(seed=0):
    return np.random.default_rng(seed).normal(size=(B, W, H)).astype(np.float32)


@functools.cache
def params(config):
    sizes = PICTURES if config.forward_target == "pixels" else FRAMES
    return auxiliary.init(
        jax.random.key(0), config, feature_size=H, target_sizes=sizes, vocab_size=V
    )


def loss_of(params, features, tokens, config, batch):
    prediction = auxiliary.apply(params, config, features, captions.visible_instruction(batch))
    return auxiliary.loss(prediction, config, batch, tokens)


def assert_close(one, other, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), one, other)


# --- valid pairs of steps ---------------------------------------------------------------------


def pairs(mask, reset, horizon):
    """True where step t + 1 + f continues the episode of step t and both are real."""
    valid = np.zeros((*mask.shape, horizon), bool)
    for row, t, f in np.ndindex(*valid.shape):
        later = t + 1 + f
        if later < mask.shape[1]:
            separated = reset[row, t + 1 : later + 1].any()
            valid[row, t, f] = mask[row, t] and mask[row, later] and not separated
    return valid


@pytest.mark.parametrize("horizon", [1, 3, 9])
def test_prediction_targets_are_real_steps_of_the_same_window_and_episode(horizon):
    random = np.random.default_rng(horizon)
    mask, reset = random.random((50, 7)) < 0.8, random.random((50, 7)) < 0.2
    valid = auxiliary.forward_mask(mask, horizon, reset)
    np.testing.assert_array_equal(valid, pairs(mask, reset, horizon))
    never = np.zeros_like(reset)
    valid = auxiliary.forward_mask(mask, horizon)
    np.testing.assert_array_equal(valid, pairs(mask, never, horizon))


def test_the_targets_are_the_following_steps():
    steps = np.random.default_rng(0).normal(size=(B, W, N))
    targets = auxiliary.ahead(steps, F)
    assert targets.shape == (B, W, F, N)
    for t in range(W - F):
        np.testing.assert_array_equal(targets[:, t], jnp.asarray(steps[:, t + 1 : t + 1 + F]))


@pytest.mark.slow
def test_two_episodes_in_a_window_equal_two_windows():
    batch, tokens = draw_batch()
    features, weights = draw_features(), params(BOTH)
    prediction = auxiliary.apply(weights, BOTH, features, captions.visible_instruction(batch))

    def error(rows, steps):
        part = jax.tree.map(lambda leaf: leaf[rows, steps], (prediction, batch, tokens))
        mask = auxiliary.forward_mask(part[1].timestep_mask, F, part[1].reset)
        terms, _ = auxiliary.loss(part[0], BOTH, *part[1:])
        return float(terms["forward_tokens"]) * mask.sum(), mask.sum()

    alone = [error(slice(2, 3), slice(0, 3)), error(slice(2, 3), slice(3, W))]
    assert_close(error(slice(2, 3), slice(0, W)), tuple(np.sum(alone, axis=0)), 1e-5)


# --- the losses -------------------------------------------------------------------------------


def test_the_token_loss_is_the_mean_squared_error_over_valid_targets():
    batch, tokens = draw_batch()
    prediction = auxiliary.apply(params(TOKENS), TOKENS, draw_features())
    assert prediction.tokens.shape == (B, W, F, N * D)
    assert prediction[1:] == (None, None, None)
    errors = [
        (prediction.tokens[row, t, f] - tokens[row, t + 1 + f].reshape(-1)) ** 2
        for row, t, f in np.argwhere(pairs(batch.timestep_mask, batch.reset, F))
    ]
    terms, metrics = auxiliary.loss(prediction, TOKENS, batch, tokens)
    assert terms.keys() == {"forward_tokens"}
    assert metrics == {}
    assert_close(terms["forward_tokens"], np.mean(errors), 1e-5)


@pytest.mark.parametrize("cameras", [auxiliary.CAMERAS, auxiliary.CAMERAS[:1]])
def test_the_pixel_loss_has_a_term_for_each_camera(cameras):
    batch, tokens = draw_batch(cameras=cameras)
    prediction = auxiliary.apply(params(PIXELS), PIXELS, draw_features())
    terms, _ = auxiliary.loss(prediction, PIXELS, batch, tokens)
    assert terms.keys() == {f"forward_{name}" for name in cameras}
    for name in cameras:
        predicted, pictures = getattr(prediction, name), getattr(batch.observation, name) / 255
        assert predicted.shape == (B, W, F, (SIZE // PATCH) ** 2, 3 * PATCH**2)
        errors = [
            (predicted[row, t, f, 2 * down + right].reshape(PATCH, PATCH, 3) - patch) ** 2
            for row, t, f in np.argwhere(pairs(batch.timestep_mask, batch.reset, F))
            for down, right in np.ndindex(2, 2)
            for patch in [pictures[row, t + 1 + f][_at(down), _at(right)]]
        ]
        assert_close(terms[f"forward_{name}"], np.mean(errors), 1e-5)


def _at(place):
    return slice(place * PATCH, (place + 1) * PATCH)


def test_the_caption_loss_is_that_of_module_captions():
    batch, tokens = draw_batch()
    features, words = draw_features(), captions.visible_instruction(batch)
    prediction = auxiliary.apply(params(BOTH), BOTH, features, words)
    logits = captions.apply(params(BOTH)["caption"], features, words)
    assert_close(prediction.caption, logits)
    terms, metrics = auxiliary.loss(prediction, BOTH, batch, tokens)
    assert terms.keys() == {"forward_tokens", "caption"}
    assert_close((terms["caption"], metrics), captions.loss(logits, words))


@functools.partial(jax.jit, static_argnums=3)
@functools.partial(jax.grad, argnums=(0, 1, 2))
def gradient(params, features, tokens, config, batch):
    return sum(loss_of(params, features, tokens, config, batch)[0].values())


def test_the_gradient_reaches_the_features_but_not_the_target_tokens():
    batch, tokens = draw_batch()
    inputs = (params(BOTH), draw_features(), tokens, BOTH, batch)
    params_gradient, features_gradient, tokens_gradient = gradient(*inputs)
    assert all(leaf.any() for leaf in jax.tree.leaves(params_gradient))
    follows = pairs(batch.timestep_mask, batch.reset, F).any(-1)
    has_words = (np.asarray(captions.visible_instruction(batch)) > 0).any(-1)
    np.testing.assert_array_equal((features_gradient != 0).any(-1), follows | has_words)
    assert not tokens_gradient.any()


def test_masked_steps_may_contain_anything():
    batch, tokens = draw_batch()
    with_nan = np.where(batch.timestep_mask[..., None, None], tokens, np.nan)
    inputs = (params(BOTH), draw_features())
    assert_close(loss_of(*inputs, with_nan, BOTH, batch), loss_of(*inputs, tokens, BOTH, batch), 0)
    assert_close(
        gradient(*inputs, with_nan, BOTH, batch), gradient(*inputs, tokens, BOTH, batch), 0
    )
    all_masked = batch._replace(timestep_mask=np.zeros((B, W), bool))
    terms, metrics = loss_of(*inputs, tokens, BOTH, all_masked)
    assert all(value == 0 for value in [*terms.values(), *metrics.values()])
    gradients = gradient(*inputs, tokens, BOTH, all_masked)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))


def test_only_enabled_losses_have_params():
    assert not auxiliary.is_on(AuxiliaryConfig())
    assert params(AuxiliaryConfig()) == {}
    assert auxiliary.apply({}, AuxiliaryConfig(), draw_features()) == AuxiliaryPrediction()
    assert params(TOKENS).keys() == {"forward"}
    assert params(PIXELS)["forward"].keys() == set(auxiliary.CAMERAS)
    assert params(AuxiliaryConfig(caption=True, caption_size=5)).keys() == {"caption"}
    assert params(BOTH).keys() == {"forward", "caption"}
    assert all(auxiliary.is_on(config) for config in (TOKENS, AuxiliaryConfig(caption=True)))


@pytest.mark.slow
def test_the_training_loss_sums_all_terms_and_needs_no_words_without_a_caption():
    config = tiny_demos.imitation("", "", auxiliary=TOKENS, loss=LossWeights(gripper=0.5))
    batch, _ = draw_batch(cameras=())
    batch = batch._replace(
        observation=Observation(),
        tokens=Tokens(
            np.random.default_rng(1).normal(size=(B, W, 3, 8)).astype(np.float32),
            np.ones((B, W, 3), bool),
        ),
        action=np.ones((B, W, 2, 7), np.float32),
        action_mask=np.ones((B, W, 2), bool),
    )
    key = jax.random.key(0)
    loss, metrics = make_loss(config)(init_params(key, config), Counted(batch, jnp.array(0)), key)
    terms = (metrics["loss_arm"], metrics["loss_gripper"], metrics["loss_forward_tokens"])
    assert all(term > 0 for term in terms)
    assert_close(loss, np.dot([1, 0.5, 0.05], terms))


# --- errors -----------------------------------------------------------------------------------

MISTAKES = {
    "horizon": ({"forward_horizon": -1}, r"auxiliary\.forward_horizon must be at least 0, got -1"),
    "sizes": (
        {"forward_sizes": (8, 0)},
        r"auxiliary\.forward_sizes must be at least 1 each, got \(8, 0\)",
    ),
    "target": (
        {"forward_target": "pixel"},
        r"unknown auxiliary\.forward_target 'pixel'; .* Did you mean 'pixels'",
    ),
    "patch": ({"forward_patch_size": 0}, r"auxiliary\.forward_patch_size must be at least 1"),
    "caption": ({"caption_size": 0}, r"auxiliary\.caption_size must be at least 1, got 0"),
}


@pytest.mark.parametrize(("changes", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_a_config_out_of_range_is_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        AuxiliaryConfig(**changes)


def test_a_pixel_loss_without_images_is_refused():
    batch, tokens = draw_batch(cameras=())
    with pytest.raises(ValueError, match=r"forward_target 'pixels' needs images .* got none"):
        auxiliary.frames(PIXELS, batch.observation, tokens)


def test_patches_that_do_not_divide_the_image_are_refused():
    with pytest.raises(ValueError, match="forward_patch_size must divide images of 4 x 4 pixels"):
        auxiliary.patches(np.zeros((1, 4, 4, 3), np.uint8), 3)


def test_a_caption_without_words_is_refused():
    with pytest.raises(
        ValueError, match=r"words must be ids .* pass captions\.visible_instruction"
    ):
        auxiliary.apply(params(BOTH), BOTH, draw_features())


TRAININGS = {  # refused before any training
    "state": ({"auxiliary": PIXELS}, r"'pixels' needs images in the batch, got backbone 'state'"),
    "cached": (
        {"auxiliary": PIXELS, "backbone": tiny_demos.PERCEIVER, "frozen_backbone": True},
        "'pixels' needs images .* 'perceiver' with frozen_backbone True; choose 'tokens'",
    ),
    "patches": (
        {
            "auxiliary": dataclasses.replace(PIXELS, forward_patch_size=5),
            "backbone": tiny_demos.PERCEIVER,
        },
        "forward_patch_size must divide the image size 16 × 16 pixels, got 5",
    ),
    "beyond the window": (
        {"auxiliary": AuxiliaryConfig(forward_horizon=6)},
        r"auxiliary\.forward_horizon must be below window_size = 6, got 6; reduce",
    ),
    "a kl weight": (
        {"loss": LossWeights(kl=2.0)},
        r"loss\.kl must be 0\.05, since train\.imitate has no such loss term, got 2\.0; add",
    ),
    "a cotrain weight": (
        {"loss": LossWeights(cotrain=0.0)},
        r"loss\.cotrain must be 0\.05, since .* got 0\.0",
    ),
    "no forward weight": (
        {"auxiliary": TOKENS, "loss": LossWeights(forward=0)},
        r"loss\.forward must be above 0 if its auxiliary head is enabled, got 0",
    ),
    "no caption weight": (
        {"auxiliary": BOTH, "loss": LossWeights(caption=0)},
        r"loss\.caption must be above 0 if its auxiliary head is enabled, got 0",
    ),
}


@pytest.mark.parametrize(("options", "sentence"), TRAININGS.values(), ids=TRAININGS)
def test_a_training_with_an_impossible_auxiliary_loss_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny_demos.imitation("demos", "run", **options)
