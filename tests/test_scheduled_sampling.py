"""Schedules equal their equations; rate 1 = teacher forcing, rate 0 = free running."""

import jax
import numpy as np
import pytest

from vla_jax.nn import scheduled_sampling, seq2seq
from vla_jax.nn.scheduled_sampling import SamplingConfig
from vla_jax.nn.seq2seq import Seq2SeqConfig

B, S, T, V = 64, 4, 5, 7
SIZES = {"source_size": V, "target_size": V, "embed_size": 6, "hidden_size": 8, "score_size": 4}
CONFIGS = {
    "tokens": Seq2SeqConfig(**SIZES),
    "tokens-bottleneck": Seq2SeqConfig(**SIZES, score="none", cell="gru"),
    "vectors-feed-context": Seq2SeqConfig(
        **SIZES, source="vectors", target="vectors", feed_context=True
    ),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)

schedule_and_run = jax.jit(
    scheduled_sampling.scheduled_sampling, static_argnums=1, static_argnames="choose"
)


init = jax.jit(seq2seq.init, static_argnums=1)
encode = jax.jit(seq2seq.encode, static_argnums=1)
force = jax.jit(seq2seq.teacher_forcing, static_argnums=1)
run_free = jax.jit(scheduled_sampling.free_running, static_argnums=(1, 3), static_argnames="choose")


def make_sequence(kind, seed, steps):
    rng = np.random.default_rng(seed)
    if kind == "tokens":
        return rng.integers(1, V, (B, steps))
    return rng.normal(size=(B, steps, V)).astype(np.float32)


def prepare(config):
    params = init(jax.random.key(0), config)
    memory = encode(params, config, make_sequence(config.source, 0, S))
    return params, memory, make_sequence(config.target, 1, T)


def assert_close(one, other, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), one, other)


@pytest.mark.parametrize("i", [0, 1, 10, 100, 1000, 100_000])
def test_the_schedules_equal_their_equations(i):
    linear = scheduled_sampling.linear(i, slope=0.004, min_rate=0.1)
    assert linear == pytest.approx(max(0.1, 1 - 0.004 * i), abs=1e-6)
    exponential = scheduled_sampling.exponential(i, base=0.99)
    assert exponential == pytest.approx(0.99**i, abs=1e-6)
    inverse_sigmoid = scheduled_sampling.inverse_sigmoid(i, k=50.0)
    by_hand = 50 / (50 + np.exp(min(i / 50, 700)))
    assert inverse_sigmoid == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("i", [0, 70])
def test_a_config_selects_a_schedule_with_its_parameters(i):
    numbers = {"slope": 0.01, "min_rate": 0.4, "base": 0.98, "k": 20.0}
    expected = {
        "linear": scheduled_sampling.linear(i, slope=0.01, min_rate=0.4),
        "exponential": scheduled_sampling.exponential(i, base=0.98),
        "inverse_sigmoid": scheduled_sampling.inverse_sigmoid(i, k=20.0),
    }
    for name, rate in expected.items():
        config = SamplingConfig(name, **numbers)
        assert float(scheduled_sampling.rate(config, i)) == pytest.approx(float(rate))
    assert scheduled_sampling.rate(SamplingConfig(**numbers), i) is None


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"schedule": "lineal"}, r"unknown schedule 'lineal'; .* Did you mean 'linear'"),
        ({"slope": -0.1}, r"slope must be in \[0, 1\], got -0.1"),
        ({"min_rate": 1.1}, r"min_rate must be in \[0, 1\], got 1.1"),
        ({"base": 2.0}, r"base must be in \[0, 1\], got 2.0"),
        ({"k": 0.5}, r"k must be at least 1, got 0.5"),
    ],
)
def test_a_wrong_config_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        SamplingConfig(**fields)


@pytest.mark.slow
@each_config
def test_rate_1_equals_teacher_forcing(config, key):
    params, memory, targets = prepare(config)
    forced = schedule_and_run(params, config, memory, targets, 1.0, key)
    assert_close(forced, force(params, config, memory, targets))


@pytest.mark.parametrize("rate", [0.0, 1.0])
@each_config
def test_a_target_of_one_step_does_not_depend_on_the_rate(config, rate, key):
    params, memory, targets = prepare(config)
    forced = schedule_and_run(params, config, memory, targets[:, :1], rate, key)
    assert_close(forced, force(params, config, memory, targets[:, :1]))


@each_config
def test_rate_0_equals_free_running(config, key):
    params, memory, targets = prepare(config)
    forced = schedule_and_run(params, config, memory, targets, 0.0, key)
    alone, _ = run_free(params, config, memory, T)
    assert_close(forced, alone)


@each_config
def test_teacher_forcing_with_its_own_outputs_equals_free_running(config):
    params, memory, _ = prepare(config)
    alone, said = run_free(params, config, memory, T)
    assert_close(force(params, config, memory, said), alone)


def test_each_row_and_step_is_sampled_independently(key):
    config = CONFIGS["tokens"]
    params, memory, targets = prepare(config)
    mixed, forced, alone = (
        schedule_and_run(params, config, memory, targets, rate, key).outputs[:, 1]
        for rate in (0.3, 1.0, 0.0)
    )
    is_forced, is_alone = (np.abs(mixed - other).max(axis=1) < 1e-6 for other in (forced, alone))
    assert (is_forced | is_alone).all()
    assert 0.1 < is_forced[~is_alone].sum() / B < 0.5
    other_key = schedule_and_run(params, config, memory, targets, 0.3, jax.random.key(1))
    assert np.abs(other_key.outputs[:, 1] - mixed).max() > 1e-3


def test_rows_can_have_rates_of_their_own(key):
    config = CONFIGS["tokens"]
    params, memory, targets = prepare(config)
    is_forced = np.arange(B) % 2 == 0
    mixed, forced, alone = (
        schedule_and_run(params, config, memory, targets, rate, key).outputs
        for rate in (is_forced.astype(np.float32), 1.0, 0.0)
    )
    assert_close(mixed[is_forced], forced[is_forced], atol=0)
    assert_close(mixed[~is_forced], alone[~is_forced], atol=0)


def test_sampled_ids_follow_the_logits(key):
    logits = np.log(np.tile([0.1, 0.2, 0.7], (4000, 1)))
    share = np.bincount(scheduled_sampling.sample(logits, key)) / 4000
    assert_close(share, np.array([0.1, 0.2, 0.7]), atol=0.03)
    np.testing.assert_array_equal(scheduled_sampling.argmax(logits), np.full(4000, 2))


def test_sampling_needs_a_key_and_is_independent_at_each_step(key):
    config = CONFIGS["tokens"]
    params, memory, _ = prepare(config)
    with pytest.raises(ValueError, match="key must be given to sample outputs, got None"):
        run_free(params, config, memory, T, choose=scheduled_sampling.sample)
    _, said = run_free(params, config, memory, T, choose=scheduled_sampling.sample, key=key)
    assert len({tuple(row) for row in said.tolist()}) > B // 2


def test_a_custom_choose_function_maps_outputs_to_the_next_inputs():
    """As in a policy that sends a function of its outputs and gets it back as input."""
    config = CONFIGS["vectors-feed-context"]
    params, memory, _ = prepare(config)

    def scale(outputs, key):
        return np.tanh(1.0) * outputs

    alone, said = run_free(params, config, memory, T, choose=scale)
    assert_close(said, np.tanh(1.0) * alone.outputs)
    assert_close(force(params, config, memory, said), alone)
