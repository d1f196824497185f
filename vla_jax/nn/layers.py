"""Dense layers, multilayer perceptrons, dropout, normalisation, masked softmax.

A dense layer is `{"kernel" [in, out], "bias" [out]}`; a multilayer perceptron (MLP) is
`{"layers_0": dense, "layers_1": dense, ...}` with ReLU between the layers and none after the last.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vla_jax.nn.matmul import Transposed, product
from vla_jax.types import Array, Key, Params, ShardingRules

EPSILON = 1e-5  # added to the variance or the mean square in a normalisation
# A dense layer is split along its outputs, or along its inputs, over the mesh axis `tensor`. What
# lies between one of each needs no communication. The other dimension is split over `fsdp`.
SPLIT_OUTPUTS = PartitionSpec("fsdp", "tensor")
SPLIT_INPUTS = PartitionSpec("tensor", "fsdp")
MLP_SHARDING: ShardingRules = (  # of an MLP, or of a tree of MLPs
    ("*layers_*[02468]/kernel", SPLIT_OUTPUTS),
    ("*layers_*[13579]/kernel", SPLIT_INPUTS),
)


def dense(
    inputs: Array, kernel: Array | Transposed, bias: Array, *, dtype: str = "float32"
) -> jax.Array:
    """Returns `inputs · kernel + bias` in float32.

    Args:
      inputs: `[..., in]`.
      kernel: `[in, out]`.
      bias: `[out]`.
      dtype: dtype of the two factors of the product; the sum is accumulated in float32.

    Returns:
      `[..., out]` float32.
    """
    outputs = product(inputs, kernel, dtype=dtype)
    return outputs + jnp.broadcast_to(bias, outputs.shape)


def embedding(table: Array, ids: Array) -> jax.Array:
    """Returns the rows `[..., D]` of a table `[N, D]`; NaN for an id that is not in 0 … N-1.

    JAX's indexing gives such an id, also -1, another row of the table.

    Args:
      table: `[N, D]`.
      ids: `[...]`, integers.
    """
    rows = jnp.asarray(table).at[jnp.asarray(ids)]
    return rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def dropout(key: Key | None, inputs: jax.Array, rate: float) -> jax.Array:
    """Sets inputs to zero at random and scales the others by 1 / (1 − rate).

    Args:
      key: consumed; None disables dropout.
      inputs: any shape.
      rate: probability of being dropped, in [0, 1).

    Returns:
      An array of the same shape.

    Source: Srivastava et al. 2014, dropout, as in `torch.nn.Dropout`.
    """
    if key is None or rate == 0.0:
        return inputs
    keep = jax.random.bernoulli(key, 1.0 - rate, inputs.shape)
    return jnp.where(keep, inputs / (1.0 - rate), 0.0)


def layer_norm(inputs: Any, scale: Array, bias: Array | None = None) -> jax.Array:
    """Normalises the last axis to mean 0 and variance 1, then scales and shifts it.

        (x − mean(x)) / √(var(x) + 1e-5) · scale + bias

    Args:
      inputs: `[..., D]`.
      scale: `[D]`.
      bias: `[D]`; None adds nothing.

    Returns:
      `[..., D]`.

    Source: Ba et al. 2016, "Layer Normalization" (arXiv:1607.06450).
    """
    centred = inputs - jnp.mean(inputs, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    scaled = centred * jax.lax.rsqrt(variance + EPSILON) * jnp.broadcast_to(scale, centred.shape)
    return scaled if bias is None else scaled + jnp.broadcast_to(bias, scaled.shape)


def rms_norm(inputs: jax.Array, scale: Array) -> jax.Array:
    """Returns `[..., D]` divided by its root mean square, times a scale `[D]`.

        x / √(mean(x²) + 1e-5) · scale

    Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization" (arXiv:1910.07467).
    """
    mean = jnp.mean(jnp.square(inputs), axis=-1, keepdims=True)
    return inputs * jax.lax.rsqrt(mean + EPSILON) * jnp.broadcast_to(scale, inputs.shape)


def masked_softmax(scores: jax.Array, mask: Array) -> jax.Array:
    """Returns the softmax over the last axis, restricted to the positions where `mask` is True.

    Args:
      scores: `[..., S]`.
      mask: bool, broadcastable to `[..., S]`.

    Returns:
      `[..., S]`, 0 where masked; all zeros, with zero gradients, where every position is masked.
    """
    # The lowest finite number, not −∞: a softmax over −∞ alone would be NaN.
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min), axis=-1)
    return jnp.where(mask, weights, 0.0)


def init_dense(key: Key, input_size: int, output_size: int) -> Params:
    """Returns a dense layer: kernel from U(−√(6/(in+out)), √(6/(in+out))) (Xavier), zero bias.

    Args:
      key: consumed.
      input_size: in.
      output_size: out.
    """
    bound = math.sqrt(6.0 / (input_size + output_size))
    kernel = jax.random.uniform(key, (input_size, output_size), jnp.float32, -bound, bound)
    return {"kernel": kernel, "bias": jnp.zeros(output_size)}


def init_mlp(key: Key, sizes: Sequence[int]) -> Params:
    """Returns the dense layers of an MLP.

    Args:
      key: consumed.
      sizes: number of input features, then the width of every layer.
    """
    keys = jax.random.split(key, len(sizes) - 1)
    return {
        f"layers_{layer}": init_dense(layer_key, sizes[layer], sizes[layer + 1])
        for layer, layer_key in enumerate(keys)
    }


def apply_mlp(params: Params, inputs: Array, *, dtype: str = "float32") -> jax.Array:
    """Returns the outputs of the last layer, without ReLU.

    Args:
      params: from `init_mlp`.
      inputs: `[..., in]`.
      dtype: dtype of the factors of the products.

    Returns:
      `[..., out]` float32.
    """
    outputs = jnp.asarray(inputs)
    for layer in range(len(params)):
        outputs = jax.nn.relu(outputs) if layer > 0 else outputs
        outputs = dense(outputs, **params[f"layers_{layer}"], dtype=dtype)
    return outputs
