"""A run is resumed with other options, unless they change batches or arithmetic."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_demos

from train import deep_sarsa, ppo, reinforce
from train.configs import ImitateConfig
from train.deep_sarsa import SarsaConfig
from train.finetune import FinetuneConfig
from train.ppo import PPOConfig
from train.pretrain import PretrainConfig
from train.reinforce import ReinforceConfig
from train.scan import ScanConfig
from train.tabular import TabularConfig
from vla_jax import config as configs
from vla_jax import runs
from vla_jax.rl import learner, passes
from vla_jax.rl.actor import Rollout
from vla_jax.rl.network import NetworkConfig
from vla_jax.rl.passes import PassesConfig
from vla_jax.training import optim, resuming
from vla_jax.training.optim import OptimConfig
from vla_jax.training.update import init_train_state, make_update

CONFIGS = (
    ImitateConfig, PretrainConfig, ScanConfig, FinetuneConfig, SarsaConfig, ReinforceConfig,
    PPOConfig, TabularConfig,
)  # fmt: skip
FOLDER = pathlib.Path("run")
ONCE = PassesConfig()
BATCH = Rollout(*[np.zeros((4, 1))] * len(Rollout._fields))  # of four environments


@pytest.fixture
def config():
    return tiny_demos.imitation("demos", "run")


def change(config, path, value):
    """The config with another value at a dotted path."""
    name, _, rest = path.partition(".")
    value = change(getattr(config, name), rest, value) if rest else value
    return dataclasses.replace(config, **{name: value})


@pytest.mark.parametrize("script", CONFIGS)
def test_every_declared_field_exists(script):
    config = script()
    known = set(paths(config))
    assert set(resuming.may_change(config)) <= known
    assert set(getattr(script, "MAY_NOT_CHANGE", ())) <= known


def paths(config, prefix=""):
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        yield f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from paths(value, f"{prefix}{field.name}.")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("loader.num_workers", 2), ("loader.num_threads", 3), ("loader.prefetch", 5),
        ("loop.log_every", 7), ("loop.save_every", 1), ("loop.keep", 9), ("loop.mesh", "data=2"),
        ("loop.tensorboard", True), ("loop.skip_bad_updates", 3), ("dataset.path", "moved"),
        ("dataset.decoded_dir", "/tmp"), ("max_cache_gb", 1.0),
    ],
)  # fmt: skip
def test_what_changes_neither_batches_nor_arithmetic_may_change(config, path, value):
    assert resuming.check(config, change(config, path, value), FOLDER, num_updates=2) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", 1), ("loader.batch_size", 4), ("loader.seed", 1), ("stride", 2),
        ("optim.weight_decay", 0.5), ("optim.learning_rate", 1.0), ("loss.gripper", 0.5),
        ("agent.policy.decoder.hidden_size", 16), ("dataset.split", "train"),
    ],
)  # fmt: skip
def test_what_changes_batches_or_arithmetic_is_refused(config, path, value):
    with pytest.raises(ValueError, match=rf"run holds a run of another config: {path} was .* and"):
        resuming.check(config, change(config, path, value), FOLDER, num_updates=2)


@pytest.mark.parametrize("path", ["loop.log_every", "loop.mesh"])
def test_seeds_of_reinforcement_learning_are_evaluated_at_the_same_updates(path):
    config = SarsaConfig()
    changed = change(config, path, "data=1" if path == "loop.mesh" else 1)
    if path == "loop.mesh":
        assert resuming.check(config, changed, FOLDER, num_updates=50) == []
    else:  # they stop at an evaluation, which is done at every log
        with pytest.raises(ValueError, match=r"loop\.log_every was 50 and is 1"):
            resuming.check(config, changed, FOLDER, num_updates=50)


def test_a_longer_training_says_what_it_does_to_the_learning_rate(config):
    longer = change(config, "loop.num_updates", 8)
    (sentence,) = resuming.check(config, longer, FOLDER, num_updates=4)
    assert sentence == (
        "loop.num_updates was 4 and is 8: from update 5 on the training follows the new "
        "schedule, which starts with learning_rate 0.0055 instead of 0.001."
    )
    assert (
        resuming.check(longer, change(longer, "loop.num_updates", 6), FOLDER, num_updates=6) == []
    )
    with pytest.raises(
        ValueError, match="num_updates must be at least 6, which run has done, got 5"
    ):
        resuming.check(longer, change(longer, "loop.num_updates", 5), FOLDER, num_updates=6)


def test_a_longer_ppo_counts_optimiser_steps_and_says_what_else_changes():
    config = change(PPOConfig(annealing=True), "loop.num_updates", 200)
    (sentence,) = resuming.check(
        config, change(config, "loop.num_updates", 400), FOLDER, num_updates=100
    )
    assert sentence.endswith(
        "starts with learning_rate 0.00088 instead of 0.000573, clip_range 0.15 instead of 0.1, "
        "entropy_weight 0.0075 instead of 0.005."
    )
    short = change(config, "loop.num_updates", 40)  # of 640 optimiser steps, 100 of them warm-up
    assert resuming.check(short, change(short, "loop.num_updates", 80), FOLDER, num_updates=20)


def test_trainings_that_are_compared_are_not_made_longer():
    config = TabularConfig()
    with pytest.raises(ValueError, match=r"deep\.loop\.num_updates was 2000 and is 4000"):
        resuming.check(
            config, change(config, "deep.loop.num_updates", 4000), FOLDER, num_updates=50
        )


ALGORITHMS = {
    SarsaConfig: deep_sarsa.make_algorithm,
    ReinforceConfig: reinforce.make_algorithm,
    PPOConfig: ppo.make_algorithm,
}


@pytest.mark.sampled
@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("script", [script for script in CONFIGS if script is not TabularConfig])
def test_the_stated_learning_rate_is_that_of_the_next_optimiser_step(script, accumulation_steps):
    """With a constant gradient and no decay, each step of AdamW is as large as the rate."""
    settings = OptimConfig(
        learning_rate=0.1, warmup_steps=2, weight_decay=0, accumulation_steps=accumulation_steps
    )
    config = dataclasses.replace(script(), optim=settings)
    config = change(config, "loop.num_updates", 4)
    init, update = training(config)
    state, steps = init(jax.random.key(0)), passes.num_steps(getattr(config, "passes", ONCE))
    before, stated = jax.tree.leaves(state.params)[0], []
    for done in range(4):
        state, _ = jax.jit(update)(state, BATCH, jax.random.key(1))
        moments = done + np.arange(steps) / steps
        stated += [resuming.scheduled(config, each)["learning_rate"] for each in moments]
        if done % 2:  # the gradients of two updates are in the params
            moved = np.asarray(before - jax.tree.leaves(state.params)[0])
            np.testing.assert_allclose(moved, sum(stated) / accumulation_steps, rtol=1e-4)


def training(config):
    """`init` and `update` of a script's training, with the sum of the params as loss."""

    def loss(params, batch, key):
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params)), {}

    if type(config) in ALGORITHMS:
        algorithm = ALGORITHMS[type(config)](config)
        algorithm = algorithm._replace(
            network=NetworkConfig(), loss_fn=loss, prepare=lambda params, rollout: rollout
        )
        return learner.make_training(algorithm, (3,), 2, config.optim, config.loop.num_updates)
    params = {"kernel": np.zeros(2, np.float32)}
    optimizer = optim.make_optimizer(config.optim, config.loop.num_updates, params)
    return lambda key: init_train_state(params, optimizer), make_update(loss, optimizer)


def test_a_lower_learning_rate_is_said(config):
    slower = change(config, "optim.learning_rate", 1e-3)
    (sentence,) = resuming.check(config, slower, FOLDER, num_updates=2)
    assert "optim.learning_rate was 0.01 and is 0.001" in sentence


def test_a_resumed_run_has_the_present_config(tmp_path, config):
    config = dataclasses.replace(config, run_dir=str(tmp_path))
    folder = runs.open_run(tmp_path, config, overwrite=False)
    (folder / "checkpoints" / "2").mkdir(parents=True)
    (folder / "agent.json.host.1.part").touch()
    longer = change(config, "loop.num_updates", 8)
    with pytest.warns(UserWarning, match="was 4 and is 8"):
        runs.open_run(tmp_path, longer, overwrite=False)
    assert configs.load(ImitateConfig, folder / "config.json") == longer
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "config.json"]
