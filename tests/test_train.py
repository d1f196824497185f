"""Training end to end at a small size: demonstrations, pre-training, imitation, interruptions."""

import dataclasses
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import get_args

import jax
import numpy as np
import pytest
import tiny_demos
from robovlms_heads import robovlms_head

from train import demo
from train import pretrain as pretrain_script
from train.cache import cache
from train.configs import with_decoder, with_kind
from train.imitate import imitate
from train.presets import IMITATE
from train.pretrain import pretrain
from train.setup import init_params, make_windows, read_dataset
from vla_jax import convert, runs
from vla_jax.actions.action_layout import ActionLayout
from vla_jax.backbones.state import StateConfig
from vla_jax.command_line import command_line
from vla_jax.config import load
from vla_jax.data.image_augment import AugmentConfig
from vla_jax.data.normalize import compute_norm_stats
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.evaluate import EvaluateConfig, evaluate
from vla_jax.evaluation.results import read_outcomes
from vla_jax.nn.scheduled_sampling import SamplingConfig
from vla_jax.policies import policy
from vla_jax.runs import load_run
from vla_jax.training import captions, checkpoint, loop, optim
from vla_jax.training.auxiliary import AuxiliaryConfig
from vla_jax.training.logs import read_metrics
from vla_jax.training.loss_terms import LossWeights
from vla_jax.training.update import init_train_state

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    return tiny_demos.write(tmp_path_factory.mktemp("demos") / "table")


@pytest.fixture(scope="module")
def pretrained_run(demos, tmp_path_factory):
    return pretrain(tiny_demos.pretraining(demos, tmp_path_factory.mktemp("runs") / "pretrained"))


@pytest.fixture(scope="module")
def trained(demos, tmp_path_factory):
    return imitate(tiny_demos.imitation(demos, tmp_path_factory.mktemp("runs") / "state"))


def train_state(run_dir, *, step=None):
    """The saved params, optimiser state and EMA of a run on the state."""
    config = tiny_demos.imitation("", run_dir)
    params = init_params(jax.random.key(0), config)
    optimizer = optim.make_optimizer(config.optim, config.loop.num_updates, params)
    like = init_train_state(params, optimizer, ema=True)
    return checkpoint.restore(run_dir / "checkpoints", like, step=step)[0]


def assert_bitwise_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.slow
def test_pretraining_trains_the_backbone_and_saves_params_and_statistics(pretrained_run):
    losses = [line["loss"] for line in read_metrics(pretrained_run / "metrics.jsonl")]
    assert len(losses) == 2
    assert np.all(np.isfinite(losses))
    params = checkpoint.restore_params(pretrained_run / "checkpoints")
    assert params.keys() == {"backbone", "readout"}
    assert params["readout"]["kernel"].shape == (4 * 8, 22 + 14)  # positions twice, see `targets`
    assert json.loads((pretrained_run / "norm_stats.json").read_text()).keys() >= {
        "environment_state"
    }


@pytest.mark.slow
def test_the_backbone_can_be_pretrained_on_another_column(demos, tmp_path):
    config = dataclasses.replace(tiny_demos.pretraining(demos, tmp_path), target="action")
    params = checkpoint.restore_params(pretrain(config) / "checkpoints")
    assert params["readout"]["bias"].shape == (7,)


def test_a_run_folder_contains_all_that_acting_needs(trained):
    run = load_run(trained)
    expected = tiny_demos.imitation("", "").agent
    assert run.agent == dataclasses.replace(expected, action_layout=ActionLayout())
    assert json.loads((trained / "world.json").read_text())["kind"] == "table_jax"
    steps = [line["step"] for line in read_metrics(trained / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4]
    assert (trained / "actions.png").stat().st_size > 0


def test_resumed_equals_uninterrupted_bitwise(demos, trained, tmp_path):
    run_dir = shutil.copytree(trained, tmp_path / "resumed")
    shutil.rmtree(run_dir / "checkpoints" / "4")
    assert int(train_state(run_dir).num_updates) == 2
    imitate(tiny_demos.imitation(demos, run_dir))
    whole, resumed = train_state(trained), train_state(run_dir)
    assert int(resumed.num_updates) == 4
    assert_bitwise_equal(whole, resumed)
    metrics = [read_metrics(folder / "metrics.jsonl") for folder in (trained, run_dir)]
    for one, other in zip(*metrics, strict=True):
        assert {k: one[k] for k in ("step", "loss", "grad_norm")} == {
            k: other[k] for k in ("step", "loss", "grad_norm")
        }


def test_resuming_a_finished_run_changes_nothing(demos, trained):
    before = train_state(trained)
    imitate(tiny_demos.imitation(demos, trained))
    assert_bitwise_equal(before, train_state(trained))


@pytest.mark.slow
@pytest.mark.sampled
def test_a_frozen_backbone_is_bitwise_unchanged(demos, pretrained_run, tmp_path):
    config = tiny_demos.imitation(
        demos,
        tmp_path / "run",
        backbone=tiny_demos.PERCEIVER,
        backbone_from=str(pretrained_run),
        frozen_backbone=True,
        auxiliary=AuxiliaryConfig(forward_horizon=2, caption=True, caption_size=8),
    )
    (folder,) = cache(config)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    run_dir = imitate(config)
    after = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert after == before  # reused, not written again
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, "hashes.json"}
    params = checkpoint.restore_params(run_dir / "checkpoints")
    pretrained = checkpoint.restore_params(pretrained_run / "checkpoints")
    assert_bitwise_equal(params["backbone"], pretrained["backbone"])
    first = init_params(jax.random.split(jax.random.key(0))[0], config)
    for part in ("decoder", "auxiliary"):
        moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), first[part], params[part])
        assert all(jax.tree.leaves(moved))


@pytest.mark.slow
@pytest.mark.sampled
def test_with_augmentation_on_the_device_resumed_equals_uninterrupted_bitwise(demos, tmp_path):
    options = dict(backbone=tiny_demos.PERCEIVER, augment_on="device")
    config = tiny_demos.imitation(demos, tmp_path / "whole", **options)
    config = dataclasses.replace(config, augment=AugmentConfig(shift=2, brightness=0.2))
    whole = imitate(config)
    resumed = shutil.copytree(whole, tmp_path / "resumed")
    shutil.rmtree(resumed / "checkpoints" / "4")
    imitate(dataclasses.replace(config, run_dir=str(resumed)))
    assert_bitwise_equal(
        *(checkpoint.restore_params(run / "checkpoints") for run in (whole, resumed))
    )
    plain = imitate(tiny_demos.imitation(demos, tmp_path / "plain", **options))
    first = [read_metrics(run / "metrics.jsonl")[0]["loss"] for run in (whole, plain)]
    assert first[0] != first[1]


@pytest.mark.slow
def test_pretraining_can_augment_on_the_device(demos, pretrained_run, tmp_path):
    config = tiny_demos.pretraining(demos, tmp_path / "run")
    changed = pretrain(
        dataclasses.replace(config, augment=AugmentConfig(shift=2), augment_on="device")
    )
    first = [read_metrics(run / "metrics.jsonl")[0]["loss"] for run in (pretrained_run, changed)]
    assert first[0] != first[1]


@pytest.mark.slow
@pytest.mark.sampled
def test_end_to_end_training_changes_the_backbone(demos, pretrained_run, tmp_path):
    config = tiny_demos.imitation(
        demos,
        tmp_path / "run",
        backbone=tiny_demos.PERCEIVER,
        backbone_from=str(pretrained_run),
        pack=True,
        auxiliary=AuxiliaryConfig(forward_horizon=1, forward_target="pixels"),
    )
    run_dir = imitate(config)
    metrics = read_metrics(run_dir / "metrics.jsonl")[-1]
    assert metrics.keys() >= {"loss_forward_image_primary", "loss_forward_image_wrist"}
    params = checkpoint.restore_params(run_dir / "checkpoints")
    pretrained = checkpoint.restore_params(pretrained_run / "checkpoints")["backbone"]
    for name in ("latents", "image_primary_embed", "words"):
        same = jax.tree.map(np.array_equal, params["backbone"][name], pretrained[name])
        assert not all(jax.tree.leaves(same)), name


@pytest.mark.slow
@pytest.mark.sampled
def test_a_gpt_trains_on_packed_episodes_and_acts_beyond_its_window(demos, tmp_path):
    config = with_kind(tiny_demos.imitation(demos, tmp_path / "run", pack=True), "gpt")
    config = dataclasses.replace(config, loop=loop.LoopConfig(2, log_every=1, save_every=2))
    run_dir = imitate(config)
    losses = [line["loss"] for line in read_metrics(run_dir / "metrics.jsonl")]
    assert len(losses) == 2
    assert np.all(np.isfinite(losses))
    first = init_params(jax.random.split(jax.random.key(0))[0], config)["decoder"]
    params = checkpoint.restore_params(run_dir / "checkpoints")["decoder"]
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), first, params)
    assert all(jax.tree.leaves(moved))
    summary = evaluate(run_dir, EvaluateConfig(num_episodes=2, num_simulators=2, num_videos=0))
    outcomes = read_outcomes(run_dir / "evaluation" / "refresh-6" / "episodes.jsonl")
    assert summary.total.episodes == len(outcomes) == 2
    assert max(outcome.num_steps for outcome in outcomes) > config.agent.policy.decoder.window_size


@pytest.mark.slow
@pytest.mark.sampled
def test_an_encoder_decoder_trains_with_scheduled_sampling_resumes_bitwise_and_acts(
    demos, tmp_path
):
    always = with_decoder(
        tiny_demos.imitation(demos, tmp_path / "always", pack=True),
        head="autoregressive",
        dropout=0.0,
    )
    config = dataclasses.replace(
        always, run_dir=str(tmp_path / "run"), sampling=SamplingConfig("linear", slope=0.25)
    )
    run_dir = imitate(config)
    losses = [line["loss"] for line in read_metrics(run_dir / "metrics.jsonl")]
    assert len(losses) == 4
    assert np.all(np.isfinite(losses))
    whole = checkpoint.restore_params(run_dir / "checkpoints")
    shutil.rmtree(run_dir / "checkpoints" / "4")
    imitate(config)
    assert_bitwise_equal(whole, checkpoint.restore_params(run_dir / "checkpoints"))
    forced = [line["loss"] for line in read_metrics(imitate(always) / "metrics.jsonl")]
    assert losses[0] == pytest.approx(forced[0], abs=1e-5)  # the teacher-forcing rate begins at 1
    assert losses[-1] != forced[-1]
    options = EvaluateConfig(num_episodes=2, num_simulators=2, num_videos=0, mode="persistent")
    assert evaluate(run_dir, options).total.episodes == 2


def test_a_sampling_schedule_for_a_head_without_feedback_is_refused():
    with pytest.raises(ValueError, match=r"sampling\.schedule must be 'always' for head 'cont"):
        tiny_demos.imitation("", "", sampling=SamplingConfig("linear"))


@pytest.mark.parametrize("decoder", get_args(demo.Decoder))
def test_every_decoder_of_the_demo_has_its_preset_on_the_same_data(decoder):
    config, base = demo._state_preset(decoder), IMITATE["table_jax_state"]()
    same = ("dataset", "world", "loader", "pack", "loss", "seed")
    assert all(getattr(config, name) == getattr(base, name) for name in same)
    assert config.loop.num_updates == base.loop.num_updates
    chosen = config.agent.policy.decoder
    kinds = {"encoder_decoder": ("lstm", "autoregressive")}
    assert (chosen.kind, chosen.head) == kinds.get(decoder, (decoder, "continuous"))


def test_a_demo_without_decoders_is_refused():
    with pytest.raises(ValueError, match="decoders must name at least one, got none"):
        demo.DemoConfig(decoders=())


# --- auxiliary heads --------------------------------------------------------------------------


def overfitting(demos, run_dir):
    """Both auxiliary heads, whole episodes, and a memory large enough for the instruction."""
    config = tiny_demos.imitation(
        demos,
        run_dir,
        backbone=StateConfig(token_dim=16, vocab_size=256),
        pack=True,
        auxiliary=AuxiliaryConfig(forward_horizon=2, caption=True, caption_size=32),
        loss=LossWeights(caption=1.0),
    )
    parts = config.agent.policy
    decoder = dataclasses.replace(parts.decoder, window_size=8, hidden_size=64, dropout=0.0)
    return dataclasses.replace(
        config,
        agent=dataclasses.replace(config.agent, policy=dataclasses.replace(parts, decoder=decoder)),
        loader=dataclasses.replace(config.loader, batch_size=16),
        optim=dataclasses.replace(config.optim, ema_decay=None, end_factor=0.01),
        loop=dataclasses.replace(config.loop, num_updates=240, save_every=230),
    )


@pytest.fixture(scope="module")
def overfitted(demos, tmp_path_factory):
    return imitate(overfitting(demos, tmp_path_factory.mktemp("runs") / "auxiliary"))


@pytest.mark.slow
@pytest.mark.sampled
def test_both_auxiliary_losses_fall_and_captions_equal_the_instructions(demos, overfitted):
    config = overfitting(demos, overfitted)
    metrics = read_metrics(overfitted / "metrics.jsonl")
    for name in ("loss_forward_tokens", "loss_caption"):
        assert metrics[-1][name] < 0.2 * metrics[0][name], name
    params = checkpoint.restore_params(overfitted / "checkpoints")
    dataset = read_dataset(config)
    windows = make_windows(
        config, dataset, compute_norm_stats(dataset), window_size=8, action_horizon=1
    )
    batch = windows[np.arange(len(windows))]
    features = policy.outputs(
        params,
        config.agent.policy,
        batch.observation,
        timestep_mask=batch.timestep_mask,
        reset=batch.reset,
    ).features
    said = captions.decode(params["auxiliary"]["caption"], features, max_words=12)
    wanted = np.asarray(captions.visible_instruction(batch))
    knows = (wanted > 0).any(-1)
    assert len(np.unique(wanted[knows], axis=0)) > 3
    np.testing.assert_array_equal(said[knows], wanted[knows])


@pytest.mark.slow
def test_with_auxiliary_heads_resumed_equals_uninterrupted_bitwise(demos, overfitted, tmp_path):
    run_dir = shutil.copytree(overfitted, tmp_path / "resumed")
    shutil.rmtree(run_dir / "checkpoints" / "240")
    imitate(overfitting(demos, run_dir))
    assert_bitwise_equal(*(saved(folder) for folder in (overfitted, run_dir)))


@pytest.mark.slow
def test_load_run_omits_the_auxiliary_params_of_the_checkpoint(overfitted):
    run = load_run(overfitted)
    assert run.params.keys() == {"backbone", "decoder"}
    assert checkpoint.restore_params(overfitted / "checkpoints").keys() == {
        "backbone", "decoder", "auxiliary"
    }  # fmt: skip


def test_auxiliary_heads_do_not_change_the_initial_params_of_the_policy():
    config = tiny_demos.imitation("", "")
    more = dataclasses.replace(config, auxiliary=AuxiliaryConfig(caption=True))
    plain, params = (init_params(jax.random.key(0), each) for each in (config, more))
    assert plain.keys() == {"backbone", "decoder"}
    assert_bitwise_equal(plain, {part: params[part] for part in plain})


def test_another_config_in_the_same_folder_is_refused_and_the_field_is_named(demos, trained):
    config = tiny_demos.imitation(demos, trained, loss=LossWeights(gripper=0.5))
    with pytest.raises(
        ValueError, match=r"another config: loss\.gripper was 0\.01 and is 0\.5; .*--overwrite"
    ):
        imitate(config)
    assert checkpoint.latest_step(trained / "checkpoints") == 4


def test_a_run_with_an_old_config_of_the_data_set_is_resumed(demos, trained, tmp_path):
    run_dir = shutil.copytree(trained, tmp_path / "old")
    shutil.rmtree(run_dir / "checkpoints" / "4")
    saved = json.loads((run_dir / "config.json").read_text())
    old = {"dataset": str(demos), "gripper": "open_positive", "feature_keys": []}
    (run_dir / "config.json").write_text(json.dumps({**saved, **old}))
    whole = DatasetConfig(str(demos), decode="whole")  # the only option at that time
    config = dataclasses.replace(tiny_demos.imitation(demos, run_dir), dataset=whole)
    imitate(config)
    assert_bitwise_equal(train_state(trained), train_state(run_dir))
    old["gripper"] = "closed_positive"
    (run_dir / "config.json").write_text(json.dumps({**saved, **old}))
    with pytest.raises(ValueError, match=r"dataset\.gripper was 'closed_positive' and is None"):
        imitate(config)


def test_overwrite_starts_again_and_the_new_run_can_be_resumed(tmp_path):
    config = tiny_demos.imitation("demos", tmp_path / "run")
    folder = runs.open_run(config.run_dir, config, overwrite=False)
    (folder / "left").touch()
    other = dataclasses.replace(config, seed=1, overwrite=True)
    runs.open_run(config.run_dir, other, overwrite=True)
    assert not (folder / "left").exists()
    runs.open_run(config.run_dir, dataclasses.replace(other, overwrite=False), overwrite=False)
    assert load(type(config), folder / "config.json").seed == 1


def test_a_folder_that_is_no_run_is_never_deleted(tmp_path):
    (tmp_path / "thesis.tex").touch()
    config = tiny_demos.imitation("demos", tmp_path)
    with pytest.raises(ValueError, match=r"is not a run folder \(no config\.json of a run\)"):
        runs.open_run(config.run_dir, config, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_only_the_first_process_writes_files(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    runs.open_run(str(tmp_path / "run"), tiny_demos.imitation("demos", "run"), overwrite=False)
    runs.save_json({"a": 1}, tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_data_set_creates_no_run_folder(tmp_path):
    config = tiny_demos.imitation(tmp_path / "nowhere", tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        imitate(config)
    assert not (tmp_path / "run").exists()


def test_the_targets_are_the_column_and_positions_relative_to_the_tool(demos, tmp_path):
    config = dataclasses.replace(tiny_demos.pretraining(demos, tmp_path), reach=0.05)
    dataset = pretrain_script.read_dataset(config)
    norm_stats = compute_norm_stats(dataset)
    make_targets, num_targets = pretrain_script.targets(config, dataset, norm_stats)
    frames = np.arange(5)
    batch = pretrain_script.make_frames(config, dataset, norm_stats)[frames]
    column, stats = dataset.columns["environment_state"][frames], norm_stats["environment_state"]
    tool = dataset.columns["proprio"][frames, :3]
    blocks = column[:, :20].reshape(5, 4, 5)[..., :3] - tool[:, None]
    plate = column[:, 20:] - tool[:, :2]
    near = np.tanh(np.concatenate([blocks.reshape(5, 12), plate], axis=1) / 0.05)
    constant = stats.std == 0
    expected = np.concatenate([(column - stats.mean) / np.where(constant, 1, stats.std), near], 1)
    assert num_targets == expected.shape[1] == 36
    np.testing.assert_allclose(make_targets(batch)[:, 0], expected, rtol=0, atol=1e-4)
    make_targets, num_targets = pretrain_script.targets(
        dataclasses.replace(config, reach=0.0), dataset, norm_stats
    )
    assert num_targets == make_targets(batch).shape[-1] == 22


def test_a_missing_target_column_is_refused(demos, tmp_path):
    config = tiny_demos.pretraining(demos, tmp_path)
    with pytest.raises(ValueError, match="unknown target 'state'; choose"):
        pretrain(dataclasses.replace(config, target="state"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "backbone", [StateConfig(), dataclasses.replace(tiny_demos.PERCEIVER, width=8)]
)
def test_a_backbone_of_another_size_is_refused(pretrained_run, backbone):
    config = tiny_demos.imitation("", "", backbone=backbone, backbone_from=str(pretrained_run))
    with pytest.raises(ValueError, match=r"backbone of .*pretrained does not fit this config: \w+"):
        init_params(jax.random.key(0), config)


# --- initial decoder params -------------------------------------------------------------------


def write_converted(folder, **sizes):
    """Writes a converted RoboVLMs head for the small policy on the state; returns its params."""
    head = robovlms_head("lstm", in_features=8 * 3, hidden=8, layers=1, sizes=(8,), **sizes)
    decoder, params = convert.from_robovlms(head, window_size=6)
    report = convert.report_robovlms(head, decoder)
    convert.write_folder(folder, convert.TensorFile(head), decoder, params, report)
    return params


def test_training_starts_from_the_decoder_of_a_conversion_or_of_a_run(trained, tmp_path):
    given = {
        tmp_path / "head": write_converted(tmp_path / "head"),
        trained: checkpoint.restore_params(trained / "checkpoints")["decoder"],
    }
    fresh = init_params(jax.random.key(0), tiny_demos.imitation("", ""))
    for folder, decoder in given.items():
        config = tiny_demos.imitation("", "", decoder_from=str(folder))
        params = init_params(jax.random.key(0), config)
        assert_bitwise_equal(params["decoder"], decoder)
        assert_bitwise_equal(params["backbone"], fresh["backbone"])


@pytest.mark.slow
def test_a_converted_head_is_trained_and_converted_back(demos, tmp_path):
    write_converted(tmp_path / "head")
    options = {"decoder_from": str(tmp_path / "head")}
    run = load_run(imitate(tiny_demos.imitation(demos, tmp_path / "run", **options)))
    back = convert.to_robovlms(run.agent.policy.decoder, run.params["decoder"])
    first = robovlms_head("lstm", in_features=8 * 3, hidden=8, layers=1, sizes=(8,))
    assert back.keys() == first.keys()
    for name, tensor in back.items():
        assert 0 < np.abs(tensor - first[name]).max() < 0.1, name


@pytest.mark.slow
def test_a_decoder_of_another_size_is_refused(pretrained_run, tmp_path):
    write_converted(tmp_path / "head", chunk=3)
    sentence = r"decoder of .*head does not fit this config: .*heads/arm/layers_1/bias.*18"
    missing = "decoder of .* does not fit this config: "
    for folder, message in ((tmp_path / "head", sentence), (pretrained_run, missing)):
        config = tiny_demos.imitation("", "", decoder_from=str(folder))
        with pytest.raises(ValueError, match=message):
            init_params(jax.random.key(0), config)


def test_save_every_below_one_is_refused():
    with pytest.raises(ValueError, match="save_every must be at least 1, got 0"):
        loop.LoopConfig(save_every=0)


# --- the command line, and kill -9 ------------------------------------------------------------


def start(module, *options):
    """Starts `python -m train.…` in the repository's root."""
    command = [sys.executable, "-m", f"train.{module}", *map(str, options)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def small(demos, run_dir):
    """Options of a small policy on the state."""
    return (
        *("--preset", "table_jax_state", "--dataset", demos, "--run-dir", run_dir),
        *("--window-size", 6, "--hidden-size", 8, "--head-sizes", 8, "--batch-size", 8),
    )


@pytest.mark.slow
def test_a_discrete_head_trains_from_the_command_line_and_acts(demos, tmp_path):
    options = ("--decoder.head", "discrete", "--num-bins", 16, "--max-steps", 8)
    updates = ("--num-updates", 60, "--save-every", 60, "--log-every", 20, "--warmup-steps", 0)
    argv = [str(word) for word in (*small(demos, tmp_path / "run"), *options, *updates)]
    run_dir = imitate(command_line(IMITATE, argv, description="Trains."))
    metrics = read_metrics(run_dir / "metrics.jsonl")
    assert [line["loss"] for line in metrics] == [line["loss_bins"] for line in metrics]
    assert metrics[-1]["loss"] < 0.9 * np.log(16)  # uniform guess
    assert (run_dir / "actions.png").stat().st_size > 0
    assert load_run(run_dir).params["decoder"]["heads"].keys() == {"bins"}
    assert evaluate(run_dir, EvaluateConfig(num_episodes=2, num_videos=0)).total.episodes == 2


def small_run(demos, run_dir):
    return start(
        "imitate",
        *small(demos, run_dir),
        *("--num-updates", 1500, "--save-every", 20, "--log-every", 10, "--warmup-steps", 5),
        *("--dropout", 0.1),
    )


def kill_while_training(process, run_dir, seconds, *, once_saved=False):
    """Sends SIGKILL after the first new updates (and a checkpoint), and before the last update."""
    lines = run_dir / "metrics.jsonl"
    before = lines.stat().st_ino if lines.exists() else None
    start = checkpoint.latest_step(run_dir / "checkpoints") or 0

    def is_training():  # the loop first replaces the file, without unsaved lines
        replaced = lines.exists() and lines.stat().st_ino != before
        return replaced and any(line["step"] > start for line in read_metrics(lines))

    while process.poll() is None and not is_training():
        time.sleep(0.01)
    time.sleep(seconds)
    while once_saved and process.poll() is None:  # on a busy machine, none may be saved yet
        once_saved = not checkpoint.latest_step(run_dir / "checkpoints")
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, output = process.communicate()
    assert process.returncode == -signal.SIGKILL, output


@pytest.mark.slow
@pytest.mark.sampled
def test_a_run_killed_three_times_equals_uninterrupted_bitwise(demos, tmp_path):
    seconds = [random.uniform(0.2, 0.8) for _ in range(3)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with small_run(demos, whole) as uninterrupted:
        reached = []
        for number, pause in enumerate(seconds):
            last = number == len(seconds) - 1
            kill_while_training(small_run(demos, killed), killed, pause, once_saved=last)
            reached.append(checkpoint.latest_step(killed / "checkpoints") or 0)
        for process in (small_run(demos, killed), uninterrupted):
            _, output = process.communicate()
            assert process.returncode == 0, output
    print(f"killed {seconds} s into the updates, with checkpoints of {reached}")
    assert 0 < reached[-1] < 1500, reached
    assert_bitwise_equal(*(saved(folder) for folder in (whole, killed)))
    metrics = [read_metrics(folder / "metrics.jsonl") for folder in (whole, killed)]
    steps = [[(line["step"], line["loss"]) for line in lines] for lines in metrics]
    assert steps[0] == steps[1]


def saved(run_dir):
    """Everything in the last checkpoint."""
    step = checkpoint.latest_step(run_dir / "checkpoints")
    tree, record = checkpoint._stored(run_dir.absolute() / "checkpoints" / str(step))
    path = run_dir.absolute() / "checkpoints" / str(step)
    metadata = checkpoint.read_metadata(run_dir / "checkpoints")
    return checkpoint._load(path, checkpoint._as_numpy(tree), record), metadata["loader"]
