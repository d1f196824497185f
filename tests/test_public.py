"""`import vla_jax`: lazy public names, subpackages, and the cost of the import."""

import ast
import importlib
import pathlib
import pkgutil
import subprocess
import sys
import tomllib

import pytest

import vla_jax

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "vla_jax"
HEAVY = ("jax", "numpy", "flax", "optax", "orbax", "mujoco", "grain", "pyarrow", "torch", "chex")
SUBPACKAGES = sorted(module.name for module in pkgutil.iter_modules([str(PACKAGE)]) if module.ispkg)


def run(code):
    """Returns the standard output of `code` in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def typed_names():
    """Returns name -> (module, attribute) from the TYPE_CHECKING block."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.asname or alias.name: (statement.module, alias.name)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }


def test_the_import_loads_no_other_package():
    loaded = run("import sys, vla_jax; print(*{name.partition('.')[0] for name in sys.modules})")
    assert not set(HEAVY) & set(loaded.split())


def test_the_import_adds_at_most_300_ms_to_jax():
    code = "import time, jax; s = time.perf_counter(); import vla_jax; print(time.perf_counter()-s)"
    assert min(float(run(code)) for _ in range(2)) < 0.3


@pytest.mark.parametrize("name", vla_jax.__all__)
def test_every_public_name_is_the_object_that_type_checkers_see(name):
    module, attribute = typed_names()[name]
    if module == "vla_jax":
        assert getattr(vla_jax, name) is importlib.import_module(f"vla_jax.{name}")
    else:
        assert getattr(vla_jax, name) is getattr(importlib.import_module(module), attribute)
    assert name in dir(vla_jax)


def test_every_subpackage_is_an_attribute_and_no_other_module_is_typed():
    assert set(SUBPACKAGES) <= set(vla_jax.__all__)
    assert set(typed_names()) == set(vla_jax.__all__)
    assert "True" in run("import vla_jax; print(vla_jax.nn.__name__ == 'vla_jax.nn')")


def test_no_module_hides_a_public_function_of_its_name():
    modules = {module.name for module in pkgutil.iter_modules([str(PACKAGE)])}
    assert modules & set(vla_jax.__all__) == set(SUBPACKAGES)


def test_an_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        vla_jax.no_such_name  # noqa: B018


def test_the_version_equals_that_of_the_distribution():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == vla_jax.__version__
    assert f"## {vla_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"version: {vla_jax.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_package_is_marked_as_typed():
    assert (PACKAGE / "py.typed").is_file()
