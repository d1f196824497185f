"""One update on many devices: the batch is shared out, the train state is on all of them.

The mesh has one axis, `"data"`. With several processes (`jax.distributed.initialize`) each one
holds its own part of the batch and all run the same program.
"""

from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vla_jax.training.update import TrainState, Update
from vla_jax.types import Key, Metrics

Tree = TypeVar("Tree")


def make_mesh(num_devices: int | None = None) -> Mesh:
    """Returns a mesh of one axis `"data"`.

    Args:
      num_devices: how many devices to use, over all processes; None means all.

    Raises:
      ValueError: there are not that many devices.
    """
    devices = jax.devices()
    num_devices = len(devices) if num_devices is None else num_devices
    if not 1 <= num_devices <= len(devices):
        raise ValueError(f"num_devices must be in 1 … {len(devices)}, got {num_devices}.")
    # Auto: with the default (Explicit) a zero carry would have to name its sharding in each scan.
    axis_types = (AxisType.Auto,)
    return jax.make_mesh((num_devices,), ("data",), axis_types, devices=devices[:num_devices])


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Returns the tree with every array whole on every device of the mesh.

    Args:
      tree: arrays, the same in every process.
      mesh: from `make_mesh`.
    """
    return jax.device_put(tree, _replicated(mesh))


def shard_batch(batch: Tree, mesh: Mesh) -> Tree:
    """Returns the batch with its leading axis shared out over the devices.

    Args:
      batch: arrays `[B, ...]`; with several processes each gives its own rows. None is kept.
      mesh: from `make_mesh`.

    Raises:
      ValueError: the rows cannot be shared out evenly.
    """
    _check_rows(batch, len(mesh.local_devices))
    sharding = _sharded(mesh)
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), batch
    )


def jit_update(update: Update, mesh: Mesh) -> Update:
    """Returns the update compiled for the mesh.

    The train state that is passed in is donated: use only the one that comes out.

    Args:
      update: from `update.make_update`, without `axis_name`.
      mesh: from `make_mesh`; the batch is one that `shard_batch` has shared out.
    """
    everywhere, shared = _replicated(mesh), _sharded(mesh)
    return jax.jit(
        update,
        in_shardings=(everywhere, shared, everywhere),
        out_shardings=(everywhere, everywhere),
        donate_argnums=0,
    )


def pmap_update(update: Update, mesh: Mesh) -> Update:
    """Returns the same update through `jax.pmap`, for code that is built on it.

    Each device takes the loss over its own rows and the gradients are averaged, so a loss with a
    mask must divide by the sum of the mask over *all* devices (`psum` over `"data"`); a plain
    mean needs nothing. Every device draws the same randomness, so dropout differs from `jit`.

    Args:
      update: from `update.make_update(..., axis_name="data")`.
      mesh: from `make_mesh`, of one process.
    """
    devices = list(mesh.devices.flat)
    mapped = jax.pmap(
        update, "data", in_axes=(None, 0, None), out_axes=(None, None), devices=devices
    )

    def update_shares(train_state: TrainState, batch: Any, key: Key) -> tuple[TrainState, Metrics]:
        _check_rows(batch, len(devices))
        shares = jax.tree.map(lambda x: x.reshape(len(devices), -1, *x.shape[1:]), batch)
        return mapped(train_state, shares, key)

    return update_shares


def _replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _sharded(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec("data"))


def _check_rows(batch: Any, num_devices: int) -> None:
    for rows in jax.tree.leaves(batch):
        if rows.shape[0] % num_devices:
            raise ValueError(
                f"batch size {rows.shape[0]} cannot be shared out over {num_devices} devices; "
                f"choose a multiple of {num_devices}."
            )
