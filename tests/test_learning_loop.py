"""Learning from reward: resumed = uninterrupted, one device = four devices, clear errors."""

import dataclasses
import json
import re
import shutil
from functools import partial

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import deep_sarsa, ppo, reinforce, tabular
from train.benchmark import throughput
from train.deep_sarsa import SarsaConfig, make_sarsa
from train.ppo import PPOConfig, make_ppo
from train.reinforce import ReinforceConfig, make_reinforce
from vla_jax import config as configs
from vla_jax.command_line import command_line
from vla_jax.envs import discrete_worlds
from vla_jax.envs.grid import GridConfig
from vla_jax.rl import actor, learning_record, network
from vla_jax.rl.learner import SeedsConfig, zero_carry
from vla_jax.rl.learning_loop import learn, read_curve, write_report
from vla_jax.rl.network import NetworkConfig
from vla_jax.training import checkpoint
from vla_jax.training.logs import read_metrics
from vla_jax.training.loop import LoopConfig
from vla_jax.training.optim import OptimConfig

SEEDS = SeedsConfig(
    num_seeds=2, num_envs=8, num_steps=6, eval_episodes=4, report_episodes=6, solved_at=2.0
)
PARTS = {
    "seeds": SEEDS,
    "optim": OptimConfig(warmup_steps=0, learning_rate=3e-3, ema_decay=0.9),
    "world": GridConfig(size=3, num_obstacles=1, max_steps=8),
    "network": NetworkConfig(
        kind="gru", object_size=4, object_sizes=(8,), hidden_sizes=(8,), memory_size=8
    ),
}
LOOP = LoopConfig(num_updates=4, log_every=2, save_every=2, mesh="data=1")
SCRIPTS = {"sarsa": deep_sarsa, "reinforce": reinforce, "ppo": ppo}
MAKERS = {
    "sarsa": (SarsaConfig, make_sarsa),
    "reinforce": (ReinforceConfig, make_reinforce),
    "ppo": (PPOConfig, make_ppo),
}
LEARNERS = {
    name: make(config_type(loop=LOOP, **PARTS)) for name, (config_type, make) in MAKERS.items()
}


def run(run_dir, name, *, seeds=SEEDS, loop=LOOP, learner=None):
    return learn(seeds, loop, run_dir, learner or LEARNERS[name], seed=0, name=name)


def metrics_of(run_dir):
    timing = ("steps_per_second", "data_wait")
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [{name: line[name] for name in line if name not in timing} for line in lines]


@pytest.fixture(scope="module", params=LEARNERS)
def whole(request, tmp_path_factory):
    """Name, folder and result of a training without interruption."""
    run_dir = tmp_path_factory.mktemp(request.param)
    return request.param, run_dir, run(run_dir, request.param)


def interrupted(run_dir, tmp_path):
    """A copy of the folder after the second of four updates."""
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "checkpoints" / "4")
    assert checkpoint.latest_step(copy / "checkpoints") == 2
    return copy


@pytest.mark.slow
@pytest.mark.sampled
def test_a_resumed_training_equals_an_uninterrupted_one_to_the_bit(whole, tmp_path):
    name, run_dir, result = whole
    copy = interrupted(run_dir, tmp_path)
    resumed = run(copy, name)
    jax.tree.map(np.testing.assert_array_equal, resumed, result)
    assert metrics_of(copy) == metrics_of(run_dir)


@pytest.mark.slow
@pytest.mark.sampled
def test_four_devices_equal_one(whole, tmp_path):
    name, _, result = whole
    loop = LoopConfig(num_updates=4, log_every=4, save_every=4, mesh="data=2,fsdp=2")
    sharded = run(tmp_path, name, loop=loop)
    close = partial(np.testing.assert_allclose, atol=1e-4)
    jax.tree.map(close, sharded.params, result.params)


@pytest.mark.slow
def test_seeds_differ_and_each_has_its_learning_curve(whole, capsys):
    _, run_dir, result = whole
    kernel = result.params["mlp"]["layers_0"]["kernel"]
    assert np.abs(kernel[0] - kernel[1]).max() > 0.01
    env_steps, values = read_curve(run_dir, "success")
    np.testing.assert_array_equal(env_steps, [2 * 8 * 6, 4 * 8 * 6])
    assert values.shape == (2, 2)
    write_report(SEEDS, run_dir, result)
    assert re.search(r"success: mean 0\.\d+ \[.*of 2 seeds", capsys.readouterr().out)
    report = json.loads((run_dir / "report.json").read_text())
    assert report["success"]["seeds"] == result.report["success"].tolist()
    assert report["env_steps"] == 2 * 4 * 8 * 6
    assert (run_dir / "curve.png").stat().st_size > 1000


def test_a_value_that_a_log_left_out_is_nan_in_the_curve(tmp_path):
    lines = [{"success/00": 0.5}, {"success/01": 1.0, "success/00": 0.75}, {"return/00": 1.0}]
    steps = ({"step": n, "env_steps": 10 * n, **line} for n, line in enumerate(lines, 1))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    env_steps, values = read_curve(tmp_path, "success")
    np.testing.assert_array_equal(env_steps, [10, 20, 30])
    np.testing.assert_array_equal(values, [[0.5, np.nan], [0.75, 1.0], [np.nan, np.nan]])


@pytest.mark.slow
def test_a_seed_that_has_solved_its_environment_stops_learning(tmp_path):
    seeds = SeedsConfig(**{**vars(SEEDS), "solved_at": -1.0})
    result = run(tmp_path, "sarsa", seeds=seeds)
    assert result.num_updates.tolist() == [2, 2]
    assert checkpoint.latest_step(tmp_path / "checkpoints") == 2


@pytest.mark.slow
@pytest.mark.sampled
def test_a_reward_of_nan_is_reported_and_the_last_checkpoint_is_kept(whole, tmp_path, monkeypatch):
    name, run_dir, result = whole
    copy, env = interrupted(run_dir, tmp_path), discrete_worlds.make(PARTS["world"])

    def step(state, action):
        state, transition = env.step(state, action)
        return state, transition._replace(reward=transition.reward + jnp.nan)

    monkeypatch.setattr(discrete_worlds, "make", lambda config, **_: env._replace(step=step))
    config_type, make = MAKERS[name]
    broken = make(config_type(loop=LOOP, **PARTS))
    before = checkpoint.read_metadata(copy / "checkpoints")
    with pytest.raises(
        ValueError,
        match=r"reward must be finite, got nan in seed 0 at update 3; .* update 2, is kept: fix",
    ):
        run(copy, name, learner=broken)
    assert checkpoint.latest_step(copy / "checkpoints") == 2
    assert checkpoint.read_metadata(copy / "checkpoints") == before
    jax.tree.map(np.testing.assert_array_equal, run(copy, name), result)  # without the fault


@pytest.mark.sampled
@pytest.mark.parametrize("name", MAKERS)
def test_a_policy_whose_outputs_are_not_finite_chooses_no_action(name):
    config_type, _ = MAKERS[name]
    algorithm = SCRIPTS[name].make_algorithm(config_type(loop=LOOP, **PARTS))
    env, key = discrete_worlds.make(PARTS["world"]), jax.random.key(0)

    @jax.jit
    def play(scale):
        heads = algorithm.heads(env.num_actions)
        params = network.init(key, algorithm.network, env.observation_shape, heads)
        params = jax.tree.map(lambda leaf: leaf * scale, params)
        policies = algorithm.exploit(params), algorithm.explore(params, jnp.int32(0))
        return [actor.play(env, act, 3, zero_carry(algorithm, 3), key=key) for act in policies]

    for good, bad in zip(play(1.0), play(jnp.nan), strict=True):
        assert np.isfinite(good.reward).all()
        assert (np.asarray(good.action) >= 0).all()
        real = np.asarray(bad.mask)
        assert (np.asarray(bad.action)[real] == -1).all()
        assert np.isnan(np.asarray(bad.reward)[real]).all()
        assert not bad.success.any()


def test_environments_that_cannot_be_sharded_are_refused(tmp_path):
    seeds, loop = SeedsConfig(num_envs=6), LoopConfig(mesh="data=4")
    message = "num_envs must be a multiple of the 4 devices over which .* are split, got 6"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "sarsa", seeds=seeds, loop=loop)


def test_a_config_that_does_not_fit_leaves_an_earlier_run_unchanged(tmp_path):
    parts = {**PARTS, "network": NetworkConfig(object_size=3)}
    config = SarsaConfig(run_dir=str(tmp_path), loop=LOOP, overwrite=True, **parts)
    earlier = json.dumps({configs.CLASS: "SarsaConfig", "run_dir": str(tmp_path)})
    (tmp_path / "config.json").write_text(earlier)
    with pytest.raises(ValueError, match="object_size must be 0 or 4"):
        deep_sarsa.train(config)
    assert (tmp_path / "config.json").read_text() == earlier


@pytest.mark.slow
def test_a_table_learns_a_small_grid_and_performs_worse_with_shared_rows(tmp_path):
    deep = SarsaConfig(
        loop=LoopConfig(num_updates=400), seeds=SeedsConfig(num_envs=32, report_episodes=200)
    )
    env_config = GridConfig(size=3, num_obstacles=1, max_steps=20)
    success = {}
    for rows in (2**21, 7):
        config = tabular.TabularConfig(max_rows=rows)
        train_table = jax.jit(partial(tabular.train_table, config, deep, env_config))
        success[rows] = train_table(key=jax.random.key(0))["success"]
    assert success[2**21] > 0.9
    assert success[7] < 0.7


def test_a_folder_that_disagrees_with_its_checkpoint_is_refused(tmp_path):
    config = SarsaConfig(run_dir=str(tmp_path), loop=LOOP, **PARTS)
    saving = checkpoint.open_checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoint.save(saving, 2, {"params": {"x": jnp.ones(1)}}, learning_record.make(config))
    checkpoint.close(saving)
    longer = dataclasses.replace(config, loop=dataclasses.replace(LOOP, num_updates=9))
    learning_record.check(tmp_path, tmp_path, longer)
    other = dataclasses.replace(config, gamma=0.5)
    configs.save(other, tmp_path / "config.json")  # as if edited, or copied from another run
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"holds a run of another config: gamma"):
        deep_sarsa.train(other)
    assert sorted(path for path in tmp_path.rglob("*") if path.name != ".lock") == before


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize("name", MAKERS)
def test_a_script_writes_a_curve_a_report_and_a_video(name, tmp_path):
    config, _ = MAKERS[name]
    run_dir = SCRIPTS[name].train(config(run_dir=str(tmp_path / "run"), loop=LOOP, **PARTS))
    files = {path.name for path in run_dir.iterdir()}
    assert {"config.json", "metrics.jsonl", "curve.png", "report.json", "episodes.mp4"} <= files
    with av.open(str(run_dir / "episodes.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 200
    assert frames[0].shape == (96, 96, 3)
    assert any((frame != frames[0]).any() for frame in frames)


@pytest.mark.slow
def test_the_comparison_plots_both_learners(tmp_path, capsys):
    deep = SarsaConfig(loop=LOOP, **PARTS)
    config = tabular.TabularConfig(run_dir=str(tmp_path / "run"), obstacles=(1,), deep=deep)
    run_dir = tabular.compare(config)
    assert "1 obstacles, 1,458 states: success" in capsys.readouterr().out
    report = json.loads((run_dir / "report.json").read_text())
    assert np.shape(report["network"]) == np.shape(report["table"]) == (1, 2)
    assert (run_dir / "obstacles.png").stat().st_size > 1000


@pytest.mark.slow
def test_throughput_reports_both_and_their_ratio():
    config = throughput.ThroughputConfig(num_envs=16, num_steps=4, loop_steps=50, rounds=1)
    report = throughput.measure(config)
    assert re.search(r"16 environments .* million steps/s; .* thousand; ratio \d+ \(", report)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("presets", "argv"),
    [
        (deep_sarsa.SARSA, ["--trace-decay", "0.1", "--num-obstacles", "4"]),
        (deep_sarsa.SARSA, ["--preset", "grid_hidden", "--network.kind", "lstm"]),
        (reinforce.REINFORCE, ["--preset", "cartpole_hidden", "--num-seeds", "3"]),
        (ppo.PPO, ["--preset", "lit", "--delay", "64", "--num-minibatches", "2"]),
        (tabular.TABULAR, ["--obstacles", "1", "2"]),
        (throughput.THROUGHPUT, ["--num-envs", "64"]),
    ],
)
def test_every_script_parses_its_options(presets, argv):
    config = command_line(presets, argv, description="")
    assert str(argv[-1]) in repr(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(SarsaConfig, gamma=1.5), r"gamma must be in \[0, 1\], got 1.5"),
        (partial(SarsaConfig, decay_updates=0), "decay_updates must be at least 1, got 0"),
        (partial(SarsaConfig, expected=True), "trace_decay must be 0 with expected, got 0.5"),
        (partial(ReinforceConfig, gamma=1.5), r"gamma must be in \[0, 1\], got 1.5"),
        (partial(ReinforceConfig, gamma=1.0), "gamma must be below 1, got 1.0"),
        (partial(ReinforceConfig, trace_decay=-0.1), r"trace_decay must be in \[0, 1\], got -0.1"),
        (partial(ReinforceConfig, entropy_weight=-1.0), "entropy_weight must be >= 0, got -1"),
        (partial(PPOConfig, gamma=1.0), "gamma must be below 1, got 1.0"),
        (partial(PPOConfig, clip_range=0.0), "clip_range must be above 0, got 0"),
        (
            partial(PPOConfig, seeds=SeedsConfig(num_envs=6)),
            "num_minibatches must divide num_envs = 6, got 4",
        ),
        (partial(NetworkConfig, gate_span=2), "gate_span must be 0 or above 2, got 2"),
        (partial(NetworkConfig, joint_sizes=(0,)), "joint_sizes must be at least 1, got"),
        (
            lambda: make_sarsa(SarsaConfig(partially_observed=True)),
            "object_size must be 0 or 3, the number of features per object .* got 4",
        ),
        (partial(SeedsConfig, num_seeds=0), "num_seeds must be at least 1, got 0"),
        (partial(SeedsConfig, solved_by="fun"), "solved_by must be 'success' or 'return'"),
        (partial(tabular.TabularConfig, obstacles=()), "obstacles must hold numbers >= 1"),
        (partial(throughput.ThroughputConfig, rounds=0), "rounds must be at least 1, got 0"),
        (
            partial(throughput.ThroughputConfig, network=NetworkConfig(kind="gru")),
            "network must be of kind 'fc' with object_size 0, .* got 'gru' with 0",
        ),
    ],
)
def test_a_wrong_config_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
