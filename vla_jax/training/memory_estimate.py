"""Memory that a training needs on each device, estimated before anything is allocated or compiled.

Params, optimiser state, EMA and gradients are exact. The activations are what the backward pass
stores (the residuals of `jax.vjp`), the largest piece that rematerialisation computes again at one
time, and the batch. The compiler may fuse some of them away or need temporary buffers on top.
"""

import math
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend import core
from jax.extend.core.primitives import remat_p
from jax.sharding import Mesh

from vla_jax.training import freezing, parallel
from vla_jax.training.optim import OptimConfig
from vla_jax.training.update import LossFn, init_train_state
from vla_jax.types import Params, ShardingRules

_MEMINFO = pathlib.Path("/proc/meminfo")  # memory of the host, on Linux


class MemoryEstimate(NamedTuple):
    """Bytes on each device during one update."""

    params: int  # trained and frozen
    gradients: int  # of the trained params
    optimizer: int  # moments, counters, and accumulated gradients
    ema: int  # EMA of the trained params
    activations: int | None  # residuals of the backward pass, and the batch; None = unknown

    @property
    def total(self) -> int:
        """Sum of all known parts."""
        return sum(part for part in self if part is not None)

    @property
    def least(self) -> int:
        """Total without half of the activations, the most that the compiler may fuse away."""
        return self.total - (self.activations or 0) // 2

    def times(self, copies: int) -> "MemoryEstimate":
        """Returns the memory of several such trainings in one program."""
        activations = None if self.activations is None else copies * self.activations
        return MemoryEstimate(
            copies * self.params,
            copies * self.gradients,
            copies * self.optimizer,
            copies * self.ema,
            activations,
        )


def estimate(
    loss_fn: LossFn,
    params: Params,
    optimizer: optax.GradientTransformation,
    batch: Any,
    config: OptimConfig,
    *,
    mesh: Mesh,
    rules: ShardingRules = (),
) -> MemoryEstimate:
    """Returns the memory of one update, as `update.make_update` and `parallel.jit_update` run it.

    Args:
      loss_fn: `(params, batch, key) -> (loss [], metrics)`.
      params: shapes, from `jax.eval_shape`, or arrays.
      optimizer: from `optim.make_optimizer`.
      batch: shapes `[B, ...]`, of all devices together; None leaves the activations unknown.
      config: frozen params, their exceptions, and EMA.
      mesh: devices over which batch and params are split.
      rules: sharding rules of the params.
    """
    freeze, train, ema = config.freeze, config.train, config.ema_decay is not None
    state = jax.eval_shape(
        lambda params: init_train_state(params, optimizer, ema=ema, freeze=freeze, train=train),
        params,
    )
    shardings = parallel.make_shardings(state, mesh, rules)
    trained, frozen = freezing.split(state.params, freeze, train)
    trained_shardings, _ = freezing.split(shardings.params, freeze, train)
    return MemoryEstimate(
        params=sharded_bytes(state.params, shardings.params),
        gradients=sharded_bytes(trained, trained_shardings),
        optimizer=sharded_bytes(state.opt_state, shardings.opt_state),
        ema=sharded_bytes(state.ema_params, shardings.ema_params),
        activations=None if batch is None else _activations(loss_fn, trained, frozen, batch, mesh),
    )


def backward_bytes(function: Callable[..., Any], argument: Any, *others: Any) -> int:
    """Returns the bytes that the derivative of a function by its first argument stores.

    Arguments that are stored as they are, such as params, do not count. Where `jax.checkpoint` is
    used, the largest of its pieces is added, which exists while its backward pass runs.

    Args:
      function: of arrays; returns an array or a tree of arrays.
      argument: shapes of the argument to differentiate by, of a float dtype.
      others: shapes of further arguments.
    """
    forward = jax.make_jaxpr(function)(argument, *others)
    num_leaves = len(jax.tree.leaves(argument))

    def residuals(*arguments: Any) -> list[jax.Array]:
        first, rest = arguments[:num_leaves], arguments[num_leaves:]
        _, backward = jax.vjp(lambda *first: core.jaxpr_as_fun(forward)(*first, *rest), *first)
        return jax.tree.leaves(backward)

    traced = jax.make_jaxpr(residuals)(*jax.tree.leaves((argument, others))).jaxpr
    stored = {var for var in traced.outvars if isinstance(var, core.Var)} - set(traced.invars)
    again = max(map(_recomputed_bytes, _remat_pieces(forward.jaxpr)), default=0)
    return sum(_num_bytes(var.aval) for var in stored) + again


def forward_bytes(function: Callable[..., Any], *arguments: Any) -> int:
    """Returns the bytes of the intermediate results of a function, at the time of their maximum.

    Arguments do not count. The compiler may fuse some of the results away.

    Args:
      function: of arrays; returns a tree of arrays.
      arguments: their shapes.
    """
    return _live_bytes(jax.make_jaxpr(function)(*arguments).jaxpr)


def sharded_bytes(tree: Any, shardings: Any) -> int:
    """Returns the bytes of one device's part of a tree.

    Args:
      tree: arrays or shapes.
      shardings: from `parallel.make_shardings`, in the same structure.
    """
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in pairs
    )


def available_bytes(device: Any) -> int | None:
    """Returns the memory that a device has for one training; None if that is unknown.

    Devices that report no limit share the host's free memory.
    """
    statistics = device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        return int(statistics["bytes_limit"])
    if not _MEMINFO.exists():
        return None
    fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    if "MemAvailable" not in fields:
        return None
    return int(fields["MemAvailable"].split()[0]) * 1024 // jax.local_device_count()


def _activations(loss_fn: LossFn, trained: Any, frozen: Any, batch: Any, mesh: Mesh) -> int:
    def loss(trained: Any, frozen: Any, rows: Any, key: Any) -> jax.Array:
        return loss_fn(freezing.merge(trained, frozen), rows, key)[0]

    rows = jax.tree.map(lambda leaf: _rows_of_device(leaf, mesh), batch)
    key = jax.eval_shape(lambda: jax.random.key(0))
    stored = backward_bytes(loss, trained, frozen, rows, key)
    return stored + sum(map(_num_bytes, jax.tree.leaves(rows)))


def _live_bytes(jaxpr: Any) -> int:
    """Returns the largest sum of results that are still needed, over the steps of a program."""
    last_use = dict.fromkeys(_variables(jaxpr.outvars), len(jaxpr.eqns))
    for step, eqn in reversed(list(enumerate(jaxpr.eqns))):
        last_use |= {var: step for var in _variables(eqn.invars) if var not in last_use}
    given = {*jaxpr.invars, *jaxpr.constvars}
    live = most = 0
    for step, eqn in enumerate(jaxpr.eqns):
        made = _var_bytes(eqn.outvars)
        inside = (_live_bytes(piece) - _var_bytes(piece.outvars) for piece in _programs(eqn))
        most = max(most, live + made + max((0, *inside)))
        ended = {var for var in _variables(eqn.invars) if last_use[var] == step} - given
        live += _var_bytes(var for var in eqn.outvars if var in last_use) - _var_bytes(ended)
    return most


def _variables(atoms: Iterable[Any]) -> list[Any]:
    return [atom for atom in atoms if isinstance(atom, core.Var)]


def _var_bytes(atoms: Iterable[Any]) -> int:
    return sum(_num_bytes(var.aval) for var in _variables(atoms))


def _programs(eqn: Any) -> list[Any]:
    """Returns the programs inside a step of a program, such as the body of a loop."""
    return [
        getattr(value, "jaxpr", value)
        for value in jax.tree.leaves(eqn.params, is_leaf=_is_program)
        if _is_program(value)
    ]


def _remat_pieces(jaxpr: Any) -> Iterator[Any]:
    """Yields the outermost functions inside a program that `jax.checkpoint` computes again."""
    for eqn in jaxpr.eqns:
        inner = _programs(eqn)
        if eqn.primitive is remat_p:
            yield from inner
        else:
            for piece in inner:
                yield from _remat_pieces(piece)


def _is_program(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def _recomputed_bytes(piece: Any) -> int:
    """Returns what the backward pass of a piece stores once it is computed again."""
    function = core.jaxpr_as_fun(core.ClosedJaxpr(piece, ()))
    shapes = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in piece.invars]
    floats = {
        index: shape
        for index, shape in enumerate(shapes)
        if jnp.issubdtype(shape.dtype, jnp.inexact)
    }
    others = {index: shape for index, shape in enumerate(shapes) if index not in floats}

    def of_floats(floats: dict[int, Any], others: dict[int, Any]) -> Any:
        arguments = floats | others
        return function(*(arguments[index] for index in range(len(shapes))))

    return backward_bytes(of_floats, floats, others)


def _rows_of_device(leaf: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    num_rows = leaf.shape[0] // parallel.num_row_shards(mesh)
    return jax.ShapeDtypeStruct((num_rows, *leaf.shape[1:]), leaf.dtype)


def _num_bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize
