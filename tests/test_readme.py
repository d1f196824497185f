"""The README's code runs, and its tree names every file."""

import pathlib
import re

import jax.numpy as jnp
import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_twenty_lines_run_and_stream_what_they_trained():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    names: dict = {}
    exec(code, names)
    windowed = names["decoders"].apply(names["params"], names["config"], names["tokens"])
    last = names["ActionChunk"](windowed.arm[:, -1], windowed.gripper_logit[:, -1])
    assert isinstance(names["chunk"], names["ActionChunk"])
    assert jnp.allclose(names["chunk"].arm, last.arm, atol=1e-5)
    assert jnp.allclose(names["chunk"].gripper_logit, last.gripper_logit, atol=1e-5)


@pytest.mark.parametrize("folder", ["vla_jax", "train"])
def test_the_tree_names_every_file(folder):
    files = {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    assert not {name for name in files if name not in README}


def test_it_is_short():
    assert len(README.splitlines()) <= 200
