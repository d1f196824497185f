"""Attention: a mean of source values, weighted by how well each key matches the query.

    weightsₛ = softmax over the unmasked s of score(query, memoryₛ)
    context = Σₛ weightsₛ memoryₛ

- "additive": v · tanh(W q + U mₛ + b), Bahdanau et al. 2015 (arXiv:1409.0473);
- "dot": q · mₛ, and "general": q · (W mₛ), Luong et al. 2015 (arXiv:1508.04025);
- "scaled_dot": (W q) · (U mₛ) / √E, Vaswani et al. 2017 (arXiv:1706.03762), one head.

The part of the score that does not depend on the query, U mₛ, is computed once by `prepare`.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp

from vla_jax.config import checked, did_you_mean
from vla_jax.nn.layers import masked_softmax
from vla_jax.types import Array, Key, Params

Score = Literal["additive", "dot", "general", "scaled_dot"]


@dataclasses.dataclass(frozen=True)
@checked()
class AttentionConfig:
    """Attention over a source."""

    score: Score = "additive"  # score function: additive, dot, general or scaled_dot
    size: int = 128  # E, features of projected queries and keys, additive and scaled_dot only
    dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of the factors of matrix products

    def __post_init__(self):
        if self.score not in get_args(Score):
            raise ValueError(
                f"unknown score '{self.score}'; {did_you_mean(self.score, get_args(Score))}"
            )
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}.")


class Source(NamedTuple):
    """A source prepared for queries."""

    keys: Array  # [B, S, E], compared with the query
    values: Array  # [B, S, D], averaged
    mask: Array  # [B, S] bool, True where the position is real; may have more rows, see `apply`


def init(key: Key, config: AttentionConfig, query_size: int, memory_size: int) -> Params:
    """Returns the params of the score, each from U(−1/√n, 1/√n) with n the size of its first axis.

    Args:
      key: consumed.
      config: the score.
      query_size: H, features of a query.
      memory_size: D, features of a position.

    Returns:
      For "additive" `{"query_kernel" [H, E], "key_kernel" [D, E], "key_bias" [E], "score_kernel"
      [E]}`; for "scaled_dot" the first two; for "general" `{"key_kernel" [D, H]}`; for "dot" `{}`.

    Raises:
      ValueError: the score is "dot" and the sizes differ.
    """
    if config.score == "dot" and query_size != memory_size:
        raise ValueError(
            f"memory_size must equal query_size = {query_size} with score 'dot', got "
            f"{memory_size}; choose score 'general'."
        )
    shapes = _shapes(config, query_size, memory_size)
    keys = jax.random.split(key, max(1, len(shapes)))
    params = {}
    for (name, shape), part in zip(shapes.items(), keys, strict=False):  # "dot" has no params
        bound = shape[0] ** -0.5
        params[name] = jax.random.uniform(part, shape, jnp.float32, -bound, bound)
    return params


def prepare(
    params: Params, config: AttentionConfig, memory: Array, *, mask: Array | None = None
) -> Source:
    """Returns the source with the part of the score that does not depend on the query.

    Args:
      params: from `init`.
      config: the config given to `init`.
      memory: `[B, S, D]`; masked positions may be NaN.
      mask: `[B, S]`, True where the position is real; None means everywhere.
    """
    chex.assert_rank(memory, 3)
    mask = jnp.ones(memory.shape[:2], bool) if mask is None else jnp.asarray(mask)
    chex.assert_shape(mask, memory.shape[:2])
    values = jnp.where(mask[..., None], jnp.asarray(memory, jnp.float32), 0.0)
    keys = values
    if "key_kernel" in params:
        keys = _product("bsd,de->bse", values, params["key_kernel"], config.dtype)
    if "key_bias" in params:
        keys = keys + jnp.broadcast_to(params["key_bias"], keys.shape)
    return Source(keys, values, mask)


def apply(
    params: Params, config: AttentionConfig, query: Array, source: Source
) -> tuple[jax.Array, jax.Array]:
    """Returns the context of each query, and the attention weights.

    Weights are 0 at masked positions; if all positions are masked, the context is 0 too.

    Several consecutive query rows may share a source row, each with its own mask, such as all steps
    of a window that attend to the same features. The source is not copied for this.

    Args:
      params: from `init`.
      config: the config given to `init`.
      query: `[B, H]`, or `[B, T, H]` for many steps at once; the first axis may be any multiple of
        that of the source. Rows without an unmasked position may be NaN.
      source: from `prepare`; its mask has as many rows as the query.

    Returns:
      Context `[B, D]` and weights `[B, S]`; or `[B, T, D]` and `[B, T, S]`; float32; the first
      axis is that of the query.
    """
    chex.assert_rank(query, {2, 3})
    chex.assert_equal_shape_prefix([query, source.mask], 1)
    num_sources, num_positions = source.keys.shape[:2]
    chex.assert_is_divisible(query.shape[0], num_sources)
    steps = jnp.asarray(query if query.ndim == 3 else query[:, None], jnp.float32)
    steps = jnp.where(jnp.any(source.mask, axis=-1)[:, None, None], steps, 0.0)
    rows = steps.shape[:2]
    # Rows that share a source are treated as further steps of one row.
    joined = steps.reshape(num_sources, -1, steps.shape[-1])
    scores = _SCORES[config.score](params, config, joined, source.keys)
    scores = scores.reshape(*rows, num_positions)
    weights = masked_softmax(scores, source.mask[:, None])
    joined = weights.reshape(num_sources, -1, num_positions)
    context = _product("bts,bsd->btd", joined, source.values, config.dtype)
    context = context.reshape(*rows, -1)
    return (context, weights) if query.ndim == 3 else (context[:, 0], weights[:, 0])


def causal_mask(mask: Array, reset: Array, reach: int) -> jax.Array:
    """Returns the causal attention mask `[B, T (query), T (key)]`.

    A real step attends to at most the last `reach` real steps of its episode, itself included. A
    masked step attends to nothing.

    Args:
      mask: `[B, T]`, True where the step is real.
      reset: `[B, T]`, True where a new episode starts, on a masked step too.
      reach: steps that a query can attend to, itself included.
    """
    chex.assert_equal_shape([mask, reset])
    real, starts = jnp.asarray(mask), jnp.asarray(reset)
    index, episode, num_steps = jnp.cumsum(real, axis=1), jnp.cumsum(starts, axis=1), real.shape[1]
    is_same = episode[:, :, None] == episode[:, None, :]
    is_near = index[:, :, None] - index[:, None, :] < reach
    is_past = jnp.broadcast_to(jnp.tri(num_steps, dtype=bool), is_same.shape)
    return is_same & is_near & is_past & real[:, :, None] & real[:, None, :]


def episode_positions(mask: Array, reset: Array) -> jax.Array:
    """Returns `[B, T]` int32, the number of real steps of the same episode before each.

    Args:
      mask: `[B, T]`, True where the step is real.
      reset: `[B, T]`, True where a new episode starts, on a masked step too.
    """
    real = jnp.asarray(mask)
    before = jnp.cumsum(real, axis=1) - real
    return before - jax.lax.cummax(jnp.where(reset, before, 0), axis=1)


def _shapes(config: AttentionConfig, query_size: int, memory_size: int) -> dict[str, Any]:
    projections = {
        "query_kernel": (query_size, config.size),
        "key_kernel": (memory_size, config.size),
    }
    return {
        "additive": {**projections, "key_bias": (config.size,), "score_kernel": (config.size,)},
        "dot": {},
        "general": {"key_kernel": (memory_size, query_size)},
        "scaled_dot": projections,
    }[config.score]


def _additive(params: Params, config: AttentionConfig, query: jax.Array, keys: Array) -> jax.Array:
    projected = _product("bth,he->bte", query, params["query_kernel"], config.dtype)
    shape = (*projected.shape[:2], *keys.shape[1:])
    sum_ = jnp.broadcast_to(projected[:, :, None], shape) + jnp.broadcast_to(keys[:, None], shape)
    return _product("btse,e->bts", jnp.tanh(sum_), params["score_kernel"], config.dtype)


def _dot(params: Params, config: AttentionConfig, query: jax.Array, keys: Array) -> jax.Array:
    del params
    return _product("bth,bsh->bts", query, keys, config.dtype)


def _scaled_dot(
    params: Params, config: AttentionConfig, query: jax.Array, keys: Array
) -> jax.Array:
    projected = _product("bth,he->bte", query, params["query_kernel"], config.dtype)
    return _product("bte,bse->bts", projected, keys, config.dtype) / math.sqrt(config.size)


def _product(axes: str, left: Array, right: Array, dtype: str) -> jax.Array:
    return jnp.einsum(
        axes,
        jnp.asarray(left, dtype),
        jnp.asarray(right, dtype),
        preferred_element_type=jnp.float32,
    )


_SCORES = {"additive": _additive, "dot": _dot, "general": _dot, "scaled_dot": _scaled_dot}
