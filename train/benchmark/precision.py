"""Precision of products in all implementations of `train.benchmark`, and PyTorch's device."""

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

Name = Literal["float32", "tf32", "bfloat16"]


class Precision(NamedTuple):
    """One precision."""

    matmul: str  # JAX's default matmul precision
    dtype: Literal["float32", "bfloat16"]  # of the factors of products, in the configs of vla_jax
    tolerance: float  # largest ‖result − expected‖ / ‖expected‖ between implementations


# TF32 keeps 10 bits of the mantissa of each factor, bfloat16 7: an error of up to 2⁻¹¹ or 2⁻⁸ each.
# The gradients of a head differ most: a ReLU whose input is near 0 passes a gradient in one library
# and none in the other. On a CPU in bfloat16, recurrences differ by up to 1e-2, and heads of 64
# units by 0.17 (second moments of Adam). The tolerances have not been tried on a GPU.
PRECISIONS: dict[Name, Precision] = {
    "float32": Precision("float32", "float32", 1e-4),
    "tf32": Precision("tensorfloat32", "float32", 1e-2),
    "bfloat16": Precision("float32", "bfloat16", 0.3),
}


@contextlib.contextmanager
def all_libraries(name: Name) -> Iterator[None]:
    """Sets the precision of float32 products in JAX and, on a GPU, in PyTorch.

    bfloat16 is not set here: the configs of vla_jax and `autocast` choose it.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.default_matmul_precision(PRECISIONS[name].matmul))
        if importlib.util.find_spec("torch") is not None:
            import torch

            backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
            for backend in backends:
                stack.callback(setattr, backend, "allow_tf32", backend.allow_tf32)
                backend.allow_tf32 = name == "tf32"
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
