"""Fine-tuning from reward: it learns, resumes to the bit, and writes a run whose policy acts."""

import dataclasses
import json
import shutil
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from train.finetune import FinetuneConfig, finetune, make_finetune, make_loss, read_cloned
from vla_jax import config as configs
from vla_jax.evaluate import EvaluateConfig, evaluate
from vla_jax.nn.layers import init_mlp
from vla_jax.rl import learning_record
from vla_jax.rl.episodes import EpisodeRollout
from vla_jax.rl.gaussian import NoiseConfig, NoisyAction
from vla_jax.rl.learner import SeedsConfig
from vla_jax.runs import load_run
from vla_jax.training.loop import LoopConfig
from vla_jax.training.optim import OptimConfig
from vla_jax.types import Observation

SEEDS = SeedsConfig(
    num_seeds=2, num_envs=8, num_steps=4, eval_episodes=12, report_episodes=12, solved_at=2.0
)


def config_of(folder, run_dir, **changes):
    return FinetuneConfig(
        init_from=str(folder),
        run_dir=str(run_dir),
        noise=NoiseConfig(0.5, 1.0),
        seeds=SEEDS,
        optim=OptimConfig(
            learning_rate=0.01, warmup_steps=0, ema_decay=0.5, freeze=("backbone/*",)
        ),
        loop=LoopConfig(num_updates=4, log_every=2, save_every=2, mesh="data=1"),
        num_episodes=12,
        **changes,
    )


@pytest.fixture(scope="module")
def cloned(tmp_path_factory):
    """Folder of the tiny run."""
    return tiny_run.write(tmp_path_factory.mktemp("cloned"))


@pytest.fixture(scope="module")
def tuned(cloned, tmp_path_factory):
    """Folder of a fine-tuned copy of the tiny run."""
    return finetune(config_of(cloned, tmp_path_factory.mktemp("tuned") / "run"))


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.slow
def test_the_result_is_a_run_folder_whose_policy_acts(cloned, tuned):
    before, after = load_run(cloned), load_run(tuned)
    assert (after.agent, after.world, after.step) == (before.agent, before.world, 10 + 4)
    assert_same(after.norm_stats, before.norm_stats)
    assert_same(after.params["backbone"], before.params["backbone"])
    moved = [
        np.abs(ours - theirs).max()
        for ours, theirs in zip(
            jax.tree.leaves(after.params["decoder"]),
            jax.tree.leaves(before.params["decoder"]),
            strict=True,
        )
    ]
    assert min(moved) > 0  # every part of the decoder changes
    summary = evaluate(tuned, EvaluateConfig(num_episodes=6, num_videos=0))
    assert summary.total.episodes == 6
    assert (tuned / "curve.png").stat().st_size > 1000


@pytest.mark.slow
def test_both_policies_are_compared_on_the_same_layouts(tuned):
    report = json.loads((tuned / "report.json").read_text())
    tasks = [
        {name: rate["episodes"] for name, rate in report[policy]["tasks"].items()}
        for policy in ("cloned", "finetuned")
    ]
    assert tasks[0] == tasks[1]
    assert sum(tasks[0].values()) == 12
    assert report["env_steps"] == 2 * 4 * 8 * 4  # seeds, updates, environments, steps


@pytest.mark.slow
def test_a_resumed_training_equals_an_uninterrupted_one_to_the_bit(cloned, tuned, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tuned, copy)
    shutil.rmtree(copy / "checkpoints")
    shutil.rmtree(copy / "learning" / "checkpoints" / "4")
    finetune(config_of(cloned, copy))
    assert_same(load_run(copy).params, load_run(tuned).params)


@pytest.mark.slow
def test_a_run_that_has_been_trained_again_is_refused_as_the_origin(cloned, tuned, tmp_path):
    origin, run_dir = tmp_path / "origin", tmp_path / "run"
    shutil.copytree(cloned, origin)
    shutil.copytree(tuned, run_dir)
    config = config_of(cloned, run_dir)
    learning = run_dir / "learning"
    initial = load_run(origin)
    learning_record.check(run_dir, learning, config, initial)  # another place, the same params
    for other in (initial._replace(step=20), initial._replace(params=tiny_run.params(1))):
        with pytest.raises(ValueError, match=r"origin must hold the policy with which .*run was"):
            learning_record.check(run_dir, learning, config, other)
    again = dataclasses.replace(config, overwrite=True)
    learning_record.check(run_dir, learning, again, initial._replace(step=20))


def rewarding(env, extra):
    """Episodes of one step, with a reward for moving the arm to +x and opening the gripper."""

    def step(state, action):
        state, transition = env.step(state, action)
        reward = jnp.asarray((action[0] > 0.1) & (action[6] > 0), jnp.float32)
        return state, transition._replace(reward=reward + extra, terminated=jnp.ones((), bool))

    return env._replace(step=step)


@pytest.fixture(scope="module")
def rewards(cloned):
    """Function from an offset of the reward to the mean rewards of 40 updates."""
    config = config_of(cloned, "")
    config = dataclasses.replace(config, seeds=dataclasses.replace(SEEDS, num_envs=64))
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, num_updates=40))
    policy = read_cloned(str(cloned))
    keys = jax.random.split(jax.random.key(1), 40)

    @jax.jit
    def learn(extra):
        learner = make_finetune(config, policy._replace(env=rewarding(policy.env, extra)))

        def update(state, key):
            state, metrics = learner.update(state, key)
            return state, metrics["reward"]

        return jax.lax.scan(update, learner.init(jax.random.key(0)), keys)[1]

    return learn


@pytest.mark.slow
def test_a_policy_learns_rewarded_actions(rewards):
    mean_rewards = rewards(0.0)
    assert np.mean(mean_rewards[:3]) < 0.5
    assert np.mean(mean_rewards[-3:]) > 0.8


@pytest.mark.slow
def test_a_reward_of_nan_reaches_the_metrics(rewards):
    assert np.isnan(rewards(jnp.nan)[0])  # `learn` then stops: tests/test_learning_loop.py


def drawn_rollout():
    """Three episodes of four real steps."""
    rng = np.random.default_rng(0)
    observation = Observation(
        proprio=rng.normal(size=(3, 4, 8)).astype(np.float32),
        environment_state=rng.normal(size=(3, 4, 22)).astype(np.float32),
        instruction=rng.integers(0, 256, (3, 4, 12)),
    )
    action = NoisyAction(rng.normal(size=(3, 4, 6)).astype(np.float32), np.ones((3, 4), bool))
    reward, mask = np.ones((3, 4), np.float32), np.ones((3, 4), bool)
    return EpisodeRollout(observation, action, reward, mask)


def test_steps_after_the_end_may_be_nan_or_infinite(cloned):
    policy = read_cloned(str(cloned))
    loss_fn = make_loss(config_of(cloned, ""), policy.run)
    params = {**policy.run.params, "value": init_mlp(jax.random.key(0), (8, 128, 1))}
    params["decoder"] = jax.tree.map(lambda leaf: leaf + 0.1, params["decoder"])
    mask = np.arange(4) < np.array([[4], [2], [1]])

    def fill(part, value):
        part_mask = mask.reshape(*mask.shape, *[1] * (part.ndim - 2))
        return np.where(part_mask, part, value) if part.dtype == np.float32 else part

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def losses(params, rollout):
        return loss_fn(params, rollout, jax.random.key(0))

    zeros, *others = (
        losses(
            params, jax.tree.map(partial(fill, value=value), drawn_rollout())._replace(mask=mask)
        )
        for value in (0.0, np.nan, np.inf)
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(zeros))
    for other in others:
        assert_same(other, zeros)


@pytest.mark.slow
def test_the_divergence_is_zero_before_the_first_update(cloned):
    config, policy = config_of(cloned, ""), read_cloned(str(cloned))
    loss_fn, rollout = make_loss(config, policy.run), drawn_rollout()

    @jax.jit
    @jax.value_and_grad
    def divergence(params):
        return loss_fn(params, rollout, jax.random.key(0))[1]["loss_kl"]

    params = {**policy.run.params, "value": init_mlp(jax.random.key(0), (8, 128, 1))}
    value, grads = divergence(params)
    assert abs(float(value)) < 1e-6
    jax.tree.map(lambda grad: np.testing.assert_allclose(grad, 0.0, atol=1e-6), grads)
    params["decoder"] = jax.tree.map(lambda leaf: leaf + 0.1, params["decoder"])
    assert float(divergence(params)[0]) > 0.01


def changed(cloned, tmp_path, name, data):
    """A copy of a run with one file replaced."""
    copy = tmp_path / "copy"
    shutil.copytree(cloned, copy)
    (copy / name).write_text(json.dumps(data))
    return copy


def test_a_run_that_cannot_be_fine_tuned_is_refused(cloned, tmp_path):
    with pytest.raises(ValueError, match="init_from must name a run folder"):
        finetune(config_of("", tmp_path / "run"))
    with pytest.raises(FileNotFoundError, match=r"run folder .*nowhere is missing; train first"):
        finetune(config_of(tmp_path / "nowhere", tmp_path / "run"))
    other = changed(cloned, tmp_path, "world.json", {"kind": "table_mujoco"})
    with pytest.raises(ValueError, match=r"init_from must be .*table_jax.* 'table_mujoco' in"):
        finetune(config_of(other, tmp_path / "run"))
    with pytest.raises(ValueError, match="run_dir must be another folder than init_from"):
        finetune(config_of(cloned, cloned, overwrite=True))
    long = dataclasses.replace(SEEDS, num_steps=5)
    with pytest.raises(ValueError, match=r"num_steps must be at most .*window_size = 4"):
        finetune(dataclasses.replace(config_of(cloned, tmp_path / "run"), seeds=long))
    assert not (tmp_path / "run").exists()
    assert load_run(cloned).agent == configs.load(type(tiny_run.AGENT), cloned / "agent.json")


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("gamma", 1.5, "gamma and trace_decay must be in"),
        ("kl_weight", -1.0, "kl_weight must be at least 0, got -1.0"),
        ("num_episodes", 0, "num_episodes must be at least 1, got 0"),
    ],
)
def test_a_wrong_config_raises_one_sentence(field, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        FinetuneConfig(**{field: value})


@pytest.mark.slow
def test_reinforce_fine_tunes_with_init_from(tmp_path):
    words = ["-m", "train.reinforce", "--init-from", str(tmp_path / "nowhere"), "--arm-std", "0.2"]
    ended = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: run folder")
