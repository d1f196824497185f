"""The manual: every Python block and the notebook run, commands exist, links have targets."""

import importlib.util
import pathlib
import re
import shlex

import nbformat
import pytest
import tiny_run
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient

from train import (
    chains,
    deep_sarsa,
    demo,
    memory_config,
    memory_pictures,
    memory_suite,
    ppo,
    pretrain,
    record,
    reinforce,
    scan,
    sweep,
    tabular,
)
from train.cache_frames import CACHE
from train.presets import IMITATE
from vla_jax.backbones.registry import BACKBONES
from vla_jax.command_line import command_line
from vla_jax.data.readers.reader import READERS
from vla_jax.envs.worlds import WORLDS
from vla_jax.nn.cells import CELLS

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
GUIDES = (
    "index",
    "first_run",
    "your_data",
    "robot",
    "extend/cell",
    "extend/backbone",
    "extend/reader",
    "extend/world",
)
PRESETS = {
    "train.cache": CACHE,
    "train.chains": chains.CHAINS,
    "train.deep_sarsa": deep_sarsa.SARSA,
    "train.demo": demo.PRESETS,
    "train.imitate": IMITATE,
    "train.memory": memory_config.PRESETS,
    "train.memory_pictures": memory_pictures.PRESETS,
    "train.memory_suite": memory_suite.MEMORY_SUITE,
    "train.ppo": ppo.PPO,
    "train.pretrain": pretrain.PRESETS,
    "train.record": record.PRESETS,
    "train.reinforce": reinforce.REINFORCE,
    "train.scan": scan.PRESETS,
    "train.sweep": sweep.SWEEP,
    "train.tabular": tabular.TABULAR,
}
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *(path for path in sorted(DOCS.rglob("*.md")) if path.name != "quickstart.md"),
]


def blocks(text, language="python"):
    """Code blocks of a page in a language; "" means without a language."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [code for name, code in fences if name == language]


def commands(text):
    """Argument lists of the `python -m` commands in the page's shell blocks."""
    for block in blocks(text, ""):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(r"python3? -m (.*)", line)
            if found:
                yield shlex.split(found[1], comments=True)


@pytest.fixture
def families():
    """Restores the registries to which a guide adds entries."""
    before = [(family, dict(family)) for family in (BACKBONES, CELLS, READERS, WORLDS)]
    yield
    for family, members in before:
        family.clear()
        family.update(members)


@pytest.mark.sampled
@pytest.mark.usefixtures("families")
@pytest.mark.parametrize("name", GUIDES)
def test_the_code_of_a_guide_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_run.write(tmp_path / "runs/first")
    code = blocks((DOCS / f"{name}.md").read_text(encoding="utf-8"))
    assert code
    names: dict = {"__name__": "guide"}
    for block in code:
        exec(block, names)


def page_name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_the_commands_of_a_page_exist(path):
    for argv in commands(path.read_text(encoding="utf-8")):
        assert importlib.util.find_spec(argv[0]), argv
        if "--init-from" in argv:
            command_line(reinforce.FINETUNE, argv[1:], description="Runs a script.")
        elif argv[0] in PRESETS:
            command_line(PRESETS[argv[0]], argv[1:], description="Runs a script.")


@pytest.mark.parametrize("name", ["your_data", "gpu"])
def test_the_training_options_in_the_tables_of_a_guide_exist(name):
    rows = re.findall(r"^\|(.*)\|$", (DOCS / f"{name}.md").read_text("utf-8"), re.MULTILINE)
    spans = [span for row in rows for span in re.findall(r"`(--[^`]*)`", row)]
    with_values = [shlex.split(span) for span in spans if " " in span]
    assert with_values
    for argv in with_values:
        command_line(IMITATE, argv, description="Trains a policy.")


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_the_links_of_a_page_have_targets(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith("#"):
            file = path.parent / target.partition("#")[0]
            assert file.is_file() or file == DOCS / "quickstart.md", target


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in DOCS.rglob("*.md"):
        assert str(path.relative_to(DOCS)) in navigation


@pytest.mark.slow
def test_the_notebook_runs_from_the_wheel_with_outputs_of_the_stored_kinds(
    wheel_python, tmp_path, monkeypatch
):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    stored = nbformat.read(DOCS / "quickstart.ipynb", as_version=4)
    fresh = nbformat.read(DOCS / "quickstart.ipynb", as_version=4)
    fresh.cells.append(nbformat.v4.new_code_cell("print(vla_jax.__file__)"))
    kernel = AsyncKernelManager(kernel_name="python3")
    kernel.kernel_spec.argv[0] = str(wheel_python)
    NotebookClient(fresh, timeout=600, km=kernel).execute(cleanup_kc=True)
    package = pathlib.Path(fresh.cells.pop().outputs[0].text.strip())
    assert package.is_relative_to(wheel_python.parents[1])
    kinds = [
        [
            [(o.output_type, *sorted(o.get("data", {}))) for o in cell.get("outputs", ())]
            for cell in n.cells
        ]
        for n in (stored, fresh)
    ]
    assert kinds[0] == kinds[1]
    assert any(("display_data", "image/png", "text/plain") in outputs for outputs in kinds[0])
    text = "".join(o.get("text", "") for cell in fresh.cells for o in cell.get("outputs", ()))
    assert "streamed = windowed to 1e-5" in text


def test_the_notebook_imports_only_the_package_itself():
    cells = nbformat.read(DOCS / "quickstart.ipynb", as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    imports = re.findall(r"^(?:import|from) (\S+)", code, re.MULTILINE)
    assert [name for name in imports if name.startswith("vla_jax")] == ["vla_jax"]
