"""Params that are split over the devices of a mesh: whole in loops, and rows split in between.

The mesh is that of `training.parallel.jit_update`, which traces a model with the mesh as context.
Without one, or where `fsdp` is 1, both functions return their argument.
"""

import math
from typing import TypeVar

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
    mesh = jax.sharding.get_abstract_mesh()
    if not _is_split() or activations.shape[0] % math.prod(mesh.shape[axis] for axis in ROWS):
        return activations
    return jax.lax.with_sharding_constraint(activations, PartitionSpec(ROWS))


def _is_split() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    axes = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    # In shard_map the axes are manual, and every device has the params that it was given.
    return all(axes.get(axis) == AxisType.Auto for axis in ROWS) and mesh.shape["fsdp"] > 1
