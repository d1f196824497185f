"""Training on many devices: a sharded batch, and a train state replicated or sharded by path.

The mesh has the axes `"data"`, `"fsdp"` and `"tensor"`; the rows of a batch are split over the
first two. The train state is replicated, unless sharding rules split some of its leaves. A rule is
a glob over leaf paths and a `PartitionSpec`, such as
`("backbone/*/up/kernel", PartitionSpec("fsdp", "tensor"))`; the first rule that matches counts. An
axis of size 1 splits nothing, and neither do axes that do not divide a dimension. With several
processes (`jax.distributed.initialize`) each one holds its own rows of the batch, and all run the
same program.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vla_jax import trees
from vla_jax.config import did_you_mean
from vla_jax.nn.sharded_params import ROWS
from vla_jax.training.device_order import arrange
from vla_jax.training.update import TrainState, Update
from vla_jax.types import Key, Metrics, ShardingRules

Tree = TypeVar("Tree")
Function = TypeVar("Function", bound=Callable[..., Any])
MESH_AXES = (*ROWS, "tensor")


def parse_mesh(text: str) -> dict[str, int]:
    """Returns the sizes that a text such as `"data=2,fsdp=4"` gives to axes of the mesh.

    Args:
      text: pairs `axis=size`, separated by commas; "" gives none.

    Raises:
      ValueError: an axis is unknown or given twice, or its size is not a positive integer.
    """
    sizes: dict[str, int] = {}
    for pair in filter(None, text.replace(" ", "").split(",")):
        axis, _, size = pair.partition("=")
        if axis not in MESH_AXES:
            raise ValueError(f"mesh has no axis '{axis}'; {did_you_mean(axis, MESH_AXES)}")
        if axis in sizes:
            raise ValueError(f"mesh must name every axis once, got '{axis}' twice; drop one.")
        if not (size.isdecimal() and size.isascii() and 0 < int(size) < 2**31):
            raise ValueError(
                f"mesh must be pairs of axis and size such as data=2,fsdp=4, got '{pair}'; give "
                "a size of at least 1."
            )
        sizes[axis] = int(size)
    return sizes


def make_mesh(mesh: str = "", *, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh with the axes `"data"`, `"fsdp"` and `"tensor"`.

    Args:
      mesh: sizes of axes, such as `"data=2,fsdp=4"`. An axis that is left out has size 1, `data`
        as many devices as remain.
      devices: devices to choose from; None means those of all processes.

    Raises:
      ValueError: the sizes do not fit the number of devices, or the network of TPUs; several
        processes do not all take part; or the devices of one part of a batch belong to several
        processes.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {**dict.fromkeys(MESH_AXES, 1), **parse_mesh(mesh)}
    inner = sizes["fsdp"] * sizes["tensor"]
    if "data" not in parse_mesh(mesh):
        if len(devices) % inner:
            raise ValueError(
                f"mesh must split the {len(devices)} devices evenly, got {mesh}; choose sizes "
                f"whose product divides {len(devices)}, or give data as well."
            )
        sizes["data"] = len(devices) // inner
    num_devices = sizes["data"] * inner
    is_shared = len({device.process_index for device in devices}) > 1
    if num_devices > len(devices) or (is_shared and num_devices != len(devices)):
        expected = "be" if is_shared else "be at most"
        raise ValueError(
            f"the product of the sizes of mesh must {expected} {len(devices)}, the number of "
            f"devices, got {mesh} ({num_devices}); choose other sizes."
        )
    # Auto: with the default (Explicit) a zero carry would have to name its sharding in each scan.
    arranged = arrange((sizes["data"], sizes["fsdp"], sizes["tensor"]), devices[:num_devices])
    made = Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    for group in made.devices.reshape(-1, sizes["tensor"]):
        if len({device.process_index for device in group}) > 1:
            raise ValueError(
                f"tensor must divide the number of devices of every process, got {mesh}; the rows "
                "of a batch belong to one process."
            )
    return made


def local_mesh(mesh: Mesh) -> Mesh:
    """Returns a mesh of this process's devices of a mesh, for work that each process does alone.

    Args:
      mesh: from `make_mesh`.
    """
    local = list(mesh.local_devices)
    tensor = mesh.shape["tensor"]
    fsdp = math.gcd(mesh.shape["fsdp"], len(local) // tensor)
    return make_mesh(f"fsdp={fsdp},tensor={tensor}", devices=local)


def num_row_shards(mesh: Mesh) -> int:
    """Returns the number of parts into which the rows of a batch are split.

    Args:
      mesh: from `make_mesh`, or with some of its axes.
    """
    return math.prod(mesh.shape[axis] for axis in ROWS if axis in mesh.axis_names)


def row_part(mesh: Mesh) -> tuple[int, int]:
    """Returns the place of this process's rows in a batch, and the number of processes.

    The place is the position of the process's devices in the mesh, which on TPUs need not be the
    index of the process.

    Args:
      mesh: from `make_mesh`.
    """
    order = list(dict.fromkeys(device.process_index for device in mesh.devices.flat))
    return order.index(jax.process_index()), len(order)


def check_split_axes(mesh: Mesh, rules: ShardingRules, params: Any) -> None:
    """Raises a ValueError if an axis that splits params would split none.

    The devices of `tensor` would then all compute the same, and those of `fsdp` would each hold all
    params.

    Args:
      mesh: from `make_mesh`.
      rules: sharding rules of the params.
      params: arrays or shapes.
    """
    shardings = jax.tree.leaves(make_shardings(params, mesh, rules))
    named = {axis for sharding in shardings for entry in sharding.spec for axis in _axes(entry)}
    for axis in ("fsdp", "tensor"):
        if mesh.shape[axis] > 1 and axis not in named:
            raise ValueError(
                f"{axis} must be 1 for a model of which no param is split over it, by a sharding "
                f"rule and a size that divides, got {mesh.shape[axis]}; use data in --mesh."
            )


def stacked(rules: ShardingRules) -> ShardingRules:
    """Returns the rules of params with one more axis in front, which is not split.

    Args:
      rules: of the params of one model, where the tree has those of several.
    """
    return tuple((glob, PartitionSpec(None, *spec)) for glob, spec in rules)


def is_first_process() -> bool:
    """Returns True in the one process that writes files and prints."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Returns True if the flag is True in any process; all of them must call it.

    Args:
      flag: of this process.
    """
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def agree(numbers: Sequence[int]) -> list[int]:
    """Returns the numbers that the first process has, in every process."""
    if jax.process_count() == 1:
        return list(numbers)
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    own = np.resize(np.asarray(numbers or [0], np.int32), count)
    return multihost_utils.broadcast_one_to_all(own).tolist()


def make_shardings(tree: Any, mesh: Mesh, rules: ShardingRules = ()) -> Any:
    """Returns a `NamedSharding` for every leaf; a leaf without a rule is replicated.

    A dimension that the axes of its rule do not divide evenly stays whole. A glob may match a
    whole path, or its end after any `/`, so that one rule applies to the params, their EMA, and the
    optimiser state, where the path of a param has a prefix. Scalars are always replicated.

    Args:
      tree: arrays or shapes: params, or a whole train state.
      mesh: from `make_mesh`.
      rules: (glob, PartitionSpec) pairs; the first match counts.

    Raises:
      ValueError: a rule names an axis that the mesh lacks, or has more entries than a leaf has
        dimensions.
    """
    for glob, spec in rules:
        _check_axes(glob, spec, mesh)
    anywhere = tuple((pattern, spec) for glob, spec in rules for pattern in (glob, f"*/{glob}"))

    def sharding(path: str, leaf: Any) -> NamedSharding:
        spec = trees.lookup(path, anywhere, PartitionSpec()) if np.ndim(leaf) else PartitionSpec()
        return NamedSharding(mesh, _divisible(path, np.shape(leaf), spec, mesh))

    leaves = [sharding(path, leaf) for path, leaf in trees.leaves_by_path(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def with_shardings(shapes: Tree, shardings: Any) -> Tree:
    """Returns the shapes of arrays on their devices.

    Args:
      shapes: from `jax.eval_shape`.
      shardings: from `make_shardings`, in the same structure.
    """

    def place(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    return jax.tree.map(place, shapes, shardings)


def batch_sharding(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """Returns the sharding of an array whose rows are split over the devices.

    Args:
      mesh: from `make_mesh`, or with some of its axes.
      axis: the array's axis of rows.
    """
    axes = tuple(name for name in ROWS if name in mesh.axis_names)
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, axes))


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Returns the tree with every array replicated on all devices of the mesh.

    Args:
      tree: arrays, the same in every process.
      mesh: from `make_mesh`.
    """
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def fetch(tree: Tree, mesh: Mesh) -> Tree:
    """Returns arrays of any sharding as NumPy arrays; all processes must call it.

    Args:
      tree: arrays on the devices of the mesh.
      mesh: from `make_mesh`.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.device_get(jax.jit(lambda tree: tree, out_shardings=replicated)(tree))


def shard_batch(batch: Tree, mesh: Mesh) -> Tree:
    """Returns the batch with its leading axis split over the devices.

    Args:
      batch: arrays `[B, ...]`; with several processes each passes its own rows. None stays None.
      mesh: from `make_mesh`.

    Raises:
      ValueError: the rows cannot be split evenly.
    """
    copies = mesh.size // num_row_shards(mesh)  # devices with the same rows
    _check_rows(batch, len(mesh.local_devices) // copies)
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), batch
    )


def jit_update(update: Update, mesh: Mesh, shardings: Any = None) -> Update:
    """Returns the update compiled for the mesh.

    The train state that is passed in is donated: use only the one that is returned.

    Args:
      update: from `update.make_update`, without `axis_name`.
      mesh: from `make_mesh`; the update's batch must be from `shard_batch`.
      shardings: shardings of the train state, from `make_shardings`; None means replicated.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = replicated if shardings is None else shardings
    return jax.jit(
        on_mesh(update, mesh),
        in_shardings=(shardings, batch_sharding(mesh), replicated),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
    )


def on_mesh(function: Function, mesh: Mesh) -> Function:
    """Returns the function traced with the mesh as its context, to compile it for that mesh.

    The models find there the axes over which their params are split (`nn.sharded_params`).

    Args:
      function: of arrays.
      mesh: from `make_mesh`.
    """

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return cast(Function, traced)


def pmap_update(update: Update, mesh: Mesh) -> Update:
    """Returns the update compiled by `jax.pmap`, for code that is built on it.

    Each device computes the loss over its own rows and the gradients are averaged, so a loss with
    a mask must divide by the sum of the mask over *all* devices (`psum` over `"data"`); a plain
    mean needs no change. All devices use the same random numbers, so dropout differs from `jit`.

    Args:
      update: from `update.make_update(..., axis_name="data")`.
      mesh: from `make_mesh`, of one process.
    """
    devices = list(mesh.devices.flat)
    mapped = jax.pmap(
        update, "data", in_axes=(None, 0, None), out_axes=(None, None), devices=devices
    )

    def update_shards(train_state: TrainState, batch: Any, key: Key) -> tuple[TrainState, Metrics]:
        _check_rows(batch, len(devices))
        shards = jax.tree.map(lambda x: x.reshape(len(devices), -1, *x.shape[1:]), batch)
        return mapped(train_state, shards, key)

    return update_shards


def _check_rows(batch: Any, num_shards: int) -> None:
    for rows in jax.tree.leaves(batch):
        if rows.shape[0] % num_shards:
            raise ValueError(
                f"batch size {rows.shape[0]} cannot be split evenly over {num_shards} devices; "
                f"choose a multiple of {num_shards}."
            )


def _check_axes(glob: str, spec: PartitionSpec, mesh: Mesh) -> None:
    for axis in (axis for entry in spec for axis in _axes(entry)):
        if axis not in mesh.axis_names:
            raise ValueError(
                f"the sharding rule for '{glob}' names the axis '{axis}', but the mesh has "
                f"{', '.join(mesh.axis_names)}; change the rule, or make a mesh with that axis."
            )


def _divisible(path: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    """Returns the spec without the entries whose axes do not divide their dimension."""
    if len(spec) > len(shape):
        raise ValueError(
            f"the sharding rule for {path} has {len(spec)} entries, but its shape is "
            f"{list(shape)}; drop an entry, or put a rule for this leaf before it."
        )
    num_shards = [math.prod(mesh.shape[axis] for axis in _axes(entry)) for entry in spec]
    if not any(size % num for size, num in zip(shape, num_shards, strict=False)):
        return spec
    entries = zip(shape, num_shards, spec, strict=False)
    return PartitionSpec(*(None if size % num else entry for size, num, entry in entries))


def _axes(entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes that one entry of a PartitionSpec names."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)
