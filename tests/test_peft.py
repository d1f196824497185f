"""PEFT adapters: read, applied, merged and written, against values computed by `peft` itself."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vla_jax import backbones, trees
from vla_jax.backbones import paligemma, peft, weight_export
from vla_jax.nn import lora

BASES = {"paligemma": "paligemma-hf5.23", "smolvlm": "smolvlm-hf5.23"}
SAVED = {"paligemma": (), "smolvlm": ("language/head/kernel",)}
each = pytest.mark.parametrize("name", BASES)
Q = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(golden):
    loaded = {name: backbones.load(golden / "vlm" / base) for name, base in BASES.items()}
    return loaded.__getitem__


@pytest.fixture
def edited(golden, tmp_path):
    """Makes a copy of PaliGemma's adapter with other settings and tensors."""

    def make(settings=None, tensors=None, drop=()):
        folder = tmp_path / "adapter"
        shutil.copytree(golden / "lora/paligemma", folder)
        data = json.loads((folder / peft.CONFIG).read_text())
        (folder / peft.CONFIG).write_text(json.dumps({**data, **(settings or {})}))
        stored = {**load_file(folder / peft.WEIGHTS), **(tensors or {})}
        for key in drop:
            del stored[key]
        save_file(stored, folder / peft.WEIGHTS)
        return folder

    return make


@functools.cache
def forward(name, config, golden):
    """Logits of a model's stored inputs as a compiled function of its params, and the mask."""
    arrays = load_file(golden / "vlm" / BASES[name] / "io.safetensors")
    inputs = {key[3:]: value for key, value in arrays.items() if key.startswith("in.")}
    run = jax.jit(lambda params: backbones.reference.forward(params, config, inputs)["logits"])
    return run, inputs["attention_mask"] == 1


def error(config, params, golden, name, stored_name):
    """Largest difference of the logits from those of the original, where the mask is 1."""
    run, mask = forward(name, config, golden)
    expected = load_file(golden / "lora" / name / "io.safetensors")[f"out.{stored_name}.logits"]
    return np.abs(run(params) - expected)[mask].max()


def equal(a, b):
    """Returns True if two trees are equal to the bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@each
def test_an_adapter_gives_the_logits_of_peft_before_and_after_merging(name, golden, base):
    config, params = base(name)
    adapted = peft.read_adapter(golden / "lora" / name, config, params)
    assert error(config, params, golden, name, "base") < 1e-5
    assert error(config, adapted, golden, name, "adapter") < 1e-5
    assert error(config, jax.jit(lora.merge)(adapted), golden, name, "merged") < 1e-5
    assert error(config, params, golden, name, "adapter") > 0.5


@each
def test_merged_tensors_are_those_of_peft_under_the_names_of_the_base_file(name, golden, base):
    config, params = base(name)
    adapted = peft.read_adapter(golden / "lora" / name, config, params)
    tensors = weight_export.to_tensors(config, jax.jit(lora.merge)(adapted))
    merged = load_file(golden / "lora" / name / "merged.safetensors")
    for key, original in weight_export.to_tensors(config, params).items():
        np.testing.assert_allclose(tensors[key], merged.get(key, original), atol=1e-6, err_msg=key)


@each
def test_a_written_adapter_holds_the_same_tensors_and_is_read_back_to_the_bit(
    name, golden, base, tmp_path
):
    config, params = base(name)
    adapted = peft.read_adapter(golden / "lora" / name, config, params)
    peft.write_adapter(tmp_path / "a", config, adapted, modules_to_save=SAVED[name])
    original = load_file(golden / "lora" / name / peft.WEIGHTS)
    written = load_file(tmp_path / "a" / peft.WEIGHTS)
    assert set(written) == set(original)
    assert all(np.array_equal(written[key], original[key]) for key in original)
    assert equal(peft.read_adapter(tmp_path / "a", config, params), adapted)
    with pytest.raises(FileExistsError, match="exists already"):
        peft.write_adapter(tmp_path / "a", config, adapted)


def test_factors_of_another_adapter_are_replaced(golden, base):
    config, params = base("paligemma")
    adapted = peft.read_adapter(golden / "lora/paligemma", config, params)
    other = lora.add(jax.random.key(0), params, lora.LoraConfig(2, targets=("*/key", "*/up")))
    assert equal(peft.read_adapter(golden / "lora/paligemma", config, other), adapted)


def test_layers_of_different_ranks_are_padded_and_their_padding_is_not_trained(
    golden, base, edited
):
    """Layer 1 has rank 2 and no adapter at `down`; the padding has no gradient."""
    config, params = base("paligemma")
    layer = "base_model.model.model.language_model.layers.1"
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 32)), random.normal(size=(32, 2))
    tensors = {f"{layer}.self_attn.q_proj.lora_A.weight": a.astype(np.float32),
               f"{layer}.self_attn.q_proj.lora_B.weight": b.astype(np.float32)}  # fmt: skip
    folder = edited(
        {"rank_pattern": {"language_model.layers.1.self_attn.q_proj": 2}},
        tensors,
        drop=[f"{layer}.mlp.down_proj.lora_{factor}.weight" for factor in "AB"],
    )
    adapted = peft.read_adapter(folder, config, params)
    query = adapted["language"]["layers"]["query"]
    assert query["lora_a"].shape == (2, 32, 4)
    np.testing.assert_array_equal(query["lora_a"][1, :, :2], a.T.astype(np.float32))
    np.testing.assert_array_equal(query["lora_scale"], [8 / 4, 8 / 2])
    assert not query["lora_b"][1, 2:].any()
    assert not adapted["language"]["layers"]["down"]["lora_b"][1].any()

    def loss(params):
        embeddings, positions = jnp.arange(96.0).reshape(1, 3, 32), jnp.arange(3)[None]
        mask = jnp.tri(3, dtype=bool)[None]
        hidden = paligemma.language_model(params, config, embeddings, positions, mask)
        return jnp.square(hidden - 1).sum()

    grads = jax.jit(jax.grad(loss))(adapted)["language"]["layers"]
    for factor, index in (("lora_a", np.s_[:, 2:]), ("lora_b", np.s_[2:])):
        assert np.abs(grads["query"][factor][1]).max() > 0
        assert not grads["query"][factor][1][index].any()
        assert np.abs(grads["down"][factor][0]).max() > 0
        assert not grads["down"][factor][1].any()
    peft.write_adapter(folder.parent / "b", config, adapted)
    stored, written = (load_file(f / peft.WEIGHTS) for f in (folder, folder.parent / "b"))
    assert {key: array.shape for key, array in stored.items()} == {
        key: array.shape for key, array in written.items()
    }
    assert equal(peft.read_adapter(folder.parent / "b", config, params), adapted)


def test_a_config_that_describes_an_adapter_gives_the_same_tree(golden, base):
    config, params = base("smolvlm")
    adapted = peft.read_adapter(golden / "lora/smolvlm", config, params)
    fresh = lora.add(jax.random.key(0), params, peft.describe(golden / "lora/smolvlm", config))
    assert not trees.first_difference(fresh, adapted)
    layers = ("language", "layers", "query", "lora_scale")
    one, other = (functools.reduce(dict.__getitem__, layers, tree) for tree in (fresh, adapted))
    assert np.max(other) == np.max(one)


def test_an_adapter_of_a_convolution_over_patches_is_a_map_of_its_pixels(base, tmp_path):
    """The update of the convolution's kernel is B · A, whatever the order of its axes."""
    config, params = base("paligemma")
    adapted = lora.add(jax.random.key(0), params, lora.LoraConfig(2, targets=("vision/patches",)))
    patches = adapted["vision"]["patches"]
    b = jax.random.normal(jax.random.key(1), patches["lora_b"].shape)
    adapted["vision"]["patches"] = {**patches, "lora_b": b}
    peft.write_adapter(tmp_path / "a", config, adapted)
    name = "base_model.model.model.vision_tower.embeddings.patch_embedding"
    stored = load_file(tmp_path / "a" / peft.WEIGHTS)
    a, b = (stored[f"{name}.lora_{factor}.weight"] for factor in "AB")
    assert (a.shape, b.shape) == ((2, 3, 14, 14), (24, 2, 1, 1))
    update = 16 / 2 * np.einsum("or,rchw->ochw", b[..., 0, 0], a)
    key = "vision_tower.embeddings.patch_embedding.weight"
    before, after = (weight_export.to_tensors(config, p)[key] for p in (params, adapted))
    np.testing.assert_allclose(after - before, update, atol=1e-5)
    assert equal(peft.read_adapter(tmp_path / "a", config, params), adapted)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"peft_type": "IA3"}, "peft_type must be 'LORA', got 'IA3'"),
        ({"peft_type": None}, "peft_type must be 'LORA', got None"),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"bias": "all"}, "bias must be 'none', got 'all'"),
        ({"lora_bias": True}, "lora_bias is not supported"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the weights"),
        ({"r": 0}, "r must be in 1 … 2147483647, got 0"),
        ({"r": "4"}, "r must be int, got '4'"),
        ({"lora_alpha": -1}, "lora_alpha must be above 0 and finite, got -1"),
        ({"rank_pattern": []}, "rank_pattern must be a dict"),
        ({"rank_pattern": {"q_proj": 1.5}}, "q_proj must be int, got 1.5"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern has '\\(', which is not a regular expression"),
        ({"r": 5}, r"lora_A of .* must be \[5, \d+\], got \[4, \d+\]; check adapter_config.json"),
    ],
)
def test_settings_that_are_not_supported_are_refused(settings, sentence, base, edited):
    with pytest.raises(ValueError, match=sentence) as caught:
        peft.read_adapter(edited(settings), *base("paligemma"))
    assert "/adapter/adapter_" in str(caught.value)


def test_tensors_that_do_not_fit_are_refused(base, edited, tmp_path):
    for number, (tensors, drop, sentence) in enumerate(
        (
            ({f"{Q}.lora_magnitude_vector": np.ones(32, np.float32)}, (), "plain LoRA"),
            ({"base_model.model.x.lora_A.weight": np.ones((4, 3), np.float32)}, (), "can adapt"),
            ({"base_model.model.lm_head.weight": np.ones((140, 32), np.float32)}, (), "lm_head"),
            ({f"{Q}.weight": np.ones((3, 3), np.float32)}, (), r"must be \[32, 32\]"),
            ({}, (f"{Q}.lora_B.weight",), "has lora_A of .*q_proj, but not lora_B"),
        )
    ):
        folder = edited({}, tensors, drop).rename(tmp_path / f"{number}")
        with pytest.raises(ValueError, match=sentence):
            peft.read_adapter(folder, *base("paligemma"))


def test_missing_files_and_missing_factors_are_refused(base, edited, tmp_path):
    config, params = base("paligemma")
    folder = edited()
    (folder / peft.WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="save the adapter in safetensors format"):
        peft.read_adapter(folder, config, params)
    with pytest.raises(FileNotFoundError, match="expected the config of a PEFT adapter"):
        peft.read_adapter(tmp_path / "none", config, params)
    with pytest.raises(ValueError, match="must have low-rank factors that are not zero"):
        peft.write_adapter(tmp_path / "b", config, params)
    assert not (tmp_path / "b").exists()
