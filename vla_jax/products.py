"""The products of a recurrent step: few rows, one large kernel, again and again.

On a CPU, XLA multiplies few rows by a large kernel fast only where the factors lie as it likes, and
by the transpose of a kernel slowly, since it makes that transpose first. Here both are told so that
a kernel is read as it lies; other devices get the plain product. Figures:
`python -m train.benchmark --works products`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.types import Array

LARGE = 2**20  # numbers in a kernel, 4 MB: more than the cache of one core holds
FEW = 24  # rows up to which it pays to turn these over
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
    kernel = jnp.asarray(kernel, dtype)
    if is_large(kernel) and 1 < _num_rows(inputs) <= FEW:
        return jax.lax.platform_dependent(inputs, kernel, cpu=_inputs_turned, default=_plain)
    return _plain(inputs, kernel)


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


# XLA would fold the transposes of the small factor and of the result into the product, which undoes
# what is meant here; the barriers keep them where they stand.


def _inputs_turned(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    columns = jax.lax.optimization_barrier(jnp.moveaxis(inputs, -1, 0))
    return jnp.einsum("d...,de->...e", columns, kernel, preferred_element_type=jnp.float32)


def _kernel_first(inputs: jax.Array, turned: jax.Array) -> jax.Array:
    *leading, size = inputs.shape
    num_rows = math.prod(leading)
    rows = inputs.reshape(num_rows, size)
    if _num_rows(inputs) > 1:
        rows = jnp.pad(rows, ((0, -num_rows % 4), (0, 0)))  # whole groups of four are faster
    columns = jnp.einsum("ed,bd->eb", turned, rows, preferred_element_type=jnp.float32)
    product = jax.lax.optimization_barrier(columns).T
    return product[:num_rows].reshape(*leading, len(turned))


def _num_rows(inputs: jax.Array) -> int:
    """How many they are, 0 where an export leaves that open."""
    num_rows = math.prod(inputs.shape[:-1])
    return num_rows if isinstance(num_rows, int) else 0
