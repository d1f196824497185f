"""Settings that cannot work are refused before any data, run or environment is read."""

import dataclasses

import pytest
import tiny_demos

from train import finetune, imitate, pretrain, scan
from train.finetune import FinetuneConfig
from train.pretrain import PretrainConfig
from train.scan import ScanConfig
from vla_jax import config as configs
from vla_jax import runs
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.training.loop import LoopConfig
from vla_jax.training.optim import OptimConfig

# name -> script, config without data, and the function that reads
SCRIPTS = {
    "imitate": (imitate.imitate, tiny_demos.imitation("", ""), (imitate, "read_training_inputs")),
    "pretrain": (pretrain.pretrain, PretrainConfig(), (pretrain, "read_dataset")),
    "scan": (scan.train, ScanConfig(), (scan, "data_sets")),
    "finetune": (finetune.finetune, FinetuneConfig(init_from="r"), (finetune, "read_cloned")),
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
