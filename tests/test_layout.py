"""Structure of the repository: directions of imports, size of files."""

import ast
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LAYERS = (  # a file imports only from its own layer and those above, without cycles
    "types", "processes", "files", "stopping", "workers", "folder_lock", "config", "records",
    "trees", "compile_cache", "output_pipe", "command_line",
    "nn", "actions", "envs", "data", "backbones", "policies", "training", "acting", "runs",
    "convert", "evaluation", "rl", "serving",
    "evaluation_setup", "evaluate", "export", "inspect_data", "convert_data", "serve",
)  # fmt: skip
FILES = sorted(
    path for folder in ("vla_jax", "train", "tests") for path in (ROOT / folder).rglob("*.py")
)
HEAVY = (
    "torch", "mujoco", "gymnasium", "grain", "pyarrow", "av", "PIL", "matplotlib", "tensorboardX",
    "tokenizers", "h5py", "google_crc32c", "array_record", "msgpack", "websockets",
    "prometheus_client", "flatbuffers",
)  # fmt: skip


def module(path, root=ROOT):
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def layer(name):
    """Position of a module's layer in `LAYERS`; scripts are below the library."""
    package, _, rest = name.partition(".")
    return len(LAYERS) if package == "train" else LAYERS.index(rest.partition(".")[0])


def names_of(node):
    """The dotted names that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names]
    return []


def imported(path):
    """All dotted names that the file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        yield from names_of(node)


def import_graph(root=ROOT):
    """Maps each module to the modules of this repository that it imports."""
    paths = [path for folder in ("vla_jax", "train") for path in (root / folder).rglob("*.py")]
    graph = {module(path, root): set() for path in paths}
    for path in paths:
        for name in imported(path):
            while name and name not in graph:
                name = name.rpartition(".")[0]
            if name:
                graph[module(path, root)].add(name)
    return graph


def upward_imports(graph):
    """Imports `(from, to)` of a layer below that of the file.

    The package `vla_jax` itself is omitted: it imports the public functions lazily.
    """
    return [
        (name, other)
        for name, others in graph.items()
        for other in others
        if name != "vla_jax" and other not in ("vla_jax", "train") and layer(other) > layer(name)
    ]


def library(folder=""):
    return [path for path in FILES if module(path).startswith(f"vla_jax{folder}")]


def test_no_file_imports_from_a_layer_below_its_own():
    assert not upward_imports(import_graph())


def test_there_are_no_import_cycles():
    graph = {name: others - {"vla_jax"} for name, others in import_graph().items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises a CycleError that names the cycle


def test_an_injected_upward_import_is_found(tmp_path):
    (tmp_path / "vla_jax/nn").mkdir(parents=True)
    (tmp_path / "vla_jax/policies").mkdir()
    (tmp_path / "vla_jax/nn/cells.py").write_text("from vla_jax.policies import policy\n")
    (tmp_path / "vla_jax/policies/policy.py").write_text("from vla_jax.nn import matmul\n")
    (tmp_path / "vla_jax/nn/matmul.py").write_text("")
    found = upward_imports(import_graph(tmp_path))
    assert found == [("vla_jax.nn.cells", "vla_jax.policies.policy")]


def test_no_two_files_share_a_name():
    names = [p.stem for p in FILES if p.parts[len(ROOT.parts)] != "tests" and p.stem[0] != "_"]
    assert not {name for name in names if names.count(name) > 1}


def test_no_two_classes_share_a_name():
    paths = [p for p in FILES if p.parts[len(ROOT.parts)] != "tests"]
    statements = [node for path in paths for node in ast.parse(path.read_text()).body]
    names = [node.name for node in statements if isinstance(node, ast.ClassDef)]
    public = [name for name in names if name[0] != "_"]
    assert len(public) > 100
    assert not {name for name in public if public.count(name) > 1}


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
    allowed = ("tests.", "vla_jax.convert.", "train.benchmark.baselines")
    assert not [name for name in used if not name.startswith(allowed)]


@pytest.mark.parametrize("path", [*library(), ROOT / "train/benchmark/baselines.py"], ids=module)
def test_packages_of_an_extra_are_imported_where_they_are_used(path):
    top = [name for node in ast.parse(path.read_text()).body for name in names_of(node)]
    assert not [name for name in top if name.partition(".")[0] in HEAVY]


def test_no_file_of_the_library_is_longer_than_400_lines():
    lengths = {module(p): len(p.read_text().splitlines()) for p in FILES if "tests" not in p.parts}
    assert not {name: length for name, length in lengths.items() if length > 400}


def test_no_import_is_relative():
    assert not [module(p) for p in FILES for name in imported(p) if name.startswith(".")]


def test_no_file_has_a_catch_all_name():
    assert not [p for p in FILES if p.stem in ("utils", "util", "helpers", "helper", "common")]
