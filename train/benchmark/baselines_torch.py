"""PyTorch on the device of JAX: tensors, precision of products, and waiting for results."""

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np


@contextlib.contextmanager
def with_tf32(allowed: bool) -> Iterator[None]:
    """Allows float32 products in TF32 on a GPU, or forbids them; without PyTorch does nothing."""
    with contextlib.ExitStack() as stack:
        if importlib.util.find_spec("torch") is not None:
            import torch

            backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
            for backend in backends:
                stack.callback(setattr, backend, "allow_tf32", backend.allow_tf32)
                backend.allow_tf32 = allowed
        yield


def autocast(dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Returns PyTorch's context in which products have factors of a dtype; float32 changes nothing.

    Args:
      dtype: of the factors, from a config of vla_jax.
    """
    import torch

    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch_device(), dtype=getattr(torch, dtype))


def torch_device() -> str:
    """Returns the device on which PyTorch is measured, the same as JAX's."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def to_torch(array: Any) -> Any:
    """Returns an array as a tensor on PyTorch's device."""
    import torch

    return torch.tensor(np.asarray(array), device=torch_device())


def to_numpy(tensor: Any) -> np.ndarray:
    """Returns a tensor of any device as an array, bfloat16 as float32."""
    return tensor.detach().float().cpu().numpy()


def wait(results: Any) -> Any:
    """Returns PyTorch's results when they are ready; on a GPU its calls return earlier."""
    import torch

    if torch_device() == "cuda":
        torch.cuda.synchronize()
    return results
