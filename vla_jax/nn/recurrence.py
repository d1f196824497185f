"""Stacks of recurrent layers over time: masked, reset at episode starts, in one or two directions.

`apply` runs a whole sequence, `step` one time step of the same recurrence. Params and carries have
the same paths, `["layers_0"]["forward"]`; `layer` and `from_layer` access them.
Sequences are batch-major `[B, T, D]` outside and time-major inside.

- A step whose `mask` is False keeps the carry and gives zeros, so that a padded sequence gives the
  same results as the sequence without its padding.
- A step whose `reset` is True starts from a zero carry, so that several episodes in one sequence
  do not influence each other, in either direction.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vla_jax.nn import associative, bptt, cells, chunkwise, cudnn, matmul
from vla_jax.nn.cells import CELLS, Cell
from vla_jax.nn.layers import dropout
from vla_jax.nn.recurrence_config import Implementation, RecurrenceConfig
from vla_jax.nn.remat import run_in_chunks
from vla_jax.nn.sharded_params import gathered
from vla_jax.types import Array, Key, Params, ShardingRules

Carry = dict[str, dict[str, Any]]  # layer -> direction -> carry of a cell
# None is split over `tensor`: the gates of a unit would lie on several devices, which would have to
# exchange them at every step.
SHARDING: ShardingRules = (
    ("*/input_kernel", PartitionSpec("fsdp")),
    ("*/recurrent_kernel", PartitionSpec("fsdp")),
)


def cell_of(config: RecurrenceConfig) -> Cell:
    """Returns the cell of every layer."""
    return cells.get(config.cell, num_heads=config.num_heads, conv_size=config.conv_size)


def output_size(config: RecurrenceConfig) -> int:
    """Returns the number of output features: H, or 2·H with two directions."""
    return config.hidden_size * len(_directions(config))


def init(key: Key, config: RecurrenceConfig, input_size: int) -> Params:
    """Returns `{"layers_0": {"forward": params of a cell, "backward": ...}, ...}`.

    Args:
      key: consumed.
      config: sizes of the stack.
      input_size: D, features of the inputs.
    """
    params, size = {}, input_size
    for name, layer_key in zip(
        _layers(config), jax.random.split(key, config.num_layers), strict=True
    ):
        keys = jax.random.split(layer_key, len(_directions(config)))
        params[name] = {
            direction: cell_of(config).init(direction_key, size, config.hidden_size)
            for direction, direction_key in zip(_directions(config), keys, strict=True)
        }
        size = output_size(config)
    return params


def zero_carry(config: RecurrenceConfig, like: Array) -> Carry:
    """Returns the carry before the first step, all zeros.

    Args:
      config: sizes of the stack.
      like: any array `[B, ...]` of the data; the carry is sharded like it.
    """
    zero = cell_of(config).zero_carry
    return {
        name: {direction: zero(like, config.hidden_size) for direction in _directions(config)}
        for name in _layers(config)
    }


def layer(tree: Params | Carry, index: int = 0, *, direction: str = "forward") -> Any:
    """Returns the params or the carry of one cell of a stack.

    Args:
      tree: params from `init`, or a carry.
      index: of the layer; negative indices count from the last layer.
      direction: "forward" or "backward".
    """
    return tree[f"layers_{range(len(tree))[index]}"][direction]


def from_layer(cell: Any) -> dict[str, dict[str, Any]]:
    """Returns the params or the carry of a stack of one layer and one direction.

    Args:
      cell: params or carry of the cell.
    """
    return {"layers_0": {"forward": cell}}


def prepare_params(params: Params, config: RecurrenceConfig, *, num_rows: int) -> Params:
    """Returns params stored for fast calls of `step`, with the same results; not for `apply`.

    Args:
      params: from `init`.
      config: the config given to `init`.
      num_rows: rows of the carries in one step, such as B · W.
    """
    return matmul.prepare_params(params, num_rows=num_rows, dtype=config.dtype)


def apply(
    params: Params,
    config: RecurrenceConfig,
    inputs: Array,
    *,
    mask: Array | None = None,
    lengths: Array | None = None,
    reset: Array | None = None,
    carry: Carry | None = None,
    key: Key | None = None,
) -> tuple[Carry, jax.Array]:
    """Returns the carry after the last step and the outputs of all steps.

        hₜ = cell(0 if resetₜ else hₜ₋₁, inputsₜ)  where maskₜ;   hₜ = hₜ₋₁, outputₜ = 0 elsewhere

    Args:
      params: from `init`.
      config: the config given to `init`.
      inputs: `[B, T, D]`; masked steps may be NaN.
      mask: `[B, T]`, True where the step is real; None means everywhere.
      lengths: `[B]` int32; the first so many steps of each row are real. Given instead of the mask
        for rows that are padded on the right only, it saves implementation "cudnn" moving them.
      reset: `[B, T]`, True where a new episode starts, on a masked step too; None means nowhere.
      carry: before the first step (backward direction: after the last); None means zeros.
      key: consumed, for dropout; None means no dropout.

    Returns:
      The carry (backward direction: at the first step), and outputs `[B, T, H]`, float32; with two
      directions `[B, T, 2·H]`, forward first.

    Raises:
      ValueError: the params come from `prepare_params`; mask and lengths are both given; or
        implementation "cudnn" has no GPU, or gets resets, which it does not support.
    """
    flags = _Flags(mask, lengths, reset)
    _check(params, inputs, flags)
    carry = zero_carry(config, inputs) if carry is None else carry
    chex.assert_tree_shape_prefix(carry, (inputs.shape[0],))
    run = _TIME_LOOPS[config.implementation]
    return run(gathered(params), config, carry, inputs, flags, key)


def step(
    params: Params,
    config: RecurrenceConfig,
    carry: Carry,
    inputs: Array,
    *,
    reset: Array | None = None,
    key: Key | None = None,
) -> tuple[Carry, jax.Array]:
    """Returns the next carry and the output of one step.

    Args:
      params: from `init` or `prepare_params`.
      config: the config given to `init`, with one direction.
      carry: leaves `[B, ...]`, or more leading axes to which those of `inputs` broadcast.
      inputs: `[B, D]`.
      reset: `[B]`, True where a new episode starts; None means nowhere.
      key: consumed, for dropout between layers; None means no dropout.

    Returns:
      The carry, and the output `[B, H]`, float32.

    Raises:
      ValueError: the recurrence has two directions, so a single step is not defined.
    """
    if config.bidirectional:
        raise ValueError(
            "step needs bidirectional=False, got True: the backward direction depends on future "
            "steps; use `apply` on the whole sequence."
        )
    chex.assert_axis_dimension(inputs, -1, _input_size(params))
    cell, outputs, next_carry = cell_of(config), jnp.asarray(inputs), {}
    for index, name in enumerate(_layers(config)):
        layer_inputs, layer_params = outputs, layer(params, index)
        if index > 0 and key is not None:
            outputs = dropout(jax.random.fold_in(key, index), layer_inputs, config.dropout)
        cleared = bptt.clear(layer(carry, index), reset)
        layer_carry, outputs = cells.step(cell, layer_params, cleared, outputs, dtype=config.dtype)
        if index > 0 and config.residual:
            outputs = layer_inputs + outputs
        next_carry[name] = {"forward": layer_carry}
    return next_carry, outputs


class _Flags(NamedTuple):
    """Flags of real steps and of starts of episodes."""

    mask: Array | None  # [B, T]
    lengths: Array | None  # [B], instead of the mask
    reset: Array | None  # [B, T]


# (params, config, carry, inputs, flags, key) -> carry, outputs; batch-major
_TimeLoop = Callable[..., tuple[Carry, jax.Array]]


def _apply_cudnn(
    params: Params,
    config: RecurrenceConfig,
    carry: Carry,
    inputs: Array,
    flags: _Flags,
    key: Key | None,
) -> tuple[Carry, jax.Array]:
    del key
    if flags.reset is not None:
        raise ValueError(
            "reset must be None with implementation 'cudnn', which cannot start an episode inside "
            "a row, got flags; give every episode its own row instead of packing, or choose 'auto'."
        )
    paths = [(name, direction) for name in _layers(config) for direction in _directions(config)]
    cell_params, carries = (
        [tree[name][direction] for name, direction in paths] for tree in (params, carry)
    )
    last, outputs = cudnn.lstm(
        cell_params, carries, inputs,
        mask=flags.mask, lengths=flags.lengths, bidirectional=config.bidirectional,
    )  # fmt: skip
    next_carry: Carry = {name: {} for name in _layers(config)}
    for (name, direction), after in zip(paths, last, strict=True):
        next_carry[name][direction] = after
    return next_carry, outputs


def _apply_scan(
    scan: bptt.Scan,
    params: Params,
    config: RecurrenceConfig,
    carry: Carry,
    inputs: Array,
    flags: _Flags,
    key: Key | None,
) -> tuple[Carry, jax.Array]:
    mask = flags.mask
    if flags.lengths is not None:
        mask = bptt.steps_within(flags.lengths, inputs.shape[1])
    mask, reset = (None if flag is None else _swap(flag) for flag in (mask, flags.reset))
    run = partial(_run_stack, scan, params, config)
    steps = (
        bptt.keep_real(_swap(inputs), mask),
        mask,
        reset,
        _draw_dropout(config, key, inputs.shape),
    )
    if config.remat_chunk and not config.bidirectional:
        last, outputs = run_in_chunks(run, config.remat_chunk, carry, steps)
    else:
        last, outputs = run(carry, steps)
    return last, _swap(outputs)


def _apply_recommended(
    params: Params,
    config: RecurrenceConfig,
    carry: Carry,
    inputs: Array,
    flags: _Flags,
    key: Key | None,
) -> tuple[Carry, jax.Array]:
    scan = bptt.scan if CELLS[config.cell].chunk is None else chunkwise.scan
    return _apply_scan(scan, params, config, carry, inputs, flags, key)


_TIME_LOOPS: dict[Implementation, _TimeLoop] = {
    "auto": _apply_recommended,
    "bptt": partial(_apply_scan, bptt.scan),
    "scan": partial(_apply_scan, bptt.plain_scan),
    "associative": partial(_apply_scan, associative.scan),
    "chunkwise": partial(_apply_scan, chunkwise.scan),
    "cudnn": _apply_cudnn,
}


def _draw_dropout(
    config: RecurrenceConfig, key: Key | None, shape: tuple[int, ...]
) -> dict[str, Any]:
    """Returns the dropout mask of the inputs of each layer but the first, `[T, B, H]` bool."""
    if key is None or config.dropout == 0.0:
        return {}
    size = len(_directions(config)) * config.hidden_size
    return {
        name: jax.random.bernoulli(
            jax.random.fold_in(key, index), 1.0 - config.dropout, (shape[1], shape[0], size)
        )
        for index, name in enumerate(_layers(config))
        if index > 0
    }


def _run_stack(
    scan: bptt.Scan, params: Params, config: RecurrenceConfig, carry: Carry, steps: Any
) -> tuple[Carry, jax.Array]:
    """Runs all layers over inputs `[T, B, D]`, mask and reset `[T, B]`, and dropout masks."""
    outputs, mask, reset, keep = steps
    last: Carry = {}
    for index, name in enumerate(_layers(config)):
        layer_inputs = outputs
        if name in keep:
            outputs = jnp.where(keep[name], layer_inputs / (1.0 - config.dropout), 0.0)
        steps = (outputs, mask, reset)
        last[name], outputs = _run_layer(scan, params[name], config, carry[name], steps)
        if index > 0 and config.residual:
            outputs = layer_inputs + outputs
    return last, outputs


def _run_layer(
    scan: bptt.Scan, params: Params, config: RecurrenceConfig, carry: dict[str, Any], steps: Any
) -> tuple[dict[str, Any], jax.Array]:
    """Runs the directions of one layer over inputs `[T, B, D]`, mask and reset `[T, B]`."""
    inputs, mask, reset = steps
    last, outputs = {}, []
    for direction in _directions(config):
        reverse = direction == "backward"
        steps = (inputs, mask, _reverse_reset(reset) if reverse else reset)
        run = partial(_run_cell, scan, params[direction], config, reverse=reverse)
        if config.remat_chunk and config.bidirectional:  # a layer needs all steps of the one below
            result = run_in_chunks(
                run, config.remat_chunk, carry[direction], steps, reverse=reverse
            )
        else:
            result = run(carry[direction], steps)
        last[direction], hidden = result
        outputs.append(hidden)
    return last, jnp.concatenate(outputs, axis=-1)


def _run_cell(
    scan: bptt.Scan,
    params: Params,
    config: RecurrenceConfig,
    carry: Any,
    steps: Any,
    *,
    reverse: bool,
) -> tuple[Any, jax.Array]:
    """Runs a cell over inputs `[T, B, D]`, mask and reset `[T, B]`."""
    inputs, mask, reset = steps
    projected = cells.project(params, inputs, dtype=config.dtype)
    return scan(
        cell_of(config), params, carry, projected,
        mask=mask, reset=reset, reverse=reverse, dtype=config.dtype,
    )  # fmt: skip


def _reverse_reset(reset: Array | None) -> Array | None:
    """Returns the flags `[T, B]` of the backward direction: True at the last step of an episode."""
    if reset is None:
        return None
    return jnp.concatenate([reset[1:], jnp.zeros_like(reset[:1])])


def _swap(steps: Array) -> jax.Array:
    """Exchanges the batch axis and the time axis."""
    return jnp.swapaxes(steps, 0, 1)


def _layers(config: RecurrenceConfig) -> list[str]:
    return [f"layers_{index}" for index in range(config.num_layers)]


def _directions(config: RecurrenceConfig) -> tuple[str, ...]:
    return ("forward", "backward") if config.bidirectional else ("forward",)


def _input_size(params: Params) -> int:
    return layer(params)["input_kernel"].shape[0]


def _check(params: Params, inputs: Array, flags: _Flags) -> None:
    if matmul.is_prepared(params):
        raise ValueError(
            "params must come from `init`, got those of `prepare_params`, which are for `step`."
        )
    if flags.mask is not None and flags.lengths is not None:
        raise ValueError("mask must be None with lengths, got both; combine them into one mask.")
    chex.assert_shape(inputs, (None, None, _input_size(params)))
    if flags.lengths is not None:
        chex.assert_shape(flags.lengths, inputs.shape[:1])
        chex.assert_type(flags.lengths, int)
    for each in (flags.mask, flags.reset):
        if each is not None:
            chex.assert_shape(each, inputs.shape[:2])
            chex.assert_type(each, bool)
