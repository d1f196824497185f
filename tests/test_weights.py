"""Weights of vision-language models: loaded, refused, placed on devices, and exported."""

import copy
import dataclasses
import json
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vla_jax import backbones, trees
from vla_jax.backbones import models, weight_report, weights
from vla_jax.backbones.image_settings import Preprocessing
from vla_jax.nn.lora import LoraConfig
from vla_jax.training import parallel

NEW = {name: f"{name}-hf5.23" for name in ("kosmos2", "paligemma", "smolvlm")}
each = pytest.mark.parametrize("name", NEW)


def equal(a, b):
    """Returns True if two trees are equal to the bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@pytest.fixture
def folder(golden, tmp_path):
    """Makes a copy of a model's folder with other fields and tensors."""

    def make(name="paligemma-hf5.23", fields=None, tensors=None, drop=(), dtype=None):
        target = tmp_path / f"model_{len(list(tmp_path.iterdir()))}"
        target.mkdir()
        source = golden / "vlm" / name
        data = json.loads((source / "config.json").read_text())
        for key, value in (fields or {}).items():
            section, _, field = key.rpartition(".")
            (data[section] if section else data)[field] = value
        (target / "config.json").write_text(json.dumps(data))
        stored = {**load_file(source / "model.safetensors"), **(tensors or {})}
        kept = {k: v.astype(dtype or v.dtype) for k, v in stored.items() if k not in drop}
        save_file(kept, target / "model.safetensors")
        return target

    return make


def split(folder, names=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")):
    """Replaces the one file of a folder by two, and an index."""
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = [dict(list(stored.items())[i::2]) for i in range(2)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, folder / name)
    weight_map = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@each
def test_a_model_in_shards_and_under_the_names_of_an_older_version_gives_the_same_params(
    name, folder
):
    config, params = backbones.load(folder(f"{name}-hf4.57"))
    sharded = folder(f"{name}-hf4.57")
    split(sharded)
    assert equal(backbones.load(sharded)[1], params)
    model = models.get(config)
    renamed = folder(f"{name}-hf4.57")
    stored = load_file(renamed / "model.safetensors")
    stored = {weight_report.rename(model, key): value for key, value in stored.items()}
    save_file(stored, renamed / "model.safetensors")
    assert equal(backbones.load(renamed)[1], params)
    report = weight_report.compare(model, config, stored)
    assert not report.missing
    assert not report.left_over
    assert len(report.used) == len(stored) - len(report.ignored)


@pytest.mark.parametrize("stored", [jnp.bfloat16, np.float16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_half_precision_files_are_read_and_cast(stored, wanted, folder):
    config, params = backbones.load(folder())
    options = dataclasses.replace(config.options, param_dtype=wanted)
    config = dataclasses.replace(config, options=options)
    found = backbones.load(folder(dtype=stored), config=config)[1]
    assert {leaf.dtype.name for path, leaf in trees.leaves_by_path(found).items()
            if path != "action_token"} == {wanted}  # fmt: skip
    expected = jax.tree.map(lambda leaf: np.asarray(leaf).astype(stored), params)
    learned = expected.pop("action_token")
    assert not learned.any()
    found.pop("action_token")
    cast = jax.tree.map(lambda leaf: leaf.astype(np.dtype(wanted)), expected)
    assert equal(found, cast)


def test_params_on_several_devices_are_those_of_one_and_sharded_by_the_rules(folder):
    params = backbones.load(folder())[1]
    mesh = parallel.make_mesh("data=2,fsdp=2")
    sharded = backbones.load(folder(), mesh=mesh)[1]
    assert equal(sharded, params)
    kernel = sharded["language"]["layers"]["up"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 16, 64)}
    assert sharded["language"]["norm"]["scale"].sharding.is_fully_replicated
    mesh = parallel.make_mesh("data=1,fsdp=3")
    with pytest.raises(ValueError, match=r"cannot be sharded by .*'fsdp': 3.*divides it"):
        backbones.load(folder(), mesh=mesh)


def test_loading_holds_one_slice_of_a_param_and_one_tensor_on_the_host(golden, tmp_path):
    """NumPy's memory at its peak; tensors of the file are mapped and do not count."""
    config = weights.load_config(golden / "vlm" / NEW["smolvlm"])
    language = dataclasses.replace(
        config.language, vocab_size=4096, hidden_size=128, intermediate_size=512, num_layers=8
    )
    config = dataclasses.replace(config, language=language)
    shapes = models.get(config).shapes(config)
    params = jax.tree.map(np.zeros, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    backbones.export(tmp_path / "m", config, params, max_shard_bytes=10**6)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 5
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    del params
    for mesh, shards in ((None, 1), (parallel.make_mesh("data=1,fsdp=4"), 4)):
        backbones.load(tmp_path / "m", mesh=mesh)  # compiles what it needs
        tracemalloc.start()
        loaded = backbones.load(tmp_path / "m", mesh=mesh)
        kept, peak = tracemalloc.get_traced_memory()
        del loaded
        tracemalloc.stop()
        # the simulated devices take over the memory of the slices, which is kept
        assert peak - kept < largest / shards + 500_000 < total / 2


CLIP = {"size": {"shortest_edge": 28}, "use_square_size": True, "crop_size": 28}


def test_settings_of_images_are_those_of_the_folder(folder):
    source = folder("kosmos2-hf5.23")
    default = weights.load_config(source).images
    assert default.resampling == "bicubic"
    settings = {**CLIP, "resample": 2, "image_mean": [0.1, 0.2, 0.3], "image_std": 0.5}
    (source / "preprocessor_config.json").write_text(json.dumps(settings))
    images = weights.load_config(source).images
    assert images == Preprocessing("bilinear", (0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert backbones.load(source)[0].images == images
    (source / "preprocessor_config.json").unlink()
    nested = {"image_processor": {**settings, "resample": 1}, "image_seq_len": 4}
    (source / "processor_config.json").write_text(json.dumps(nested))
    assert weights.load_config(source).images.resampling == "lanczos"
    (source / "processor_config.json").write_text('{"image_seq_len": 4}')
    assert weights.load_config(source).images == default


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("kosmos2", {**CLIP, "size": 14, "crop_size": 14}, "size of the image processor must be"),
        ("kosmos2", {"size": {"shortest_edge": 28}, "crop_size": 28}, "crop of the .* be False"),
        ("paligemma", {"size": {"height": 9, "width": 9}}, r"size of .* must be \d+ .*, got 9;"),
        ("smolvlm", {"max_image_size": {"longest_edge": 8}}, r"crop_size of .* got 8;"),
        ("paligemma", {"resample": 9}, "resample must be one of 1, 2, 3, 4, got 9"),
    ],
)
def test_settings_of_images_that_the_model_cannot_take_are_refused(name, settings, message, folder):
    source = folder(f"{name}-hf5.23")
    (source / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        weights.load_config(source)


@each
def test_exported_and_loaded_params_are_equal_to_the_bit(name, golden, tmp_path):
    config, params = backbones.load(golden / "vlm" / NEW[name])
    backbones.export(tmp_path / "one", config, params, like=golden / "vlm" / NEW[name])
    again, found = backbones.load(tmp_path / "one")
    assert equal(found, params)
    assert dataclasses.replace(again, options=config.options, reference_version="") == (
        dataclasses.replace(config, reference_version="")
    )
    stored = load_file(golden / "vlm" / NEW[name] / "model.safetensors")
    written = load_file(tmp_path / "one/model.safetensors")
    assert all(np.array_equal(written[key], stored[key]) for key in written)
    assert (tmp_path / "one/io.safetensors").exists() is False
    backbones.export(tmp_path / "many", config, params, max_shard_bytes=40_000)
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(written)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in written.values())
    assert all(file.stat().st_size < 60_000 for file in (tmp_path / "many").iterdir())
    assert equal(backbones.load(tmp_path / "many")[1], params)


def test_other_files_of_the_original_are_copied_and_nothing_is_overwritten(golden, tmp_path):
    config, params = backbones.load(golden / "vlm" / NEW["smolvlm"])
    (tmp_path / "like").mkdir()
    for name in ("tokenizer.json", "preprocessor_config.json", "config.json", "pytorch_model.bin",
                 "model-00001-of-00002.safetensors", "model.safetensors.index.json"):  # fmt: skip
        (tmp_path / "like" / name).write_text("{}")
    shutil.copy(golden / "vlm" / NEW["smolvlm"] / "config.json", tmp_path / "like")
    backbones.export(tmp_path / "new", config, params, like=tmp_path / "like")
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [
        "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json",
    ]  # fmt: skip
    with pytest.raises(FileExistsError, match="exists already; choose another name"):
        backbones.export(tmp_path / "new", config, params)
    with pytest.raises(ValueError, match=r"must be of a 'smolvlm' model, got 'kosmos2'"):
        backbones.export(tmp_path / "b", config, params, like=golden / "vlm" / NEW["kosmos2"])
    with pytest.raises(ValueError, match="max_shard_bytes must be at least 1, got 0"):
        backbones.export(tmp_path / "other", config, params, max_shard_bytes=0)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["like", "new"]


def test_a_bfloat16_model_is_exported_as_it_is_and_factors_are_merged(golden, tmp_path):
    source = golden / "vlm" / NEW["smolvlm"]
    options = weights.load_config(source).options
    options = dataclasses.replace(options, param_dtype="bfloat16", lora=LoraConfig(rank=2))
    config = weights.load_config(source, options=options)
    params = backbones.load(source, config=config)[1]
    query = params["language"]["layers"]["query"]
    assert query["lora_a"].dtype == jnp.float32
    query["lora_b"] = jax.random.normal(jax.random.key(1), query["lora_b"].shape)
    backbones.export(tmp_path / "a", config, params)
    assert json.loads((tmp_path / "a/config.json").read_text())["dtype"] == "bfloat16"
    written = load_file(tmp_path / "a/model.safetensors")
    assert {array.dtype.name for array in written.values()} == {"bfloat16"}
    a, b = np.asarray(query["lora_a"][1]), np.asarray(query["lora_b"][1])
    expected = np.asarray(query["kernel"][1], np.float32) + 16 / 2 * a @ b
    found = written["model.text_model.layers.1.self_attn.q_proj.weight"].astype(np.float32).T
    np.testing.assert_allclose(found, expected, rtol=1 / 128, atol=1e-6)


def test_a_missing_head_is_tied_with_a_warning(folder):
    source = folder("smolvlm-hf5.23", drop=("lm_head.weight",))
    with pytest.warns(UserWarning, match=r"no lm_head.weight, .* the embedding is used"):
        config, params = backbones.load(source)
    assert config.language.tied_head
    assert "head" not in params["language"]


EMBED = "language_model.model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"drop": (EMBED,)}, f"lacks 1 of 59 tensors that its config.json needs: {EMBED}; check"),
        ({"tensors": {"extra.weight": np.ones(3)}}, "has 1 tensors that .* not describe: extra"),
        ({"tensors": {EMBED: np.ones((139, 32), np.float32)}}, r"must be \[140, 32\] .* \[139, 32"),
        ({"tensors": {EMBED: np.ones((140, 32), np.uint16)}}, "dtype U16, which is not supported"),
        ({"fields": {"text_config.hidden_size": 64}}, r"must be \[64, 24\] .*, got \[32, 24\]"),
        ({"fields": {"text_config.num_hidden_layers": 3}}, "lacks 9 of 68 tensors"),
        ({"fields": {"text_config.num_hidden_layers": 1}}, "has 9 tensors that its config.json"),
        ({"fields": {"text_config.num_hidden_layers": 10**9}}, "layers must be at most 1000, got"),
        ({"fields": {"model_type": "blip"}}, "config.json: unknown model_type 'blip'; choose from"),
        ({"fields": {"model_type": "smolvlm"}}, "tensors that its config.json needs"),
        (
            {"tensors": {f"model.{EMBED.replace('.model', '')}": np.ones((140, 32), np.float32)}},
            "has the same tensor under two names",
        ),
    ],
)
def test_a_folder_whose_parts_do_not_match_is_refused(change, sentence, folder):
    with pytest.raises(ValueError, match=sentence) as caught:
        backbones.load(folder(**change))
    assert "model_0" in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_named(value, folder):
    table = np.ones((140, 32), np.float32)
    table[3, 4] = value
    sentence = f"model_0: tensors with NaN or infinity \\(1\\), the first is {EMBED}; download"
    with pytest.warns(UserWarning, match=sentence):
        backbones.load(folder(tensors={EMBED: table}))


def test_a_folder_that_is_not_a_model_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json is missing; give the folder of a"):
        backbones.load(tmp_path / "none")
    without = folder()
    (without / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"must contain model.safetensors or .*index.json"):
        backbones.load(without)
    (without / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        backbones.load(without)


VALUES = (None, "x", "", -1, 0, 7, 10**9, 10**30, 1e30, float("nan"), -1.5, True, [], [1], {})


@pytest.mark.parametrize("name", ["kosmos2-hf5.23", "paligemma2-hf5.23", "smolvlm-hf4.57"])
def test_any_value_in_any_field_of_a_config_is_read_or_refused_in_a_sentence(
    name, golden, tmp_path
):
    source = json.loads((golden / "vlm" / name / "config.json").read_text())
    places = [(None, key) for key in source]
    for section in ("text_config", "vision_config"):
        places += [(section, key) for key in source[section]]
    sentences = []
    for section, key in places:
        for value in VALUES:
            data = copy.deepcopy(source)
            (data[section] if section else data)[key] = value
            (tmp_path / "config.json").write_text(json.dumps(data))
            try:
                weights.load_config(tmp_path)
            except ValueError as error:
                sentences.append(str(error))
    assert len(sentences) > 100
    assert all(s.startswith(f"{tmp_path / 'config.json'}: ") and len(s) < 500 for s in sentences)


def test_a_field_may_be_absent_if_the_original_has_a_default():
    """Sizes that a config.json lacks are those of the original's classes."""
    whole = models.from_json({"model_type": "paligemma"})
    assert (whole.vision.intermediate_size, whole.language.hidden_size) == (4096, 2048)
    smol = {"model_type": "smolvlm", "vision_config": {"image_size": 256}}
    assert models.from_json(smol).language.epsilon == 1e-5
    assert models.from_json({**smol, "text_config": {}}).language.epsilon == 1e-6
    assert models.from_json({**smol, "text_config": {"hidden_size": 64}}).language.head_dim == 2
