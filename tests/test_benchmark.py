"""The benchmark tells figures of all works, and none of a peer that computes something else."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from train.benchmark import __main__, baselines, cases, jax_runs, system, timing
from train.benchmark.__main__ import BenchmarkConfig
from train.benchmark.timing import Contest, Peer
from vla_jax import convert

RECURRENCES = {"ours", "ours, plain scan", "flax.linen.RNN", "flax.nnx.RNN"}
RECURRENCES |= {"torch.nn.LSTM", "torch.nn.GRU"}
STREAMS = {"ours, refresh", "ours, window again", "RoboVLMs (PyTorch), window again"}


@pytest.fixture(autouse=True)
def one_thread():
    """PyTorch's threads spin while they wait, which on a busy machine takes seconds per step."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def measured(tmp_path, *chosen, file="", rounds=1):
    """The figures of tiny works, as the file has them."""
    config = BenchmarkConfig(
        cases=chosen, rounds=rounds, small=True, run_dir=str(tmp_path / "run"), json=file
    )
    return json.loads(__main__.benchmark(config).read_text())


def peer(name, results, lacks=()):
    """A peer that gives the same results at every run."""
    return Peer(name, lambda: results, lambda found: found, 0, lacks)


def contest(*contestants):
    return Contest("work", "case", 1e6, contestants)


def who(figures, work):
    return {row["peer"] for row in figures["rows"] if row["work"] == work}


def value(figures, work, what):
    """The median of one of the figures."""
    (found,) = (f for f in figures["figures"] if (f["work"], f["what"]) == (work, what))
    return found["value"]["median"]


def test_small_runs_all_works_and_writes_every_figure(tmp_path, capsys):
    file = tmp_path / "figures" / "all.json"
    figures = measured(tmp_path, *__main__.WORKS, file=str(file), rounds=2)
    assert file.exists()
    shown = capsys.readouterr().out
    for row in figures["rows"]:
        assert set(row) == set(timing.Row._fields)
        assert row["case"] in shown
        assert row["gflops"] > 0
        assert row["weight_bytes"] > 0
        assert np.isclose(row["share_of_ceiling"], row["gflops"] / figures["ceiling_gflops"])
        for spread in (row["ms"], row["ratio"]):
            assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    assert who(figures, "recurrence") == RECURRENCES
    assert who(figures, "head") == {"ours", "RoboVLMs (PyTorch)"}
    assert who(figures, "streaming") == STREAMS
    assert {row["case"] for row in figures["rows"] if row["work"] == "growth"} == {
        f"{axis} {size}" for axis, sizes in cases.SMALL.growth.items() for size in sizes
    }
    assert who(figures, "products") == {"turned over", "as it lies"}
    for found in figures["figures"]:
        assert set(found) == set(system.Figure._fields)
        assert found["what"] in shown
        assert np.isfinite([*found["value"].values()]).all()
    for part in ("recurrence", "training step"):
        assert 0 < value(figures, "memory", f"{part}, share") < 100
    assert value(figures, "start", "first update, cache empty") > 0
    assert value(figures, "checkpoints", "until it is on disk") > 0
    found_cases = {found["case"] for found in figures["figures"] if found["work"] == "loader"}
    assert len(found_cases) == 4
    assert figures["left_out"] == []
    assert set(figures["machine"]) == {"device", "cores", "load", "versions"}
    assert figures["machine"]["device"] in shown
    assert (tmp_path / "run" / "growth.png").stat().st_size > 5000


def corrupt(function, monkeypatch, name, change):
    """Makes `convert.<function>` give one tensor that is not ours."""
    right = getattr(convert, function)

    def wrong(*arguments):
        tensors = right(*arguments)
        tensors[name] = change(tensors[name])
        return tensors

    monkeypatch.setattr(convert, function, wrong)


def test_a_recurrence_with_another_weight_is_caught(tmp_path, monkeypatch, capsys):
    corrupt("to_torch", monkeypatch, "weight_hh_l1", lambda kernel: kernel * np.float32(1.01))
    with pytest.raises(ValueError, match=r"torch\.nn\.LSTM computes something else than ours in"):
        measured(tmp_path, "recurrence")
    assert "time over the first" not in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_head_with_another_weight_is_caught(tmp_path, monkeypatch):
    corrupt("to_robovlms", monkeypatch, "act_head.gripper.mlp.2.bias", lambda bias: bias + 1)
    with pytest.raises(ValueError, match=r"RoboVLMs \(PyTorch\) computes something else"):
        measured(tmp_path, "head")
    with pytest.raises(ValueError, match=r"window again computes something else.*gripper_logit"):
        measured(tmp_path, "streaming")


OURS = {"outputs": np.ones((2, 3)), "by_params": {"kernel": np.full(4, 2.0)}}
OTHERS = {
    "a number that is off": {**OURS, "outputs": np.array([[1, 1, 1], [1, 1, 1.001]])},
    "a gradient that is not there": {"outputs": OURS["outputs"]},
    "one too many": {**OURS, "more": np.ones(2)},
    "another shape": {**OURS, "outputs": np.ones((1, 3))},
    "NaN": {**OURS, "outputs": np.full((2, 3), np.nan)},
}


@pytest.mark.parametrize("other", OTHERS)
def test_results_that_differ_are_one_sentence(other):
    with pytest.raises(ValueError, match=r"theirs computes something else than ours in work, case"):
        timing.check(contest(peer("ours", OURS), peer("theirs", OTHERS[other])))


def test_nothing_can_agree_with_results_that_are_not_finite():
    broken = {"outputs": np.full(2, np.nan)}
    with pytest.raises(ValueError, match="computes something else"):
        timing.check(contest(peer("ours", broken), peer("theirs", broken)))


def test_results_that_agree_pass_and_what_a_peer_lacks_is_not_asked_of_it():
    near = {**OURS, "outputs": OURS["outputs"] * (1 + 1e-6)}
    timing.check(contest(peer("ours", OURS), peer("theirs", near)))
    part = {"outputs": OURS["outputs"], "by_params": {}}
    timing.check(contest(peer("ours", OURS), peer("theirs", part, lacks=("kernel",))))


def test_peers_take_turns_and_ratios_are_those_of_each_round(monkeypatch):
    order, clock = [], iter(np.cumsum([0, 1, 0, 4, 0, 2, 0, 4]))

    def run_of(name):
        return Peer(name, lambda: order.append(name), lambda found: found, 8)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    ours, theirs = timing.measure(contest(run_of("a"), run_of("b")), 2, ceiling=2.0)
    assert order == ["a", "a", "b", "b"] * 2  # the second of each turn is timed
    assert ours.ms == (1000, 1500, 2000)
    assert ours.ratio == (1, 1, 1)
    assert theirs.ratio == (2, 3, 4)
    assert theirs.gflops == pytest.approx(1e6 / 4e9)
    assert theirs.share_of_ceiling == pytest.approx(theirs.gflops / 2)


def test_a_training_step_counts_three_products_per_kernel():
    """The issue's own figure: 4 × LSTM 1024, B 5, T 12 are 12.1 GFLOP."""
    kernels = {"input_kernel": jnp.zeros((1024, 4096)), "recurrent_kernel": jnp.zeros((1024, 4096))}
    params = {f"layers_{n}": {"forward": {**kernels, "input_bias": jnp.zeros(9)}} for n in range(4)}
    assert jax_runs.recurrence_flop(params, 5 * 12) == pytest.approx(12.1e9, rel=0.01)
    once = 4 * 4 * 1024 * 4096
    assert baselines.recurrent_bytes(params, 12) == 13 * once
    assert baselines.recurrent_bytes(params, 12, hoisted=False) == 24 * once


def test_a_missing_pytorch_is_named_and_the_others_are_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    figures = measured(tmp_path, "head")
    assert who(figures, "head") == {"ours"}
    assert figures["left_out"] == ["PyTorch is not installed: pip install 'vla-jax[torch]'"]
    assert "left out: PyTorch is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"cases": ()}, "cases must be at least one of recurrence, .*, got none"),
    ],
)
def test_a_mistake_is_one_sentence(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        BenchmarkConfig(**fields)
