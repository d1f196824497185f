"""Attention: each score compared with NumPy and PyTorch, and the laws of masking."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vla_jax.nn import attention
from vla_jax.nn.attention import AttentionConfig

B, S, T, H, D, E = 3, 5, 2, 4, 4, 6
SCORES = ("additive", "dot", "general", "scaled_dot")
each_score = pytest.mark.parametrize("score", SCORES)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make(score):
    config = AttentionConfig(score=score, size=E)
    return config, attention.init(jax.random.key(0), config, H, D)


def attend(params, config, query, memory, mask=None):
    return attention.apply(
        params, config, query, attention.prepare(params, config, memory, mask=mask)
    )


def assert_close(one, other, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), one, other)


def reference_score(score, p, query, position):
    """Score of one query `[H]` with one position `[D]`, in float64."""
    if score == "additive":
        hidden = query @ p["query_kernel"] + position @ p["key_kernel"] + p["key_bias"]
        return np.tanh(hidden) @ p["score_kernel"]
    if score == "scaled_dot":
        return (query @ p["query_kernel"]) @ (position @ p["key_kernel"]) / np.sqrt(E)
    return query @ (position @ p["key_kernel"] if score == "general" else position)


@each_score
def test_each_score_is_its_equation(score):
    config, params = make(score)
    query, memory = draw(1, B, H).astype(np.float64), draw(2, B, S, D).astype(np.float64)
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    scores = np.array(
        [[reference_score(score, p, query[b], memory[b, s]) for s in range(S)] for b in range(B)]
    )
    weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    context = np.einsum("bs,bsd->bd", weights, memory)
    assert_close(attend(params, config, draw(1, B, H), draw(2, B, S, D)), (context, weights))


@each_score
def test_masked_weights_equal_those_of_pytorch(score):
    config, params = make(score)
    query, memory, mask = draw(1, B, T, H), draw(2, B, S, D), np.arange(S) < [[5], [2], [4]]
    q, m = torch.from_numpy(query), torch.from_numpy(memory)
    p = {name: torch.from_numpy(np.array(leaf)) for name, leaf in params.items()}
    if score == "additive":
        keys = torch.nn.functional.linear(m, p["key_kernel"].T, p["key_bias"])
        hidden = torch.tanh((q @ p["query_kernel"])[:, :, None] + keys[:, None])
        scores = hidden @ p["score_kernel"]
    else:
        q = q @ p["query_kernel"] / E**0.5 if score == "scaled_dot" else q
        keys = m @ p["key_kernel"] if "key_kernel" in p else m
        scores = torch.bmm(q, keys.transpose(1, 2))
    weights = scores.masked_fill(~torch.from_numpy(mask)[:, None], -torch.inf).softmax(dim=-1)
    context = torch.bmm(weights, m)
    assert_close(attend(params, config, query, memory, mask), (context.numpy(), weights.numpy()))


@each_score
def test_many_queries_at_once_equal_single_queries(score):
    config, params = make(score)
    query, memory, mask = draw(1, B, T, H), draw(2, B, S, D), np.arange(S) < [[5], [2], [4]]
    context, weights = attend(params, config, query, memory, mask)
    for t in range(T):
        assert_close(
            attend(params, config, query[:, t], memory, mask), (context[:, t], weights[:, t])
        )


@each_score
def test_rows_that_share_a_source_equal_rows_with_a_copy_each(score):
    config, params = make(score)
    query, memory = draw(1, 2 * B, T, H), draw(2, B, S, D)
    mask = np.random.default_rng(3).random((2 * B, S)) < 0.6
    shared = attention.prepare(params, config, memory)._replace(mask=mask)
    outputs = attention.apply(params, config, query, shared)
    assert_close(outputs, attend(params, config, query, np.repeat(memory, 2, axis=0), mask))
    one = attention.apply(params, config, query[:, 0], shared)
    assert_close(one, jax.tree.map(lambda part: part[:, 0], outputs))


@pytest.mark.parametrize("reach", [1, 2, 9])
def test_the_causal_mask_covers_the_last_real_steps_of_the_episode(reach):
    rng = np.random.default_rng(0)
    mask, reset = rng.random((8, 7)) < 0.7, rng.random((8, 7)) < 0.2
    expected = np.zeros((8, 7, 7), bool)
    for b in range(8):
        for t in np.flatnonzero(mask[b]):
            start = max([0, *np.flatnonzero(reset[b, : t + 1])])
            real = [s for s in range(start, t + 1) if mask[b, s]]
            expected[b, t, real[-reach:]] = True
    np.testing.assert_array_equal(attention.causal_mask(mask, reset, reach), expected)


@pytest.mark.sampled
@each_score
@pytest.mark.parametrize("real", [[0, 1, 2], [2, 3, 4], [1, 3]])
def test_padding_equals_truncation_and_weights_sum_to_1_over_real_positions(score, real):
    config, params = make(score)
    query, memory = draw(1, B, H), draw(2, B, S, D)
    mask = np.tile(np.isin(np.arange(S), real), (B, 1))
    with_nan = np.where(mask[..., None], memory, np.nan)
    context, weights = attend(params, config, query, with_nan, mask)
    cut_context, cut_weights = attend(params, config, query, memory[:, real])
    assert_close((context, weights[:, real]), (cut_context, cut_weights))
    assert_close(weights.sum(axis=1), np.ones(B))
    assert not weights[~mask].any()


@pytest.mark.slow
@each_score
def test_a_row_without_real_positions_has_zero_output_and_finite_gradients(score):
    config, params = make(score)
    mask = np.ones((B, S), bool)
    mask[1] = False

    def total(params, query, memory):
        context, weights = attend(params, config, query, memory, mask)
        return jnp.square(context).sum() + jnp.square(weights).sum(), (context, weights)

    arguments = (params, draw(1, B, H), draw(2, B, S, D))
    gradient, outputs = jax.grad(total, (0, 1, 2), has_aux=True)(*arguments)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert not gradient[2][1].any()
    for part in outputs:
        assert not part[1].any()
        assert part[0].any()


@each_score
def test_jit_does_not_change_results_and_bfloat16_changes_them_little(score):
    config, params = make(score)
    query, memory = draw(1, B, H), draw(2, B, S, D)
    expected = attend(params, config, query, memory)
    assert_close(jax.jit(attend, static_argnums=1)(params, config, query, memory), expected)
    half = attend(params, dataclasses.replace(config, dtype="bfloat16"), query, memory)
    assert_close(half, expected, atol=0.05)
    assert {part.dtype for part in half} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"score": "aditive"}, "unknown score 'aditive'; .* Did you mean 'additive'"),
        ({"size": 0}, "size must be at least 1, got 0"),
    ],
)
def test_a_wrong_config_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        AttentionConfig(**fields)


def test_a_dot_score_of_two_sizes_is_refused(key):
    with pytest.raises(
        ValueError, match=r"must equal query_size = 4 .* got 8; choose score 'general'"
    ):
        attention.init(key, AttentionConfig(score="dot"), 4, 8)


def test_a_source_batch_that_does_not_divide_the_rows_is_refused():
    config, params = make("general")
    source = attention.prepare(params, config, draw(2, B, S, D))
    source = source._replace(mask=np.ones((B + 1, S), bool))
    with pytest.raises(AssertionError, match="divisible"):
        attention.apply(params, config, draw(1, B + 1, H), source)


def test_a_mask_of_another_size_is_refused():
    config, params = make("general")
    with pytest.raises(AssertionError, match="assert_shape"):
        attend(params, config, draw(1, B, H), draw(2, B, S, D), np.ones((B, S + 1), bool))
