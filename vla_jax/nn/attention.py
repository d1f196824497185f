"""Attention: a query looks at the positions of a source, and takes their mean by what it seeks.

    weightsₛ = softmax over the real s of score(query, memoryₛ)
    context = Σₛ weightsₛ memoryₛ

- "additive": v · tanh(W q + U mₛ + b), Bahdanau et al. 2015 (arXiv:1409.0473);
- "dot": q · mₛ, and "general": q · (W mₛ), Luong et al. 2015 (arXiv:1508.04025);
- "scaled_dot": (W q) · (U mₛ) / √E, Vaswani et al. 2017 (arXiv:1706.03762), one head.

What does not wait for a query, U mₛ, `prepare` computes once, for all the steps of a decoder.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp

from vla_jax.config import did_you_mean
from vla_jax.nn.layers import masked_softmax
from vla_jax.types import Array, Key, Params

Score = Literal["additive", "dot", "general", "scaled_dot"]


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """How a query finds its positions."""

    score: Score = "additive"  # how well a position answers a query
    size: int = 128  # E, features in which "additive" and "scaled_dot" compare the two
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the factors of matrix products

    def __post_init__(self):
        if self.score not in get_args(Score):
            raise ValueError(
                f"unknown score '{self.score}'; {did_you_mean(self.score, get_args(Score))}"
            )
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}.")


class Source(NamedTuple):
    """A source, ready to be looked at."""

    keys: Array  # [B, S, E], what a query is compared with
    values: Array  # [B, S, D], what the mean is taken of
    mask: Array  # [B, S] bool, True where the position is real; or [R·B, S], see `apply`


def init(key: Key, config: AttentionConfig, query_size: int, memory_size: int) -> Params:
    """Returns the weights of the score, each drawn from U(−1/√n, 1/√n), n its first axis.

    Args:
      key: consumed.
      config: the score.
      query_size: H, features of a query.
      memory_size: D, features of a position.

    Returns:
      Of "additive" `{"query_kernel" [H, E], "key_kernel" [D, E], "key_bias" [E], "score_kernel"
      [E]}`; of "scaled_dot" the first two; of "general" `{"key_kernel" [D, H]}`; of "dot" nothing.

    Raises:
      ValueError: the score is "dot" and the sizes differ.
    """
    if config.score == "dot" and query_size != memory_size:
        raise ValueError(
            f"memory_size must be that of the query, {query_size}, with score 'dot', got "
            f"{memory_size}; choose 'general'."
        )
    shapes = _shapes(config, query_size, memory_size)
    keys = jax.random.split(key, max(1, len(shapes)))
    params = {}
    for (name, shape), part in zip(shapes.items(), keys, strict=False):  # "dot" has no shapes
        bound = shape[0] ** -0.5
        params[name] = jax.random.uniform(part, shape, jnp.float32, -bound, bound)
    return params


def prepare(
    params: Params, config: AttentionConfig, memory: Array, *, mask: Array | None = None
) -> Source:
    """Returns the source with all of the score that does not wait for a query.

    Args:
      params: from `init`.
      config: the one that `init` was given.
      memory: `[B, S, D]`; what is masked may be NaN.
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
    """Returns what the query finds, and where.

    Weights are 0 where the source is masked; where nothing of it is real, the context is 0 too.

    R rows one after the other may look at the same source, each with a mask of its own; the source
    is not copied for it. So may all steps of a window at what lies before each of them.

    Args:
      params: from `init`.
      config: the one that `init` was given.
      query: `[B, H]`, or `[B, T, H]` for many steps at once; or with R·B in the place of B.
      source: from `prepare`; its mask with as many rows as the query.

    Returns:
      Context `[B, D]` and weights `[B, S]`; or `[B, T, D]` and `[B, T, S]`; float32; rows as
      those of the query.
    """
    chex.assert_rank(query, {2, 3})
    chex.assert_equal_shape_prefix([query, source.mask], 1)
    num_sources, num_positions = source.keys.shape[:2]
    chex.assert_is_divisible(query.shape[0], num_sources)
    steps = jnp.asarray(query if query.ndim == 3 else query[:, None], jnp.float32)
    rows = steps.shape[:2]
    # The rows of a source are joined, as if they were steps of one.
    joined = steps.reshape(num_sources, -1, steps.shape[-1])
    scores = _SCORES[config.score](params, config, joined, source.keys)
    scores = scores.reshape(*rows, num_positions)
    weights = masked_softmax(scores, source.mask[:, None])
    joined = weights.reshape(num_sources, -1, num_positions)
    context = _product("bts,bsd->btd", joined, source.values, config.dtype)
    context = context.reshape(*rows, -1)
    return (context, weights) if query.ndim == 3 else (context[:, 0], weights[:, 0])


def causal_mask(mask: Array, reset: Array, reach: int) -> jax.Array:
    """Returns what each step of a window may look at: `[B, T, T]`, by the looking, the looked at.

    The last real steps of its episode up to itself, `reach` of them at most. A step that is not
    real looks at nothing.

    Args:
      mask: `[B, T]`, True where the step is real.
      reset: `[B, T]`, True where a new episode starts, on a masked step too.
      reach: steps that are looked at.
    """
    chex.assert_equal_shape([mask, reset])
    real, starts = jnp.asarray(mask), jnp.asarray(reset)
    number, episode, time = jnp.cumsum(real, axis=1), jnp.cumsum(starts, axis=1), real.shape[1]
    is_same = episode[:, :, None] == episode[:, None, :]
    is_near = number[:, :, None] - number[:, None, :] < reach
    is_past = jnp.broadcast_to(jnp.tri(time, dtype=bool), is_same.shape)
    return is_same & is_near & is_past & real[:, :, None] & real[:, None, :]


def _shapes(config: AttentionConfig, query_size: int, memory_size: int) -> dict[str, Any]:
    both = {"query_kernel": (query_size, config.size), "key_kernel": (memory_size, config.size)}
    return {
        "additive": {**both, "key_bias": (config.size,), "score_kernel": (config.size,)},
        "dot": {},
        "general": {"key_kernel": (memory_size, query_size)},
        "scaled_dot": both,
    }[config.score]


def _additive(params: Params, config: AttentionConfig, query: jax.Array, keys: Array) -> jax.Array:
    sought = _product("bth,he->bte", query, params["query_kernel"], config.dtype)
    shape = (*sought.shape[:2], *keys.shape[1:])
    sum_ = jnp.broadcast_to(sought[:, :, None], shape) + jnp.broadcast_to(keys[:, None], shape)
    return _product("btse,e->bts", jnp.tanh(sum_), params["score_kernel"], config.dtype)


def _dot(params: Params, config: AttentionConfig, query: jax.Array, keys: Array) -> jax.Array:
    del params
    return _product("bth,bsh->bts", query, keys, config.dtype)


def _scaled_dot(
    params: Params, config: AttentionConfig, query: jax.Array, keys: Array
) -> jax.Array:
    sought = _product("bth,he->bte", query, params["query_kernel"], config.dtype)
    return _product("bte,bse->bts", sought, keys, config.dtype) / math.sqrt(config.size)


def _product(axes: str, one: Array, other: Array, dtype: str) -> jax.Array:
    return jnp.einsum(
        axes,
        jnp.asarray(one, dtype),
        jnp.asarray(other, dtype),
        preferred_element_type=jnp.float32,
    )


_SCORES = {"additive": _additive, "dot": _dot, "general": _dot, "scaled_dot": _scaled_dot}
