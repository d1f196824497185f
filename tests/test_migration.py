"""The commands and the code of docs/migration.md run."""

import pathlib
import re
import shlex

import jax
import numpy as np
import pytest
import tiny_run
import torch
from robovlms_heads import robovlms_head

from train.configs import ImitateConfig
from train.presets import IMITATE
from vla_jax import convert
from vla_jax.command_line import command_line
from vla_jax.convert.__main__ import main
from vla_jax.policies import decoders
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.training.auxiliary import AuxiliaryConfig
from vla_jax.training.loss_terms import LossWeights
from vla_jax.training.optim import OptimConfig

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs/migration.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
HEAD, EXPORT, ACTION_TOKENS, *OTHERS = BLOCKS


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.*outside the head are left over", "ignore:.*randomly initialised"
)
@pytest.mark.filterwarnings("ignore:assuming window_size 8")
def test_the_commands_and_the_code_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = {f"model.{name}": x for name, x in robovlms_head("lstm").items()}
    tensors["model.action_token"] = np.ones(6, np.float32)
    convert.write("policy.ckpt", convert.TensorFile(tensors))
    model = torch.nn.ModuleDict({"encoder": torch.nn.ModuleDict({"rnn": torch.nn.GRU(3, 5)})})
    torch.save(model.state_dict(), "model.pt")
    commands = re.findall(r"^python -m vla_jax\.convert (.*)$", PAGE, re.MULTILINE)
    assert len(commands) == 6
    for line in commands:
        main(shlex.split(line))
    names: dict = {}
    exec(HEAD, names)
    assert names["chunk"].arm.shape == (3, 2, 6)
    assert set(names["tensors"]) == set(robovlms_head("lstm"))
    assert convert.read_recurrence("encoder")[0].cell == "gru"
    assert names["config"].window_size == 8


def test_the_documented_options_for_a_released_head_give_a_decoder_of_its_size():
    found = re.search(r"^python -m train\.imitate (.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert found
    argv = shlex.split(found[1].replace("\\\n", ""))
    config = command_line(IMITATE, argv, description="Imitates.")
    decoder = config.agent.policy.decoder
    params = jax.eval_shape(lambda key: decoders.init(key, decoder), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 41_210_950
    assert (decoder.kind, decoder.window_size, decoder.dropout) == ("lstm", 8, 0)
    assert (config.decoder_from, config.pack) == ("converted", False)


def test_a_trained_head_is_written_into_the_original_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_run.write(tmp_path / "runs/fine")
    head = robovlms_head("lstm", in_features=8, hidden=8, layers=1, sizes=(8,))
    tensors = {f"model.{name}": x for name, x in head.items()} | {"model.vision": np.ones(6)}
    convert.write("policy.ckpt", convert.TensorFile(tensors))
    exec(EXPORT, {})
    fine = convert.read("fine.ckpt").tensors
    assert list(fine) == list(tensors)
    head = {name: x for name, x in fine.items() if "head" in name}
    config, params = convert.from_robovlms(head, window_size=8)
    assert config.hidden_size == 8
    jax.tree.map(np.testing.assert_array_equal, params, tiny_run.params(10)["decoder"])
    np.testing.assert_array_equal(fine["model.vision"], tensors["model.vision"])


@pytest.mark.slow
def test_the_code_block_on_action_tokens_runs():
    names: dict = {}
    exec(ACTION_TOKENS, names)
    np.testing.assert_allclose(names["loss"], np.log(32064), rtol=1e-5)
    assert names["metrics"]["action_l1"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("block", OTHERS, ids=["torch", "flax", "linen"])
def test_the_code_blocks_on_torch_and_flax_run(block):
    names: dict = {}
    exec(block, names)
    leaves = jax.tree.leaves(names["params"])
    assert leaves
    assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_every_config_field_in_the_tables_exists():
    for owner in (DecoderConfig, OptimConfig, ImitateConfig, LossWeights, AuxiliaryConfig):
        fields = set(owner.__dataclass_fields__)
        named = set(re.findall(rf"`{owner.__name__}\.(\w+)`", PAGE))
        assert named
        assert named <= fields


def test_the_readme_links_the_page():
    assert "(docs/migration.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
