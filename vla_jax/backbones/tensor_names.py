"""Tables from our params to the tensors of Hugging Face's files.

A param whose file name contains `{}` is stacked: entry i of its leading axis is the tensor whose
name has i in that place.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

Shape = tuple[int, ...]


class AxisOrder(NamedTuple):
    """Order of the axes of a tensor in a file."""

    to_params: Callable[[np.ndarray], np.ndarray]  # tensor of the file -> param, a view if possible
    to_file: Callable[[np.ndarray], np.ndarray]  # the inverse
    file_shape: Callable[[Shape], Shape]  # shape of the param -> shape in the file


class Tensor(NamedTuple):
    """A param and its tensor, or tensors, in a file."""

    path: str  # of the param, such as language/layers/mlp/up/kernel
    name: str  # in the file; `{}` stands for the number of the layer
    order: AxisOrder


class Place(NamedTuple):
    """Place of a tensor of a file in the params."""

    tensor: Tensor
    layer: int | None  # entry of the leading axis of the param; None = the whole param
    shape: Shape  # in the file


def _same(array: np.ndarray) -> np.ndarray:
    return array


SAME = AxisOrder(_same, _same, tuple)
LINEAR = AxisOrder(np.transpose, np.transpose, lambda shape: shape[::-1])  # [out, in] in the file


def patch_convolution(patch_size: int) -> AxisOrder:
    """Returns the axis order of a convolution over patches: `[D, 3, p, p]` in the file.

    The param is `[p·p·3, D]`, as `blocks.patches` orders the pixels.

    Args:
      patch_size: p, pixels.
    """
    p = patch_size
    return AxisOrder(
        lambda file: file.transpose(2, 3, 1, 0).reshape(-1, file.shape[0]),
        lambda kernel: kernel.reshape(p, p, 3, -1).transpose(3, 2, 0, 1),
        lambda shape: (shape[1], 3, p, p),
    )


def video_convolution(patch_size: int, num_frames: int) -> AxisOrder:
    """Returns the axis order of a convolution over patches of several frames, `[D, 3, F, p, p]`.

    The param is `[3·F·p·p, D]`, in the order of the rows of `pixel_values` (Qwen-VL).

    Args:
      patch_size: p, pixels.
      num_frames: F, frames of a patch.
    """
    shape = (3, num_frames, patch_size, patch_size)
    return AxisOrder(
        lambda file: file.reshape(file.shape[0], -1).T,
        lambda kernel: kernel.T.reshape(-1, *shape),
        lambda param: (param[1], *shape),
    )


def linear(path: str, name: str, *, bias: bool) -> list[Tensor]:
    """Returns the tensors of a linear map, with or without bias."""
    kernel = Tensor(f"{path}/kernel", f"{name}.weight", LINEAR)
    return [kernel, Tensor(f"{path}/bias", f"{name}.bias", SAME)] if bias else [kernel]


def norm(path: str, name: str, *, bias: bool) -> list[Tensor]:
    """Returns the tensors of a normalisation, with or without bias."""
    scale = Tensor(f"{path}/scale", f"{name}.weight", SAME)
    return [scale, Tensor(f"{path}/bias", f"{name}.bias", SAME)] if bias else [scale]


def join(*groups: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Returns all tensors as one table."""
    return tuple(tensor for group in groups for tensor in group)


def places(tensors: Iterable[Tensor], shapes: Mapping[str, Any]) -> dict[str, Place]:
    """Returns name in the file -> place in the params, in the order of the table.

    Args:
      tensors: the table.
      shapes: of the params, nested dict of tuples.
    """
    found = {}
    for tensor in tensors:
        shape: Any = shapes
        for name in tensor.path.split("/"):
            shape = shape[name]
        if "{}" not in tensor.name:
            found[tensor.name] = Place(tensor, None, tensor.order.file_shape(shape))
            continue
        file_shape = tensor.order.file_shape(shape[1:])
        for layer in range(shape[0]):
            found[tensor.name.format(layer)] = Place(tensor, layer, file_shape)
    return found
