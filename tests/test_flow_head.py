"""The flow-matching head against NumPy, distributions that it must learn, and its streaming."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from tests.campaigns import two_ways
from tests.finite_differences import assert_slopes
from vla_jax.acting.agent import AgentConfig, with_noise
from vla_jax.policies import decoders, flow_head, policy, trunks
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.policies.head import TeacherForcing
from vla_jax.training import losses
from vla_jax.types import FlowChunk

B, T, W, N, D, H, K, A = 3, 11, 4, 2, 3, 6, 2, 4
STARTS = np.array([[t == 0 for t in range(T)], [t in (0, 5) for t in range(T)], [True] * T])


def configured(kind="lstm", **fields):
    options = {"head": "flow", "head_sizes": (8,), **fields}
    return DecoderConfig(
        kind=kind, token_dim=D, num_tokens=N, window_size=W, hidden_size=H, num_layers=1,
        num_heads=2, action_horizon=K, action_dim=A, **options,
    )  # fmt: skip


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def velocity_in_numpy(params, features, chunk, time):
    """Returns the velocity `[K, A]` of one chunk, in float64."""
    period = 4e-3 * (4.0 / 4e-3) ** (np.arange(16) / 15)
    angle = 2 * np.pi * time / period
    x = np.concatenate([features, chunk.reshape(-1), np.sin(angle), np.cos(angle)])
    for layer in range(len(params["velocity"])):
        weights = params["velocity"][f"layers_{layer}"]
        x = np.maximum(x, 0) if layer else x
        x = x @ np.asarray(weights["kernel"], np.float64) + np.asarray(weights["bias"], np.float64)
    return x.reshape(chunk.shape)


@pytest.mark.parametrize("flow_steps", [1, 3])
def test_actions_are_those_of_euler_steps_in_numpy(flow_steps, key):
    config = configured(flow_steps=flow_steps)
    params = flow_head.init(key, config)
    features, noise = draw(0, B, H), draw(1, B, K, A)
    chunk = flow_head.denoise(params, config, features, noise)
    for row in range(B):
        x = noise[row].astype(np.float64)
        for step in range(flow_steps):
            time = step / flow_steps
            x = x + velocity_in_numpy(params, features[row], x, time) / flow_steps
        np.testing.assert_allclose(chunk.arm[row], np.clip(x[:, :-1], -1, 1), atol=2e-5)
        open_ = (1 + np.clip(x[:, -1], -0.999, 0.999)) / 2
        np.testing.assert_allclose(
            chunk.gripper_logit[row], np.log(open_ / (1 - open_)), rtol=1e-3, atol=1e-4
        )


def loss_in_numpy(action, noise, time, mask, params, features):
    """Returns the mean squared error of the velocities of real actions, in float64."""
    total, count = 0.0, 0
    for row in range(B):
        given = np.where(mask[row][:, None], action[row], 0.0)
        x = time[row] * given + (1 - time[row]) * noise[row]
        velocity = velocity_in_numpy(params, features[row], x, time[row])
        errors = (velocity - (given - noise[row]))[mask[row]] ** 2
        total, count = total + errors.sum(), count + errors.size
    return total / count


def test_the_loss_is_that_of_a_loop_in_numpy_over_the_real_actions(key):
    config = configured()
    params = flow_head.init(key, config)
    features, action, noise = draw(0, B, H), np.tanh(draw(1, B, K, A)), draw(2, B, K, A)
    time, mask = np.array([0.0, 0.3, 0.9], np.float32), np.array([[True, False]] * B)
    action[~mask] = np.nan
    prediction = flow_head.predict_velocity(
        params, config, features, TeacherForcing(action, mask), noise, time
    )
    loss, metrics = losses.action_loss(prediction, action, mask)
    expected = loss_in_numpy(action, noise, time, mask, params, features)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert set(metrics) == {"loss_flow", "acc_gripper", "arm_l1"}


def test_the_gradient_of_the_loss_equals_float64_finite_differences(key):
    config = configured()
    point = (flow_head.init(key, config), draw(0, B, H))
    action, noise = np.tanh(draw(1, B, K, A)), draw(2, B, K, A)
    time, mask = np.array([0.0, 0.3, 0.9], np.float32), np.array([[True, False]] * B)

    def loss(params, features):
        targets = TeacherForcing(action, mask)
        prediction = flow_head.predict_velocity(params, config, features, targets, noise, time)
        return losses.action_loss(prediction, action, mask)[0]

    in_numpy = partial(loss_in_numpy, action, noise, time, mask)
    # float32 angles of up to 1,400 radians are wrong by 1e-4
    assert_slopes(jax.grad(loss, (0, 1))(*point), in_numpy, point, tolerance=1e-4)


def test_the_estimate_of_the_true_velocity_is_the_action():
    action, noise = np.tanh(draw(0, B, K, A)), draw(1, B, K, A)
    exact = FlowChunk(action - noise, noise, action)
    loss, metrics = losses.action_loss(exact, action, np.ones((B, K), bool))
    assert loss < 1e-12
    assert metrics["arm_l1"] < 1e-6
    assert metrics["acc_gripper"] == 1


def test_a_batch_without_real_actions_has_a_loss_of_0_and_a_finite_gradient(key):
    config = configured()
    params = flow_head.init(key, config)
    action, mask = np.full((B, T, K, A), np.nan, np.float32), np.zeros((B, T, K), bool)

    def loss(params):
        targets = TeacherForcing(action, mask)
        chunk = flow_head.apply(params, config, draw(0, B, T, H), targets=targets, key=key)
        return losses.action_loss(chunk, action, mask)

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    assert value == 0
    assert all(np.isfinite(metric) for metric in metrics.values())
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient))


def test_training_times_have_the_distribution_of_pi0(key):
    """P(τ < t) = 1 − (1 − t / 0.999)^1.5."""
    config = configured()
    params = flow_head.init(key, config)
    shape = (200, 50)
    targets = TeacherForcing(jnp.ones((*shape, K, A)), jnp.ones((*shape, K), bool))
    features = jnp.zeros((*shape, H))
    chunk = flow_head.apply(params, config, features, targets=targets, key=key)
    assert isinstance(chunk, FlowChunk)
    # estimate = τ a + (1 − τ) ε + (1 − τ) v, with a = 1
    time = 1 - (chunk.estimate - 1) / (chunk.velocity + chunk.noise - 1)
    time = np.asarray(time[..., 0, 0]).reshape(-1)
    for part in (0.1, 0.4, 0.8):
        expected = 1 - (1 - part / 0.999) ** 1.5
        np.testing.assert_allclose((time < part).mean(), expected, atol=0.02)


def test_bfloat16_products_give_float32_predictions(key):
    """Compared before the gripper's logit, which is steep near ±1."""
    config = configured()
    params, features = flow_head.init(key, config), draw(0, B, H)
    targets = TeacherForcing(np.tanh(draw(1, B, K, A)), np.ones((B, K), bool))
    half, full = (
        flow_head.predict_velocity(
            params,
            dataclasses.replace(config, dtype=dtype),
            features,
            targets,
            draw(2, B, K, A),
            np.array([0.1, 0.5, 0.9], np.float32),
        ).velocity
        for dtype in ("bfloat16", "float32")
    )
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, full, atol=0.05)
    assert not np.array_equal(half, full)


def test_targets_need_a_key_and_options_have_ranges(key):
    config = configured()
    params, features = flow_head.init(key, config), draw(0, B, T, H)
    targets = TeacherForcing(np.zeros((B, T, K, A)), np.ones((B, T, K), bool))
    with pytest.raises(ValueError, match="key must be given with targets for head 'flow'"):
        flow_head.apply(params, config, features, targets=targets)
    for wrong in ({"flow_steps": 0}, {"noise_seed": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            configured(**wrong)


def test_euler_with_the_exact_field_reaches_a_gaussian(monkeypatch):
    """The marginal velocity of N(0, 1) → N(m, s²) is known; its Euler steps converge to N(m, s²).

    x(τ) ~ N(τ m, σ²), σ² = τ² s² + (1 − τ)²,  v = m + (τ s² − (1 − τ)) (x − τ m) / σ²
    """
    m, s = 0.4, 0.15

    def exact(params, config, features, chunk, time):
        t = time[..., None, None]
        slope = (t * s**2 - (1 - t)) / (t**2 * s**2 + (1 - t) ** 2)
        return m + slope * (chunk - t * m)

    monkeypatch.setattr(flow_head, "_velocity", exact)
    config = configured(flow_steps=200)
    noise = draw(0, 20_000, K, A)
    arm = np.asarray(flow_head.denoise({}, config, draw(1, 20_000, H), noise).arm)
    np.testing.assert_allclose(arm.mean(axis=0), m, atol=0.01)
    np.testing.assert_allclose(arm.std(axis=0), s, atol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_of_two_good_ways_the_mean_is_neither_and_a_sample_is_one(seed):
    config, params = two_ways.train("continuous", seed)
    mean = two_ways.act(config, params)
    assert not two_ways.is_one_way(mean).any()
    assert np.abs(mean.arm).max() < 0.2
    # of the arm; its numbers are chosen one by one
    assert two_ways.is_one_way(two_ways.act(*two_ways.train("discrete", seed))).all()
    config, params = two_ways.train("flow", seed)
    sample = two_ways.act(dataclasses.replace(config, flow_steps=10), params)
    assert two_ways.succeeds(sample).mean() > 0.9
    assert 0.4 < (np.asarray(sample.arm) > 0).mean() < 0.6  # each way as often as shown


CASES = [
    (kind, mode)
    for kind in trunks.names()
    for mode in ("refresh", "periodic", "persistent")
    if mode in trunks.get(kind).modes
]


@pytest.mark.sampled
@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_streamed_equals_windowed_under_the_same_noise(kind, mode, key):
    config, tokens = configured(kind), draw(0, B, T, N, D)
    params = decoders.init(key, config)
    step = jax.jit(decoders.step, static_argnums=1)
    state = decoders.init_stream(params, config, B, mode=mode)
    age = np.zeros(B, int)
    for t in range(T):
        state, chunk = step(params, config, state, tokens[:, t], reset=STARTS[:, t])
        age = np.where(STARTS[:, t], 0, age + 1)
        seen = {"refresh": np.minimum(age, W - 1), "periodic": age % W, "persistent": age}[mode]
        window = np.zeros((B, T, N, D), np.float32)
        mask = np.arange(T) >= T - 1 - seen[:, None]
        for row in range(B):
            window[row, T - 1 - seen[row] :] = tokens[row, t - seen[row] : t + 1]
        window, mask = (part[:, T - W :] if kind == "gpt" else part for part in (window, mask))
        _, features = decoders.run_trunk(params, config, window, timestep_mask=mask)
        noise = flow_head.draw_noise(config, age)
        expected = flow_head.denoise(params["heads"], config, features[:, -1], noise)
        jax.tree.map(
            lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), chunk, expected
        )


def test_without_a_key_a_window_acts_like_the_stream_from_its_first_step(key):
    config, features = configured(), draw(0, B, T, H)
    params, mask = flow_head.init(key, config), np.ones((B, T), bool)
    mask[0, :3] = False
    chunk = flow_head.apply(params, config, features, timestep_mask=mask, reset=STARTS)
    steps = np.array([[max(0, t - 3) for t in range(T)], [*range(5), *range(T - 5)], [0] * T])
    expected = flow_head.denoise(params, config, features, flow_head.draw_noise(config, steps))
    np.testing.assert_allclose(chunk.arm, expected.arm, atol=1e-6)


def test_noise_depends_on_the_seed_and_the_step_only():
    config = configured()
    steps = np.array([0, 1, 7])
    noise = np.asarray(flow_head.draw_noise(config, steps))
    np.testing.assert_array_equal(noise[2], flow_head.draw_noise(config, np.array([7]))[0])
    assert not np.allclose(noise[0], noise[1])
    other = flow_head.draw_noise(dataclasses.replace(config, noise_seed=1), steps)
    assert not np.allclose(noise, other)


def test_acting_may_take_other_steps_and_another_seed_than_training():
    def agent(head):
        decoder = configured(head=head)
        backbone = dataclasses.replace(tiny_run.AGENT.policy.backbone, token_dim=D)
        return AgentConfig(policy.connect(backbone, decoder))

    changed = with_noise(agent("flow"), flow_steps=9, noise_seed=None)
    assert changed.policy.decoder == dataclasses.replace(agent("flow").policy.decoder, flow_steps=9)
    assert with_noise(agent("continuous"), flow_steps=None, noise_seed=None) == agent("continuous")
    with pytest.raises(ValueError, match=r"noise_seed must be None for head 'continuous'.* got 3;"):
        with_noise(agent("continuous"), flow_steps=None, noise_seed=3)
