"""Precision of matrix products in all implementations of `train.benchmark`."""

import contextlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax

from train.benchmark import baselines_torch

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
    """Sets the precision of float32 products in JAX and in PyTorch.

    bfloat16 is not set here: it is in the configs of vla_jax, from which PyTorch's peers take it.
    """
    matmul = jax.default_matmul_precision(PRECISIONS[name].matmul)
    with matmul, baselines_torch.with_tf32(name == "tf32"):
        yield
