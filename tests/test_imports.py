"""Importing a module has no side effect on the process."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = (
    *(f"train.{path.stem}" for path in sorted((ROOT / "train").glob("[a-z]*.py"))),
    *(f"vla_jax.{name}" for name in ("evaluate", "convert", "convert_data", "export", "serve")),
    "vla_jax.inspect_data",
)
LATE = (
    "orbax", "tensorstore", "scipy", "matplotlib", "grain", "torch", "transformers", "mujoco",
    "gymnasium", "pyarrow", "av", "PIL", "h5py", "tokenizers", "tensorboardX",
)  # fmt: skip
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "vla_jax").rglob("*.py")
    if path.stem != "__main__"
)
# Third-party packages are imported first: their side effects are not ours.
SCRIPT = """
import ast, importlib, logging, os, pathlib, signal, sys, warnings

def foreign(path):
    for node in ast.parse(path.read_text()).body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (name for name in names if not name.startswith(("vla_jax", "train")))

root = pathlib.Path(sys.argv[1])
for path in sorted((root / "vla_jax").rglob("*.py")):
    for name in foreign(path):
        try:
            importlib.import_module(name)
        except ImportError:
            pass

def state():
    names = ["root", *sorted(logging.root.manager.loggerDict)]
    loggers = {name: logging.getLogger(name) for name in names}
    return {
        "os.environ": dict(os.environ),
        "logging": {
            name: (list(logger.filters), list(logger.handlers), logger.level, logger.disabled)
            for name, logger in loggers.items()
        },
        "sys.unraisablehook": sys.unraisablehook,
        "sys.excepthook": sys.excepthook,
        "warnings.filters": list(warnings.filters),
        "warnings.formatwarning": warnings.formatwarning,
        "SIGINT": signal.getsignal(signal.SIGINT),
    }

changed, before = [], state()
for module in sys.argv[2:]:
    importlib.import_module(module)
    after = state()
    changed += [f"{module} changes {name}" for name in before if before[name] != after[name]]
    before = after
print("\\n".join(changed))
"""


def side_effects(root, modules):
    command = [sys.executable, "-c", SCRIPT, str(root), *modules]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    return done.stdout.split("\n")[:-1]


def test_no_import_has_a_side_effect():
    assert side_effects(ROOT, MODULES) == [""]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("import os; os.environ['VLA'] = '1'", "os.environ"),
        ("import logging; logging.getLogger('absl').addFilter(print)", "logging"),
        ("import sys; sys.unraisablehook = print", "sys.unraisablehook"),
        ("import warnings; warnings.simplefilter('ignore')", "warnings.filters"),
    ],
)
def test_an_injected_side_effect_is_found(line, name, tmp_path):
    (tmp_path / "planted.py").write_text(line)
    assert side_effects(tmp_path, ["planted"]) == [f"planted changes {name}"]


def test_no_script_imports_what_only_a_later_step_needs():
    """Wrong options are refused soon: a slow package is imported by the functions that use it."""
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    code += "; print(*{name.partition('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", code, *SCRIPTS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "jax" in done.stdout.split()
    assert not set(LATE) & set(done.stdout.split())
