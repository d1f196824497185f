"""Arrays of other libraries as NumPy's, and as the float32 in which params are stored."""

from typing import Any

import jax.numpy as jnp
import numpy as np


def as_numpy(tensor: Any) -> np.ndarray:
    """Returns an array of NumPy, JAX or torch as NumPy's."""
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    dtype = jnp.dtype(str(flat.dtype).removeprefix("torch."))
    # By its bytes: torch makes no NumPy array of a bfloat16, which NumPy has from JAX.
    return flat.view(torch.uint8).numpy().view(dtype).reshape(tensor.shape)


def as_float32(name: str, tensor: Any) -> np.ndarray:
    """Returns the array in float32, which holds all that it holds.

    Args:
      name: of the tensor, for the error.
      tensor: of NumPy, JAX or torch.

    Raises:
      ValueError: it is of integers, or of more than 32 bits, which would not come back.
    """
    array = as_numpy(tensor)
    if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.itemsize > 4:
        raise ValueError(
            f"{name} must be floating point of 32 or 16 bits, got {array.dtype}; save it as "
            "float32 (`module.float()` in PyTorch)."
        )
    return np.asarray(array, np.float32)
