"""Arrays of other libraries as NumPy arrays, and as float32, the dtype of params."""

from typing import Any

import jax.numpy as jnp
import numpy as np


def as_numpy(tensor: Any) -> np.ndarray:
    """Returns an array of NumPy, JAX or torch as a NumPy array."""
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    dtype = jnp.dtype(str(flat.dtype).removeprefix("torch."))
    # Through the bytes: torch cannot make a NumPy array of bfloat16, a dtype that JAX registers.
    return flat.view(torch.uint8).numpy().view(dtype).reshape(tensor.shape)


def as_float32(name: str, tensor: Any) -> np.ndarray:
    """Returns the array in float32, without loss.

    Args:
      name: of the tensor, for the error message.
      tensor: array of NumPy, JAX or torch.

    Raises:
      ValueError: integers, or more than 32 bits, which float32 cannot represent.
    """
    array = as_numpy(tensor)
    if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.itemsize > 4:
        raise ValueError(
            f"{name} must be floating point of 32 or 16 bits, got {array.dtype}; save it as "
            "float32 (`module.float()` in PyTorch)."
        )
    return np.asarray(array, np.float32)
