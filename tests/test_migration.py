"""docs/migration.md: its commands and its code run."""

import pathlib
import re
import shlex

import jax
import numpy as np
import pytest
import torch
from robovlms_heads import their_head

from train.configs import ImitateConfig
from vla_jax import convert
from vla_jax.auxiliary import AuxiliaryConfig
from vla_jax.convert.__main__ import main
from vla_jax.decoders import DecoderConfig
from vla_jax.loss_terms import LossWeights
from vla_jax.optim import OptimConfig

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs/migration.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*beside the head are left over", "ignore:.*drawn at random")
@pytest.mark.filterwarnings("ignore:window_size 8 is assumed")
def test_the_commands_and_the_code_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = {f"model.{name}": x for name, x in their_head("lstm").items()}
    tensors["model.action_token"] = np.ones(6, np.float32)
    convert.write("policy.ckpt", convert.TensorFile(tensors))
    model = torch.nn.ModuleDict({"encoder": torch.nn.ModuleDict({"rnn": torch.nn.GRU(3, 5)})})
    torch.save(model.state_dict(), "model.pt")
    commands = re.findall(r"^python -m vla_jax\.convert (.*)$", PAGE, re.MULTILINE)
    assert len(commands) == 6
    for line in commands:
        main(shlex.split(line))
    names: dict = {}
    exec(BLOCKS[0], names)
    assert names["chunk"].arm.shape == (3, 2, 6)
    assert set(names["tensors"]) == set(their_head("lstm"))
    assert convert.read_recurrence("encoder")[0].cell == "gru"
    assert names["config"].window_size == 8


@pytest.mark.parametrize("block", BLOCKS[1:], ids=["torch", "flax", "linen"])
def test_the_blocks_on_torch_and_flax_run(block):
    names: dict = {}
    exec(block, names)
    leaves = jax.tree.leaves(names["params"])
    assert leaves
    assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_every_name_of_ours_in_the_tables_exists():
    for owner in (DecoderConfig, OptimConfig, ImitateConfig, LossWeights, AuxiliaryConfig):
        fields = set(owner.__dataclass_fields__)
        named = set(re.findall(rf"`{owner.__name__}\.(\w+)`", PAGE))
        assert named
        assert named <= fields


def test_the_readme_links_it():
    assert "(docs/migration.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
