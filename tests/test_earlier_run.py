"""A run folder written before the folders of the library were rearranged gives the same episodes.

The run in `golden/earlier_run` (300 updates of an LSTM from the state of the JAX table) and its
episodes were written by revision 010a294.
"""

import io
import pathlib
import shutil

import pytest
from rich.console import Console

from train.configs import ImitateConfig
from vla_jax import config as configs
from vla_jax.evaluate import EvaluateConfig, evaluate
from vla_jax.evaluation import results

EARLIER = pathlib.Path(__file__).parent / "golden/earlier_run"


@pytest.mark.parametrize("name", ["persistent", "refresh-16"])
def test_an_earlier_run_gives_the_same_episodes(name, tmp_path):
    folder = shutil.copytree(EARLIER, tmp_path / "run")
    expected = results.read_outcomes(EARLIER / f"{name}.jsonl")
    mode = name.partition("-")[0]
    config = EvaluateConfig(mode=mode, num_episodes=len(expected), num_videos=0)
    with pytest.warns(UserWarning, match="saved by an earlier version, without checksums"):
        evaluate(folder, config, console=Console(file=io.StringIO()))
    found = results.read_outcomes(folder / "evaluation" / name / "episodes.jsonl")
    assert [outcome[:3] for outcome in found] == [outcome[:3] for outcome in expected]
    same = sum(
        one._replace(clipped=None, observations_clipped=None) == other
        for one, other in zip(found, expected, strict=True)
    )
    assert same >= 0.95 * len(expected)  # a CPU that rounds otherwise may end an episode earlier
    assert any(outcome.success for outcome in expected)


def test_the_config_of_an_earlier_run_is_readable():
    config = configs.load(ImitateConfig, EARLIER / "config.json")
    assert config.dataset.path == "demos/state"
    assert config.loop.num_updates == 300
