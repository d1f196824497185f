"""The README's code runs, its tree lists every folder, and the files it names exist."""

import os
import pathlib
import re
import subprocess

import jax.numpy as jnp
import pytest

import vla_jax

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TREE = re.search(r"^```\n(vla_jax/ .*?)^```", README, re.DOTALL | re.MULTILINE)[1]


def test_the_example_runs_and_streamed_equals_windowed():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    names: dict = {}
    exec(code, names)
    windowed = vla_jax.apply_policy(names["params"], names["config"], names["observation"])
    assert isinstance(names["chunk"], vla_jax.ActionChunk)
    assert jnp.allclose(names["chunk"].arm, windowed.arm[:, -1], atol=1e-5)
    assert jnp.allclose(names["chunk"].gripper_logit, windowed.gripper_logit[:, -1], atol=1e-5)


def test_the_tree_lists_every_folder_of_the_library_and_nothing_missing():
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


@pytest.mark.slow
def test_the_example_runs_from_the_installed_wheel(wheel_python, tmp_path):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    (tmp_path / "example.py").write_text(f"{code}\nprint(vla_jax.__file__)\n")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [wheel_python, "example.py"], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    package = pathlib.Path(done.stdout.strip()).parent
    assert package.is_relative_to(wheel_python.parents[1])
    assert (package / "py.typed").is_file()
    assert not (package.parent / "train").exists()
