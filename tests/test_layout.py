"""The shape of the repository: who may import whom, and how large a file may grow."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FLOORS = (  # a file imports only from files above it
    "types", "config", "rotations", "action_tokens", "gates", "products", "cells", "bptt",
    "associative", "cudnn", "recurrence", "truncated", "transformer", "heads", "attention",
    "seq2seq",
    "scheduled_sampling", "search", "chunk_writer", "pooling", "decoder_config", "decoders",
    "streaming_gpt", "streaming_seen", "streaming", "execution", "loss_terms", "losses",
    "captions", "auxiliary", "optim",
    "data.dataset", "data.gripper", "data.tool_frame", "data.text", "data.augment",
    "augment", "data.normalize", "data.windows", "data.packing", "data.scan", "data.buckets",
    "data.loader", "data.frames", "data.lerobot_layout", "data.lerobot", "data.lerobot_stats",
    "data.lerobot_shards", "data.lerobot_writer",
    "backbones.parts", "backbones.language", "backbones.perceiver", "backbones.state",
    "backbones.family",
    "policy", "agent", "robovlms",
    "envs.table", "envs.table_scene", "envs.table_expert", "envs.table_mujoco",
    "envs.table_jax_paint", "envs.table_jax", "envs.gymnasium", "envs.simulate", "envs.worlds",
    "envs.grid", "envs.cartpole", "envs.table_choices", "envs.hidden",
    "rl.returns", "rl.exploration", "rl.policy_gradient", "rl.sarsa", "rl.worlds", "rl.network",
    "rl.actor", "rl.gaussian", "rl.episodes",
    "update", "parallel", "checkpoint",
    "convert.arrays", "convert.report", "convert.sizes", "convert.files", "convert.torch_rnn",
    "convert.robovlms_names", "convert.robovlms_sizes", "convert.robovlms", "convert.flax_cells",
    "convert.folder", "convert.__main__",
    "runs",
    "rollout", "results", "film", "plots", "report", "players", "progress", "evaluate",
    "linen",
)  # fmt: skip
SCRIPTS = (
    "command_line", "logs", "malloc", "loop", "record", "pretrain", "configs", "setup", "cache",
    "imitate", "demo", "seq2seq", "timing", "peers", "ours", "works", "path", "benchmark",
    "memory_tasks", "memory", "learner", "learn", "host_actor", "host_learn", "watch",
    "from_reward", "sarsa", "finetune", "reinforce", "tabular", "grid_gymnasium", "throughput",
)  # fmt: skip
FILES = sorted(
    path for folder in ("vla_jax", "train", "tests") for path in (ROOT / folder).rglob("*.py")
)
ORDER = [f"vla_jax.{name}" for name in FLOORS] + [f"train.{name}" for name in SCRIPTS]


def module(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def names_of(node):
    """The dotted names that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names]
    return []


def imported(path):
    """Every dotted name that the file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        yield from names_of(node)


def own_modules(path):
    """The files of ours that a file imports."""
    for name in imported(path):
        while name and name not in ORDER:
            name = name.rpartition(".")[0]
        if name:
            yield name


def library(folder=""):
    return [path for path in FILES if module(path).startswith(f"vla_jax{folder}")]


def test_every_file_has_its_floor():
    ours = {module(path) for path in FILES if path.parts[len(ROOT.parts)] != "tests"}
    packages = {"vla_jax", "vla_jax.data", "vla_jax.backbones", "vla_jax.envs"}
    packages |= {"vla_jax.convert", "vla_jax.rl", "train"}
    assert ours - packages == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_from_files_above_it(name):
    path = ROOT / f"{name.replace('.', '/')}.py"
    below = [other for other in own_modules(path) if ORDER.index(other) >= ORDER.index(name)]
    assert not below, f"{name} imports {below}, not above it in FLOORS"


def test_the_data_files_are_numpy_only():
    foreign = {
        module(path): name
        for path in library(".data")
        for name in imported(path)
        if name.partition(".")[0] in ("jax", "jaxlib", "flax", "optax")
    }
    assert not foreign


def test_torch_is_imported_only_in_tests_converters_and_the_benchmarks_peers():
    used = [module(p) for p in FILES for name in imported(p) if name.partition(".")[0] == "torch"]
    allowed = ("tests.", "vla_jax.convert.", "train.peers")
    assert not [name for name in used if not name.startswith(allowed)]


HEAVY = (
    "torch", "mujoco", "gymnasium", "grain", "pyarrow", "av", "PIL", "matplotlib", "tensorboardX",
)  # fmt: skip


@pytest.mark.parametrize("path", [*library(), ROOT / "train/peers.py"], ids=module)
def test_what_an_extra_brings_is_imported_where_it_is_used(path):
    top = [name for node in ast.parse(path.read_text()).body for name in names_of(node)]
    assert not [name for name in top if name.partition(".")[0] in HEAVY]


def test_no_file_of_the_library_is_longer_than_400_lines():
    lengths = {module(p): len(p.read_text().splitlines()) for p in FILES if module(p) in ORDER}
    assert not {name: length for name, length in lengths.items() if length > 400}


def test_no_import_is_relative():
    assert not [module(p) for p in FILES for name in imported(p) if name.startswith(".")]


def test_no_file_is_a_drawer_for_everything():
    assert not [p for p in FILES if p.stem in ("utils", "util", "helpers", "helper", "common")]
