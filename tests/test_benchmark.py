"""The benchmark measures all cases, and refuses implementations with different results."""

import json
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.profiler import ProfileData

from train.benchmark import (
    __main__,
    baselines,
    cases,
    device_time,
    jax_runs,
    precision,
    system,
    timing,
)  # fmt: skip
from train.benchmark.__main__ import BenchmarkConfig
from train.benchmark.timing import Comparison, Device, Implementation
from vla_jax import convert
from vla_jax.policies import trunks

FLAX = {"flax.linen.RNN", "flax.nnx.RNN"}
RECURRENCES = {"vla_jax", "vla_jax, plain scan"} | FLAX
RECURRENCES |= {"torch.nn.LSTM", "torch.nn.GRU"}
STREAMS = {"vla_jax, refresh", "vla_jax, window re-run", "RoboVLMs (PyTorch), window re-run"}


@pytest.fixture(autouse=True)
def one_thread():
    """Limits PyTorch to one thread: waiting threads spin, which costs seconds per step on a busy
    machine.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def measured(tmp_path, *chosen, file="", rounds=1, **options):
    """Runs cases at tiny sizes and returns the content of the JSON file."""
    config = BenchmarkConfig(
        cases=chosen,
        rounds=rounds,
        small=True,
        run_dir=str(tmp_path / "run"),
        json=file,
        **options,
    )
    return json.loads(__main__.benchmark(config).read_text())


def implementation(name, results, lacks=()):
    """An implementation that returns the same results at every run."""
    return Implementation(name, lambda: results, lambda results: results, 0, lacks)


def comparison(*implementations):
    return Comparison("case", "setting", 1e6, implementations)


def implementations_of(content, case):
    return {row["implementation"] for row in content["rows"] if row["case"] == case}


def median(content, case, quantity):
    """Returns the median of one measurement."""
    (value,) = (
        each["value"]
        for each in content["measurements"]
        if (each["case"], each["quantity"]) == (case, quantity)
    )
    return value["median"]


@pytest.mark.slow
@pytest.mark.sampled
def test_small_runs_all_cases_and_writes_all_measurements(tmp_path, capsys):
    file = tmp_path / "results" / "all.json"
    content = measured(tmp_path, *__main__.CASES, file=str(file), rounds=2)
    assert file.exists()
    shown = capsys.readouterr().out
    for row in content["rows"]:
        assert set(row) == set(timing.Row._fields)
        assert row["setting"] in shown
        assert row["gflops"] > 0
        assert row["weight_bytes"] > 0
        assert np.isclose(row["fraction_of_peak"], row["gflops"] / content["peak_gflops"])
        for spread in (row["ms"], row["ratio"]):
            assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    assert implementations_of(content, "recurrence") == RECURRENCES
    assert implementations_of(content, "head") == {"vla_jax", "RoboVLMs (PyTorch)"}
    assert implementations_of(content, "streaming") == STREAMS
    assert {row["setting"] for row in content["rows"] if row["case"] == "growth"} == {
        f"{axis} {size}" for axis, sizes in cases.SMALL.growth.items() for size in sizes
    }
    assert implementations_of(content, "products") == {"transposed in advance", "not transposed"}
    loops = {"associative", "chunkwise", "bptt", "scan"}
    assert implementations_of(content, "parallel") == loops
    settings = {row["setting"].split()[0] for row in content["rows"] if row["case"] == "decoders"}
    assert settings == set(trunks.names())
    for measurement in content["measurements"]:
        assert set(measurement) == set(system.Measurement._fields)
        assert measurement["quantity"] in shown
        assert np.isfinite([*measurement["value"].values()]).all()
    for part in ("recurrence", "training step"):
        assert 0 < median(content, "memory", f"{part}, with / without") < 100
    assert median(content, "start", "first update, cache empty") > 0
    assert median(content, "checkpoints", "until it is on disk") > 0
    loaders = {each["setting"] for each in content["measurements"] if each["case"] == "loader"}
    assert len(loaders) == 4
    frames = [each for each in content["measurements"] if each["case"] == "frames"]
    assert len({each["setting"] for each in frames}) == 4  # two codecs, two formats of records
    shares = [each["value"]["median"] for each in frames if each["unit"] == "% of time"]
    np.testing.assert_allclose(np.sum(np.reshape(shares, (4, 3)), axis=1), 100)
    assert content["left_out"] == []
    assert set(content["machine"]) == {"device", "cores", "load", "versions"}
    assert content["machine"]["device"] in shown
    assert (tmp_path / "run" / "growth.png").stat().st_size > 5000


def corrupt(function, monkeypatch, name, change):
    """Makes `convert.<function>` return one wrong tensor."""
    right = getattr(convert, function)

    def wrong(*arguments):
        tensors = right(*arguments)
        tensors[name] = change(tensors[name])
        return tensors

    monkeypatch.setattr(convert, function, wrong)


@pytest.mark.slow
def test_a_recurrence_with_different_weights_is_detected(tmp_path, monkeypatch, capsys):
    corrupt("to_torch", monkeypatch, "weight_hh_l1", lambda kernel: kernel * np.float32(1.01))
    with pytest.raises(ValueError, match=r"torch\.nn\.LSTM must agree with vla_jax to"):
        measured(tmp_path, "recurrence")
    assert "time / first" not in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_head_with_different_weights_is_detected(tmp_path, monkeypatch):
    corrupt("to_robovlms", monkeypatch, "act_head.gripper.mlp.2.bias", lambda bias: bias + 1)
    with pytest.raises(ValueError, match=r"RoboVLMs \(PyTorch\) must agree with vla_jax"):
        measured(tmp_path, "head")
    with pytest.raises(ValueError, match=r"window re-run must agree with.*gripper_logit"):
        measured(tmp_path, "streaming")


OURS = {"outputs": np.ones((2, 3)), "by_params": {"kernel": np.full(4, 2.0)}}
OTHERS = {
    "a wrong number": {**OURS, "outputs": np.array([[1, 1, 1], [1, 1, 1.001]])},
    "a missing gradient": {"outputs": OURS["outputs"]},
    "a result too many": {**OURS, "more": np.ones(2)},
    "another shape": {**OURS, "outputs": np.ones((1, 3))},
    "NaN": {**OURS, "outputs": np.full((2, 3), np.nan)},
}


@pytest.mark.parametrize("other", OTHERS)
def test_different_results_raise(other):
    with pytest.raises(
        ValueError, match=r"theirs must agree with ours to 0\.0001 in case, setting"
    ):
        timing.check(
            comparison(implementation("ours", OURS), implementation("theirs", OTHERS[other]))
        )


def test_results_that_are_not_finite_never_agree():
    broken = {"outputs": np.full(2, np.nan)}
    with pytest.raises(ValueError, match="must agree"):
        timing.check(comparison(implementation("ours", broken), implementation("theirs", broken)))


def test_equal_results_pass_and_leaves_that_an_implementation_lacks_are_skipped():
    near = {**OURS, "outputs": OURS["outputs"] * (1 + 1e-6)}
    timing.check(comparison(implementation("ours", OURS), implementation("theirs", near)))
    part = {"outputs": OURS["outputs"], "by_params": {}}
    timing.check(
        comparison(implementation("ours", OURS), implementation("theirs", part, lacks=("kernel",)))
    )


def test_implementations_alternate_and_ratios_are_taken_per_round(monkeypatch):
    order, clock = [], iter(np.cumsum([0, 1, 0, 4, 0, 2, 0, 4]))

    def run_of(name):
        return Implementation(name, lambda: order.append(name), lambda results: results, 8)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    ours, other = timing.measure(comparison(run_of("a"), run_of("b")), 2, Device(2.0))
    assert order == ["a", "a", "b", "b"] * 2  # the second run of each round is timed
    assert ours.ms == (1000, 1500, 2000)
    assert ours.ratio == (1, 1, 1)
    assert other.ratio == (2, 3, 4)
    assert other.gflops == pytest.approx(1e6 / 4e9)
    assert other.fraction_of_peak == pytest.approx(other.gflops / 2)
    assert other.queued_ms is other.weights_share is None


def test_runs_in_a_row_are_waited_for_once(monkeypatch):
    order, clock = [], iter(np.cumsum([0, 8, 0, 2]))
    each = Implementation(
        "a", lambda: order.append("run"), lambda results: results, 10**6,
        wait=lambda results: order.append("wait"),
    )  # fmt: skip
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(timing, "device_ms", lambda run, wait, num_runs: busy)
    busy = None
    (row,) = timing.measure(comparison(each), 1, Device(2.0, gigabytes=1.0), queue=4)
    assert order == ["run", "wait"] * 2 + ["run", "wait"] + ["run"] * 4 + ["wait"]
    assert row.ms == (8000, 8000, 8000)
    assert row.queued_ms == (500, 500, 500)
    assert row.weights_share == pytest.approx(1e-3 / 0.5)  # 1 MB at 1 GB/s of half a second
    busy, clock = 20.0, iter(np.cumsum([0, 8, 0, 2]))
    (row,) = timing.measure(comparison(each), 1, Device(2.0, gigabytes=1.0), queue=4)
    assert (row.device_ms, row.weights_share) == (20.0, pytest.approx(1e-3 / 0.02))


TRACE = """
planes { name: "/host:CPU" lines { name: "Stream of no device" events { duration_ps: 1000000 } } }
planes {
  name: "/device:GPU:0"
  lines {
    name: "Stream #13(Compute)"
    events { offset_ps: 1000000 duration_ps: 4000000 }
    events { offset_ps: 9000000 duration_ps: 1000000 }
  }
  lines { name: "Stream #14(MemcpyD2D)" events { offset_ps: 4000000 duration_ps: 2000000 } }
  lines { name: "XLA Modules" events { duration_ps: 50000000 } }
}
"""


def test_a_device_works_while_any_of_its_streams_does():
    profile = ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(TRACE))
    assert device_time.busy_ns(profile) == 6000  # 1 to 6 and 9 to 10 µs


def test_a_cpu_has_no_trace_of_a_device():
    run = jax.jit(lambda: jnp.ones(3))
    assert device_time.device_ms(run, jax.block_until_ready, 3) is None


def test_a_graph_streams_what_the_plain_step_does(monkeypatch):
    """On a GPU its kernels are replayed; here its function runs."""
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda step, samples: step)
    config = replace(cases.SMALL.decoder, window_size=3)
    params, tokens, _ = jax_runs.draw_demonstrations(replace(config, window_size=6), 2)
    frames = jnp.moveaxis(tokens, 1, 0)
    plain, graph = (
        make(config, params, frames, weight_bytes=1)
        for make in (baselines.torch_stream, baselines.torch_graph_stream)
    )
    for _ in range(5):
        timing.check(comparison(plain, graph), tolerance=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tf32", "bfloat16"])
def test_other_precisions_are_measured_and_compared(name, tmp_path, monkeypatch):
    # fewer units of a head would flip too large a part of its gradients
    wider = replace(cases.SMALL.decoder, hidden_size=64, token_dim=64, head_sizes=(64, 32))
    monkeypatch.setattr(cases, "SMALL", cases.SMALL._replace(decoder=wider, batch_size=8))
    chosen = ("recurrence", "head", "streaming", "backbone")
    before = torch.backends.cudnn.allow_tf32
    content = measured(tmp_path, *chosen, precision=name, queue=3)
    assert torch.backends.cudnn.allow_tf32 == before
    assert (content["precision"], content["queue"]) == (name, 3)
    assert {row["case"] for row in content["rows"]} == set(chosen)
    for row in content["rows"]:
        assert row["queued_ms"]["median"] > 0
        assert row["weights_share"] > 0
    others = {"torch.nn.LSTM", "torch.nn.GRU"} | (set() if name == "bfloat16" else FLAX)
    assert implementations_of(content, "recurrence") == others | {"vla_jax", "vla_jax, plain scan"}
    assert implementations_of(content, "streaming") == STREAMS


def test_the_precision_is_set_in_all_libraries():
    for name, is_tf32 in (("tf32", True), ("float32", False)):
        with precision.all_libraries(name):
            assert torch.backends.cuda.matmul.allow_tf32 is is_tf32
            assert torch.backends.cudnn.allow_tf32 is is_tf32
            assert jax.config.jax_default_matmul_precision == precision.PRECISIONS[name].matmul


def test_pytorch_without_a_gpu_is_left_out_where_jax_has_one(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert baselines.why_no_torch().startswith("this PyTorch sees no GPU, JAX does: install")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert "JAX runs on tpu here" in baselines.why_no_torch()


def test_a_training_step_counts_three_products_per_kernel():
    """4 × LSTM 1024 at B 5, T 12 need 12.1 GFLOP."""
    kernels = {"input_kernel": jnp.zeros((1024, 4096)), "recurrent_kernel": jnp.zeros((1024, 4096))}
    params = {f"layers_{n}": {"forward": {**kernels, "input_bias": jnp.zeros(9)}} for n in range(4)}
    assert jax_runs.recurrence_flop(params, 5 * 12) == pytest.approx(12.1e9, rel=0.01)
    once = 4 * 4 * 1024 * 4096
    assert baselines.recurrent_bytes(params, 12) == 13 * once
    assert baselines.recurrent_bytes(params, 12, hoisted=False) == 24 * once


def test_without_pytorch_the_others_are_measured_and_its_absence_is_reported(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    content = measured(tmp_path, "head")
    assert implementations_of(content, "head") == {"vla_jax"}
    assert content["left_out"] == ["PyTorch is not installed: pip install 'vla-jax[torch]'"]
    assert "left out: PyTorch is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"cases": ()}, "cases must be at least one of recurrence, .*, got none"),
    ],
)
def test_a_wrong_config_raises(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        BenchmarkConfig(**fields)
