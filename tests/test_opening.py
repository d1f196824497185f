"""Run folders are opened and deleted by the script that wrote them only."""

import dataclasses
import itertools

import pytest

from train.chains import ChainsConfig
from train.configs import ImitateConfig
from train.deep_sarsa import SarsaConfig
from train.finetune import FinetuneConfig
from train.memory_config import MemoryConfig
from train.memory_suite import MemorySuiteConfig
from train.ppo import PPOConfig
from train.pretrain import PretrainConfig
from train.reinforce import ReinforceConfig
from train.scan import ScanConfig
from train.sweep import SweepConfig
from train.tabular import TabularConfig
from vla_jax import config as configs
from vla_jax import runs
from vla_jax.files import read_json, write_json

CLASSES = [
    ChainsConfig, FinetuneConfig, ImitateConfig, MemoryConfig, MemorySuiteConfig, PPOConfig,
    PretrainConfig, ReinforceConfig, SarsaConfig, ScanConfig, SweepConfig, TabularConfig,
]  # fmt: skip


def make(cls, folder):
    return cls(**{f.name: str(folder) for f in dataclasses.fields(cls) if f.name == "run_dir"})


@pytest.mark.parametrize("save", [configs.save_of_run, configs.save], ids=["present", "earlier"])
def test_a_run_is_deleted_by_its_own_script_only(tmp_path, save):
    for writer, other in itertools.product(CLASSES, CLASSES):
        save(make(writer, tmp_path), tmp_path / "config.json")
        (tmp_path / "left").touch()
        config = make(other, tmp_path)
        if writer is other:
            runs.open_run(tmp_path, config, overwrite=True)
            assert not (tmp_path / "left").exists()
            continue
        with pytest.raises(ValueError, match="must hold a run of the same script to be deleted"):
            runs.open_run(tmp_path, config, overwrite=True)
        assert (tmp_path / "left").exists()


def test_a_run_is_continued_by_its_own_script_only(tmp_path):
    """The fields of an imitation are among those of a sweep."""
    runs.open_run(tmp_path, make(ImitateConfig, tmp_path), overwrite=False)
    with pytest.raises(ValueError, match="must be the SweepConfig of a run, got the Imit"):
        runs.open_run(tmp_path, make(SweepConfig, tmp_path), overwrite=False)
    assert configs.load(ImitateConfig, tmp_path / "config.json").run_dir == str(tmp_path)


def test_a_run_with_a_name_that_is_gone_can_be_deleted(tmp_path):
    config, file = make(ChainsConfig, tmp_path), tmp_path / "config.json"
    configs.save_of_run(config, file)
    write_json(file, {**read_json(file, "a config"), "policies": ["gpt"]})
    with pytest.raises(
        ValueError, match=r"'gpt' in policies; .*delete the run with --overwrite\.$"
    ):
        runs.open_run(tmp_path, config, overwrite=False)
    runs.open_run(tmp_path, config, overwrite=True)
    assert configs.load(ChainsConfig, file) == config


def test_an_earlier_run_that_lacks_fields_is_continued_but_not_deleted(tmp_path):
    """A field may have been added since, or belong to another script only."""
    config, file = make(ImitateConfig, tmp_path), tmp_path / "config.json"
    configs.save(config, file)
    fields = configs.to_dict(config)
    del fields["pack"]
    write_json(file, fields)
    assert runs.open_run(tmp_path, config, overwrite=False) == tmp_path
    with pytest.raises(ValueError, match=r"of an earlier version.* differs in pack; .*yourself"):
        runs.open_run(tmp_path, config, overwrite=True)
