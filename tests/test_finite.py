"""A training stops before a state that is not finite is saved, and names what went bad first."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vla_jax.rl import learning_loop
from vla_jax.rl.learner import SeedsConfig
from vla_jax.training import checkpoint, finite, loop, optim
from vla_jax.training.logs import read_metrics
from vla_jax.training.loop import LoopConfig
from vla_jax.training.optim import OptimConfig
from vla_jax.training.update import init_train_state, make_update

OPTIM = OptimConfig(learning_rate=0.1, warmup_steps=0, ema_decay=0.5)
LOOP = LoopConfig(num_updates=6, log_every=2, save_every=2, keep=9, mesh="data=1")
NAN = float("nan")


class Batches:
    """One number per update; the loss is multiplied by it."""

    def __init__(self, values):
        self._values, self.position = values, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.position += 1
        return np.full(1, self._values[self.position - 1], np.float32)

    def metrics(self):
        return {}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]

    def close(self):
        pass


def loss_fn(params, batch, key):
    del key
    arm, gripper = jnp.sum(params["a"] ** 2), jnp.sum(params["b"] ** 2) * batch[0]
    return arm + gripper, {"loss_arm": arm, "loss_gripper": gripper}


def init(key):
    params = {"a": jax.random.normal(key, (3,)), "b": jnp.ones(2)}
    optimizer = optim.make_optimizer(OPTIM, LOOP.num_updates, params)
    return init_train_state(params, optimizer, ema=True)


def fit(run_dir, values, config=LOOP, *, loss=loss_fn):
    shapes = jax.eval_shape(init, jax.random.key(0))
    optimizer = optim.make_optimizer(OPTIM, config.num_updates, shapes.params)
    return loop.fit(
        config,
        pathlib.Path(run_dir),
        make_update(loss, optimizer, ema_decay=0.5, skip_bad=config.skip_bad_updates > 0),
        loop.random_start(init, jax.random.key(0)),
        Batches(values),
        jax.random.key(1),
        schedule=optim.make_schedule(OPTIM, config.num_updates),
        metadata={},
        name="test",
    )


@pytest.mark.parametrize("log_every", [1, 6])
def test_the_first_bad_term_and_its_update_are_named_and_the_good_checkpoint_stays(
    tmp_path, log_every
):
    config = dataclasses.replace(LOOP, log_every=log_every)
    with pytest.raises(ValueError, match="loss_gripper") as caught:
        fit(tmp_path, [1, 1, 1, NAN, 1, NAN], config)
    assert str(caught.value) == (
        "loss_gripper must be finite, got nan at update 4; the last checkpoint, at update 2, is "
        "kept: run the command again with a lower --learning-rate, or add --skip-bad-updates 10."
    )
    assert checkpoint.latest_step(tmp_path / "checkpoints") == 2
    assert all(line["step"] < 4 for line in read_metrics(tmp_path / "metrics.jsonl"))


def test_params_that_overflow_are_not_saved(tmp_path, monkeypatch):
    big = optax.scale(float("inf"))
    monkeypatch.setattr(optim, "make_optimizer", lambda *_: big)
    with pytest.raises(ValueError, match="params/a must be finite, got NaN or infinity after upd"):
        fit(tmp_path, [1] * 6, dataclasses.replace(LOOP, save_every=1))
    assert checkpoint.latest_step(tmp_path / "checkpoints") is None


def test_skipped_updates_equal_optax_apply_if_finite_and_are_counted(tmp_path):
    config = dataclasses.replace(LOOP, skip_bad_updates=2, log_every=1)
    values = [1, NAN, NAN, 1, NAN, 1]
    state = fit(tmp_path, values, config)

    first = init(jax.random.key(0))
    optimizer = optim.make_optimizer(OPTIM, config.num_updates, first.params)
    optimizer = optax.apply_if_finite(optimizer, max_consecutive_errors=2)
    params, opt_state = first.params, optimizer.init(first.params)
    for value in values:
        grads = jax.grad(lambda p, v=value: loss_fn(p, np.float32([v]), None)[0])(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.params, params)
    assert int(opt_state.total_notfinite) == 3
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["skipped_updates"] for line in lines] == [0, 1, 2, 2, 3, 3]
    assert "loss" not in lines[1]
    assert "loss" in lines[3]


def test_more_bad_updates_in_a_row_than_allowed_stop_the_training(tmp_path):
    config = dataclasses.replace(LOOP, skip_bad_updates=2)
    with pytest.raises(
        ValueError, match=r"at update 5, after 2 such updates in a row; .* a higher"
    ):
        fit(tmp_path, [1, 1, NAN, NAN, NAN, 1], config)
    assert checkpoint.latest_step(tmp_path / "checkpoints") == 4


def test_the_counts_of_skipped_updates_survive_a_resume(tmp_path):
    config = dataclasses.replace(LOOP, skip_bad_updates=2)
    values = [1, 1, NAN, NAN, 1, 1]
    whole = fit(tmp_path / "whole", values, config)
    with pytest.raises(ValueError, match="got nan at update 5, after 2 such updates in a row"):
        fit(tmp_path / "cut", [*values[:4], NAN, 1], config)
    resumed = fit(tmp_path / "cut", values, config)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    lines = [read_metrics(tmp_path / name / "metrics.jsonl")[-1] for name in ("whole", "cut")]
    assert [line["skipped_updates"] for line in lines] == [2, 2]


def test_the_message_says_how_to_go_on_and_that_works(tmp_path):
    values = [1, 1, 1, NAN, 1, 1]
    with pytest.raises(ValueError, match="add --skip-bad-updates 10"):
        fit(tmp_path, values)
    state = fit(tmp_path, values, dataclasses.replace(LOOP, skip_bad_updates=10))
    assert int(state.num_updates) == 6
    assert finite.first_bad_leaf(state) is None


def test_no_update_waits_for_the_device_before_the_next_log(monkeypatch):
    reads = []
    monkeypatch.setattr(jax, "device_get", lambda tree: reads.append(len(tree)) or tree)
    watch = finite.Watch(0, finite.NONE_SKIPPED)
    for step in range(finite.PENDING):
        assert not watch.is_full
        watch.add(step, {"loss": 1.0, "grad_norm": 1.0})
        assert reads == []
    assert watch.is_full
    watch.read()
    assert reads == [finite.PENDING]
    assert not watch.is_full


def test_the_first_bad_update_of_any_seed_is_found():
    watch = finite.SeedsWatch(0, 2)
    loss = np.ones((2, 4))
    loss[1, 1] = loss[0, 2] = np.inf
    bad, _ = watch.read(8, {"loss_a": loss, "loss": loss, "grad_norm": np.ones((2, 4))})
    assert bad == finite.Bad(10, "loss_a", np.inf, 1)


def test_bad_updates_of_a_seed_are_skipped_and_left_out_of_the_means():
    watch = finite.SeedsWatch(1, 2)
    loss = np.array([[1.0, NAN, 3.0], [2.0, 2.0, NAN]])
    bad, means = watch.read(0, {"loss": loss, "reward": np.ones((2, 3))})
    assert bad is None
    assert means["loss"].tolist() == [2.0, 2.0]
    assert watch.total.tolist() == [1, 1]
    again = finite.SeedsWatch(1, 2)
    again.set_state(json.loads(json.dumps(watch.get_state())))
    bad, _ = again.read(3, {"loss": np.array([[NAN], [NAN]]), "reward": np.ones((2, 1))})
    assert bad == finite.Bad(4, "loss", bad.value, 1)  # the second in a row of that seed


@pytest.mark.filterwarnings("error")
def test_a_seed_without_a_finite_update_is_left_out_of_the_mean_over_the_seeds():
    watch, config = finite.SeedsWatch(5, 2), SeedsConfig(num_seeds=2)
    _, means = watch.read(
        0, {"loss": np.array([[NAN, NAN], [1.0, 2.0]]), "grad_norm": np.ones((2, 2))}
    )
    evaluated = {"return": np.ones(2), "success": np.ones(2), "success_lift": np.full(2, NAN)}
    scalars = learning_loop._scalars({**means, **evaluated}, config, 2)
    assert scalars["loss"] == 1.5
    assert scalars["grad_norm"] == 1.0
    assert "success_lift" not in scalars
