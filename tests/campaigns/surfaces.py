"""What a training reads besides its run folder: caches, weights, models, mixtures, configs.

A surface writes a small folder, and reads it as the commands do; the campaign damages its files.
"""

import json
import pathlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np
import tiny_demos
from mutations import digest_of

from train import file_hashes
from train.configs import ImitateConfig
from train.mixture_file import read_mixture
from train.setup import check, read_dataset
from vla_jax import config as configs
from vla_jax import convert
from vla_jax.backbones import tokenizers, weights
from vla_jax.convert.__main__ import main as convert_main
from vla_jax.convert.folder import read_folder, read_recurrence
from vla_jax.data import token_files
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.data.token_files import TokenSizes
from vla_jax.policies import policy
from vla_jax.training import checkpoint

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SIZES = TokenSizes(25, 3, 4, "float32")  # of cached tokens
Parts = dict[str, str]  # part -> hash of its content


class Surface(NamedTuple):
    """A folder that the project reads."""

    make: Callable[[pathlib.Path], None]  # writes it
    read: Callable[[pathlib.Path], Parts]  # as the commands do
    json: tuple[str, ...] = ()  # globs of JSON files whose values are changed
    bytes: tuple[str, ...] = ()  # globs of files whose bytes are changed


def _digests(tree: object) -> str:
    return digest_of([digest_of(np.asarray(leaf)) for leaf in jax.tree.leaves(tree)])


# --- caches -----------------------------------------------------------------------------------


def make_tokens(folder: pathlib.Path) -> None:
    """Writes three shards of tokens, the params beside them, and hashes of their sources."""
    draw = np.random.default_rng(0)
    with small_shards():
        for shard in range(SIZES.num_shards):
            count = len(SIZES.frames(shard))
            block = draw.normal(size=(count, 3, 4)).astype(np.float32), draw.random((count, 3)) > 0
            token_files.write_shard(folder / "cache", shard, SIZES, [block])
    checkpoint.save_params(folder / "cache/params", {"w": draw.normal(size=(5, 7))})
    (folder / "source.bin").write_bytes(b"weights")
    file_hashes.hash_files({"a": folder / "source.bin"}, folder / "hashes.json")


def small_shards() -> "mock._patch[int]":
    """Limits a shard to ten frames inside a block."""
    return mock.patch.object(token_files, "SHARD_BYTES", 10 * SIZES.frame_bytes)


def read_tokens(folder: pathlib.Path) -> Parts:
    """Reads tokens as `train.imitate` does: checks the shards that are not missing."""
    with small_shards():
        missing = token_files.missing_shards(folder / "cache", SIZES)
        there = sorted({*range(SIZES.num_shards)} - {*missing})
        token_files.check_shards(folder / "cache", there, SIZES)
        if missing:
            raise ValueError(f"shards {missing} are missing and computed again.")
        tokens = token_files.open_tokens(folder / "cache", SIZES)
        parts = {"tokens": _digests([part[:] for part in tokens])}
    parts["params"] = _digests(checkpoint.read_params(folder / "cache/params"))
    parts["hash"] = file_hashes.hash_files({"a": folder / "source.bin"}, folder / "hashes.json")
    return parts


def make_frames(folder: pathlib.Path) -> None:
    """Records demonstrations and decodes their images to the disk."""
    tiny_demos.write(folder / "demos")
    read_frames(folder)


def read_frames(folder: pathlib.Path) -> Parts:
    """Reads all images of the demonstrations, from their decoded files."""
    data = DatasetConfig(str(folder / "demos"), decode="whole", decoded_dir=str(folder / "frames"))
    dataset = read_dataset(replace(_on_images(folder / "demos"), dataset=data))
    return {name: digest_of(np.asarray(part[:])) for name, part in dataset.frames.items()}


def _on_images(demos: pathlib.Path) -> ImitateConfig:
    """Returns the config of a small training on images."""
    config = tiny_demos.imitation(demos, "out")
    decoder = config.agent.policy.decoder
    agent = replace(config.agent, policy=policy.connect(tiny_demos.PERCEIVER, decoder))
    return replace(config, agent=agent)


# --- weights ----------------------------------------------------------------------------------


def make_weights(suffix: str) -> Callable[[pathlib.Path], None]:
    """Returns a function that writes the weights of a `torch.nn.LSTM`."""

    def make(folder: pathlib.Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        draw = np.random.default_rng(0)
        shapes = {"weight_ih_l0": (16, 3), "weight_hh_l0": (16, 4)}
        shapes |= {name: (16,) for name in ("bias_ih_l0", "bias_hh_l0")}
        tensors = {name: draw.normal(size=shape) for name, shape in shapes.items()}
        tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
        convert.write(folder / f"model{suffix}", convert.TensorFile(tensors))

    return make


def read_weights(suffix: str) -> Callable[[pathlib.Path], Parts]:
    """Returns a function that converts the weights of a `torch.nn.LSTM`, as the command does."""

    def read(folder: pathlib.Path) -> Parts:
        return _converted(folder, [str(folder / f"model{suffix}"), str(folder / "out")])

    return read


def _converted(folder: pathlib.Path, argv: list[str]) -> Parts:
    """Runs `vla_jax.convert` and reads what it wrote."""
    with mock.patch.dict("os.environ", {"VLA_JAX_TRACEBACK": "1"}):
        convert_main(argv)
    return read_converted(folder / "out")


def make_converted(folder: pathlib.Path) -> None:
    """Converts the weights of a `torch.nn.LSTM`."""
    make_weights(".safetensors")(folder)
    _converted(folder, [str(folder / "model.safetensors"), str(folder / "out")])


def read_converted(folder: pathlib.Path) -> Parts:
    """Reads the folder of a conversion, and its file."""
    config, params = read_recurrence(folder)
    whole = read_folder(folder)
    return {
        "config": digest_of(config),
        "params": _digests(params),
        "tensors": _digests(dict(whole.tensors)),
        "names": digest_of(list(whole.tensors)),
    }


def make_model(name: str) -> Callable[[pathlib.Path], None]:
    """Returns a function that writes the folder of a vision-language model."""

    def make(folder: pathlib.Path) -> None:
        shutil.copytree(GOLDEN / f"vlm/{name}-hf5.23", folder, dirs_exist_ok=True)
        shutil.copy(GOLDEN / f"tokenizers/{name}/tokenizer.json", folder)
        for path in folder.glob("*.safetensors"):
            if path.name != "model.safetensors":
                path.unlink()
        tensors = dict(convert.read(folder / "model.safetensors").tensors)
        names = sorted(tensors)
        weight_map = {}
        for number, half in enumerate((names[::2], names[1::2])):
            file = f"model-0000{number + 1}-of-00002.safetensors"
            convert.write(folder / file, convert.TensorFile({each: tensors[each] for each in half}))
            weight_map |= dict.fromkeys(half, file)
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return make


def read_model(folder: pathlib.Path) -> Parts:
    """Reads config, weights and tokenizer of a model's folder."""
    config, params = weights.load(folder)
    tokenizer = tokenizers.read_tokenizer(config.options.tokenizer)
    return {
        "config": digest_of(configs.to_dict(config) | {"options": ""}),
        "params": _digests(params),
        "ids": digest_of(tokenizers.ids(tokenizer, "pick up the red block", True)),
    }


# --- configs ----------------------------------------------------------------------------------


def make_mixture(folder: pathlib.Path) -> None:
    """Writes a mixture of two data sets."""
    tiny_demos.write(folder / "a")
    shutil.copytree(folder / "a", folder / "b")
    entries = [
        {"name": "one", "weight": 2, "path": "a", "cameras": ["primary=observation.images.primary"],
         "expected_fps": 10.0, "decoded_dir": "f", "cache_bytes": 1000000},
        {"name": "two", "weight": 1, "path": "b", "skip_bad_episodes": True},
    ]  # fmt: skip
    (folder / "mixture.json").write_text(json.dumps({"datasets": entries}))


def read_mixture_file(folder: pathlib.Path) -> Parts:
    """Reads a mixture, without its data."""
    parts = read_mixture(str(folder / "mixture.json"), DatasetConfig())
    return {"mixture": digest_of(str(parts).replace(str(folder), ""))}


def read_config(folder: pathlib.Path) -> Parts:
    """Reads and checks the config of a training."""
    config = configs.load(ImitateConfig, folder / "config.json")
    check(config)
    return {"config": digest_of(config)}


def make_config(folder: pathlib.Path) -> None:
    """Writes the config of a training on images."""
    tiny_demos.write(folder / "demos")
    configs.save(_on_images(folder / "demos"), folder / "config.json")


SURFACES = {
    "tokens": Surface(
        make_tokens, read_tokens, ("hashes.json", "cache/**/*.json"),
        ("cache/shard*/*", "cache/params/**/*", "hashes.json"),
    ),
    "frames": Surface(make_frames, read_frames, ("frames/*.json",), ("frames/*",)),
    "pt": Surface(make_weights(".pt"), read_weights(".pt"), (), ("model.pt",)),
    "safetensors": Surface(
        make_weights(".safetensors"), read_weights(".safetensors"), (), ("model.safetensors",)
    ),
    "converted": Surface(
        make_converted, lambda folder: read_converted(folder / "out"),
        ("out/*.json",), ("out/**/*",),
    ),
    "paligemma": Surface(
        make_model("paligemma"), read_model,
        ("config.json", "model.safetensors.index.json", "preprocessor_config.json"), ("*",),
    ),
    "smolvlm": Surface(make_model("smolvlm"), read_model, ("config.json",), ("config.json",)),
    "kosmos2": Surface(make_model("kosmos2"), read_model, ("config.json",), ("config.json",)),
    "qwen3_vl": Surface(make_model("qwen3vl"), read_model, ("config.json",), ("config.json",)),
    "mixture": Surface(
        make_mixture, read_mixture_file, ("mixture.json",), ("mixture.json",)
    ),
    "config": Surface(make_config, read_config, ("config.json",), ("config.json",)),
}  # fmt: skip
