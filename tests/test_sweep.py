"""A sweep: members trained as one program are the trainings of `train.imitate`."""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_demos
from test_stopping import exit_code

from train import sweep as script
from train import sweep_group, sweep_report
from train.configs import with_decoder
from train.imitate import imitate
from train.presets import IMITATE
from train.pretrain import pretrain
from train.sweep import SWEEP, SweepConfig, make_members, plan_groups, sweep
from train.sweep_group import NO_LOSS, Group, MembersState, final_loss
from train.sweep_report import Result
from vla_jax import files
from vla_jax.command_line import command_line
from vla_jax.config import load
from vla_jax.data.loader import Loader
from vla_jax.evaluate import EvaluateConfig, evaluate
from vla_jax.runs import load_run, open_run
from vla_jax.training import checkpoint
from vla_jax.training.logs import read_metrics
from vla_jax.training.loop import LoopConfig
from vla_jax.training.run_lock import in_use
from vla_jax.training.update import init_train_state
from vla_jax.trees import leaves_by_path

RATES = (1e-2, 2e-3)


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    return tiny_demos.write(tmp_path_factory.mktemp("demos") / "table")


def config_of(demos, run_dir, **options):
    single = tiny_demos.imitation(demos, run_dir, **options.pop("training", {}))
    values = {field.name: getattr(single, field.name) for field in dataclasses.fields(single)}
    options = {"seeds": 2, "learning_rates": RATES, "num_episodes": 3} | options
    return SweepConfig(**values | options)


@pytest.fixture(scope="module")
def swept(demos, tmp_path_factory):
    """Returns the folder of a sweep of two seeds and two learning rates, dropout included."""
    return sweep(config_of(demos, tmp_path_factory.mktemp("runs") / "swept")).parent


def results(folder):
    lines = files.read_json_lines(folder / sweep_report.RESULTS)
    return [Result(**line)._replace(seconds=0.0) for line in lines]


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize(("rate", "seed"), [(RATES[0], 0), (RATES[1], 1)])
def test_a_member_is_the_training_of_imitate(demos, swept, tmp_path, rate, seed):
    single = tiny_demos.imitation(demos, tmp_path / "run", seed=seed)
    single = dataclasses.replace(
        single, optim=dataclasses.replace(single.optim, learning_rate=rate)
    )
    imitate(single)
    (result,) = (r for r in results(swept) if (r.learning_rate, r.seed) == (rate, seed))
    last = read_metrics(tmp_path / "run/metrics.jsonl")[-1]
    assert result.loss == pytest.approx(last["loss"], abs=1e-5)
    assert (result.num_updates, result.diverged_at) == (last["step"], None)
    member, run = load_run(swept / result.name), load_run(tmp_path / "run")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), member.params, run.params
    )
    assert (member.agent, member.world, member.step) == (run.agent, run.world, run.step)
    assert member.norm_stats.keys() == run.norm_stats.keys()
    saved = load(type(single), swept / result.name / "config.json")
    assert dataclasses.replace(saved, run_dir=single.run_dir) == single
    # train.imitate continues it
    position = checkpoint.read_metadata(swept / result.name / "checkpoints")["loader"]
    assert position == checkpoint.read_metadata(tmp_path / "run/checkpoints")["loader"]


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize("mesh", ["data=4", "data=2,fsdp=2"])
def test_a_sweep_on_a_mesh_trains_what_one_device_does(demos, tmp_path, mesh, monkeypatch):
    folders, states = {}, []
    train_group = script.train_group

    def train(*args):
        states.append(train_group(*args))
        return states[-1]

    monkeypatch.setattr(script, "train_group", train)
    for number, sizes in enumerate(("data=1", mesh)):
        config = config_of(demos, tmp_path / str(number), seeds=2, learning_rates=())
        folders[sizes] = sweep(
            dataclasses.replace(config, loop=dataclasses.replace(config.loop, mesh=sizes))
        ).parent
    one, other = (load_members(folder) for folder in folders.values())
    assert len(one) == 2
    for first, second in zip(one, other, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), first, second)
    kernels = {
        path: leaf for path, leaf in leaves_by_path(states[1]).items() if path.endswith("kernel")
    }
    assert len(kernels) >= 4 * 4  # of params, two moments, EMA
    is_split = "fsdp" in mesh
    for path, leaf in kernels.items():
        assert leaf.sharding.is_fully_replicated != is_split, path
        assert leaf.addressable_shards[0].data.size == leaf.size // (1 + is_split), path


def load_members(folder):
    return [load_run(folder / result.name).params for result in results(folder)]


@pytest.mark.slow
def test_imitate_continues_a_member(demos, swept, tmp_path):
    result = results(swept)[3]
    single = tiny_demos.imitation(demos, tmp_path / "run", seed=result.seed)
    single = dataclasses.replace(
        single, optim=dataclasses.replace(single.optim, learning_rate=result.learning_rate)
    )
    imitate(single)
    shutil.copytree(swept / result.name, tmp_path / "member")
    runs = []
    for folder in ("run", "member"):
        loop = dataclasses.replace(single.loop, num_updates=6)
        longer = dataclasses.replace(single, run_dir=str(tmp_path / folder), loop=loop)
        with pytest.warns(UserWarning, match="num_updates"):  # another schedule
            runs.append(imitate(longer))
    params = [load_run(run).params for run in runs]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *params)
    assert [line["step"] for line in read_metrics(runs[1] / "metrics.jsonl")] == [5, 6]


def test_a_sweep_that_is_shared_is_not_overwritten(demos, tmp_path):
    config = config_of(demos, tmp_path / "run")
    folder = open_run(tmp_path / "run", config, overwrite=False) / "group-lstm-h8-l1-0"
    folder.mkdir()
    config = dataclasses.replace(config, overwrite=True)
    with in_use(folder), pytest.raises(BlockingIOError, match="group-lstm-h8-l1-0"):
        sweep(config)
    assert folder.exists()


def test_the_members_differ_and_are_in_the_table(swept):
    members = results(swept)
    assert [(r.learning_rate, r.seed) for r in members] == [(r, s) for r in RATES for s in (0, 1)]
    assert len({round(r.loss, 6) for r in members}) == 4
    assert all(r.episodes == 3 and 0 <= r.successes <= 3 for r in members)
    table = (swept / sweep_report.TABLE).read_text()
    assert table.count("| lstm | 8 | 1 | 0.01 |") == table.count("| lstm | 8 | 1 | 0.002 |") == 1
    assert not list(swept.glob("group-*/checkpoints"))
    curve = read_metrics(next(swept.glob("group-*/metrics.jsonl")))
    assert [line["step"] for line in curve] == [1, 2, 3, 4]
    assert curve[-1]["loss/03"] == pytest.approx(members[3].loss)


@pytest.mark.slow
def test_a_sweep_that_is_stopped_resumes_from_the_update_at_hand(
    demos, swept, tmp_path, monkeypatch
):
    config, make_batches = config_of(demos, tmp_path / "cut"), sweep_group.make_batches
    taken = []

    class SignalledLoader(Loader):
        def __next__(self):
            taken.append(1)
            if len(taken) == 3:
                signal.raise_signal(signal.SIGTERM)
            return super().__next__()

    def make_signalled(*args):
        batches = make_batches(*args)
        batches.__class__ = SignalledLoader
        return batches

    with monkeypatch.context() as patch:
        patch.setattr(sweep_group, "make_batches", make_signalled)
        assert exit_code(lambda: sweep(config)) == 143
    (folder,) = (tmp_path / "cut").glob("group-*")
    assert checkpoint.latest_step(folder / "checkpoints") == 3
    assert not results(tmp_path / "cut")
    assert sweep(config) == tmp_path / "cut" / sweep_report.TABLE
    assert results(tmp_path / "cut") == results(swept)
    assert len(taken) == 3


def fake_group(trained):
    """Returns a function in the place of `_run_group` that writes results alone."""

    def run_group(group, data, run_dir, env, config):
        del data, env, config
        trained.append(group.name)
        for member in group.members:
            result = Result(member.name, "lstm", 8, 1, 0.1, 0, 9, 4, 0.5, None, 0, None, 1.0)
            files.write_json(run_dir / member.name / script._RESULT, result._asdict())

    return run_group


def test_finished_members_are_kept_and_new_ones_added(demos, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(script, "_run_group", fake_group(trained))
    config = config_of(demos, tmp_path / "run", cells=("lstm", "gru"))
    sweep(config)
    assert trained == ["group-lstm-h8-l1-0", "group-gru-h8-l1-0"]
    sweep(dataclasses.replace(config, seeds=3, cells=("lstm",)))
    assert trained[2:] == ["group-lstm-h8-l1-1"]
    left = tmp_path / "run" / "group-lstm-h8-l1-0" / "checkpoints"  # by a process that was killed
    left.mkdir()
    assert len(results(tmp_path / "run")) == 6
    sweep(dataclasses.replace(config, seeds=3))
    assert trained[3:] == ["group-gru-h8-l1-1"]
    assert not left.exists()


def test_the_groups_are_planned_once(demos, tmp_path):
    members = make_members(config_of(demos, tmp_path, cells=("lstm", "rnn"), seeds=3))
    groups = plan_groups(tmp_path, members, 4)
    assert [len(group.members) for group in groups] == [4, 2, 4, 2]
    assert plan_groups(tmp_path, members, 100) == groups
    assert [m for group in groups for m in group.members] == members


def test_a_group_that_another_process_trains_is_left_to_it(demos, tmp_path, monkeypatch):
    trained, elsewhere = [], contextlib.ExitStack()
    monkeypatch.setattr(script, "_POLL", 0.01)
    fake = fake_group(trained)

    def run_group(group, *rest):
        fake(group, *rest)
        if group.name == "group-gru-h8-l1-0":  # meanwhile the other process has finished
            other = Group("other", tuple(make_members(config)[:4]))
            fake(other, *rest)
            elsewhere.close()

    monkeypatch.setattr(script, "_run_group", run_group)
    config = config_of(demos, tmp_path / "run", cells=("lstm", "gru"))
    open_run(tmp_path / "run", config, overwrite=False)
    plan_groups(tmp_path / "run", make_members(config), 16)
    elsewhere.enter_context(in_use(tmp_path / "run/group-lstm-h8-l1-0"))
    sweep(config)
    assert trained == ["group-gru-h8-l1-0", "other"]


def test_a_member_that_diverges_stops_alone(demos, tmp_path, monkeypatch):
    config = config_of(demos, tmp_path, learning_rates=())
    config = dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, ema_decay=None),
        loop=LoopConfig(skip_bad_updates=1),
    )

    def make_loss(_):
        return lambda params, counted, key: (jnp.sum(params["w"] ** 4 * counted.batch), {})

    monkeypatch.setattr(sweep_group, "make_loss", make_loss)
    optimizer = optax.sgd(0.1)
    update = sweep_group._make_update(config, optimizer, np.array([0.1, 1e20, 1], np.float32))
    members = jax.vmap(lambda w: init_train_state({"w": w}, optimizer))(
        jnp.array([[1.0], [1.0], [1e30]])  # the loss of the last one is infinite from the start
    )
    zero = jnp.zeros(3, jnp.int32)
    state = MembersState(jnp.zeros([], jnp.int32), members, jnp.full(3, NO_LOSS), zero, zero)
    keys, losses = jax.random.split(jax.random.key(0), 3), []
    for _ in range(5):
        state, metrics = jax.jit(update)(state, jnp.ones(1), keys)
        losses.append(float(metrics["loss"]))
    assert state.diverged_at.tolist() == [0, 3, 2]  # update 2 is bad and skipped, update 3 too
    assert [final_loss(state, index) for index in (1, 2)] == [1.0, None]
    assert state.loss[1] == 1.0
    assert state.members.params["w"][1] == pytest.approx(-4e19, rel=1e-5)
    assert state.members.params["w"][0] < 1
    assert np.all(np.isfinite(losses))
    assert metrics["diverged"] == 2
    assert np.isnan(metrics["loss/02"])  # is left out of metrics.jsonl
    assert metrics["loss/00"] == metrics["loss"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"cells": ("lstmm",)}, "unknown name 'lstmm' in cells; .*Did you mean 'lstm'"),
        ({"hidden_sizes": (64, 0)}, "hidden_sizes must be at least 1, got 0"),
        ({"learning_rates": (0.0,)}, "learning_rates must be at least 1e-12, got 0.0"),
        ({"layers": (2, 2)}, "layers must hold every value once"),
        ({"cells": ("gpt",), "hidden_sizes": (30,)}, "hidden_size must be .* num_heads"),
        (
            {"overwrite": True, "loop": LoopConfig(distributed="slurm")},
            "overwrite must be False with distributed",
        ),
    ],
)
def test_wrong_options_are_refused(options, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(config_of("demos", tmp_path), **options)


def test_cudnn_which_cannot_be_mapped_over_trainings_is_refused(tmp_path):
    with pytest.raises(ValueError, match="implementation must not be 'cudnn'"):
        with_decoder(config_of("demos", tmp_path), implementation="cudnn", dropout=0.0)


def test_what_cannot_be_swept_is_refused_before_reading(demos, tmp_path, monkeypatch):
    def read_nothing(*_):
        raise AssertionError("data were read")

    monkeypatch.setattr(script, "read_training_inputs", read_nothing)
    images = config_of(demos, tmp_path / "run", training={"backbone": tiny_demos.PERCEIVER})
    with pytest.raises(ValueError, match=r"--frozen-backbone .*train\.cache"):
        sweep(images)
    with pytest.raises(ValueError, match=r"backbone_from must name .* depend on the seed"):
        sweep(dataclasses.replace(images, frozen_backbone=True))
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds a single training"):
        sweep(config_of(demos, tmp_path / "run"))


def test_every_preset_of_imitate_can_be_chosen():
    for name in IMITATE:
        config = command_line(SWEEP, ["--preset", name, "--cells", "gru"], description="Sweeps.")
        assert (config.run_dir, config.cells) == (f"runs/sweep_{name}", ("gru",))


def test_the_table_has_intervals_and_leaves_out_what_diverged():
    same = Result("a", "gru", 64, 2, 1e-3, 0, 1000, 50, 0.5, None, 100, 90, 1.0)
    rows = list(
        sweep_report.rows(
            [
                same,
                same._replace(name="b", seed=1, successes=80, loss=0.25),
                same._replace(name="c", seed=2, successes=0, loss=9.0, diverged_at=7),
                same._replace(name="c", seed=3, successes=0, loss=None, diverged_at=1),
                same._replace(name="d", learning_rate=1.0),
            ]
        )
    )
    assert rows[0][5:8] == ("4, 2 diverged", "0.3750 [0.2500, 0.5000]", "-1.2133 – 1.9633")
    assert rows[0][8:] == ("85.0 [80.0, 90.0] %", "21.5 – 100.0 %", "a")
    assert rows[1][5:] == ("1", "0.5000", "–", "90.0 %", "82.6 – 94.5 %", "d")
    assert sweep_report.table([same]).row_count == 1


@pytest.mark.slow
@pytest.mark.sampled
def test_features_of_a_frozen_backbone_are_swept_and_evaluated(demos, tmp_path):
    pretrained = pretrain(tiny_demos.pretraining(demos, tmp_path / "pretrained"))
    training = {
        "backbone": tiny_demos.PERCEIVER, "frozen_backbone": True, "backbone_from": str(pretrained)
    }  # fmt: skip
    folder = sweep(config_of(demos, tmp_path / "run", training=training, num_episodes=20)).parent
    (result, *_), options = results(folder), EvaluateConfig(num_episodes=20, num_videos=0)
    assert evaluate(folder / result.name, options).total.successes == result.successes


@pytest.mark.slow
@pytest.mark.sampled
def test_processes_share_the_groups(demos, tmp_path):
    options = {
        "--preset": "table_jax_state", "--dataset": demos, "--run-dir": tmp_path / "run",
        "--num-updates": 4, "--warmup-steps": 0, "--save-every": 4, "--batch-size": 8,
        "--hidden-sizes": 8, "--seeds": 2, "--num-episodes": 2, "--max-steps": 5,
        "--distributed": "slurm",
    }  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    command = [sys.executable, "-m", "train.sweep", *words, "--cells", "lstm", "gru", "fc"]
    started = [
        subprocess.Popen(
            command, env={**os.environ, "SLURM_LOCALID": str(i)}, stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    errors = [process.communicate(timeout=600)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    assert len(results(tmp_path / "run")) == 6
    lines = [line for text in errors for line in text.splitlines() if line.startswith("group-")]
    done = [line.split(":")[0] for line in lines if " of 3 groups" in line]
    assert len(done) == len(set(done)) == 3  # none was trained twice
    assert all("group-" in text for text in errors)  # each process has trained some
