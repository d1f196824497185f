"""Gated DeltaNet: a matrix per head that is corrected towards each new value."""

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

TINY = 1e-6  # of the length of a query or key, so that it has a direction


class GatedDeltaNetCarry(NamedTuple):
    """Carry of a gated DeltaNet."""

    memory: Array  # [..., M, E (values), E (keys)] float32
    recent: Array | None  # [..., S-1, 3·H] float32, inputs of the convolution; None without it


class _Parts(NamedTuple):
    """The parts of a projection."""

    inputs: jax.Array  # [..., 3·H], queries, keys and values before the convolution
    gate: jax.Array  # [..., H], of the output
    strength: jax.Array  # [..., M], β
    log_decay: jax.Array  # [..., M], log α


def init(key: Key, input_size: int, hidden_size: int, *, num_heads: int, conv_size: int) -> Params:
    """Returns `{"input_kernel" [D, 4·H + 2·M], "input_bias", "log_rate" [M], ...}`.

    The other two are `"norm_scale"` `[E]`, and `"conv_weights"` `[S, 3·H]` if there is a
    convolution. The heads start with time constants between 1 and 1,000 steps.

    Args:
      key: consumed.
      input_size: D.
      hidden_size: H.
      num_heads: M; 0 means an automatic number.
      conv_size: S, steps of the convolution; 1 means none.

    Source: Yang et al. 2024, as in fla-org/flash-linear-attention: rates and step sizes as in
    Mamba-2, see `decay_rates.draw_rates`.
    """
    heads = chunks.count_heads(num_heads, hidden_size)
    kernel_key, conv_key, rate_key = jax.random.split(key, 3)
    params = init_projection(kernel_key, input_size, hidden_size, 4 * hidden_size + 2 * heads)
    log_rate, bias = draw_rates(rate_key, heads)
    params |= {
        "input_bias": params["input_bias"].at[-heads:].set(bias),
        "log_rate": log_rate,
        "norm_scale": jnp.ones(hidden_size // heads),
    }
    if conv_size == 1:
        return params
    return {**params, "conv_weights": chunks.init_convolution(conv_key, conv_size, 3 * hidden_size)}


def zero_carry(
    like: Array, hidden_size: int, *, num_heads: int, conv_size: int
) -> GatedDeltaNetCarry:
    """Returns the carry before the first step, all zeros.

    Args:
      like: any array `[B, ...]` of the data; the carry is sharded like it.
      hidden_size: H.
      num_heads: M; 0 means an automatic number.
      conv_size: S, steps of the convolution; 1 means none.
    """
    heads = chunks.count_heads(num_heads, hidden_size)
    size = hidden_size // heads
    recent = None if conv_size == 1 else zero_array(like, conv_size - 1, 3 * hidden_size)
    return GatedDeltaNetCarry(zero_array(like, heads, size, size), recent)


def combine(
    extra_params: Params, carry: GatedDeltaNetCarry, projected: Array, recurrent: Array | None
) -> tuple[GatedDeltaNetCarry, jax.Array]:
    """Returns the next carry and output of a gated DeltaNet.

    For each head:

        q, k, v = silu(conv(pₜ)),   q and k divided by their lengths
        β = 2 σ(pₜ)       α = exp(−exp(log_rate) softplus(pₜ))
        Sₜ = α Sₜ₋₁ (I − β k kᵀ) + β v kᵀ
        hₜ = RMSNorm(Sₜ q) silu(gₜ)

    With β in (0, 2) the eigenvalues of I − β k kᵀ are in (−1, 1]: a head can reflect its memory,
    and with it track permutations, which cells with positive eigenvalues cannot.

    Args:
      extra_params: `log_rate` `[M]`, `norm_scale` `[E]`, and `conv_weights` `[S, 3·H]` if there
        is a convolution.
      carry: leaves `[..., M, ...]`.
      projected: p `[..., 4·H + 2·M]`, in the order q, k, v, g, β, α.
      recurrent: ignored; a gated DeltaNet has no recurrent product.

    Source: Yang et al. 2024, "Gated Delta Networks" (arXiv:2412.06464), equation 10; β in (0, 2):
    Grazzi et al. 2024 (arXiv:2411.12537).
    """
    del recurrent
    parts = _split(extra_params, projected)
    recent, inputs = carry.recent, parts.inputs
    if recent is not None:
        recent, inputs = chunks.convolve_step(extra_params["conv_weights"], recent, inputs)
    query, key, value = _read_write(inputs, carry.memory.shape[-3])
    decay = jnp.exp(parts.log_decay)[..., None]
    error = value - decay * product("...vk,...k->...v", carry.memory, key)
    written = parts.strength[..., None] * error
    memory = decay[..., None] * carry.memory + written[..., :, None] * key[..., None, :]
    outputs = product("...vk,...k->...v", memory, query)
    return GatedDeltaNetCarry(memory, recent), _output(extra_params, outputs, parts.gate)


def chunk(
    extra_params: Params, carry: GatedDeltaNetCarry, projected: Array, steps: Chunk, *, dtype: str
) -> tuple[GatedDeltaNetCarry, jax.Array]:
    """Returns the carry after a chunk and the outputs of its steps.

    Each step adds β uₜ kₜᵀ to the memory. With γₜₛ the product of the α after s up to t, the errors
    u of all steps are the solution of one triangular system (the WY representation of a product of
    reflections), which needs no loop over matrices:

        uₜ + Σₛ<ₜ γₜₛ (kₜ · kₛ) βₛ uₛ = vₜ − γₜ₀ S₀ kₜ
        Sₜ qₜ = γₜ₀ S₀ qₜ + Σₛ≤ₜ γₜₛ (qₜ · kₛ) βₛ uₛ

    See `Cell.chunk`. Source: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta
    Rule over Sequence Length" (arXiv:2406.06484), section 3; with α: arXiv:2412.06464, section 3.3.
    """
    parts = _split(extra_params, projected)
    recent, inputs = carry.recent, parts.inputs
    if recent is not None:
        recent, inputs = chunks.convolve(extra_params["conv_weights"], recent, inputs, steps)
    query, key, value = map(heads_first, _read_write(inputs, carry.memory.shape[-3]))
    strength = jnp.where(steps.real[:, None], heads_first(parts.strength), 0.0)[..., None]
    decays = chunks.decays(steps, heads_first(parts.log_decay))

    from_carry = decays.carry[..., None]
    expected = from_carry * product("bmvk,bmtk->bmtv", carry.memory, key, dtype=dtype)
    system = strength * decays.pairs * product("bmtk,bmsk->bmts", key, key, dtype=dtype)
    written = chunks.solve_lower(system, strength * (value - expected))
    scores = decays.pairs * product("bmtk,bmsk->bmts", query, key, dtype=dtype)
    outputs = from_carry * product("bmvk,bmtk->bmtv", carry.memory, query, dtype=dtype)
    outputs += product("bmts,bmsv->bmtv", scores, written, dtype=dtype)
    memory = from_carry[:, :, -1:] * carry.memory
    last = decays.pairs[:, :, -1, :, None] * key
    memory += product("bmsv,bmsk->bmvk", written, last, dtype=dtype)
    next_carry = GatedDeltaNetCarry(memory, recent)
    return next_carry, _output(extra_params, heads_first(outputs), parts.gate)


def _split(extra_params: Params, projected: Array) -> _Parts:
    num_heads = extra_params["log_rate"].shape[0]
    size = (projected.shape[-1] - 2 * num_heads) // 4
    ends = (3 * size, 4 * size, 4 * size + num_heads)
    inputs, gate, strength, step_size = jnp.split(projected, ends, axis=-1)
    decay = log_decay(extra_params["log_rate"], jax.nn.softplus(step_size))
    return _Parts(inputs, gate, 2.0 * jax.nn.sigmoid(strength), decay)


def _read_write(inputs: jax.Array, num_heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns queries and keys of length 1 and values, each `[..., M, E]`."""
    parts = jnp.split(jax.nn.silu(inputs), 3, axis=-1)
    query, key, value = (split_heads(part, num_heads) for part in parts)
    return _direction(query), _direction(key), value


def _direction(vectors: jax.Array) -> jax.Array:
    square = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(square + TINY)


def _output(extra_params: Params, outputs: jax.Array, gate: jax.Array) -> jax.Array:
    """Returns RMSNorm(h) silu(g) `[..., H]` from h `[..., M, E]`."""
    normalised = rms_norm(outputs, extra_params["norm_scale"])
    return join_heads(normalised) * jax.nn.silu(gate)


def configure(num_heads: int, conv_size: int) -> Cell:
    """Returns the gated DeltaNet with some number of heads; see `Cell.configure`."""
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


GATED_DELTA_NET = configure(num_heads=0, conv_size=4)
