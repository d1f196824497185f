"""Hugging Face's `transformers` and `peft` load what we write, and complete a config as we do."""

import contextlib
import copy
import dataclasses
import functools
import json
import os
import shutil
import warnings

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from vla_jax import backbones
from vla_jax.backbones import models, peft, weights
from vla_jax.nn import lora

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the packages are imported
pytestmark = pytest.mark.slow  # the import alone takes 8 s
NAMES = {
    "kosmos2": "kosmos2-hf5.23",
    "paligemma": "paligemma-hf5.23",
    "paligemma2": "paligemma2-hf5.23",
    "qwen25vl": "qwen25vl-hf5.23",
    "qwen3vl": "qwen3vl-hf5.23",
    "smolvlm": "smolvlm-hf5.23",
}
each = pytest.mark.parametrize("name", NAMES)
TARGETS = ("language/layers/query", "language/layers/down", "vision/layers/*")


@contextlib.contextmanager
def original():
    """Ignores warnings of the packages whose values are the reference."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def hf():
    with original():
        import peft
        import torch
        import transformers
        from huggingface_hub.errors import StrictDataclassError

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return dataclasses.make_dataclass("Packages", ["transformers", "peft", "torch", "refusal"])(
        transformers, peft, torch, StrictDataclassError
    )


@functools.cache
def inputs(golden, name):
    arrays = load_file(golden / "vlm" / NAMES[name] / "io.safetensors")
    return {key[3:]: value for key, value in arrays.items() if key.startswith("in.")}


def ours(golden, name, config, params):
    run = jax.jit(
        lambda params: backbones.reference.forward(params, config, inputs(golden, name))["logits"]
    )
    return np.asarray(run(params))[inputs(golden, name)["attention_mask"] == 1]


def load(hf, folder):
    with original():
        model = hf.transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=hf.torch.float32
        )
    return model.eval()


def theirs(hf, golden, name, model):
    names = (
        "input_ids", "attention_mask", "pixel_values", "image_embeds_position_mask",
        "image_grid_thw", "pixel_attention_mask", "token_type_ids", "mm_token_type_ids",
    )  # fmt: skip
    arrays = {k: hf.torch.tensor(v) for k, v in inputs(golden, name).items() if k in names}
    with original(), hf.torch.no_grad():
        logits = model(**arrays).logits.numpy()
    return logits[inputs(golden, name)["attention_mask"] == 1]


def adapted(params, rank=2):
    """Params with random factors of different rank in the two layers, and the second one scaled."""
    params = lora.add(jax.random.key(0), params, lora.LoraConfig(rank, targets=TARGETS))

    def fill(path, leaf):
        name = path[-1].key
        if name not in ("lora_a", "lora_b", "lora_scale"):
            return leaf
        leaf = np.array(leaf)
        if name == "lora_scale":
            return leaf * np.where(np.arange(leaf.size) == 1, 0.3, 0.1).astype(np.float32)
        leaf = np.random.default_rng(0).normal(size=leaf.shape).astype(np.float32) / 4
        leaf[(0, slice(1, None)) if name == "lora_b" else np.s_[0, :, 1:]] = 0  # rank 1
        return leaf

    return jax.tree_util.tree_map_with_path(fill, params)


@each
def test_an_exported_model_gives_its_logits_in_transformers(name, hf, golden, tmp_path):
    """In bfloat16, several files, and with an adapter merged."""
    source = golden / "vlm" / NAMES[name]
    options = dataclasses.replace(weights.load_config(source).options, param_dtype="bfloat16")
    config, params = backbones.load(source, config=weights.load_config(source, options=options))
    params = jax.jit(lora.merge)(adapted(params))
    backbones.export(tmp_path / "a", config, params, like=source, max_shard_bytes=50_000)
    assert (tmp_path / "a/model.safetensors.index.json").exists()
    found = theirs(hf, golden, name, load(hf, tmp_path / "a"))
    np.testing.assert_allclose(found, ours(golden, name, config, params), atol=1e-5)


def leaves(data, path=()):
    """Path -> value of everything in a config that is not a section."""
    if not isinstance(data, dict):
        return {path: data}
    return {k: v for name in data for k, v in leaves(data[name], (*path, name)).items()}


@each
def test_an_exported_config_is_the_original_with_the_sizes_of_the_params(
    name, hf, golden, tmp_path
):
    """Everything else is kept: ids, initialisation, the name of an older class."""
    source, original = tmp_path / "source", golden / "vlm" / NAMES[name]
    source.mkdir()
    data = json.loads((original / "config.json").read_text())
    data |= {"eos_token_id": 7, "torch_dtype": data.pop("dtype"), "custom": {"list": [1]}}
    data["text_config"]["bos_token_id"] = 5
    if name == "smolvlm":
        data |= {"model_type": "idefics3", "architectures": ["Idefics3ForConditionalGeneration"]}
        data["vision_config"]["model_type"] = "idefics3_vision"
    (source / "config.json").write_text(json.dumps(data))
    shutil.copy(original / "model.safetensors", source)
    config, params = backbones.load(source)
    backbones.export(tmp_path / "a", config, params, like=source)
    written = json.loads((tmp_path / "a/config.json").read_text())
    assert leaves(data).items() <= leaves(written).items()
    assert "dtype" not in written
    model = load(hf, tmp_path / "a")
    assert type(model).__name__ == data["architectures"][0]
    found = theirs(hf, golden, name, model)
    np.testing.assert_allclose(found, ours(golden, name, config, params), atol=1e-5)


@each
def test_a_written_adapter_gives_its_logits_in_peft(name, hf, golden, tmp_path):
    source = golden / "vlm" / NAMES[name]
    config, params = backbones.load(source)
    changed = adapted(params)
    peft.write_adapter(tmp_path / "a", config, changed)
    model = load(hf, source)
    before = theirs(hf, golden, name, model)
    with original():
        model = hf.peft.PeftModel.from_pretrained(model, tmp_path / "a").eval()
    found = theirs(hf, golden, name, model)
    assert np.abs(found - before).max() > 0.01
    np.testing.assert_allclose(found, ours(golden, name, config, changed), atol=1e-5)


@pytest.mark.parametrize("name", ["paligemma", "smolvlm"])
def test_an_adapter_that_was_read_and_written_gives_the_stored_logits(name, hf, golden, tmp_path):
    source = golden / "vlm" / NAMES[name]
    config, params = backbones.load(source)
    params = peft.read_adapter(golden / "lora" / name, config, params)
    saved = ("language/head/kernel",) if name == "smolvlm" else ()
    peft.write_adapter(tmp_path / "a", config, params, modules_to_save=saved)
    with original():
        model = hf.peft.PeftModel.from_pretrained(load(hf, source), tmp_path / "a").eval()
    found = theirs(hf, golden, name, model)
    stored = load_file(golden / "lora" / name / "io.safetensors")["out.adapter.logits"]
    mask = inputs(golden, name)["attention_mask"] == 1
    np.testing.assert_allclose(found, stored[mask], atol=1e-5)


def read(data):
    """The config of a model, or the sentence of its refusal."""
    try:
        return models.from_json(data)
    except ValueError as error:
        return str(error)


@each
def test_a_config_without_any_one_field_is_completed_as_by_transformers(name, hf, golden, tmp_path):
    """Settings that we refuse, such as sizes that do not divide, are refused by both."""
    whole = json.loads((golden / "vlm" / NAMES[name] / "config.json").read_text())
    places = [(key,) for key in whole if key != "model_type"]
    places += [
        (key, field) for key in whole if isinstance(whole[key], dict) for field in whole[key]
    ]
    count = 0
    for path in places:
        data = copy.deepcopy(whole)
        del (data if len(path) == 1 else data[path[0]])[path[-1]]
        (tmp_path / "config.json").write_text(json.dumps(data))
        try:
            with original():
                completed = hf.transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
        except hf.refusal:  # such as layer_types without the number of layers
            continue
        completed["transformers_version"] = data.get("transformers_version")
        assert read(data) == read(json.loads(json.dumps(completed))), path
        count += 1
    assert count > len(places) - 4
