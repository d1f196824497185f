"""Rotary positions, and attention whose query heads share key heads (grouped-query attention).

Source: Su et al. 2021, RoFormer (arXiv:2104.09864); Ainslie et al. 2023, GQA (arXiv:2305.13245).
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from vla_jax.nn.layers import masked_softmax
from vla_jax.types import Array


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Returns the features rotated by position: pairs (i, i + E/2), each by its angle.

    Args:
      x: `[B, T, M, E]`.
      angles: `[B, T, E/2]` rad, or `[1, T, E/2]`.

    Source: Su et al. 2021, RoFormer (arXiv:2104.09864), in the layout of Hugging Face's models.
    """
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def outer(positions: Array, frequencies: Array) -> jax.Array:
    """Returns `[..., F]` float32, each of the positions `[...]` times each frequency `[F]`.

    Not a matrix product, whose factors a GPU rounds to TF32.
    """
    positions = jnp.asarray(positions, jnp.float32)
    row = jnp.asarray(frequencies).reshape(*(1,) * positions.ndim, -1)
    return positions[..., None] * row


def grouped_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Array,
    *,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """Returns scaled dot-product attention, with groups of query heads that share a key head.

        softmax over the unmasked s of cap(scale · query · keyₛ), times valueₛ
        cap(x) = softcap · tanh(x / softcap)

    Args:
      query: `[B, T, M, E]`; M is a multiple of the number of key heads.
      key: `[B, S, M', E]`; keys and values that no query attends to may be NaN.
      value: `[B, S, M', E]`.
      mask: bool `[B or 1, T or 1, S]`, True where a query attends to a key. A query without any key
        may be NaN, and gives zeros.
      scale: factor of the scores.
      softcap: bound of the scores (Gemma 2); None = no bound.

    Returns:
      `[B, T, M·E]`.
    """
    num_key_heads, mask = key.shape[2], jnp.asarray(mask)
    key, value = (_keep(x, jnp.any(mask, axis=-2)) for x in (key, value))
    query = _keep(query, jnp.any(mask, axis=-1))
    query = rearrange(query, "B T (G Q) E -> B G Q T E", G=num_key_heads)
    scores = scale * jnp.einsum("bgqte,bsge->bgqts", query, key, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    weights = masked_softmax(scores, mask[:, None, None]).astype(value.dtype)
    outputs = jnp.einsum("bgqts,bsge->bgqte", weights, value, preferred_element_type=jnp.float32)
    return rearrange(outputs, "B G Q T E -> B T (G Q E)").astype(value.dtype)


def _keep(x: jax.Array, is_used: jax.Array) -> jax.Array:
    """Returns `x [B, T, M, E]` with zeros where `is_used [B or 1, T or 1]` is False."""
    return jnp.where(is_used[..., None, None], x, 0.0)
