"""Pooling: reduces the tokens of a step to one vector.

The members of `POOLINGS` reduce N tokens to n vectors, which `apply` concatenates:

- "max", "mean": over n bins of tokens, ⌊iN/n⌋ … ⌈(i+1)N/n⌉, as PyTorch's adaptive pooling;
- "attention": n learned queries, softmax(q·k/√D) over the tokens;
- "none": all tokens, n = N.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from vla_jax.nn.layers import masked_softmax
from vla_jax.types import Array, Key, Params

Pooling = Literal["max", "mean", "attention", "none"]  # keys of `POOLINGS`


class PoolingMethod(NamedTuple):
    """Member of `POOLINGS`."""

    init: Callable[[Key, int, int], Params]  # (key, num_latents, D) -> params, often empty
    # (params, tokens [..., N, D], mask [..., N], num_latents) -> [..., n, D]; masked tokens are 0
    apply: Callable[[Params, jax.Array, jax.Array, int], jax.Array]
    num_vectors: Callable[[int, int], int]  # (N, num_latents) -> n
    min_tokens: Callable[[int], int]  # num_latents -> smallest N


def init(key: Key, kind: Pooling, num_latents: int, token_dim: int) -> Params:
    """Returns the params of a pooling, empty unless `kind` is "attention".

    Args:
      key: consumed.
      kind: key of `POOLINGS`.
      num_latents: n, number of vectors.
      token_dim: D, features of a token.
    """
    return POOLINGS[kind].init(key, num_latents, token_dim)


def apply(
    params: Params, kind: Pooling, tokens: Array, num_latents: int, *, mask: Array | None = None
) -> jax.Array:
    """Returns the pooled vectors of a step, concatenated; zeros where no token is real.

    Args:
      params: from `init`.
      kind: key of `POOLINGS`.
      tokens: `[..., N, D]`; masked tokens may be NaN.
      num_latents: n, number of vectors; ignored by "none", where n = N.
      mask: `[..., N]`, True where the token is real; None means everywhere.

    Returns:
      `[..., n·D]` float32.
    """
    mask = jnp.ones(tokens.shape[:-1], bool) if mask is None else jnp.asarray(mask)
    chex.assert_shape(mask, tokens.shape[:-1])
    tokens = jnp.where(mask[..., None], jnp.asarray(tokens, jnp.float32), 0.0)
    vectors = POOLINGS[kind].apply(params, tokens, mask, num_latents)
    return vectors.reshape(*vectors.shape[:-2], -1)


def _no_params(key: Key, num_latents: int, token_dim: int) -> Params:
    del key, num_latents, token_dim
    return {}


def _init_queries(key: Key, num_latents: int, token_dim: int) -> Params:
    return {"queries": jax.random.normal(key, (num_latents, token_dim))}


def _pool_bins(
    reduce: Callable[[jax.Array, jax.Array], jax.Array],
    params: Params,
    tokens: jax.Array,
    mask: jax.Array,
    num_latents: int,
) -> jax.Array:
    del params
    num_tokens = tokens.shape[-2]
    edges = [(i * num_tokens, (i + 1) * num_tokens) for i in range(num_latents)]
    bins = [slice(start // num_latents, -(-stop // num_latents)) for start, stop in edges]
    return jnp.stack([reduce(tokens[..., b, :], mask[..., b]) for b in bins], axis=-2)


def _max(tokens: jax.Array, mask: jax.Array) -> jax.Array:
    highest = jnp.max(jnp.where(mask[..., None], tokens, -jnp.inf), axis=-2)
    return jnp.where(jnp.any(mask, axis=-1)[..., None], highest, 0.0)


def _mean(tokens: jax.Array, mask: jax.Array) -> jax.Array:
    count = jnp.maximum(jnp.sum(mask, axis=-1), 1)
    return jnp.sum(tokens, axis=-2) / count[..., None]


def _attend(params: Params, tokens: jax.Array, mask: jax.Array, num_latents: int) -> jax.Array:
    del num_latents  # equals the number of queries
    queries = jnp.asarray(params["queries"])
    scores = jnp.einsum("...nd,qd->...qn", tokens, queries) / math.sqrt(tokens.shape[-1])
    weights = masked_softmax(scores, mask[..., None, :])
    return jnp.einsum("...qn,...nd->...qd", weights, tokens)


def _keep_all(params: Params, tokens: jax.Array, mask: jax.Array, num_latents: int) -> jax.Array:
    del params, mask, num_latents
    return tokens


def _bins_method(reduce: Callable[[jax.Array, jax.Array], jax.Array]) -> PoolingMethod:
    return PoolingMethod(
        init=_no_params,
        apply=partial(_pool_bins, reduce),
        num_vectors=lambda num_tokens, num_latents: num_latents,
        min_tokens=lambda num_latents: num_latents,
    )


POOLINGS: dict[str, PoolingMethod] = {
    "max": _bins_method(_max),
    "mean": _bins_method(_mean),
    "attention": PoolingMethod(
        init=_init_queries,
        apply=_attend,
        num_vectors=lambda num_tokens, num_latents: num_latents,
        min_tokens=lambda num_latents: 1,
    ),
    "none": PoolingMethod(
        init=_no_params,
        apply=_keep_all,
        num_vectors=lambda num_tokens, num_latents: num_tokens,
        min_tokens=lambda num_latents: 1,
    ),
}
