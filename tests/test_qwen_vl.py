"""Qwen3-VL and Qwen2.5-VL: the original's outputs, configs, names, and the path of a policy.

The folders of `golden/vlm` were written by Hugging Face transformers 5.23.0 with random weights;
`config-hf4.57.json` describes the same model as version 4.57.6 does.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from vla_jax import backbones
from vla_jax.backbones import (
    models,
    mrope,
    preprocess,
    qwen3_vision,
    qwen_vision,
    tokenizers,
    vlm,
    weight_export,
    weight_report,
)
from vla_jax.backbones.image_settings import PatchSettings
from vla_jax.backbones.qwen3_vision import Qwen3VisionConfig
from vla_jax.backbones.qwen3_vl import Qwen3VLConfig
from vla_jax.backbones.qwen25_vision import Qwen25VisionConfig
from vla_jax.backbones.qwen25_vl import Qwen25VLConfig
from vla_jax.backbones.sequence import IMAGE, PADDING
from vla_jax.backbones.vlm_options import VLMOptions

GOLDEN = pathlib.Path(__file__).parent / "golden"
FOLDERS = {
    "qwen3_vl": GOLDEN / "vlm/qwen3vl-hf5.23",
    "qwen25_vl": GOLDEN / "vlm/qwen25vl-hf5.23",
}
TEXTS = ("lift the red block", "push", "")
SIZE = (16, 24)  # pixels; 2 × 3 tokens, which fill no whole number of windows
each = pytest.mark.parametrize("kind", FOLDERS)


@functools.cache
def load(kind):
    return backbones.load(FOLDERS[kind])


def read_json(kind, name="config.json"):
    return json.loads((FOLDERS[kind] / name).read_text())


@functools.cache
def policy(kind):
    """Config of a policy that reads out all positions, and its compiled hidden states."""
    options = VLMOptions(readout="all", max_text_tokens=6)
    config = dataclasses.replace(load(kind)[0], image_size=SIZE, options=options)
    return config, jax.jit(models.MODELS[kind].hidden_states, static_argnums=1)


def step(kind, texts=TEXTS):
    """Sequences of a step `[3, S]` and its images."""
    config, _ = policy(kind)
    ids = np.stack([vlm.tokenize(models.MODELS[kind], config, text) for text in texts])
    images = np.random.default_rng(0).integers(0, 256, (3, 2, *SIZE, 3), np.uint8)
    return ids, images


def reference(kind, config, inputs):
    """Outputs of `reference.forward`; compiled, since its operations one by one take longer."""
    forward = jax.jit(lambda params: backbones.reference.forward(params, config, inputs))
    return forward(load(kind)[1])


@each
@pytest.mark.parametrize("file", ["io", "io_left"])
def test_outputs_equal_the_original_model(kind, file):
    config, _ = load(kind)
    stored = load_file(FOLDERS[kind] / f"{file}.safetensors")
    inputs = {k.removeprefix("in."): v for k, v in stored.items() if k.startswith("in.")}
    real = inputs["attention_mask"].astype(bool)
    outputs = reference(kind, config, inputs)
    for name in ("last_hidden", "logits"):
        expected = stored[f"out.{name}"][real]
        np.testing.assert_allclose(outputs[name][real], expected, atol=1e-5, err_msg=name)
    grids = [tuple(grid[1:]) for grid in inputs["image_grid_thw"].tolist()]
    positions = mrope.positions(
        real,
        inputs["input_ids"] == config.image_token_id,
        qwen_vision.token_grids(config.vision, grids),
    )
    np.testing.assert_array_equal(positions[:, real], stored["out.position_ids"][:, real])


@each
def test_every_version_of_a_config_describes_the_same_model(kind):
    expected = models.from_json(read_json(kind))
    assert models.from_json(read_json(kind, "config-hf4.57.json")) == expected
    assert models.from_json(models.MODELS[kind].to_json(expected)) == expected


def test_text_fields_at_the_top_of_a_config_are_read():
    data = read_json("qwen25_vl", "config-hf4.57.json")
    text = data.pop("text_config")
    text["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 1, 1]}
    flat = text | data
    assert models.from_json(flat) == models.from_json(read_json("qwen25_vl"))


def test_the_defaults_are_the_published_small_models():
    text_3 = {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "rope_theta": 5000000,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20]},
    }  # fmt: skip
    vision_3 = {
        "hidden_size": 1024, "intermediate_size": 4096, "depth": 24,
        "deepstack_visual_indexes": [5, 11, 17], "out_hidden_size": 2048,
    }  # fmt: skip
    data = {"model_type": "qwen3_vl", "text_config": text_3, "vision_config": vision_3}
    assert models.from_json(data | {"tie_word_embeddings": True}) == Qwen3VLConfig()
    text_25 = {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008,
        "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06, "use_sliding_window": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    data = {"model_type": "qwen2_5_vl", "vision_config": {"hidden_size": 1280, "in_chans": 3}}
    assert models.from_json({**data, **text_25, "tie_word_embeddings": True}) == Qwen25VLConfig()


@each
def test_all_names_of_a_tensor_are_known(kind):
    """Files of either version of transformers, of the whole model or without its head."""
    config, _ = load(kind)
    model = models.MODELS[kind]
    names = [*load_file(FOLDERS[kind] / "model.safetensors")]
    live = [
        name.replace("visual.", "model.visual.", 1).replace("model.", "model.language_model.", 1)
        if kind == "qwen25_vl" and not name.startswith("lm_head")
        else name
        for name in names
    ]
    live = [name.replace("model.language_model.visual", "model.visual") for name in live]
    base = [name.removeprefix("model.") for name in live]
    for variant in (names, live, base):
        renamed = [weight_report.rename(model, name) for name in variant]
        report = weight_report.compare(model, config, renamed)
        assert (report.missing, report.left_over, report.ignored) == ((), (), ())


@each
def test_params_give_the_tensors_of_the_file(kind):
    config, params = load(kind)
    expected = load_file(FOLDERS[kind] / "model.safetensors")
    tensors = weight_export.to_tensors(config, params)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, expected[name], err_msg=name)


@each
def test_the_policy_computes_what_the_reference_does(kind):
    config, hidden_states = policy(kind)
    _, params = load(kind)
    ids, images = step(kind)
    hidden = hidden_states(params, config, ids, images)
    sizes, made = (config.vision.patch_size, config.vision.merge_size), config.images
    settings = PatchSettings(1, 10**6, *sizes, mean=made.mean, std=made.std)
    rows = [preprocess.patches(image, settings) for image in images.reshape(-1, *SIZE, 3)]
    assert config.image_token_id not in ids
    inputs = {
        "input_ids": np.where(ids == IMAGE, config.image_token_id, np.maximum(ids, 0)),
        "attention_mask": (ids != PADDING).astype(np.int32),
        "pixel_values": np.concatenate([row.pixels for row in rows]),
        "image_grid_thw": np.asarray([row.grid for row in rows]),
    }
    expected = reference(kind, config, inputs)["last_hidden"]
    real = ids != PADDING
    np.testing.assert_allclose(hidden[real], expected[real], atol=1e-5)


@each
def test_the_rest_of_the_batch_does_not_change_a_sample(kind):
    config, hidden_states = policy(kind)
    _, params = load(kind)
    ids, images = step(kind)
    together = hidden_states(params, config, ids, images)
    for i in (1, 2):
        alone = hidden_states(
            params, config, *(np.repeat(x[i : i + 1], 3, axis=0) for x in (ids, images))
        )
        np.testing.assert_allclose(alone[0], together[i], atol=1e-5)


def test_rematerialisation_does_not_change_the_gradient_through_deepstack():
    config, params = load("qwen3_vl")
    patches = jax.random.normal(jax.random.key(0), (2, 24, 96))

    def gradient(remat):
        def loss_fn(params):
            features = qwen3_vision.apply(params, config.vision, patches, [(4, 6)], remat=remat)
            return jnp.sum(features.tokens**2) + jnp.sum(jnp.sin(features.added))

        return jax.jit(jax.grad(loss_fn))(params["vision"])

    expected, actual = gradient("none"), gradient("layers")
    for leaf, other in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-4)


@each
def test_a_prompt_has_a_place_for_every_token_of_an_image(kind):
    config, _ = policy(kind)
    tokenizer = tokenizers.read_tokenizer(GOLDEN / "tokenizers/qwen3vl/tokenizer.json")
    ids = np.asarray(models.MODELS[kind].prompt(config, tokenizer, "push"))
    starts = np.nonzero(ids == tokenizers.token_id(tokenizer, "<|vision_start|>"))[0]
    ends = np.nonzero(ids == tokenizers.token_id(tokenizer, "<|vision_end|>"))[0]
    assert len(starts) == 2
    assert set(ends - starts) == {config.tokens_per_image + 1} == {7}
    assert (ids == IMAGE).sum() == 2 * config.tokens_per_image
    turns = (ids == tokenizers.token_id(tokenizer, "<|im_start|>")).sum()
    assert turns == {"qwen3_vl": 2, "qwen25_vl": 3}[kind]  # Qwen2.5-VL has a system message


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Qwen3VLConfig(image_size=(256, 250)), "image_size must be two positive multiples"),
        (lambda: Qwen25VLConfig(rope_sections=(24, 20, 18)), "the sum head_dim / 2 = 64"),
        (lambda: Qwen3VisionConfig(deepstack_layers=(5, 3)), "must be ascending numbers of the 24"),
        (lambda: Qwen3VisionConfig(deepstack_layers=(24,)), "must be ascending numbers of the 24"),
        (lambda: Qwen25VisionConfig(window_size=20), "must be at least patch_size · merge_size 28"),
        (lambda: Qwen3VisionConfig(num_positions=0), "num_positions must be at least 1, got 0"),
        (lambda: Qwen3VisionConfig(hidden_size=96), "must be a multiple of 4 · num_heads 64"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@each
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"vision_config": {"in_channels": 1}}, "in_channels must be 3, got 1"),
        ({"vision_config": {"depth": "four"}}, "depth must be int, got 'four'"),
        (
            {"text_config": {"rope_scaling": {"mrope_section": [2, 2]}}},
            r"mrope_section must be 3 integers, got \[2, 2\]",
        ),
        (
            {"text_config": {"rope_scaling": {"rope_type": "yarn"}}},
            "rope_type must be 'default', got 'yarn'",
        ),
    ],
)
def test_a_config_with_unknown_values_is_refused(kind, changes, sentence):
    data = read_json(kind, "config-hf4.57.json")
    for name, fields in changes.items():
        data[name] |= fields
    with pytest.raises(ValueError, match=sentence):
        models.from_json(data)


@pytest.mark.parametrize(
    ("grids", "num_patches", "sentence"),
    [
        ([[2, 4, 4]], 32, "image_grid_thw must have 1 frame for each image, got 2"),
        ([[1, 4, 3]], 12, "image_grid_thw must have multiples of 2 rows and columns"),
        ([[1, 4, 4]], 12, "pixel_values must have the 16 rows that image_grid_thw"),
    ],
)
def test_grids_that_do_not_fit_are_refused(grids, num_patches, sentence):
    with pytest.raises(ValueError, match=sentence):
        qwen_vision.read_grids(Qwen3VisionConfig(), np.asarray(grids), num_patches)


def test_the_smallest_default_image_is_not_resized_by_the_original_processor():
    size, images = Qwen3VLConfig().image_size, Qwen3VLConfig().images
    assert preprocess.smart_resize(*size, PatchSettings()) == size
    assert (images.mean, images.std) == (PatchSettings().mean, PatchSettings().std)
    size = Qwen25VLConfig().image_size
    assert preprocess.smart_resize(*size, PatchSettings(3136, 12_845_056, 14)) == size
    assert Qwen25VLConfig().images.mean != images.mean
