"""Dense layers, multilayer perceptrons and dropout.

A dense layer is `{"kernel" [D, E], "bias" [E]}`; a multilayer perceptron (MLP) is
`{"layers_0": dense, "layers_1": dense, ...}` with ReLU between the layers and none after the last.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vla_jax.nn.matmul import Turned, times
from vla_jax.types import Array, Key, Params


def dense(
    inputs: Array, kernel: Array | Turned, bias: Array, *, dtype: str = "float32"
) -> jax.Array:
    """Returns `inputs · kernel + bias` in float32.

    Args:
      inputs: `[..., D]`.
      kernel: `[D, E]`.
      bias: `[E]`.
      dtype: dtype of the two factors of the product; the sum is accumulated in float32.

    Returns:
      `[..., E]` float32.
    """
    product = times(inputs, kernel, dtype=dtype)
    return product + jnp.broadcast_to(bias, product.shape)


def dropout(key: Key | None, inputs: jax.Array, rate: float) -> jax.Array:
    """Sets inputs to zero at random and scales the others up to the same expectation.

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
    kept = jax.random.bernoulli(key, 1.0 - rate, inputs.shape)
    return jnp.where(kept, inputs / (1.0 - rate), 0.0)


def init_dense(key: Key, input_size: int, output_size: int) -> Params:
    """Returns a dense layer: kernel from U(−√(6/(D+E)), √(6/(D+E))) (Xavier), zero bias.

    Args:
      key: consumed.
      input_size: D.
      output_size: E.
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
      inputs: `[..., D]`.
      dtype: dtype of the factors of the products.

    Returns:
      `[..., E]` float32.
    """
    outputs = jnp.asarray(inputs)
    for layer in range(len(params)):
        outputs = jax.nn.relu(outputs) if layer > 0 else outputs
        outputs = dense(outputs, **params[f"layers_{layer}"], dtype=dtype)
    return outputs
