"""A small training on SCAN: its files, resumed = uninterrupted, exact match."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import scan as script
from vla_jax.command_line import command_line
from vla_jax.data import scan_commands
from vla_jax.nn import scheduled_sampling, seq2seq
from vla_jax.nn.scheduled_sampling import SamplingConfig
from vla_jax.nn.search import SearchResult
from vla_jax.training import checkpoint, losses
from vla_jax.training.logs import read_metrics
from vla_jax.training.loop import LoopConfig
from vla_jax.training.update import Counted

ACTIONS_OF = dict(scan_commands.commands())


def tiny(run_dir, preset="attention", **changes):
    """Returns a config with one width, so that one update compiles, and 100 commands held out."""
    config = script.PRESETS[preset]()
    small = {
        "run_dir": str(run_dir),
        "holdout": 0.006,
        "batch_size": 8,
        "width_step": 64,
        "model": dataclasses.replace(config.model, hidden_size=8, embed_size=8),
        "optim": dataclasses.replace(config.optim, warmup_steps=1),
        "loop": LoopConfig(num_updates=4, log_every=1, save_every=2),
    }
    return dataclasses.replace(config, **{**small, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return script.train(tiny(tmp_path_factory.mktemp("runs") / "scan"))


def saved(run_dir):
    return checkpoint.restore_params(run_dir / "checkpoints")


def assert_bitwise_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.slow
def test_a_run_writes_results_metrics_and_plots(trained):
    result = json.loads((trained / "test.json").read_text())
    assert result["commands"] == round(0.006 * 16_728)
    assert 0.0 <= result["exact_match"] <= 1.0
    assert result["split"] == "simple"
    metrics = read_metrics(trained / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert all(np.isfinite(line["loss"]) for line in metrics)
    for plot in ("training.png", "attention.png"):
        assert (trained / plot).stat().st_size > 0


@pytest.mark.slow
def test_resumed_equals_uninterrupted_bitwise(trained, tmp_path):
    run_dir = shutil.copytree(trained, tmp_path / "resumed")
    shutil.rmtree(run_dir / "checkpoints" / "4")
    script.train(tiny(run_dir))
    assert checkpoint.latest_step(run_dir / "checkpoints") == 4
    assert_bitwise_equal(saved(trained), saved(run_dir))
    one, other = (read_metrics(folder / "metrics.jsonl") for folder in (trained, run_dir))
    assert [line["loss"] for line in one] == [line["loss"] for line in other]


@pytest.mark.slow
def test_a_model_without_attention_has_no_attention_plot(tmp_path):
    run_dir = script.train(tiny(tmp_path / "run", "bottleneck"))
    assert "attention" not in saved(run_dir)
    assert (run_dir / "training.png").exists()
    assert not (run_dir / "attention.png").exists()


@pytest.mark.slow
def test_the_teacher_forcing_rate_decreases_with_the_updates():
    config = tiny("", sampling=SamplingConfig("linear", slope=0.125))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0))
    key, params = jax.random.key(1), seq2seq.init(jax.random.key(0), config.model)
    rows = scan_commands.to_ids(scan_commands.commands()[:8])
    memory = seq2seq.encode(params, config.model, rows.source, mask=rows.source > 0)
    loss_fn = jax.jit(script.make_loss(config))
    for count, rate in ((0, 1.0), (4, 0.5)):
        decoded = scheduled_sampling.scheduled_sampling(
            params, config.model, memory, rows.target, rate, jax.random.split(key, 3)[1]
        )
        log_probs = jax.nn.log_softmax(decoded.outputs)
        each = jnp.take_along_axis(log_probs, rows.target[..., None], axis=-1)[..., 0]
        expected = float(-each[seq2seq.target_mask(rows.target)].mean())
        loss, _ = loss_fn(params, Counted(rows, jnp.int32(count)), key)
        assert loss == pytest.approx(expected, abs=1e-5)


def test_whole_targets_are_either_teacher_forced_or_decoded_freely():
    """One command per update, as in `one_by_one`: its loss is one of two, each half of the time."""
    config = tiny("", "one_by_one", batch_size=1)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0))
    params = seq2seq.init(jax.random.key(0), config.model)
    rows = scan_commands.to_ids([scan_commands.commands()[-1]])
    memory = seq2seq.encode(params, config.model, rows.source, mask=rows.source > 0)
    mask = seq2seq.target_mask(rows.target)
    forced = seq2seq.teacher_forcing(params, config.model, memory, rows.target)
    free, _ = scheduled_sampling.free_running(params, config.model, memory, rows.target.shape[1])
    expected = [losses.token_loss(each.outputs, rows.target, mask)[0] for each in (forced, free)]
    assert abs(expected[0] - expected[1]) > 1e-4
    keys = jax.random.split(jax.random.key(1), 200)
    loss_fn = jax.vmap(script.make_loss(config), (None, None, 0))
    found = jax.jit(loss_fn)(params, Counted(rows, jnp.int32(1)), keys)[0]
    is_forced, is_free = (np.abs(found - each) < 1e-5 for each in expected)
    assert (is_forced ^ is_free).all()
    assert 0.4 < is_forced.mean() < 0.6


def test_whole_targets_need_a_schedule():
    with pytest.raises(
        ValueError, match="force_whole_targets must be False with schedule 'always'"
    ):
        script.ScanConfig(force_whole_targets=True)


def test_a_command_is_correct_if_all_actions_and_the_end_match(monkeypatch):
    pairs = [
        scan_commands.Pair(command, ACTIONS_OF[command])
        for command in ("jump", "walk twice", "look")
    ]
    answers = ["I_JUMP", "I_WALK", "I_LOOK I_LOOK"]  # correct, too short, too long

    def decode(params, model, source):
        ids = scan_commands.to_ids([scan_commands.Pair("", answer) for answer in answers]).target
        ids = np.resize(np.pad(ids, [(0, 0), (0, 61)]), (len(source), 64))
        return SearchResult(ids, np.zeros(len(source)), None)

    monkeypatch.setattr(script, "decode", decode)
    result = script.test({}, tiny("").model, pairs)
    assert result["exact_match"] == pytest.approx(1 / 3)
    assert result["by_actions"] == {1: 0.5, 2: 0.0}
    assert [wrong["command"] for wrong in result["wrong"]] == ["walk twice", "look"]
    assert result["wrong"][0]["decoded"] == "I_WALK"


def test_options_have_the_names_of_their_fields():
    config = command_line(
        script.PRESETS,
        ["--preset", "bottleneck", "--split", "length", "--cell", "gru", "--hidden-size", "16"],
        description="",
    )
    assert (config.split, config.model.cell, config.model.hidden_size) == ("length", "gru", 16)
    assert config.model.score == "none"


def test_a_wrong_config_is_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        script.ScanConfig(batch_size=0)
    with pytest.raises(ValueError, match="width_step must be at most 64, got 65"):
        script.ScanConfig(width_step=65)
    with pytest.raises(ValueError, match=r"holdout must be in \[0, 1\), got 1.0"):
        script.ScanConfig(holdout=1.0)


@pytest.mark.parametrize("preset", script.PRESETS)
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"source_size": 13}, "model.source_size must be at least 14, .* got 13"),
        ({"target_size": 6}, "model.target_size must be at least 7, .* got 6"),
        ({"source": "vectors"}, "model.source must be 'tokens', .* got 'vectors'"),
        ({"target": "vectors"}, "model.target must be 'tokens', .* got 'vectors'"),
    ],
)
def test_a_vocabulary_without_every_word_is_refused(preset, changes, sentence):
    config = script.PRESETS[preset]()
    ids = scan_commands.to_ids(scan_commands.commands())
    assert (config.model.source_size, config.model.target_size) == (
        ids.source.max() + 1,
        ids.target.max() + 1,
    )
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
