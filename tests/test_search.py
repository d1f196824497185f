"""Greedy and beam search agree with exhaustive search over short targets, and with each other."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.nn import scheduled_sampling, search, seq2seq
from vla_jax.nn.seq2seq import Seq2SeqConfig

B, S, T, V = 4, 5, 4, 3
SIZES = {"source_size": 6, "target_size": V, "embed_size": 6, "hidden_size": 8, "score_size": 4}
CONFIGS = {
    "attention": Seq2SeqConfig(**SIZES),
    "fed": Seq2SeqConfig(**SIZES, cell="gru", score="general", feed_context=True),
    "bottleneck": Seq2SeqConfig(**SIZES, cell="rnn", score="none", num_layers=2),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
MASK = np.arange(S) < [[5], [2], [4], [1]]

greedy = jax.jit(search.greedy, static_argnums=1, static_argnames="max_steps")
beam = jax.jit(
    search.beam, static_argnums=1, static_argnames=("beam_size", "max_steps", "length_penalty")
)
init = jax.jit(seq2seq.init, static_argnums=1)
encode = jax.jit(seq2seq.encode, static_argnums=1)
free_running = jax.jit(scheduled_sampling.free_running, static_argnums=(1, 3))
force = jax.jit(seq2seq.teacher_forcing, static_argnums=1)


def prepare(config):
    """Returns params and memory; outputs are sharpened, so that rows end at different steps."""
    params = init(jax.random.key(3), config)
    params["output"]["kernel"] = 4 * params["output"]["kernel"]
    source = np.random.default_rng(0).integers(1, 6, (B, S))
    return params, encode(params, config, source, mask=MASK)


def row_of(memory, row):
    return jax.tree.map(lambda leaf: leaf[row : row + 1], memory)


def lengths_of(ids):
    """Number of steps up to and including the end id; all steps if there is none."""
    ended = ids == 0
    return np.where(ended.any(axis=-1), ended.argmax(axis=-1) + 1, ids.shape[-1])


def log_probs(params, config, memory, ids):
    """Log-probabilities of targets `[N, T]` for a memory of one row, up to their ends."""
    many = jax.tree.map(lambda leaf: jnp.repeat(leaf, len(ids), axis=0), memory)
    steps = jax.nn.log_softmax(force(params, config, many, ids).outputs)
    each = np.take_along_axis(np.asarray(steps), ids[..., None], axis=-1)[..., 0]
    return (each * (np.arange(ids.shape[1]) < lengths_of(ids)[:, None])).sum(axis=1)


def all_targets():
    """Every target of up to T ids, `[N, T]`, padded with the end id."""
    ids = np.array(list(itertools.product(range(V), repeat=T)), np.int32)
    behind = np.cumsum(ids == 0, axis=1) > (ids == 0)
    return ids[~(behind & (ids != 0)).any(axis=1)]


def assert_close(one, other, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), one, other)


@pytest.mark.sampled
@each_config
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_beam_as_wide_as_all_targets_equals_exhaustive_search(config, alpha):
    params, memory = prepare(config)
    targets = all_targets()
    found = beam(params, config, memory, beam_size=V**T, max_steps=T, length_penalty=alpha)
    for row in range(B):
        scores = log_probs(params, config, row_of(memory, row), targets)
        scores = scores / ((5 + lengths_of(targets)) / 6) ** alpha
        order = np.argsort(-scores)
        np.testing.assert_array_equal(found.ids[row, : len(targets)], targets[order])
        assert_close(found.score[row, : len(targets)], scores[order])
        assert (found.score[row, len(targets) :] == -np.inf).all()


@each_config
def test_a_beam_of_one_equals_greedy_search(config):
    params, memory = prepare(config)
    one = beam(params, config, memory, beam_size=1, max_steps=T, length_penalty=0.0)
    best = greedy(params, config, memory, max_steps=T)
    np.testing.assert_array_equal(one.ids[:, 0], best.ids)
    assert_close(one.score[:, 0], best.score)
    assert_close(jax.tree.map(lambda w: w[:, 0], one.weights), best.weights)


@each_config
def test_beams_are_sorted_and_have_the_scores_and_weights_of_their_ids(config):
    params, memory = prepare(config)
    found = beam(params, config, memory, beam_size=3, max_steps=T, length_penalty=0.6)
    assert (np.diff(found.score, axis=1) <= 0).all()
    for row in range(B):
        ids = np.asarray(found.ids[row])
        expected = log_probs(params, config, row_of(memory, row), ids)
        assert_close(found.score[row], expected / ((5 + lengths_of(ids)) / 6) ** 0.6)
        if found.weights is not None:
            many = jax.tree.map(lambda leaf: jnp.repeat(leaf, 3, axis=0), row_of(memory, row))
            real = np.arange(T) < lengths_of(ids)[:, None]
            weights = force(params, config, many, ids).weights
            assert_close(found.weights[row], np.where(real[..., None], weights, 0.0))


@each_config
def test_greedy_search_equals_free_running_up_to_the_end_of_each_row(config):
    params, memory = prepare(config)
    steps = 12
    written = greedy(params, config, memory, max_steps=steps)
    decoded, said = free_running(params, config, memory, steps)
    real = np.arange(steps) < lengths_of(np.asarray(said))[:, None]
    assert len(set(real.sum(axis=1))) > 1  # rows end at different steps
    np.testing.assert_array_equal(written.ids, np.where(real, said, 0))
    each = np.max(jax.nn.log_softmax(decoded.outputs), axis=-1)
    assert_close(written.score, (each * real).sum(axis=1))
    if written.weights is not None:
        assert_close(written.weights, np.where(real[..., None], decoded.weights, 0.0))
        sums = written.weights.sum(axis=-1)
        assert_close(sums, real.astype(np.float32))
        assert not (np.asarray(written.weights) * ~MASK[:, None]).any()


@each_config
def test_ended_rows_do_not_change_with_more_steps(config):
    params, memory = prepare(config)
    short, long = (greedy(params, config, memory, max_steps=steps) for steps in (12, 500))
    ended = np.asarray(short.ids == 0).any(axis=1)
    np.testing.assert_array_equal(short.ids[ended], long.ids[ended, :12])
    assert not long.ids[ended, 12:].any()
    assert_close(short.score[ended], long.score[ended])


def test_search_stops_when_the_last_row_has_ended():
    """With a decoder that ends at once, only one of 1000 steps is computed."""
    config = CONFIGS["attention"]
    params, memory = prepare(config)
    params["output"]["bias"] = np.array([50.0, 0, 0], np.float32)
    counted = []

    def step(*arguments, **options):
        jax.debug.callback(lambda: counted.append(1))
        return plain(*arguments, **options)

    plain, seq2seq.step = seq2seq.step, step
    try:
        search.greedy(params, config, memory, max_steps=1000)
        jax.effects_barrier()
    finally:
        seq2seq.step = plain
    assert len(counted) == 1


def test_jit_changes_nothing():
    config = CONFIGS["attention"]
    params, memory = prepare(config)
    found = search.beam(params, config, memory, beam_size=3, max_steps=T, length_penalty=0.6)
    assert_close(found, beam(params, config, memory, beam_size=3, max_steps=T, length_penalty=0.6))


@pytest.mark.parametrize(
    ("fields", "options", "sentence"),
    [
        ({"target": "vectors"}, {}, "target must be 'tokens' for a search, got 'vectors'"),
        ({}, {"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({}, {"beam_size": 0}, "beam_size must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused(fields, options, sentence, key):
    config = Seq2SeqConfig(**SIZES, **fields)
    params = init(key, config)
    memory = encode(params, config, np.ones((1, 2), int))
    with pytest.raises(ValueError, match=sentence):
        search.beam(params, config, memory, **{"beam_size": 2, "max_steps": 3, **options})
