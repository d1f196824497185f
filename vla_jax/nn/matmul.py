"""The products of a recurrent step: few rows, one large kernel, again and again.

On a CPU, XLA multiplies by the transpose of a large kernel slowly, since it makes that transpose
first. Here it is told so that the kernel is read as it lies; other devices get the plain product.
Figures: `python -m train.benchmark --cases products`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.types import Array

LARGE = 2**20  # numbers in a kernel, 4 MB: more than the cache of one core holds
MANY = 200  # rows from which on it no longer matters which factor comes first


class Turned(NamedTuple):
    """Stands for the transpose of a kernel, which is read as it lies."""

    kernel: Array  # [E, D]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the transpose, `[D, E]`."""
        return self.kernel.shape[::-1]


def times(inputs: Array, kernel: Array | Turned, *, dtype: str = "float32") -> jax.Array:
    """Returns `inputs · kernel`.

    Args:
      inputs: `[..., D]`.
      kernel: `[D, E]`.
      dtype: of the two factors; the product is summed in float32 all the same.

    Returns:
      `[..., E]` float32.
    """
    # The casts stand here, inside a scan, so that the gradients of its steps are summed in float32;
    # outside of it they would be summed in `dtype`.
    inputs = jnp.asarray(inputs, dtype)
    if isinstance(kernel, Turned):
        turned = jnp.asarray(kernel.kernel, dtype)
        return jax.lax.platform_dependent(inputs, turned, cpu=_kernel_first, default=_kernel_last)
    return _plain(inputs, jnp.asarray(kernel, dtype))


def transpose(kernel: Array) -> Array | Turned:
    """Returns `kernelᵀ` `[D, E]` for many products in sequence.

    A small kernel is turned over, a large one is read as it lies: to turn it over takes as long as
    a dozen steps of five rows.

    Args:
      kernel: `[E, D]`.
    """
    return Turned(kernel) if is_large(kernel) else kernel.T


def is_large(kernel: Array) -> bool:
    """Whether a CPU cares how a kernel `[D, E]` of this size lies."""
    return kernel.size >= LARGE


def _plain(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.matmul(inputs, kernel, preferred_element_type=jnp.float32)


def _kernel_last(inputs: jax.Array, turned: jax.Array) -> jax.Array:
    return _plain(inputs, turned.T)


def _kernel_first(inputs: jax.Array, turned: jax.Array) -> jax.Array:
    *leading, size = inputs.shape
    num_rows = math.prod(leading)
    rows = inputs.reshape(num_rows, size)
    if isinstance(num_rows, int) and num_rows > 1:  # no int: left open in an export
        rows = jnp.pad(rows, ((0, -num_rows % 4), (0, 0)))  # whole groups of four are faster
    columns = jnp.einsum("ed,bd->eb", turned, rows, preferred_element_type=jnp.float32)
    # Without the barrier XLA would fold this transpose into the product, which undoes all of it.
    product = jax.lax.optimization_barrier(columns).T
    return product[:num_rows].reshape(*leading, len(turned))
