"""Matrix products of recurrent steps: few rows times one large kernel, many times in sequence.

On a CPU, XLA multiplies by the transpose of a large kernel slowly, because it materialises the
transpose first. `Transposed` avoids that copy; devices other than CPUs run the plain product.
Figures: `python -m train.benchmark --cases products`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.types import Array, Params

LARGE = 2**20  # elements of a kernel, 4 MB in float32: exceeds the cache of one core
MANY = 200  # number of rows from which the layout of the kernel makes no difference


class Transposed(NamedTuple):
    """Lazy transpose of a kernel: products read the stored kernel without copying it."""

    kernel: Array  # [out, in]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the transpose, `[in, out]`."""
        return self.kernel.shape[::-1]


def product(inputs: Array, kernel: Array | Transposed, *, dtype: str = "float32") -> jax.Array:
    """Returns `inputs · kernel`.

    Args:
      inputs: `[..., in]`.
      kernel: `[in, out]`.
      dtype: of the two factors; the sum is accumulated in float32.

    Returns:
      `[..., out]` float32.
    """
    # The casts are here, inside a scan, so that the gradients of its steps are summed in float32;
    # outside of the scan they would be summed in `dtype`.
    inputs = jnp.asarray(inputs, dtype)
    if isinstance(kernel, Transposed):
        stored = jnp.asarray(kernel.kernel, dtype)
        return jax.lax.platform_dependent(inputs, stored, cpu=_kernel_first, default=_kernel_last)
    return _plain(inputs, jnp.asarray(kernel, dtype))


def transpose(kernel: Array) -> Array | Transposed:
    """Returns `kernelᵀ` `[out, in]` for many products in sequence.

    Small kernels are transposed. For large ones the transpose is not materialised, since that
    costs as much as about twelve steps at batch size 5.

    Args:
      kernel: `[in, out]`.
    """
    return Transposed(kernel) if is_large(kernel) else kernel.T


def prepare_params(params: Params, *, num_rows: int, dtype: str = "float32") -> Params:
    """Returns params stored for fast single steps; the results of a step are the same.

    If a CPU is JAX's default device, large kernels are copied once as `[out, in]` and wrapped in
    `Transposed`. Otherwise, and where it makes no difference, `params` are returned unchanged.

    Args:
      params: any tree of arrays.
      num_rows: rows of the inputs of one step, over all leading axes.
      dtype: of the factors of the products, in which the kernels are stored.
    """
    large = [leaf for leaf in jax.tree.leaves(params) if is_large(leaf)]
    if jax.default_backend() != "cpu" or num_rows >= MANY or not large:
        return params

    def store(leaf: Array | Transposed) -> Array | Transposed:
        if isinstance(leaf, Transposed) or not is_large(leaf):
            return leaf
        return Transposed(jnp.asarray(leaf, dtype).T)

    return jax.tree.map(store, params, is_leaf=_is_transposed)


def is_prepared(params: Params) -> bool:
    """Returns True if `prepare_params` has changed the layout of a kernel."""
    return any(map(_is_transposed, jax.tree.leaves(params, is_leaf=_is_transposed)))


def is_large(kernel: Array) -> bool:
    """Returns True if the memory layout of the kernel matters on a CPU."""
    return kernel.size >= LARGE


def _is_transposed(leaf: object) -> bool:
    return isinstance(leaf, Transposed)


def _plain(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.matmul(inputs, kernel, preferred_element_type=jnp.float32)


def _kernel_last(inputs: jax.Array, stored: jax.Array) -> jax.Array:
    return _plain(inputs, stored.T)


def _kernel_first(inputs: jax.Array, stored: jax.Array) -> jax.Array:
    *leading, size = inputs.shape
    num_rows = math.prod(leading)
    rows = inputs.reshape(num_rows, size)
    if isinstance(num_rows, int) and num_rows > 1:  # symbolic in an export with any batch size
        rows = jnp.pad(rows, ((0, -num_rows % 4), (0, 0)))  # multiples of four rows are faster
    columns = jnp.einsum("oi,bi->ob", stored, rows, preferred_element_type=jnp.float32)
    # Without the barrier XLA would fold this transpose into the product and lose the layout.
    outputs = jax.lax.optimization_barrier(columns).T
    return outputs[:num_rows].reshape(*leading, len(stored))
