"""The README's code runs, its tree names every folder, and the files it names exist."""

import pathlib
import re

import jax.numpy as jnp

import vla_jax

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TREE = re.search(r"^```\n(vla_jax/ .*?)^```", README, re.DOTALL | re.MULTILINE)[1]


def test_the_twenty_lines_run_and_streamed_equals_windowed():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    names: dict = {}
    exec(code, names)
    windowed = vla_jax.apply_policy(names["params"], names["config"], names["observation"])
    assert isinstance(names["chunk"], vla_jax.ActionChunk)
    assert jnp.allclose(names["chunk"].arm, windowed.arm[:, -1], atol=1e-5)
    assert jnp.allclose(names["chunk"].gripper_logit, windowed.gripper_logit[:, -1], atol=1e-5)


def test_the_tree_names_every_folder_of_the_library_and_only_what_exists():
    entries, folder = set(), ""
    for line in TREE.splitlines():
        name = line.split()[0]
        folder = name if not line.startswith(" ") else folder
        entries.add(name if name == folder else folder + name)
    assert not {entry for entry in entries if not (ROOT / entry).exists()}
    folders = {f"vla_jax/{path.parent.name}/" for path in (ROOT / "vla_jax").glob("*/__init__.py")}
    assert folders <= entries


def test_the_files_it_names_exist():
    named = set(re.findall(r"`((?:vla_jax|train|tests|docs)/[\w/.]+)`", README))
    assert named
    assert not {path for path in named if not (ROOT / path).exists()}


def test_it_is_short():
    assert len(README.splitlines()) <= 200
