"""From cloning to reward: it learns, resumes to the bit, and leaves a run that acts."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from train.finetune import FinetuneConfig, finetune, make_finetune, make_loss, read_cloned
from train.learner import SeedsConfig
from train.loop import LoopConfig
from vla_jax import config as configs
from vla_jax.envs import table_jax
from vla_jax.evaluate import EvaluateConfig, evaluate
from vla_jax.optim import OptimConfig
from vla_jax.rl.gaussian import NoiseConfig
from vla_jax.runs import load_run

SEEDS = SeedsConfig(
    num_seeds=2, num_worlds=8, num_steps=4, eval_episodes=12, report_episodes=12, solved_at=2.0
)


def config_of(folder, run_dir, **changes):
    return FinetuneConfig(
        init_from=str(folder),
        run_dir=str(run_dir),
        noise=NoiseConfig(0.5),
        seeds=SEEDS,
        optim=OptimConfig(
            learning_rate=0.01, warmup_steps=0, ema_decay=0.5, freeze=("backbone/*",)
        ),
        loop=LoopConfig(num_updates=4, log_every=2, save_every=2, num_devices=1),
        num_episodes=12,
        **changes,
    )


@pytest.fixture(scope="module")
def cloned(tmp_path_factory):
    """Folder of the tiny run."""
    return tiny_run.write(tmp_path_factory.mktemp("cloned"))


@pytest.fixture(scope="module")
def tuned(cloned, tmp_path_factory):
    """Folder of a run that went on from it."""
    return finetune(config_of(cloned, tmp_path_factory.mktemp("tuned") / "run"))


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_what_it_leaves_is_a_run_that_acts(cloned, tuned):
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
    assert min(moved) > 0  # every part of the decoder learns
    summary = evaluate(tuned, EvaluateConfig(num_episodes=6, num_films=0))
    assert summary.total.episodes == 6
    assert (tuned / "curve.png").stat().st_size > 1000


def test_both_policies_are_held_against_each_other_on_the_same_layouts(tuned):
    report = json.loads((tuned / "report.json").read_text())
    tasks = [
        {name: rate["episodes"] for name, rate in report[policy]["tasks"].items()}
        for policy in ("cloned", "finetuned")
    ]
    assert tasks[0] == tasks[1]
    assert sum(tasks[0].values()) == 12
    assert report["env_steps"] == 2 * 4 * 8 * 4  # seeds, updates, worlds, steps


def test_resumed_is_uninterrupted_to_the_bit(cloned, tuned, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tuned, copy)
    shutil.rmtree(copy / "checkpoints")
    shutil.rmtree(copy / "learning" / "checkpoints" / "4")
    finetune(config_of(cloned, copy))
    assert_same(load_run(copy).params, load_run(tuned).params)


def rewarding(env):
    """The world ends at once, with a reward for a hand that goes to the right, and open."""

    def step(state, action):
        state, transition = env.step(state, action)
        reward = jnp.asarray((action[0] > 0.1) & (action[6] > 0), jnp.float32)
        ends = jnp.ones((), bool)
        return state, transition._replace(reward=reward, success=reward > 0, terminated=ends)

    return env._replace(step=step)


def learn_a_while(config, policy, num_updates):
    """The state after some updates, and the mean reward of each."""
    learner = make_finetune(config, policy)

    def update(state, key):
        state, metrics = learner.update(state, key)
        return state, metrics["reward"]

    keys = jax.random.split(jax.random.key(1), num_updates)
    start = learner.init(jax.random.key(0))
    return jax.jit(lambda state: jax.lax.scan(update, state, keys))(start)


def test_a_policy_learns_what_is_rewarded(cloned):
    config = config_of(cloned, "")
    config = dataclasses.replace(
        config,
        seeds=dataclasses.replace(SEEDS, num_worlds=64),
        loop=dataclasses.replace(config.loop, num_updates=40),
    )
    policy = read_cloned(str(cloned))
    _, reward = learn_a_while(config, policy._replace(env=rewarding(policy.env)), 40)
    assert np.mean(reward[:3]) < 0.5
    assert np.mean(reward[-3:]) > 0.8


def test_at_the_start_the_cloned_policy_is_no_pull(cloned):
    policy = read_cloned(str(cloned))
    learner = make_finetune(config_of(cloned, ""), policy)
    params = learner.init(jax.random.key(0)).train_state.params
    tries, found = tries_of(cloned, policy, params), {}
    for weight in (0.0, 1000.0):
        loss_fn = make_loss(config_of(cloned, "", kl_weight=weight), policy.run)
        grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
        (_, metrics), found[weight] = grad(params, tries, jax.random.key(0))
        assert abs(float(metrics["loss_kl"])) < 1e-9
    close = np.testing.assert_allclose
    jax.tree.map(lambda a, b: close(a, b, atol=1e-5), found[0.0], found[1000.0])


def tries_of(cloned, policy, params):
    from train.finetune import _try

    key, worlds = jax.random.key(3), jnp.arange(8)
    return jax.jit(lambda p: _try(config_of(cloned, ""), policy, p, key, worlds))(params)


def test_a_reward_that_is_no_number_is_told(cloned, tmp_path, monkeypatch):
    env = table_jax.make(tiny_run.WORLD)

    def step(state, action):
        state, transition = env.step(state, action)
        return state, transition._replace(reward=jnp.nan)

    monkeypatch.setattr(table_jax, "make", lambda config: env._replace(step=step))
    with pytest.raises(ValueError, match="reward must be finite, got nan in seed 0"):
        finetune(config_of(cloned, tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def changed(cloned, tmp_path, name, data):
    """A copy of a run of which one file holds something else."""
    copy = tmp_path / "copy"
    shutil.copytree(cloned, copy)
    (copy / name).write_text(json.dumps(data))
    return copy


def test_what_cannot_go_on_learning_is_told(cloned, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run folder .*nowhere is missing; train first"):
        finetune(config_of(tmp_path / "nowhere", tmp_path / "run"))
    other = changed(cloned, tmp_path, "world.json", {"kind": "table_mujoco"})
    with pytest.raises(ValueError, match=r"init_from must be .*'table_jax'.* 'table_mujoco' in"):
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
        ("kl_weight", -1.0, "kl_weight must be >= 0, got -1.0"),
        ("num_episodes", 0, "num_episodes must be at least 1, got 0"),
    ],
)
def test_a_wrong_config_is_one_sentence(field, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        FinetuneConfig(**{field: value})


def test_the_door_is_that_of_reinforce(tmp_path):
    words = ["-m", "train.reinforce", "--init-from", str(tmp_path / "nowhere"), "--arm-std", "0.2"]
    ended = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: run folder")
