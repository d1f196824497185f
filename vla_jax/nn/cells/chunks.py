"""Parts of cells with several heads: their sizes, a short convolution, and sums over a chunk.

A chunk is C successive steps `[B, C, ...]` that a cell computes at once, with matrix products
instead of a loop; see `chunkwise`. Steps may be masked, and an episode may start at any of them:
segment n of a chunk are the steps after its n-th reset, and only segment 0 continues the carry.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.types import Array, Key

AUTOMATIC_HEADS = 4  # greatest number of heads of a cell whose config does not name one
LEAST_HEAD_SIZE = 3  # units of such a head


class Chunk(NamedTuple):
    """Steps of a chunk that are computed, and the episodes to which they belong."""

    real: jax.Array  # [B, C] bool, False where the step keeps the carry
    segment: jax.Array  # [B, C] int32, number of resets up to this step

    @property
    def continues(self) -> jax.Array:
        """True where the episode is that of the carry before the chunk, `[B, 1, C]`."""
        return (self.segment == 0)[:, None]

    @property
    def same(self) -> jax.Array:
        """True where step t is not before s and in its episode, `[B, 1, C (t), C (s)]`."""
        size = self.segment.shape[1]
        # Derived from the data, so that a sharded batch stays sharded.
        together = self.segment[:, None, :, None] == self.segment[:, None, None, :]
        return together & jnp.tril(jnp.ones((1, 1, size, size), bool))

    @property
    def visible(self) -> jax.Array:
        """True where step s influences step t, `[B, 1, C (t), C (s)]`."""
        return self.same & self.real[:, None, None, :]


class Decays(NamedTuple):
    """Factors by which a carry decays within a chunk; all of them in [0, 1]."""

    pairs: jax.Array  # [B, M, C (t), C (s)], from step s to step t; 0 where s is not visible
    carry: jax.Array  # [B, M, C], from the carry before the chunk to step t


def count_heads(num_heads: int, hidden_size: int) -> int:
    """Returns the number of heads M.

    0 means the greatest number up to 4 that divides H and leaves each head 3 units.

    Raises:
      ValueError: the heads do not divide the units, or a head has a single unit, whose
        normalised output is constant.
    """
    if not num_heads:
        few = range(min(AUTOMATIC_HEADS, hidden_size // LEAST_HEAD_SIZE), 1, -1)
        num_heads = next((m for m in few if hidden_size % m == 0), 1)
    if num_heads < 0 or hidden_size % num_heads:
        raise ValueError(
            f"num_heads must divide hidden_size = {hidden_size}, got {num_heads}; choose another "
            "number, or 0 for an automatic one."
        )
    if hidden_size == num_heads:
        raise ValueError(
            f"num_heads must leave each head 2 of the hidden_size = {hidden_size} units, got "
            f"{num_heads}; choose fewer heads or more units."
        )
    return num_heads


def split_heads(features: Array, num_heads: int) -> jax.Array:
    """Returns `[..., M·E]` as `[..., M, E]`."""
    return jnp.reshape(features, (*features.shape[:-1], num_heads, -1))


def join_heads(features: Array) -> jax.Array:
    """Returns `[..., M, E]` as `[..., M·E]`."""
    return jnp.reshape(features, (*features.shape[:-2], -1))


def heads_first(steps: Array) -> jax.Array:
    """Exchanges the axis of steps and that of heads, `[B, C, M, ...]` and `[B, M, C, ...]`."""
    return jnp.swapaxes(steps, 1, 2)


def product(axes: str, *factors: Array, dtype: str = "float32") -> jax.Array:
    """Returns an einsum of arrays, accumulated in float32.

    Args:
      axes: of the einsum.
      *factors: the arrays.
      dtype: of the factors. Those in float32 are multiplied in full: a GPU would round them to
        TF32, and the sums over a chunk would differ from single steps in the third digit.
    """
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    cast = (jnp.asarray(factor, dtype) for factor in factors)
    return jnp.einsum(axes, *cast, precision=precision, preferred_element_type=jnp.float32)


def solve_lower(system: jax.Array, right: jax.Array) -> jax.Array:
    """Returns x of (I + L) x = right, L being the part of `system` below its diagonal.

    The inverse of I + L is assembled from those of the blocks on its diagonal, which double in
    size: the lower left block of a pair with inverses A and D is −D L A. LAPACK's solution of a
    batch of systems waits for other threads of the pool in which XLA runs it, and never returns if
    all of them wait (jaxlib 0.10.2 on two cores).

    Args:
      system: `[..., C, C]` float32.
      right: `[..., C, X]` float32.
    """
    size = system.shape[-1]
    below = jnp.tril(jnp.ones((size, size), bool), -1)
    lower = jnp.where(jnp.broadcast_to(below, system.shape), system, 0.0)
    inverse = jax.lax.stop_gradient(_inverse(lower))

    def solve(axes: str, right: jax.Array) -> jax.Array:
        x = product(axes, inverse, right)
        # Relative error where 64 steps have one key and β is 2: 1.5e-5 by the inverse, now 3e-6.
        return x + product(axes, inverse, right - x - product(axes, lower, x))

    return jax.lax.custom_linear_solve(
        lambda x: x + product("...ts,...sx->...tx", lower, x),
        right,
        lambda _, right: solve("...ts,...sx->...tx", right),
        lambda _, right: solve("...st,...sx->...tx", right),
    )


def _inverse(lower: jax.Array) -> jax.Array:
    """Returns (I + L)⁻¹ `[..., C, C]` of a matrix L that is zero on and above its diagonal."""
    num_steps, lead = lower.shape[-1], lower.shape[:-2]
    padding = (1 << (num_steps - 1).bit_length()) - num_steps
    lower = jnp.pad(lower, [(0, 0)] * len(lead) + [(0, padding)] * 2)
    size = num_steps + padding
    blocks = jnp.ones_like(lower[..., :1, None])  # [..., C / c, c, c]
    while (half := blocks.shape[-1]) < size:
        starts = range(0, size, 2 * half)
        corners = [lower[..., i + half : i + 2 * half, i : i + half] for i in starts]
        first, last = blocks[..., ::2, :, :], blocks[..., 1::2, :, :]
        corner = -product("...ij,...jk,...kl->...il", last, jnp.stack(corners, -3), first)
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        blocks = jnp.concatenate([top, jnp.concatenate([corner, last], axis=-1)], axis=-2)
    return blocks[..., 0, :num_steps, :num_steps]


def sums_between(chunk: Chunk, steps: jax.Array) -> jax.Array:
    """Returns the sums of the steps after s up to t, `[B, M, C (t), C (s)]`.

    The differences of one cumulative sum would be less accurate: a sum of −10,000 before two steps
    leaves three digits of the sum between them.

    Args:
      chunk: of the steps.
      steps: `[B, M, C]`, zeros at masked steps.
    """
    size = steps.shape[-1]
    lower = jnp.tril(jnp.ones((1, 1, size, size), bool))
    after = lower & ~lower.swapaxes(-1, -2)  # [.., r, s], r > s
    terms = jnp.where(after, steps[..., :, None], 0.0)
    lower = jnp.broadcast_to(lower[0, 0].astype(jnp.float32), (chunk.real.shape[0], size, size))
    return product("btr,bmrs->bmts", lower, terms)


def decays(chunk: Chunk, log_decay: jax.Array) -> Decays:
    """Returns the products of the decays of the steps of a chunk.

    Args:
      chunk: of the steps.
      log_decay: `[B, M, C]`, at most 0; the logarithm of the factor of each step.
    """
    log_decay = jnp.where(chunk.real[:, None], log_decay, 0.0)
    pairs = jnp.exp(sums_between(chunk, log_decay))
    carry = jnp.exp(jnp.cumsum(log_decay, axis=-1))
    return Decays(jnp.where(chunk.visible, pairs, 0.0), jnp.where(chunk.continues, carry, 0.0))


def init_convolution(key: Key, num_steps: int, size: int) -> jax.Array:
    """Returns a kernel `[S, X]` from U(−1/√S, 1/√S), as `torch.nn.Conv1d` with X groups.

    Args:
      key: consumed.
      num_steps: S.
      size: X, features.
    """
    bound = num_steps**-0.5
    return jax.random.uniform(key, (num_steps, size), jnp.float32, -bound, bound)


def convolve_step(kernel: Array, recent: Array, inputs: Array) -> tuple[jax.Array, jax.Array]:
    """Returns the last inputs and the convolution of one step: a weighted sum per feature.

    Args:
      kernel: `[S, X]`, the weight of the newest input last.
      recent: `[..., S-1, X]`, the inputs of the steps before, oldest first.
      inputs: `[..., X]`, or with leading axes that broadcast.

    Returns:
      `recent` for the next step, and `[..., X]`.
    """
    lead = recent.shape[:-2]
    newest = jnp.broadcast_to(inputs, (*lead, inputs.shape[-1]))[..., None, :]
    window = jnp.concatenate([recent, newest], axis=-2)
    # One term after the other: XLA takes three times as long for a product and a sum over S.
    terms = (window[..., s, :] * _along(kernel[s], window[..., s, :]) for s in range(len(kernel)))
    return window[..., 1:, :], functools.reduce(jnp.add, terms)


def convolve(
    kernel: Array, recent: Array, inputs: Array, chunk: Chunk
) -> tuple[jax.Array, jax.Array]:
    """Returns the last inputs and the convolutions of all steps of a chunk.

    Masked steps are left out, and the steps of an episode see none of the episode before.

    Args:
      kernel: `[S, X]`, the weight of the newest input last.
      recent: `[B, S-1, X]`, the inputs of the steps before the chunk, oldest first.
      inputs: `[B, C, X]`.
      chunk: of the steps.

    Returns:
      `recent` after the chunk, and `[B, C, X]`; undefined at masked steps.
    """
    taps, num_steps = recent.shape[1], inputs.shape[1]
    rows = jnp.concatenate([recent, inputs], axis=1)
    before = jnp.zeros_like(recent[..., 0], jnp.int32)  # derived from the data to be sharded alike
    segment = jnp.concatenate([before, chunk.segment], axis=1)
    real = jnp.concatenate([before == 0, chunk.real], axis=1)
    # Index of the last real row before each row, and before the end.
    index = jnp.where(real, jnp.arange(taps + num_steps)[None], 0)
    previous = jnp.pad(jax.lax.cummax(index, axis=1), ((0, 0), (1, 0)))
    zero, outputs, last = jnp.zeros_like(chunk.segment), _along(kernel[-1], inputs) * inputs, []
    now = zero + jnp.arange(taps, taps + num_steps)[None]
    end = zero[:, :1] + (taps + num_steps)
    for tap in range(taps):
        now, end = (jnp.take_along_axis(previous, each, axis=1) for each in (now, end))
        seen = _rows(rows, segment, now, chunk.segment)
        outputs += seen * _along(kernel[-2 - tap], inputs)
        last.append(_rows(rows, segment, end, chunk.segment[:, -1:]))
    return jnp.concatenate(last[::-1], axis=1), outputs


def _rows(rows: jax.Array, segment: jax.Array, index: jax.Array, own: jax.Array) -> jax.Array:
    """Returns the rows at an index `[B, C]`, zeros where they are of another segment than `own`."""
    taken = jax.vmap(lambda rows, index: rows[index])(rows, index)
    is_own = jnp.take_along_axis(segment, index, axis=1) == own
    return jnp.where(is_own[..., None], taken, 0.0)


def _along(weights: Array, inputs: Array) -> jax.Array:
    return jnp.broadcast_to(weights, inputs.shape)
