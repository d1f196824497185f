"""Settings that cannot work are refused before any data, run or environment is read."""

import dataclasses

import pytest
import tiny_demos
import tiny_run

from train import (
    chains,
    demo,
    finetune,
    imitate,
    memory,
    memory_pictures,
    memory_suite,
    pretrain,
    scan,
    tabular,
)
from train.chains import ChainsConfig
from train.demo import DemoConfig
from train.finetune import FinetuneConfig
from train.memory_config import MemoryConfig
from train.memory_pictures import MemoryPicturesConfig
from train.memory_suite import MemorySuiteConfig
from train.pretrain import PretrainConfig
from train.scan import ScanConfig
from train.tabular import TabularConfig
from vla_jax import config as configs
from vla_jax import runs
from vla_jax.acting.agent import AgentConfig
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.policies import policy
from vla_jax.runs import Run
from vla_jax.training.loop import LoopConfig
from vla_jax.training.optim import OptimConfig

# name -> script, config without data, and the function that reads
SCRIPTS = {
    "imitate": (imitate.imitate, tiny_demos.imitation("", ""), (imitate, "read_training_inputs")),
    "pretrain": (pretrain.pretrain, PretrainConfig(), (pretrain, "read_dataset")),
    "scan": (scan.train, ScanConfig(), (scan, "data_sets")),
    "finetune": (finetune.finetune, FinetuneConfig(init_from="r"), (finetune, "read_cloned")),
}
# scripts of several trainings, whose folder holds results -> config
SUITES = {
    "chains": (chains.chain_suite, ChainsConfig()),
    "memory": (memory.memory, MemoryConfig(small=True)),
    "memory_suite": (memory_suite.memory_suite, MemorySuiteConfig()),
    "memory_pictures": (memory_pictures.memory_pictures, MemoryPicturesConfig()),
    "tabular": (tabular.compare, TabularConfig()),
    "demo": (demo.demo, DemoConfig()),
}
LONG_WARM_UP = {"optim": OptimConfig(warmup_steps=100), "loop": LoopConfig(num_updates=80)}


@pytest.fixture(params=SCRIPTS)
def script(request, tmp_path, monkeypatch):
    """Returns a script whose reading function fails, with a config that lacks nothing else."""
    function, config, reader = SCRIPTS[request.param]
    (tmp_path / "demos").mkdir()
    (tmp_path / "demos/meta").mkdir()
    (tmp_path / "demos/meta/info.json").write_text('{"codebase_version": "v3.0"}')
    changes = {"run_dir": str(tmp_path / "run")}
    if hasattr(config, "dataset"):
        changes["dataset"] = DatasetConfig(str(tmp_path / "demos"), kind="lerobot_v3")
    monkeypatch.setattr(*reader, read_nothing)
    return function, dataclasses.replace(config, **changes), tmp_path / "run"


def read_nothing(*_, **__):
    raise AssertionError("data were read")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (LONG_WARM_UP, "warmup_steps must be below num_updates = 80, got 100"),
        ({"loop": LoopConfig(mesh="data=99")}, "the product of the sizes of mesh must be"),
        ({"loop": LoopConfig(mesh="fsdp=3")}, "mesh must split the 4 devices evenly"),
    ],
    ids=["warmup_steps", "too many devices", "uneven"],
)
def test_settings_that_cannot_work_are_refused_before_reading(script, changes, sentence):
    function, config, run_dir = script
    with pytest.raises(ValueError, match=sentence):
        function(dataclasses.replace(config, **changes))
    assert not run_dir.exists()


@pytest.mark.parametrize("script", ["imitate", "pretrain"], indirect=True)
def test_a_glob_that_matches_no_param_is_refused_before_reading(script):
    function, config, run_dir = script
    optim = OptimConfig(warmup_steps=1, freeze=("bakbone/*",))
    with pytest.raises(ValueError, match=r"no parameter path matches 'bakbone/\*'"):
        function(dataclasses.replace(config, optim=optim))
    assert not run_dir.exists()


def test_a_run_of_another_config_is_refused_before_reading(script):
    function, config, run_dir = script
    runs.open_run(run_dir, config, overwrite=False)
    (run_dir / "checkpoints" / "4").mkdir(parents=True)
    with pytest.raises(ValueError, match="seed was 0 and is 5"):
        function(dataclasses.replace(config, seed=5))


def test_a_run_without_a_checkpoint_takes_the_corrected_config(script):
    function, config, run_dir = script
    runs.open_run(run_dir, config, overwrite=False)
    with pytest.raises(AssertionError, match="data were read"):
        function(dataclasses.replace(config, seed=5))
    corrected = dataclasses.replace(config, seed=5)
    runs.open_run(run_dir, corrected, overwrite=False)
    assert configs.load(type(config), run_dir / "config.json") == corrected


def test_a_script_with_possible_settings_begins_to_read(script):
    function, config, _ = script
    with pytest.raises(AssertionError, match="data were read"):
        function(config)


def test_a_folder_of_other_files_is_never_made_a_run(script):
    function, config, run_dir = script
    run_dir.mkdir()
    (run_dir / "info.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"must be a new folder or that of a run.*info\.txt"):
        function(config)
    assert [path.name for path in run_dir.iterdir() if path.name != ".lock"] == ["info.txt"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_new_folder_may_hold_the_logs_of_a_scheduler(tmp_path, overwrite):
    for name in ("17.out", "17.err", ".nfs0001"):
        (tmp_path / name).write_text("log")
    runs.open_run(tmp_path, PretrainConfig(run_dir=str(tmp_path)), overwrite=overwrite)
    assert {path.name for path in tmp_path.iterdir()} == {
        "17.out", "17.err", ".nfs0001", "config.json",
    }  # fmt: skip


def test_the_folder_of_a_model_is_never_overwritten(script):
    function, config, run_dir = script
    run_dir.mkdir()
    (run_dir / "config.json").write_text('{"model_type": "kosmos-2"}')
    with pytest.raises(ValueError, match="is not a run folder"):
        function(dataclasses.replace(config, overwrite=True))
    assert (run_dir / "config.json").exists()


@pytest.fixture(params=SUITES)
def suite(request, tmp_path):
    """Returns a script of several trainings, its config and its folder."""
    function, config = SUITES[request.param]
    changes = {"run_dir": str(tmp_path / "run")}
    if hasattr(config, "dataset"):
        changes["dataset"] = str(tmp_path / "demos")
    return function, dataclasses.replace(config, **changes), tmp_path / "run"


def test_a_suite_is_never_written_among_other_files(suite):
    function, config, run_dir = suite
    before = {"log.txt": "mine", "results.csv": "mine"}
    write(run_dir, before)
    with pytest.raises(ValueError, match=r"must be a new folder or that of a run.*results\.csv"):
        function(config)
    assert content(run_dir) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_run_of_another_script_is_neither_continued_nor_deleted(suite, overwrite):
    function, config, run_dir = suite
    if overwrite and not hasattr(config, "overwrite"):
        pytest.skip("it deletes nothing")
    changes = {"overwrite": True} if overwrite else {}
    before = {"config.json": '{"run_dir": "x", "clip": 0.2}', "results.jsonl": "mine\n"}
    write(run_dir, before)
    with pytest.raises(ValueError, match="clip"):
        function(dataclasses.replace(config, **changes))
    assert content(run_dir) == before


def wrong_runs(folder):
    """Yields what `load_run` returns, the mode to test in, and the sentence that refuses it."""
    stats, transformer = tiny_run.norm_stats(), dataclasses.replace(tiny_run.DECODER, kind="gpt")
    agent = AgentConfig(policy=policy.connect(tiny_run.AGENT.policy.backbone, transformer))
    other = {**stats, "environment_state": stats["proprio"]}
    of_state = "run must be a policy of the JAX table's state, with .*(22,).* got .*(8,)"
    yield Run(folder, agent, stats, {}, None, 1), "persistent", "mode must be 'refresh'"
    yield Run(folder, tiny_run.AGENT, other, {}, None, 1), None, of_state


@pytest.mark.parametrize("overwrite", [False, True])
def test_chains_of_a_wrong_run_change_nothing(tmp_path, monkeypatch, overwrite):
    saved = '{"config_class": "ChainsConfig", "run_dir": "x"}'
    before = {"config.json": saved, "results.jsonl": "mine\n"}
    write(tmp_path / "run", before)
    config = ChainsConfig(run="absent", run_dir=str(tmp_path / "run"), overwrite=overwrite)
    with pytest.raises(FileNotFoundError, match="run folder absent is missing"):
        chains.chain_suite(config)
    assert content(tmp_path / "run") == before
    for loaded, mode, sentence in wrong_runs(tmp_path):
        monkeypatch.setattr(chains, "load_run", lambda run, loaded=loaded: loaded)
        with pytest.raises(ValueError, match=sentence):
            chains.chain_suite(dataclasses.replace(config, mode=mode))
        assert content(tmp_path / "run") == before


def write(folder, files):
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}
