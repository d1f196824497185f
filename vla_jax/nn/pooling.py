"""The tokens of a step to one vector."""

import math
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from vla_jax.nn.layers import masked_softmax
from vla_jax.types import Array

Pooling = Literal["max", "mean", "attention", "none"]


def pool(
    tokens: Array,
    kind: Pooling,
    num_latents: int,
    *,
    mask: Array | None = None,
    queries: Array | None = None,
) -> jax.Array:
    """Returns `num_latents` vectors of a step, joined to one.

    "max" and "mean" share N tokens out to `num_latents` bins, ⌊iN/n⌋ … ⌈(i+1)N/n⌉, as PyTorch's
    adaptive pooling does; "attention" takes `num_latents` learned queries, softmax(q·k/√D);
    "none" joins all tokens. What has no real token gives zeros.

    Args:
      tokens: `[..., N, D]`.
      kind: how they become one.
      num_latents: n, vectors that are left; of "none" N are.
      mask: `[..., N]`, True where the token is real; None means everywhere.
      queries: `[n, D]`, of "attention".

    Returns:
      `[..., n·D]` float32.
    """
    mask = jnp.ones(tokens.shape[:-1], bool) if mask is None else jnp.asarray(mask)
    chex.assert_shape(mask, tokens.shape[:-1])
    tokens = jnp.where(mask[..., None], jnp.asarray(tokens, jnp.float32), 0.0)
    if kind == "none":
        latents = tokens
    elif kind == "attention":
        latents = _attend(jnp.asarray(queries), tokens, mask)
    else:
        reduce = _max if kind == "max" else _mean
        bins = _bins(tokens.shape[-2], num_latents)
        latents = jnp.stack([reduce(tokens[..., b, :], mask[..., b]) for b in bins], axis=-2)
    return latents.reshape(*latents.shape[:-2], -1)


def _bins(num_tokens: int, num_latents: int) -> list[slice]:
    edges = [(i * num_tokens, (i + 1) * num_tokens) for i in range(num_latents)]
    return [slice(start // num_latents, -(-stop // num_latents)) for start, stop in edges]


def _max(tokens: jax.Array, mask: jax.Array) -> jax.Array:
    highest = jnp.max(jnp.where(mask[..., None], tokens, -jnp.inf), axis=-2)
    return jnp.where(jnp.any(mask, axis=-1)[..., None], highest, 0.0)


def _mean(tokens: jax.Array, mask: jax.Array) -> jax.Array:
    count = jnp.maximum(jnp.sum(mask, axis=-1), 1)
    return jnp.sum(tokens, axis=-2) / count[..., None]


def _attend(queries: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    scores = jnp.einsum("...nd,qd->...qn", tokens, queries) / math.sqrt(tokens.shape[-1])
    weights = masked_softmax(scores, mask[..., None, :])
    return jnp.einsum("...qn,...nd->...qd", weights, tokens)
