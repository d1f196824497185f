"""Instruction reconstruction: target words, logits of the GRU against PyTorch, greedy decoding."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vla_jax.training import captions
from vla_jax.types import Batch, Observation

B, W, S, H, E, V = 2, 5, 4, 3, 6, 8
PARAMS = captions.init(jax.random.key(0), H, E, V)
apply, decode = jax.jit(captions.apply), jax.jit(captions.decode, static_argnames="max_words")


def draw_words(seed, *shape):
    """Instructions of 1 to S words, padded with 0."""
    random = np.random.default_rng(seed)
    length = random.integers(1, S + 1, (*shape, 1))
    words = random.integers(1, V, (*shape, S)) * (np.arange(S) < length)
    return words.astype(np.int32)


def draw_features(seed=0):
    return np.random.default_rng(seed).normal(size=(B, W, H)).astype(np.float32)


def batch_of(instruction, timestep_mask, reset=None):
    observation = Observation(instruction=instruction)
    nothing = np.zeros((*timestep_mask.shape, 1, 1), np.float32)
    return Batch(observation, None, timestep_mask, nothing, nothing[..., 0] > 0, reset)


def assert_close(one, other, atol=1e-6):
    np.testing.assert_allclose(one, other, rtol=0, atol=atol)


# --- target words -----------------------------------------------------------------------------


def expected_instruction(instruction, timestep_mask, reset):
    """The latest visible instruction since the last reset, computed in a loop."""
    words = np.zeros_like(instruction)
    for row in range(len(words)):
        latest = np.zeros(S, np.int32)
        for t in range(words.shape[1]):
            if reset[row, t]:
                latest = np.zeros(S, np.int32)
            if timestep_mask[row, t] and instruction[row, t].any():
                latest = instruction[row, t]
            if timestep_mask[row, t]:
                words[row, t] = latest
    return words


def test_a_step_has_the_latest_instruction_that_was_visible_since_the_last_reset():
    random = np.random.default_rng(0)
    shape = (200, 9)
    instruction = draw_words(1, *shape) * (random.random((*shape, 1)) < 0.3)
    mask, reset = random.random(shape) < 0.7, random.random(shape) < 0.2
    expected = expected_instruction(instruction, mask, reset)
    assert 0.2 < (expected > 0).any(-1).mean() < 0.8
    np.testing.assert_array_equal(
        captions.visible_instruction(batch_of(instruction, mask, reset)), expected
    )
    never = np.zeros_like(reset)
    expected = expected_instruction(instruction, mask, never)
    for reset in (None, never):
        np.testing.assert_array_equal(
            captions.visible_instruction(batch_of(instruction, mask, reset)), expected
        )


def test_a_batch_without_instructions_raises_one_sentence():
    with pytest.raises(ValueError, match=r"observation\.instruction must be in the batch.*None"):
        captions.visible_instruction(batch_of(None, np.ones((B, W), bool)))


# --- the GRU ----------------------------------------------------------------------------------


def torch_logits(features, words):
    weights = jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf)), PARAMS)
    cell = weights["recurrence"]["layers_0"]["forward"]
    gru = torch.nn.GRU(E, E, batch_first=True)
    gru.load_state_dict(
        {
            "weight_ih_l0": cell["input_kernel"].T,
            "weight_hh_l0": cell["recurrent_kernel"].T,
            "bias_ih_l0": cell["input_bias"],
            "bias_hh_l0": cell["recurrent_bias"],
        }
    )
    begun = np.concatenate([np.zeros_like(words[..., :1]), words[..., :-1]], -1).reshape(-1, S)
    inputs = torch.nn.functional.embedding(torch.tensor(begun), weights["embedding"])
    summary = torch.tensor(features).reshape(-1, H) @ weights["summary"]["kernel"]
    summary = torch.tanh(summary + weights["summary"]["bias"])
    with torch.no_grad():
        hidden, _ = gru(inputs + summary[:, None], summary[None])
        logits = hidden @ weights["output"]["kernel"] + weights["output"]["bias"]
    return logits.reshape(B, W, S, V).numpy()


def test_the_logits_equal_those_of_a_gru_in_pytorch():
    features, words = draw_features(), draw_words(2, B, W)
    assert_close(apply(PARAMS, features, words), torch_logits(features, words), 1e-5)


def test_a_words_logits_depend_only_on_earlier_words():
    features, words, other = draw_features(), draw_words(2, B, W), draw_words(3, B, W)
    logits = apply(PARAMS, features, words)
    for place in range(S):
        mixed = np.concatenate([words[..., :place], other[..., place:]], axis=-1)
        changed = apply(PARAMS, features, mixed)
        np.testing.assert_array_equal(changed[..., : place + 1, :], logits[..., : place + 1, :])
    assert np.abs(np.asarray(changed - apply(PARAMS, features, other))).max() > 1e-3


@pytest.mark.parametrize("word", [V, -1])
def test_words_outside_the_vocabulary_do_not_give_the_logits_of_its_last_word(word):
    words = np.full((B, W, S), word, np.int32)
    assert not np.isfinite(np.asarray(apply(PARAMS, draw_features(), words))[..., 1:, :]).any()


def varied_params(params):
    """Params whose greedy instructions differ between steps and end at different positions."""
    louder = {"kernel": 30 * params["summary"]["kernel"], "bias": params["summary"]["bias"]}
    output = {**params["output"], "bias": params["output"]["bias"].at[0].set(0.35)}
    return {**params, "summary": louder, "output": output}


def test_greedy_decoding_takes_the_most_probable_word_until_the_end_token():
    params, features = varied_params(PARAMS), draw_features()
    words = np.zeros((B, W, S), np.int32)
    for place in range(S):
        likeliest = np.argmax(apply(params, features, words), axis=-1)[..., place]
        ended = (words[..., :place] == 0).any(-1)
        words[..., place] = np.where(ended, 0, likeliest)
    assert len(np.unique(words.reshape(-1, S), axis=0)) > 2
    assert (words[..., -1] == 0).any()
    assert (words[..., -1] > 0).any()
    np.testing.assert_array_equal(decode(params, features, max_words=S), words)
    np.testing.assert_array_equal(decode(params, features[:, 0], max_words=S), words[:, 0])
    assert decode(params, features, max_words=S).dtype == jnp.int32


# --- the loss ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_loss_is_the_cross_entropy_of_the_words_and_the_end_token():
    words = draw_words(4, B, W)
    words[0, 2:] = 0  # steps without a visible instruction
    logits = np.random.default_rng(0).normal(size=(B, W, S, V)).astype(np.float32)
    entropy, right = [], []
    for sentence, scores in zip(words.reshape(-1, S), logits.reshape(-1, S, V), strict=True):
        length = np.count_nonzero(sentence)
        places = range(min(length + 1, S)) if length else ()
        for place in places:
            probability = np.exp(scores[place]) / np.exp(scores[place]).sum()
            entropy.append(-np.log(probability[sentence[place]]))
            right.append(scores[place].argmax() == sentence[place])
    loss, metrics = captions.loss(logits, words)
    assert_close(loss, np.mean(entropy), 1e-5)
    assert_close(metrics["acc_caption"], np.mean(right))


@pytest.mark.slow
def test_steps_without_instruction_have_zero_loss_and_gradient():
    features, words = draw_features(), np.zeros((B, W, S), np.int32)

    def loss_fn(params, features):
        return captions.loss(captions.apply(params, features, words), words)

    (loss, metrics), gradient = jax.value_and_grad(loss_fn, (0, 1), has_aux=True)(PARAMS, features)
    assert loss == metrics["acc_caption"] == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


def test_the_gradient_reaches_the_features_of_steps_with_an_instruction_only():
    words = draw_words(5, B, W)
    words[:, 1] = 0
    loss_fn = partial(captions.loss, words=words)
    slope = jax.grad(lambda features: loss_fn(captions.apply(PARAMS, features, words))[0])
    reached = np.any(slope(draw_features()) != 0, axis=-1)
    np.testing.assert_array_equal(reached, (words > 0).any(-1))


def test_words_of_another_shape_are_refused():
    with pytest.raises(AssertionError, match="assert_equal_shape"):
        captions.apply(PARAMS, draw_features(), draw_words(0, B, W + 1))
    with pytest.raises(AssertionError, match="assert_shape"):
        captions.loss(np.zeros((B, W, S, V)), draw_words(0, B, W)[..., :1])
