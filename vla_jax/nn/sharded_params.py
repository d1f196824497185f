"""Params that are split over the devices of a mesh: whole in loops, and rows split in between.

The mesh is that of `training.parallel.jit_update`, which traces a model with the mesh as context.
Without one, the functions return their argument; the first two also where `fsdp` is 1.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, PartitionSpec

Tree = TypeVar("Tree")
ROWS = ("data", "fsdp")  # mesh axes over which the rows of a batch are split


def gathered(params: Tree) -> Tree:
    """Returns the params whole on every device, if the mesh may split some over `fsdp`.

    A loop over time that gets parts of its kernels exchanges parts of its activations at every
    step; gathered before the loop, the kernels are exchanged once.

    Args:
      params: arrays.
    """
    if not _is_split():
        return params
    return jax.lax.with_sharding_constraint(params, PartitionSpec())


def split_rows(activations: jax.Array) -> jax.Array:
    """Returns the activations with their rows split over `data` and `fsdp`, and nothing else.

    Otherwise the compiler splits features over `fsdp`, as their kernels are, and exchanges
    activations where it should gather kernels. Rows that do not divide are left to it.

    Args:
      activations: `[B, ...]`.
    """
    if not _is_split() or activations.shape[0] % _num_row_parts():
        return activations
    return jax.lax.with_sharding_constraint(activations, PartitionSpec(ROWS))


def over_rows(
    function: Callable[..., Any], axes: Sequence[int | None], out_axes: Sequence[int], num_rows: int
) -> Callable[..., Any]:
    """Returns a function that every device runs on its own rows of the arguments.

    For calls that the compiler cannot split: it would gather all rows on every device. Without a
    mesh, or where the rows do not divide, it returns the function.

    Args:
      function: of arrays, whose rows do not depend on each other.
      axes: axis of the rows in each argument; None where it has none.
      out_axes: the same of each result.
      num_rows: B.
    """
    num_parts = _num_row_parts()
    if num_parts == 1 or num_rows % num_parts:
        return function
    specs, out_specs = (
        tuple(
            PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, ROWS)
            for axis in each
        )
        for each in (axes, out_axes)
    )
    return jax.shard_map(
        function, in_specs=specs, out_specs=out_specs, axis_names=set(ROWS), check_vma=False
    )


def _num_row_parts() -> int:
    """Returns the parts into which the mesh splits the rows; 1 in shard_map, which has split."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if any(axes.get(axis) != AxisType.Auto for axis in ROWS):
        return 1
    return math.prod(mesh.shape[axis] for axis in ROWS)


def _is_split() -> bool:
    # In shard_map every device has the params that it was given.
    return _num_row_parts() > 1 and jax.sharding.get_abstract_mesh().shape["fsdp"] > 1
