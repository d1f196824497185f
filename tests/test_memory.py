"""`train.memory` end to end at tiny sizes: results, plots, and the limit of a window."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from train import memory, memory_plots, memory_records, memory_training
from train.memory_config import BLOCK, MemoryConfig, cells_of
from train.memory_training import learn
from vla_jax.nn.cells import CELLS
from vla_jax.nn.sequence_tasks import TASKS, init

TINY = MemoryConfig(
    cells=("min_gru",), tasks=("adding", "recall", "counting"), adding=(5,), recall=(4,),
    tracking=(6,), extrapolation=(2,), windows=(3, 4, 5, 9), window_delay=4, hidden_size=16,
    batch_size=32, max_updates=1000, num_trials=500,
)  # fmt: skip


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Runs one training; returns its folder and the content of its JSON file."""
    folder = tmp_path_factory.mktemp("memory")
    file = memory.memory(dataclasses.replace(TINY, run_dir=str(folder)))
    return folder, json.loads(file.read_text())


def test_every_training_is_recorded_and_plotted(outputs):
    folder, content = outputs
    names = {(result["task"], result["length"]) for result in content["results"]}
    assert names == {("adding", 5), ("recall", 4), ("counting", 6)}
    for result in content["results"]:
        assert result["num_updates"] == BLOCK * len(result["errors"])
        assert result["seconds"] > 0
    norms_by_lag = content["gradient_norms"]["min_gru"]
    assert {when: len(norms) for when, norms in norms_by_lag.items()} == {"before": 5, "after": 5}
    assert norms_by_lag["before"][0] == norms_by_lag["after"][0] == 1.0
    for name in ("adding", "recall", "counting", "memory"):
        assert (folder / f"{name}.png").stat().st_size > 10_000


def test_short_recall_is_learned(outputs):
    _, content = outputs
    (recall,) = (result for result in content["results"] if result["task"] == "recall")
    assert recall["error"] < 0.05
    assert recall["errors"][0] > 0.3


def test_tracking_is_tested_on_longer_sequences_too(outputs):
    _, content = outputs
    (counting,) = (result for result in content["results"] if result["task"] == "counting")
    assert counting["errors"][-1] < counting["errors"][0]
    assert set(counting["longer"]) == {"12"}
    assert counting["error"] < 0.5 < TASKS["counting"].chance


def test_every_seed_is_trained_and_an_interrupted_experiment_continues(tmp_path, monkeypatch):
    config = dataclasses.replace(
        TINY, tasks=("s3",), tracking=(3,), windows=(), max_updates=BLOCK, num_seeds=2, seed=5,
        num_layers=2, run_dir=str(tmp_path),
    )  # fmt: skip
    results = json.loads(memory.memory(config).read_text())["results"]
    assert [result["seed"] for result in results] == [5, 6]
    assert results[0]["errors"] != results[1]["errors"]

    trained = []
    monkeypatch.setattr(
        memory_records, "learn", lambda *args, seed: trained.append(seed) or learn(*args, seed=seed)
    )
    lines = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    # killed while the result of the second training was written
    (tmp_path / "results.jsonl").write_text(lines[0] + lines[1][:9])
    again = json.loads(memory.memory(config).read_text())["results"]
    assert trained == [6]
    assert [result["errors"] for result in again] == [result["errors"] for result in results]
    memory.memory(dataclasses.replace(config, hidden_size=8, num_seeds=1))  # other settings
    memory.memory(dataclasses.replace(config, num_seeds=1))
    assert trained == [6, 5]
    memory.memory(dataclasses.replace(config, num_seeds=1, overwrite=True))
    assert trained == [6, 5, 5]


def test_gradient_norms_and_windows_are_read_back(outputs, monkeypatch):
    folder, content = outputs
    monkeypatch.setattr(memory_records, "train", None)  # nothing is trained again
    config = dataclasses.replace(TINY, run_dir=str(folder))
    assert json.loads(memory.memory(config).read_text()) == content


def test_a_folder_of_an_earlier_version_without_a_config_is_continued(
    outputs, tmp_path, monkeypatch
):
    monkeypatch.setattr(memory_records, "train", None)  # nothing is trained again
    file, config = tmp_path / "results.jsonl", dataclasses.replace(TINY, run_dir=str(tmp_path))
    file.write_text('{"accuracy": 0.5}\n')
    with pytest.raises(ValueError, match=r"results\.jsonl has a damaged line 1 .*settings"):
        memory.memory(config)
    file.write_bytes((outputs[0] / "results.jsonl").read_bytes())
    with pytest.raises(ValueError, match=r"delete it yourself, or continue it without --overwrite"):
        memory.memory(dataclasses.replace(config, overwrite=True))
    with pytest.warns(UserWarning, match=r"results\.jsonl is taken for that of an earlier version"):
        memory.memory(config)
    assert (tmp_path / "config.json").exists()


def test_norms_that_are_wanted_now_are_computed_and_others_left_out(outputs, tmp_path):
    (tmp_path / "results.jsonl").write_bytes((outputs[0] / "results.jsonl").read_bytes())
    known = memory_records.read(TINY, tmp_path)
    assert len(known) == 4
    longer = dataclasses.replace(TINY, adding=(5, 7))  # the longest is another one
    assert memory_records.read(longer, tmp_path) == known
    assert not memory_records.has_norms(longer, memory_records.trainings(longer)[0])
    again = {**{key: each._replace(norms=None) for key, each in known.items()}}
    (tmp_path / "results.jsonl").unlink()
    for record in again.values():
        memory_records.append(record, tmp_path)
    assert len(memory_records.read(TINY, tmp_path)) == 3
    assert len(memory_records.read(longer, tmp_path)) == 4


def test_a_training_can_go_on_after_its_task_is_solved(monkeypatch):
    """The first block of updates already counts as solved."""
    monkeypatch.setitem(TASKS, "s2", TASKS["s2"]._replace(solved=10.0))
    config = dataclasses.replace(TINY, max_updates=2 * BLOCK)
    for stops, num_updates in ((True, BLOCK), (False, 2 * BLOCK)):
        changed = dataclasses.replace(config, stop_when_solved=stops)
        assert learn(changed, "s2", "rnn", 3)[0].num_updates == num_updates


def test_all_stands_for_every_cell():
    assert cells_of(MemoryConfig(cells=("all",))) == tuple(CELLS)
    assert cells_of(MemoryConfig(cells=("gru", "s_lstm"))) == ("gru", "s_lstm")


def test_a_symbol_before_the_window_cannot_be_recalled(outputs):
    """The symbol is 4 steps back: the last 5 steps contain it, the last 4 do not."""
    wrong = {int(window): error for window, error in outputs[1]["windows"]["min_gru"].items()}
    chance = TASKS["recall"].chance
    assert min(wrong[3], wrong[4]) > chance - 0.06  # 500 trials: 4 standard errors
    assert max(wrong[5], wrong[9]) < 0.05


def test_truncated_training_runs_and_tests_on_whole_sequences(capsys):
    config = dataclasses.replace(TINY, chunk=3, burn_in=1, max_updates=BLOCK)
    result, _ = learn(config, "recall", "min_gru", 4)
    assert result.num_updates == BLOCK
    assert 0 <= result.error <= 1
    assert "recall" in memory_plots.describe(result)


def test_the_same_seed_gives_the_same_results():
    config = dataclasses.replace(TINY, max_updates=BLOCK)
    one, other = (learn(config, "adding", "min_gru", 5)[0] for _ in range(2))
    assert one.errors == other.errors
    again = learn(dataclasses.replace(config, seed=1), "adding", "min_gru", 5)[0]
    assert again.errors != one.errors


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"adding": ()}, r"adding must be one or more, each at least 3, got \(\)"),
        ({"recall": (10, 2)}, r"recall must be one or more, each at least 3, got \(10, 2\)"),
        ({"cells": ()}, "cells must be one or more of rnn"),
        ({"tasks": ()}, "tasks must be one or more of adding"),
        ({"tasks": ("s5",)}, "unknown name 's5' in tasks"),
        ({"tracking": (2,)}, r"tracking must be one or more, each at least 3, got \(2,\)"),
        ({"windows": (0,)}, r"windows must be at least 1, got \(0,\)"),
        ({"extrapolation": (0,)}, r"extrapolation must be at least 1, got \(0,\)"),
        ({"cells": ("lstmm",)}, "unknown name 'lstmm' in cells; .* Did you mean 'lstm'"),
        ({"learning_rate": 0.0}, "learning_rate must be at least 1e-12, got 0.0"),
        ({"chunk": 10, "burn_in": 10}, "burn_in must be 0 or below chunk = 10, got 10"),
        ({"burn_in": 1}, "burn_in must be 0 or below chunk = 0, got 1"),
    ],
)
def test_a_wrong_config_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        MemoryConfig(**fields)


def test_a_training_whose_params_are_not_finite_is_refused(monkeypatch):
    scaled = functools.partial(jax.tree.map, lambda leaf: 1e38 * leaf)
    monkeypatch.setattr(memory_training, "init", lambda *args, **kw: scaled(init(*args, **kw)))
    with pytest.raises(ValueError, match="NaN or infinity in min_gru on adding of 5 steps before"):
        learn(TINY, "adding", "min_gru", 5)


def test_a_training_whose_test_is_not_finite_is_refused(monkeypatch):
    monkeypatch.setattr(memory_training, "_test", lambda *_: np.inf)
    config = dataclasses.replace(TINY, max_updates=BLOCK)
    with pytest.raises(ValueError, match="error must be finite, got inf in the test of min_gru on"):
        learn(config, "adding", "min_gru", 5)


def test_sequences_that_cannot_lie_in_memory_together_are_refused():
    with pytest.raises(ValueError, match=r"num_trials must be at most \d+ for sequences of 1000"):
        MemoryConfig(num_trials=10**7)
    with pytest.raises(ValueError, match="batch_size must be at most"):
        MemoryConfig(recall=(10**9,))
