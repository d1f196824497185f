"""Mamba-2: a diagonal state-space model with one decay per head, and a short convolution."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.nn.cells import chunks
from vla_jax.nn.cells.chunks import Chunk, heads_first, join_heads, product, split_heads
from vla_jax.nn.cells.contract import Cell, init_projection, zero_array
from vla_jax.nn.cells.decay_rates import draw_rates, log_decay, spread_rates
from vla_jax.nn.layers import rms_norm
from vla_jax.types import Array, Key, Params


class Mamba2Carry(NamedTuple):
    """Carry of a Mamba-2 cell."""

    memory: Array  # [..., M, E (values), E (state)] float32
    recent: Array | None  # [..., S-1, H + 2·E] float32, inputs of the convolution; None without it


class _Parts(NamedTuple):
    """The parts of a projection."""

    gate: jax.Array  # [..., H], of the output
    inputs: jax.Array  # [..., H + 2·E], values, keys and queries before the convolution
    step_size: jax.Array  # [..., M], Δ
    log_decay: jax.Array  # [..., M], −exp(log_rate) Δ


def init(key: Key, input_size: int, hidden_size: int, *, num_heads: int, conv_size: int) -> Params:
    """Returns `{"input_kernel" [D, 2·H + 2·E + M], "input_bias", "log_rate" [M], ...}`.

    The others are `"skip_scale"` `[M]`, `"norm_scale"` `[H]`, and `"conv_weights"` `[S, H + 2·E]`
    and `"conv_bias"` if there is a convolution. The heads start with time constants between 1 and
    1,000 steps.

    Args:
      key: consumed.
      input_size: D.
      hidden_size: H.
      num_heads: M; 0 means an automatic number.
      conv_size: S, steps of the convolution; 1 means none.

    Source: Dao & Gu 2024, as in state-spaces/mamba; see `decay_rates.draw_rates`.
    """
    heads = chunks.count_heads(num_heads, hidden_size)
    kernel_key, conv_key, rate_key = jax.random.split(key, 3)
    mixed = hidden_size + 2 * (hidden_size // heads)
    params = init_projection(kernel_key, input_size, hidden_size, hidden_size + mixed + heads)
    log_rate, bias = draw_rates(rate_key, heads)
    params |= {
        "input_bias": params["input_bias"].at[-heads:].set(bias),
        "log_rate": log_rate,
        "skip_scale": jnp.ones(heads),
        "norm_scale": jnp.ones(hidden_size),
    }
    if conv_size == 1:
        return params
    kernel = chunks.init_convolution(conv_key, conv_size, mixed)
    return {**params, "conv_weights": kernel, "conv_bias": jnp.zeros(mixed)}


def zero_carry(like: Array, hidden_size: int, *, num_heads: int, conv_size: int) -> Mamba2Carry:
    """Returns the carry before the first step, all zeros.

    Args:
      like: any array `[B, ...]` of the data; the carry is sharded like it.
      hidden_size: H.
      num_heads: M; 0 means an automatic number.
      conv_size: S, steps of the convolution; 1 means none.
    """
    heads = chunks.count_heads(num_heads, hidden_size)
    size = hidden_size // heads
    recent = None if conv_size == 1 else zero_array(like, conv_size - 1, hidden_size + 2 * size)
    return Mamba2Carry(zero_array(like, heads, size, size), recent)


def combine(
    extra_params: Params, carry: Mamba2Carry, projected: Array, recurrent: Array | None
) -> tuple[Mamba2Carry, jax.Array]:
    """Returns the next carry and output of a Mamba-2 cell.

    For each head:

        x, B, C = silu(conv(pₜ))       Δ = softplus(pₜ)       α = exp(−exp(log_rate) Δ)
        Sₜ = α Sₜ₋₁ + Δ x Bᵀ
        hₜ = RMSNorm((Sₜ C + D x) silu(zₜ))

    B and C are shared by the heads; the normalisation is over all H features.

    Args:
      extra_params: `log_rate` `[M]`, D `skip_scale` `[M]`, `norm_scale` `[H]`, and `conv_weights`
        `[S, H + 2·E]` and `conv_bias` if there is a convolution.
      carry: leaves `[..., M, ...]`.
      projected: p `[..., 2·H + 2·E + M]`, in the order z, x, B, C, Δ.
      recurrent: ignored; a Mamba-2 cell has no recurrent product.

    Source: Dao & Gu 2024, "Transformers are SSMs" (arXiv:2405.21060), sections 6 and 7.1, as in
    `Mamba2` of state-spaces/mamba; its output projection is the input product of the layer above.
    """
    del recurrent
    parts = _split(extra_params, projected)
    recent, inputs = carry.recent, parts.inputs
    if recent is not None:
        recent, inputs = chunks.convolve_step(extra_params["conv_weights"], recent, inputs)
    value, key, query = _read_write(extra_params, inputs)
    written = (parts.step_size[..., None] * value)[..., None] * key[..., None, None, :]
    memory = jnp.exp(parts.log_decay)[..., None, None] * carry.memory + written
    outputs = product("...mvk,...k->...mv", memory, query)
    return Mamba2Carry(memory, recent), _output(extra_params, outputs, value, parts.gate)


def chunk(
    extra_params: Params, carry: Mamba2Carry, projected: Array, steps: Chunk, *, dtype: str
) -> tuple[Mamba2Carry, jax.Array]:
    """Returns the carry after a chunk and the outputs of its steps.

    With γₜₛ the product of the decays α after s up to t:

        Sₜ Cₜ = γₜ₀ S₀ Cₜ + Σₛ≤ₜ γₜₛ (Cₜ · Bₛ) Δₛ xₛ

    See `Cell.chunk`. Source: Dao & Gu 2024, section 6.
    """
    parts = _split(extra_params, projected)
    recent, inputs = carry.recent, parts.inputs
    if recent is not None:
        recent, inputs = chunks.convolve(extra_params["conv_weights"], recent, inputs, steps)
    value, key, query = _read_write(extra_params, inputs)
    step_size = jnp.where(steps.real[..., None], parts.step_size, 0.0)
    written = heads_first(step_size[..., None] * value)
    decays = chunks.decays(steps, heads_first(parts.log_decay))

    from_carry = decays.carry[..., None]
    scores = decays.pairs * product("btn,bsn->bts", query, key, dtype=dtype)[:, None]
    outputs = from_carry * product("bmvn,btn->bmtv", carry.memory, query, dtype=dtype)
    outputs += product("bmts,bmsv->bmtv", scores, written, dtype=dtype)
    last = decays.pairs[:, :, -1, :, None] * written
    memory = from_carry[:, :, -1:] * carry.memory
    memory += product("bmsv,bsn->bmvn", last, key, dtype=dtype)
    next_carry = Mamba2Carry(memory, recent)
    return next_carry, _output(extra_params, heads_first(outputs), value, parts.gate)


def _split(extra_params: Params, projected: Array) -> _Parts:
    num_heads, size = extra_params["log_rate"].shape[0], extra_params["norm_scale"].shape[0]
    ends = (size, projected.shape[-1] - num_heads)
    gate, inputs, step_size = jnp.split(projected, ends, axis=-1)
    step_size = jax.nn.softplus(step_size)
    return _Parts(gate, inputs, step_size, log_decay(extra_params["log_rate"], step_size))


def _read_write(extra_params: Params, inputs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns x `[..., M, E]`, B and C `[..., E]`."""
    if "conv_bias" in extra_params:
        inputs = inputs + jnp.broadcast_to(extra_params["conv_bias"], inputs.shape)
    num_heads, size = extra_params["log_rate"].shape[0], extra_params["norm_scale"].shape[0]
    ends = (size, size + size // num_heads)
    value, key, query = jnp.split(jax.nn.silu(inputs), ends, axis=-1)
    return split_heads(value, num_heads), key, query


def _output(
    extra_params: Params, outputs: jax.Array, value: jax.Array, gate: jax.Array
) -> jax.Array:
    """Returns RMSNorm((y + D x) silu(z)) `[..., H]` from y `[..., M, E]`."""
    skip = jnp.broadcast_to(extra_params["skip_scale"][:, None], value.shape)
    gated = join_heads(outputs + skip * value) * jax.nn.silu(gate)
    return rms_norm(gated, extra_params["norm_scale"])


def configure(num_heads: int, conv_size: int) -> Cell:
    """Returns the Mamba-2 cell with some number of heads; see `Cell.configure`."""
    sizes = {"num_heads": num_heads, "conv_size": conv_size}
    return Cell(
        num_gates=0,
        init=partial(init, **sizes),
        zero_carry=partial(zero_carry, **sizes),
        combine=combine,
        sums_gates=True,
        spread=spread_rates,
        chunk=chunk,
        configure=configure,
        has_vector_carry=False,
    )


MAMBA2 = configure(num_heads=0, conv_size=4)
