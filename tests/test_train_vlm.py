"""Trainings on a vision-language model on disk: whole, adapted, cached, resumed."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tiny_demos
import tiny_vlm

from train.backbone_source import read_backbone, resolve
from train.cache import cache
from train.imitate import imitate
from train.presets import IMITATE
from vla_jax import backbones
from vla_jax.acting.agent import AgentConfig
from vla_jax.backbones import peft
from vla_jax.convert.__main__ import main as convert
from vla_jax.nn import lora
from vla_jax.nn.lora import LoraConfig
from vla_jax.policies import policy
from vla_jax.runs import load_run
from vla_jax.training import checkpoint
from vla_jax.training.loop import LoopConfig
from vla_jax.trees import leaves_by_path

TOKENIZER = pathlib.Path(__file__).parent / "golden/tokenizers/smolvlm/tokenizer.json"
PREPROCESSING = json.dumps(
    {
        "image_processor_type": "SmolVLMImageProcessor",
        "size": {"longest_edge": 64},
        "max_image_size": {"longest_edge": 16},
        "do_image_splitting": False,
    }
)
VLM = dataclasses.replace(
    tiny_vlm.CONFIGS["smolvlm"],
    language=dataclasses.replace(tiny_vlm.LANGUAGE, vocab_size=400),
    image_token_id=int(
        next(
            token["id"]
            for token in json.loads(TOKENIZER.read_text())["added_tokens"]
            if token["content"] == "<image>"
        )
    ),
    options=dataclasses.replace(tiny_vlm.OPTIONS, max_text_tokens=48),
)


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    return tiny_demos.write(tmp_path_factory.mktemp("demos") / "table")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model in Hugging Face's format, with a tokenizer."""
    path = tmp_path_factory.mktemp("models") / "smolvlm"
    backbones.export(path, VLM, tiny_vlm.params(VLM))
    shutil.copy(TOKENIZER, path)
    return path


def training(demos, run_dir, folder, *, num_updates=2, **options):
    """Config of a few updates; the sizes of its backbone are not those of the folder."""
    backbone = dataclasses.replace(
        tiny_vlm.CONFIGS["smolvlm"], options=dataclasses.replace(VLM.options, **options)
    )
    config = tiny_demos.imitation(demos, run_dir)
    decoder = dataclasses.replace(tiny_demos.DECODER, window_size=2, dropout=0.0)
    return dataclasses.replace(
        config,
        backbone_from=str(folder),
        agent=AgentConfig(policy.connect(backbone, decoder)),
        loop=LoopConfig(num_updates=num_updates, log_every=1, save_every=1, mesh="data=1"),
        loader=dataclasses.replace(config.loader, batch_size=2),
    )


def backbone_leaves(run_dir):
    return leaves_by_path(checkpoint.restore_params(run_dir / "checkpoints")["backbone"])


def changed_paths(run_dir, params):
    original = leaves_by_path(params)
    found = backbone_leaves(run_dir)
    return {p for p in found if p not in original or not np.array_equal(found[p], original[p])}


@pytest.mark.slow
def test_a_model_trains_whole_and_its_run_folder_acts_without_the_model(demos, folder, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    run_dir = imitate(training(demos, tmp_path / "run", copy))
    changed = changed_paths(run_dir, tiny_vlm.params(VLM))
    assert {"action_token", "language/layers/query/kernel", "vision/patches/kernel"} <= changed
    shutil.rmtree(copy)
    run = load_run(run_dir)
    assert run.agent.policy.backbone.language.vocab_size == 400
    assert run.agent.policy.backbone.options.tokenizer == str(run_dir / "tokenizer.json")


@pytest.mark.slow
@pytest.mark.sampled
def test_an_adapted_training_changes_factors_alone_and_resumes_to_the_bit(demos, folder, tmp_path):
    lora = LoraConfig(rank=2)
    whole = imitate(training(demos, tmp_path / "whole", folder, lora=lora))
    changed = changed_paths(whole, tiny_vlm.params(VLM))
    assert changed == {
        *(f"language/layers/{n}/lora_{x}" for n in ("query", "value") for x in ("a", "b", "scale")),
        *("action_token", "proprio/kernel", "proprio/bias"),
    }
    config = training(demos, tmp_path / "half", folder, lora=lora)
    half = imitate(config)
    shutil.rmtree(half / "checkpoints/2")
    imitate(config)
    one, other = backbone_leaves(whole), backbone_leaves(half)
    assert all(np.array_equal(one[path], other[path]) for path in one)


@pytest.mark.slow
def test_a_training_starts_from_an_adapter_and_the_command_writes_its_model_back(
    demos, folder, tmp_path
):
    adaptation = LoraConfig(rank=3, alpha=6.0, targets=("language/layers/up",))
    adapted = lora.add(jax.random.key(2), tiny_vlm.params(VLM), adaptation)
    up = adapted["language"]["layers"]["up"]
    up["lora_b"] = 0.1 * jax.random.normal(jax.random.key(3), up["lora_b"].shape)
    peft.write_adapter(tmp_path / "adapter", VLM, adapted)
    config = dataclasses.replace(
        training(demos, tmp_path / "run", folder, lora=LoraConfig(rank=2)),
        adapter_from=str(tmp_path / "adapter"),
    )
    assert resolve(config).agent.policy.backbone.options.lora == adaptation
    started = leaves_by_path(read_backbone(resolve(config)))
    run_dir = imitate(config)
    assert {"action_token", "language/layers/up/lora_a"} <= changed_paths(run_dir, adapted)
    for path, leaf in leaves_by_path(adapted).items():
        if not path.startswith(("action_token", "proprio")):
            np.testing.assert_array_equal(started[path], leaf)

    tuned = load_run(run_dir).params["backbone"]
    (folder / "preprocessor_config.json").write_text(PREPROCESSING)
    convert([str(run_dir), str(tmp_path / "b"), "--to", "peft"])
    convert([str(run_dir), str(tmp_path / "m"), "--to", "huggingface", "--vlm", str(folder)])
    again = leaves_by_path(peft.read_adapter(tmp_path / "b", VLM, tiny_vlm.params(VLM)))
    merged = leaves_by_path(backbones.load(tmp_path / "m")[1])
    expected = leaves_by_path(jax.jit(lora.merge)(tuned))
    for path, leaf in leaves_by_path(tuned).items():
        if path.startswith(("vision/", "projection/", "language/")):
            np.testing.assert_array_equal(again[path], leaf)
            if "lora" not in path:
                np.testing.assert_allclose(merged[path], expected[path], atol=1e-6)
    assert (tmp_path / "m/preprocessor_config.json").read_text() == PREPROCESSING
    assert (tmp_path / "m/tokenizer.json").read_bytes() == TOKENIZER.read_bytes()


def test_an_adapter_without_its_model_is_refused(demos, folder, tmp_path):
    config = training(demos, tmp_path / "run", folder)
    with pytest.raises(ValueError, match="backbone_from must be the model that adapter_from was"):
        imitate(dataclasses.replace(config, backbone_from="", adapter_from="nowhere"))
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json is missing"):
        imitate(dataclasses.replace(config, adapter_from=str(folder)))


@pytest.mark.slow
def test_cached_features_of_a_model_train_a_decoder_and_do_not_depend_on_the_seed(
    demos, folder, tmp_path
):
    config = dataclasses.replace(
        training(demos, tmp_path / "run", folder, readout="image_mean"), frozen_backbone=True
    )
    first = cache(config)
    assert cache(dataclasses.replace(config, seed=7)) == first
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    assert cache(dataclasses.replace(config, backbone_from=str(moved))) == first
    assert changed_paths(imitate(config), tiny_vlm.params(VLM)) == {
        "proprio/kernel",
        "proprio/bias",
    }


@pytest.mark.slow
def test_a_run_gives_its_model_tokenizer_and_adaptation_to_the_next(demos, folder, tmp_path):
    first = imitate(training(demos, tmp_path / "first", folder, lora=LoraConfig(rank=2)))
    config = training(demos, tmp_path / "second", first, readout="last")
    options = resolve(config).agent.policy.backbone.options
    assert options.lora.rank == 2
    assert options.tokenizer == str(first / "tokenizer.json")
    assert "action_token" not in backbone_leaves(imitate(config))


@pytest.mark.slow
@pytest.mark.sampled
def test_a_sharded_update_of_an_adapted_model_equals_that_of_one_device(demos, folder, tmp_path):
    config = training(demos, tmp_path / "one", folder, num_updates=1, lora=LoraConfig(rank=2))
    config = dataclasses.replace(config, loader=dataclasses.replace(config.loader, batch_size=4))
    sharded = dataclasses.replace(
        config,
        run_dir=str(tmp_path / "four"),
        loop=dataclasses.replace(config.loop, mesh="data=2,fsdp=2"),
    )
    one, four = backbone_leaves(imitate(config)), backbone_leaves(imitate(sharded))
    for path, leaf in one.items():
        np.testing.assert_allclose(four[path], leaf, atol=1e-5, err_msg=path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "readout must be one without learned tokens with frozen_backbone"),
    ],
)
def test_features_that_cannot_be_cached_are_refused(demos, folder, tmp_path, options, message):
    config = dataclasses.replace(
        training(demos, tmp_path / "run", folder, **options), frozen_backbone=True
    )
    with pytest.raises(ValueError, match=message):
        imitate(config)


def test_a_model_of_another_kind_is_refused(demos, folder, tmp_path):
    config = training(demos, tmp_path / "run", folder)
    other = policy.connect(tiny_vlm.CONFIGS["paligemma"], tiny_demos.DECODER)
    with pytest.raises(ValueError, match=r"must hold a backbone 'paligemma'.* got 'smolvlm'"):
        imitate(dataclasses.replace(config, agent=AgentConfig(other)))


@pytest.mark.parametrize("name", [name for name in IMITATE if "vlm" in name or "lstm" in name])
def test_the_shapes_of_every_preset_fit(name):
    config = IMITATE[name]().agent.policy
    shapes = jax.eval_shape(lambda key: policy.init(key, config), jax.random.key(0))
    assert shapes["decoder"]
