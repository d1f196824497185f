"""Vision-language models as backbones: sequences, readouts, batches, devices, streaming."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_vlm

from vla_jax.backbones import camera_images, reference, resizing, sequence
from vla_jax.backbones.registry import BACKBONES
from vla_jax.backbones.sequence import IMAGE, PADDING
from vla_jax.backbones.vlm_options import VLMOptions
from vla_jax.policies import policy
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.training import parallel
from vla_jax.types import Observation

B = 4
TEXTS = ("open", "touch the red block", "lift blue", "")
CONFIGS = tiny_vlm.CONFIGS
each = pytest.mark.parametrize("kind", CONFIGS)


def with_options(config, **changes):
    return dataclasses.replace(config, options=dataclasses.replace(config.options, **changes))


def observe(config, texts=TEXTS, seed=0):
    random = np.random.default_rng(seed)
    tokenize = functools.partial(BACKBONES[config.kind].tokenize, config)
    shape = (len(texts), *config.image_shape, 3)
    return Observation(
        image_primary=random.integers(0, 256, shape, np.uint8),
        image_wrist=random.integers(0, 256, shape, np.uint8),
        proprio=random.normal(size=(len(texts), 8)).astype(np.float32),
        instruction=np.stack([tokenize(text) for text in texts]),
    )


@functools.cache
def compiled(kind):
    return jax.jit(BACKBONES[kind].apply, static_argnums=1)


def encode(config, observation, params=None):
    params = tiny_vlm.params(config) if params is None else params
    return compiled(config.kind)(params, config, observation)


@pytest.mark.sampled
@each
def test_tokens_of_a_sample_do_not_depend_on_the_batch_or_the_padding(kind):
    config = CONFIGS[kind]
    together = encode(config, observe(config)).tokens
    longer = with_options(config, max_text_tokens=9)
    padded = encode(longer, observe(longer), tiny_vlm.params(config)).tokens
    np.testing.assert_allclose(padded, together, atol=1e-5)
    alone = jax.tree.map(lambda part: part[1:2], observe(config))
    np.testing.assert_allclose(encode(config, alone).tokens, together[1:2], atol=1e-5)


@pytest.mark.sampled
@each
def test_images_in_several_passes_give_the_same_tokens(kind):
    config = CONFIGS[kind]
    together = encode(config, observe(config)).tokens
    in_passes = encode(with_options(config, images_per_pass=3), observe(config)).tokens
    np.testing.assert_allclose(in_passes, together, atol=1e-5)


@pytest.mark.sampled
@each
def test_the_policy_sees_the_hidden_states_of_the_original_forward(kind):
    """The ids of the policy's sequence, with the model's placeholders, give the same states."""
    config = with_options(CONFIGS[kind], readout="all", proprio_dim=0)
    params, seen = tiny_vlm.params(config), observe(config)
    found = encode(config, seen)
    ids, is_image = np.asarray(seen.instruction), np.asarray(seen.instruction) == IMAGE
    images = jnp.stack([seen.image_primary, seen.image_wrist], axis=1)
    pixels = np.asarray(camera_images.pixels(images, config.images))
    inputs = {
        "input_ids": np.where(is_image, tiny_vlm.IMAGE_ID, np.where(ids == PADDING, 1, ids)),
        "attention_mask": ids != PADDING,
        **tiny_vlm.image_inputs(config, pixels, is_image),
    }
    if kind == "paligemma":
        inputs["token_type_ids"] = np.zeros_like(ids)
    expected = reference.forward(params, config, inputs)["last_hidden"]
    order = np.argsort(ids == PADDING, axis=1, kind="stable")
    expected = np.take_along_axis(np.asarray(expected), order[..., None], 1)
    mask = np.asarray(found.mask)
    np.testing.assert_array_equal(mask, np.take_along_axis(ids != PADDING, order, 1))
    np.testing.assert_allclose(found.tokens[mask], expected[mask], atol=1e-5)


def test_readouts_choose_from_the_hidden_states():
    base = CONFIGS["smolvlm"]
    num_images, params = 2 * base.tokens_per_image, tiny_vlm.params(base)

    def read(readout):
        config = with_options(base, readout=readout, proprio_dim=0)
        return encode(config, observe(config), params)

    hidden, mask = (np.asarray(part) for part in read("all"))

    np.testing.assert_allclose(read("image").tokens, hidden[:, :num_images], atol=1e-6)
    means = hidden[:, :num_images].reshape(B, 2, -1, hidden.shape[-1]).mean(2)
    np.testing.assert_allclose(read("image_mean").tokens, means, atol=1e-6)
    text = read("text")
    np.testing.assert_allclose(text.tokens, hidden[:, num_images:], atol=1e-6)
    np.testing.assert_array_equal(text.mask, mask[:, num_images:])
    last = hidden[np.arange(B), mask.sum(1) - 1]
    np.testing.assert_allclose(read("last").tokens[:, 0], last, atol=1e-6)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("native", [IMAGE, 5, 6, 100, 101, PADDING, PADDING]),
        ("robovlms", [IMAGE, 5, 100, 101, 6, PADDING, PADDING]),
        ("robovlms_padded", [IMAGE, 5, 6, PADDING, 100, 101, PADDING]),
    ],
)
def test_learned_tokens_stand_where_the_layout_says(layout, expected):
    options = VLMOptions(layout=layout, num_action_tokens=2, max_text_tokens=4)
    found = sequence.arrange([IMAGE, 5, 6], options, vocab_size=100, length=7)
    assert found.tolist() == expected


@pytest.mark.sampled
@each
def test_sharded_params_give_the_tokens_of_one_device(kind):
    config = CONFIGS[kind]
    params, seen = tiny_vlm.params(config), observe(config)
    mesh = parallel.make_mesh("data=2,fsdp=2")
    rules = BACKBONES[kind].sharding_rules
    sharded = jax.device_put(params, parallel.make_shardings(params, mesh, rules))
    split = [leaf for leaf in jax.tree.leaves(sharded) if not leaf.sharding.is_fully_replicated]
    assert len(split) > 10
    found = encode(config, parallel.shard_batch(seen, mesh), sharded)
    np.testing.assert_allclose(found.tokens, encode(config, seen).tokens, atol=1e-5)


@pytest.mark.sampled
@each
def test_streamed_actions_equal_those_of_the_last_window(kind):
    window_size, num_steps = 2, 4
    decoder = DecoderConfig(
        hidden_size=8, num_layers=1, window_size=window_size, action_horizon=1, head_sizes=(8,)
    )
    config = policy.connect(CONFIGS[kind], decoder)
    params = {
        **jax.jit(policy.init, static_argnums=1)(jax.random.key(0), config),
        "backbone": tiny_vlm.params(CONFIGS[kind]),
    }
    steps = [observe(CONFIGS[kind], TEXTS[:2], seed) for seed in range(num_steps)]
    state, step = policy.init_stream(params, config, 2), jax.jit(policy.step, static_argnums=1)
    apply = jax.jit(policy.apply, static_argnums=1)
    for number in range(1, num_steps + 1):
        state, chunk = step(params, config, state, steps[number - 1])
        if number >= window_size:
            window = steps[number - window_size : number]
            stacked = jax.tree.map(lambda *parts: np.stack(parts, axis=1), *window)
            expected = apply(params, config, stacked)
            np.testing.assert_allclose(chunk.arm, expected.arm[:, -1], atol=1e-5)


def test_a_prompt_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="has 8 tokens, but max_text_tokens is 6; raise"):
        BACKBONES["smolvlm"].tokenize(CONFIGS["smolvlm"], "a b c d e f g")


def test_instructions_that_differ_in_nothing_the_tokenizer_sees_are_refused():
    with pytest.raises(ValueError, match="'lift' and 'lift!' have the same"):
        BACKBONES["smolvlm"].check_instructions(CONFIGS["smolvlm"], ["lift!", "lift"])


def test_a_missing_tokenizer_is_named():
    config = with_options(CONFIGS["kosmos2"], tokenizer="nowhere/tokenizer.json")
    with pytest.raises(FileNotFoundError, match=r"nowhere/tokenizer\.json is missing"):
        BACKBONES["kosmos2"].tokenize(config, "lift")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused_whatever_the_instruction():
    file = pathlib.Path(__file__).parent / "golden/tokenizers/smolvlm/tokenizer.json"
    config = with_options(CONFIGS["smolvlm"], tokenizer=str(file))
    for text in ("", "lift"):
        with pytest.raises(ValueError, match="must have ids below the model's vocab_size 64, got"):
            BACKBONES["smolvlm"].tokenize(config, text)


@pytest.mark.parametrize("kind", ["smolvlm", "qwen3_vl", "qwen25_vl"])
@pytest.mark.parametrize("layout", ["robovlms", "robovlms_padded"])
def test_a_layout_that_a_model_does_not_have_is_refused(kind, layout):
    with pytest.raises(ValueError, match=f"layout must be 'native' for backbone '{kind}', got"):
        with_options(CONFIGS[kind], layout=layout)


def test_images_of_other_sizes_are_resized_on_the_device_if_the_options_say_so():
    config = CONFIGS["smolvlm"]
    observation, size = observe(config), config.image_shape
    on_device = with_options(config, resize="device")
    assert BACKBONES["smolvlm"].image_spec(on_device).any_size
    np.testing.assert_array_equal(
        encode(on_device, observation).tokens, encode(config, observation).tokens
    )
    images = np.random.default_rng(1).integers(0, 256, (B, 24, 40, 3), np.uint8)
    larger = observation._replace(image_wrist=images)
    with pytest.raises(ValueError, match=r"image_wrist must be \[4, 16, 16, 3\]"):
        encode(config, larger)
    resized = np.stack([resizing.resize(image, size, "lanczos") for image in images])
    expected = encode(config, observation._replace(image_wrist=resized)).tokens
    np.testing.assert_allclose(encode(on_device, larger).tokens, expected, atol=0.05)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("resize", "gpu", "unknown resize 'gpu'"),
        ("readout", "first", "unknown readout 'first'"),
        ("cameras", (), "cameras must be one or more different names"),
        ("prompt", "lift it", r"prompt must contain \{instruction\}"),
        ("max_text_tokens", 0, "max_text_tokens must be at least 1, got 0"),
        ("num_action_tokens", 0, "num_action_tokens must be at least 1, got 0"),
        ("proprio_dim", -1, "proprio_dim must be 0 or more, got -1"),
        ("images_per_pass", -1, "images_per_pass must be 0 or more, got -1"),
    ],
)
def test_options_out_of_range_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        VLMOptions(**{field: value})


@pytest.mark.parametrize("name", ["paligemma", "smolvlm"])
def test_images_of_so_many_tokens_that_their_list_would_fill_the_memory_are_refused(name):
    config = tiny_vlm.CONFIGS[name]
    vision = dataclasses.replace(config.vision, image_size=2**14, patch_size=1)
    with pytest.raises(ValueError, match="must give at most 65536 tokens per image, got"):
        dataclasses.replace(config, vision=vision)
