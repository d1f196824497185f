"""Matrix LSTM of xLSTM (mLSTM): a matrix per head, exponential input gates, a stabiliser."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.nn.cells import chunks
from vla_jax.nn.cells.chunks import Chunk, heads_first, join_heads, product, split_heads
from vla_jax.nn.cells.contract import Cell, init_projection, zero_array
from vla_jax.nn.cells.time_constants import head_log_odds
from vla_jax.nn.layers import layer_norm
from vla_jax.types import Array, Key, Params

LEAST, MOST = 3.0, 6.0  # forget biases of the first and the last head: 21 to 404 steps
LARGEST = 80.0  # exponent whose exponential is finite in float32


class MLSTMCarry(NamedTuple):
    """Carry of an mLSTM; memory and normaliser are scaled by exp(−stabiliser)."""

    memory: Array  # [..., M, E (values), E (keys)] float32
    normaliser: Array  # [..., M, E] float32, the sum of the keys with the same weights
    stabiliser: Array  # [..., M] float32, logarithm of the scale


class _Gates(NamedTuple):
    """The parts of a projection."""

    query: jax.Array  # [..., M, E]
    key: jax.Array  # [..., M, E]
    value: jax.Array  # [..., M, E]
    output: jax.Array  # [..., M·E]
    admit: jax.Array  # [..., M], logarithm of the input gate
    keep: jax.Array  # [..., M], logarithm of the forget gate


def init(key: Key, input_size: int, hidden_size: int, *, num_heads: int) -> Params:
    """Returns `{"input_kernel" [D, 4·H + 2·M], "input_bias", "norm_scale" [H]}`.

    The gates of a head start as constants: input gates of 1, and forget gates that spread the
    heads' time constants from 21 to 404 steps.

    Args:
      key: consumed.
      input_size: D.
      hidden_size: H.
      num_heads: M; 0 means an automatic number.

    Source: Beck et al. 2024, as in NX-AI/xlstm: kernels of the gates 0, forget biases linear in 3 …
    6; there, the input biases are drawn from N(0, 0.1).
    """
    heads = chunks.count_heads(num_heads, hidden_size)
    params = init_projection(key, input_size, hidden_size, 4 * hidden_size + 2 * heads)
    gates = jnp.concatenate([jnp.zeros(heads), jnp.linspace(LEAST, MOST, heads)])
    return {
        "input_kernel": params["input_kernel"].at[:, -2 * heads :].set(0.0),
        "input_bias": params["input_bias"].at[-2 * heads :].set(gates),
        "norm_scale": jnp.ones(hidden_size),
    }


def zero_carry(like: Array, hidden_size: int, *, num_heads: int) -> MLSTMCarry:
    """Returns the carry before the first step, all zeros.

    Args:
      like: any array `[B, ...]` of the data; the carry is sharded like it.
      hidden_size: H.
      num_heads: M; 0 means an automatic number.
    """
    heads = chunks.count_heads(num_heads, hidden_size)
    size = hidden_size // heads
    shapes = ((heads, size, size), (heads, size), (heads,))
    return MLSTMCarry(*(zero_array(like, *shape) for shape in shapes))


def combine(
    extra_params: Params, carry: MLSTMCarry, projected: Array, recurrent: Array | None
) -> tuple[MLSTMCarry, jax.Array]:
    """Returns the next carry and output of an mLSTM.

    For each head:

        q, v, o, i, f = pₜ,   k = pₜ / √E
        mₜ = max(log σ(f) + mₜ₋₁, i)
        i′ = exp(i − mₜ)       f′ = exp(log σ(f) + mₜ₋₁ − mₜ)
        Cₜ = f′ Cₜ₋₁ + i′ v kᵀ
        nₜ = f′ nₜ₋₁ + i′ k
        hₜ = σ(o) LN(Cₜ q / max(|nₜ · q|, exp(−mₜ)))

    The stabiliser m cancels out in h.

    Args:
      extra_params: `norm_scale` `[H]`, of the layer normalisation of each head.
      carry: leaves `[..., M, ...]`.
      projected: p `[..., 4·H + 2·M]`, in the order q, k, v, o, i, f.
      recurrent: ignored; an mLSTM has no recurrent product.

    Source: Beck et al. 2024, "xLSTM" (arXiv:2405.04517), equations 19–27 and appendix A.3, with
    NX-AI/xlstm's sigmoid forget gate and normalisation of each head.
    """
    del recurrent
    gates = _split(projected, carry.stabiliser.shape[-1])
    kept = gates.keep + carry.stabiliser
    stabiliser = jnp.maximum(kept, gates.admit)
    keep, admit = jnp.exp(kept - stabiliser), jnp.exp(gates.admit - stabiliser)
    written = (admit[..., None] * gates.value)[..., :, None] * gates.key[..., None, :]
    memory = keep[..., None, None] * carry.memory + written
    normaliser = keep[..., None] * carry.normaliser + admit[..., None] * gates.key
    read = product("...vk,...k->...v", memory, gates.query)
    weight = jnp.sum(normaliser * gates.query, axis=-1)
    outputs = _normalise(read, weight, stabiliser)
    return MLSTMCarry(memory, normaliser, stabiliser), _output(extra_params, outputs, gates.output)


def chunk(
    extra_params: Params, carry: MLSTMCarry, projected: Array, steps: Chunk, *, dtype: str
) -> tuple[MLSTMCarry, jax.Array]:
    """Returns the carry after a chunk and the outputs of its steps.

    With F the sum of log σ(f):

        Dₜₛ = F between s and t + iₛ         mₜ = max(F up to t + m₀, maxₛ Dₜₛ)
        Sₜₛ = exp(Dₜₛ − mₜ) (qₜ · kₛ)
        Cₜ qₜ = Σₛ Sₜₛ vₛ + exp(F up to t + m₀ − mₜ) C₀ qₜ        nₜ · qₜ = Σₛ Sₜₛ + … n₀ · qₜ

    See `Cell.chunk`. Source: Beck et al. 2024, appendix A.3, and its form with a carry.
    """
    gates = _split(projected, carry.stabiliser.shape[-1])
    query, key, value, admit, keep = (
        heads_first(part) for part in (*gates[:3], gates.admit, gates.keep)
    )
    keep = jnp.where(steps.real[:, None], keep, 0.0)
    pairs = chunks.sums_between(steps, keep) + admit[:, :, None, :]
    pairs = jnp.where(steps.visible, pairs, -jnp.inf)
    in_episode = jnp.where(steps.same, keep[:, :, None, :], 0.0)
    before = jnp.where(steps.continues, carry.stabiliser[..., None], 0.0)
    carried = jnp.sum(in_episode, axis=-1) + before
    stabiliser = jnp.maximum(carried, jnp.max(pairs, axis=-1))
    weights = jnp.exp(pairs - stabiliser[..., None])
    first = jnp.where(steps.continues, jnp.exp(carried - stabiliser), 0.0)

    scores = weights * product("bmte,bmse->bmts", query, key, dtype=dtype)
    read = product("bmts,bmse->bmte", scores, value, dtype=dtype)
    read += first[..., None] * product("bmke,bmte->bmtk", carry.memory, query, dtype=dtype)
    weight = jnp.sum(scores, axis=-1)
    weight += first * product("bme,bmte->bmt", carry.normaliser, query, dtype=dtype)
    outputs = heads_first(_normalise(read, weight, stabiliser))

    last, end = weights[:, :, -1, :, None] * key, first[:, :, -1]
    memory = end[..., None, None] * carry.memory
    memory += product("bmsv,bmsk->bmvk", value, last, dtype=dtype)
    normaliser = end[..., None] * carry.normaliser + jnp.sum(last, axis=-2)
    next_carry = MLSTMCarry(memory, normaliser, stabiliser[:, :, -1])
    return next_carry, _output(extra_params, outputs, gates.output)


def spread(key: Key, params: Params, span: int) -> Params:
    """Returns params whose heads have time constants between 2 and `span` steps.

    Args:
      key: not used.
      params: from `init`.
      span: steps, above 2.
    """
    del key
    bias, width = params["input_bias"], params["norm_scale"].shape[0]
    num_heads = (bias.shape[0] - 4 * width) // 2
    return {
        **params, "input_bias": bias.at[-num_heads:].set(head_log_odds(num_heads, span))
    }  # fmt: skip


def _split(projected: Array, num_heads: int) -> _Gates:
    size = (projected.shape[-1] - 2 * num_heads) // 4
    ends = (size, 2 * size, 3 * size, 4 * size, 4 * size + num_heads)
    query, key, value, output, admit, keep = jnp.split(projected, ends, axis=-1)
    query, key, value = (split_heads(part, num_heads) for part in (query, key, value))
    scaled = key * (size // num_heads) ** -0.5
    return _Gates(query, scaled, value, output, admit, jax.nn.log_sigmoid(keep))


def _normalise(read: jax.Array, weight: jax.Array, stabiliser: jax.Array) -> jax.Array:
    """Returns C q / max(|n · q|, exp(−m)), `[..., E]`."""
    # Clipped, for the gradient of an infinite exponential would be NaN.
    least = jnp.exp(jnp.minimum(-stabiliser, LARGEST))
    return read / jnp.maximum(jnp.abs(weight), least)[..., None]


def _output(extra_params: Params, outputs: jax.Array, gate: jax.Array) -> jax.Array:
    """Returns σ(o) LN(h) `[..., H]` from h `[..., M, E]`."""
    scale = split_heads(extra_params["norm_scale"], outputs.shape[-2])
    return jax.nn.sigmoid(gate) * join_heads(layer_norm(outputs, scale))


def configure(num_heads: int, conv_size: int) -> Cell:
    """Returns the mLSTM with some number of heads; see `Cell.configure`."""
    del conv_size
    return Cell(
        num_gates=0,
        init=partial(init, num_heads=num_heads),
        zero_carry=partial(zero_carry, num_heads=num_heads),
        combine=combine,
        sums_gates=True,
        spread=spread,
        chunk=chunk,
        configure=configure,
        has_vector_carry=False,
    )


M_LSTM = configure(num_heads=0, conv_size=1)
