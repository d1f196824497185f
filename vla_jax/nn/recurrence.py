"""A cell over time: stacked, masked, reset at episode starts, in one or both directions.

`apply` runs a whole sequence, `step` one time step of the same recurrence. Params and carries
have the same paths: `params["layers_0"]["forward"]` goes with `carry["layers_0"]["forward"]`.
Sequences are batch-major `[B, T, D]` outside and time-major inside.

- A step whose `mask` is False leaves the carry as it is and gives zeros, so that a sequence
  padded on the left or the right does what the same sequence does without the padding.
- A step whose `reset` is True starts from a zero carry, so that several episodes in one sequence
  do not see each other, in neither direction.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp

from vla_jax.config import did_you_mean
from vla_jax.nn import associative, bptt, cudnn
from vla_jax.nn.cells import CELLS, CellName
from vla_jax.nn.matmul import Turned
from vla_jax.types import Array, Key, Params

# "bptt": backward pass by hand; "scan": JAX's own; "cudnn": NVIDIA's LSTM; "associative": no loop,
# for cells that are linear in their carry; "auto": "bptt".
Implementation = Literal["auto", "bptt", "scan", "associative", "cudnn"]
SCANS = {
    "auto": bptt.scan,
    "bptt": bptt.scan,
    "scan": bptt.plain_scan,
    "associative": associative.scan,
}
Carry = dict[str, dict[str, Any]]  # layer -> direction -> carry of a cell


@dataclasses.dataclass(frozen=True)
class RecurrenceConfig:
    """A stack of recurrent layers."""

    cell: CellName = "lstm"  # key of `cells.CELLS`
    num_layers: int = 1  # L, one on top of the other
    hidden_size: int = 256  # H, units of each layer and direction
    dropout: float = 0.0  # probability of dropping an output between two layers
    residual: bool = False  # whether each layer but the first adds its inputs to its outputs
    bidirectional: bool = False  # whether a second pass runs from the end to the start
    remat_chunk: int = 0  # steps of which all is computed again for the gradient; 0 = keep all
    implementation: Implementation = "auto"  # of time, see there
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the factors of matrix products

    def __post_init__(self):
        if self.cell not in CELLS:
            raise ValueError(f"unknown cell '{self.cell}'; {did_you_mean(self.cell, CELLS)}")
        for name in ("num_layers", "hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}.")
        if self.remat_chunk < 0:
            raise ValueError(
                f"remat_chunk must be a number of steps or 0 for none, got {self.remat_chunk}."
            )
        known = (*SCANS, "cudnn")
        if self.implementation not in known:
            raise ValueError(
                f"unknown implementation '{self.implementation}'; "
                f"{did_you_mean(self.implementation, known)}"
            )
        if self.implementation == "associative":
            associative.check(CELLS[self.cell])
        if self.implementation == "cudnn":
            _check_cudnn(self)
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"unknown dtype '{self.dtype}'; {did_you_mean(self.dtype, ('float32', 'bfloat16'))}"
            )


def output_size(config: RecurrenceConfig) -> int:
    """Returns the features of an output: H, or 2·H in both directions."""
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
            direction: CELLS[config.cell].init(direction_key, size, config.hidden_size)
            for direction, direction_key in zip(_directions(config), keys, strict=True)
        }
        size = output_size(config)
    return params


def zero_carry(config: RecurrenceConfig, like: Array) -> Carry:
    """Returns the carry before the first step, all zeros.

    Args:
      config: sizes of the stack.
      like: any array `[B, ...]` that comes in; the carry is sharded as it is.
    """
    zero = CELLS[config.cell].zero_carry
    return {
        name: {direction: zero(like, config.hidden_size) for direction in _directions(config)}
        for name in _layers(config)
    }


def apply(
    params: Params,
    config: RecurrenceConfig,
    inputs: Array,
    *,
    mask: Array | None = None,
    reset: Array | None = None,
    carry: Carry | None = None,
    key: Key | None = None,
) -> tuple[Carry, jax.Array]:
    """Returns the carry after the last step and the outputs of all steps.

        hₜ = cell(0 if resetₜ else hₜ₋₁, inputsₜ)  where maskₜ;   hₜ = hₜ₋₁, outputₜ = 0 elsewhere

    Args:
      params: from `init`.
      config: the one that `init` was given.
      inputs: `[B, T, D]`.
      mask: `[B, T]`, True where the step is real; None means everywhere.
      reset: `[B, T]`, True where a new episode starts, on a masked step too; None means nowhere.
      carry: before the first step (of the backward direction: after the last); None means zeros.
      key: consumed, for dropout; None means no dropout.

    Returns:
      The carry (of the backward direction: at the first step), and outputs `[B, T, H]`, float32;
      in both directions `[B, T, 2·H]`, forward first.

    Raises:
      ValueError: the kernels are turned over, for `step` alone; or implementation "cudnn" has no
        GPU, or gets a mask or reset, which it does not know.
    """
    _check(params, inputs, mask, reset)
    carry = zero_carry(config, inputs) if carry is None else carry
    chex.assert_tree_shape_prefix(carry, (inputs.shape[0],))
    if config.implementation == "cudnn":
        return _apply_cudnn(params, config, carry, inputs, mask, reset)
    mask, reset = (None if flags is None else _swap(flags) for flags in (mask, reset))
    run = partial(_run_stack, params, config)
    steps = (_swap(inputs), mask, reset, _draw_kept(config, key, inputs.shape))
    if config.remat_chunk and not config.bidirectional:
        last, outputs = _run_in_chunks(run, config.remat_chunk, carry, steps)
    else:
        last, outputs = run(carry, steps)
    return last, _swap(outputs)


def step(
    params: Params,
    config: RecurrenceConfig,
    carry: Carry,
    inputs: Array,
    *,
    reset: Array | None = None,
) -> tuple[Carry, jax.Array]:
    """Returns the next carry and the output of one step, without dropout.

    Args:
      params: from `init`.
      config: the one that `init` was given, in one direction.
      carry: `[B, H]`, or any leading axes that those of `inputs` broadcast to.
      inputs: `[B, D]`.
      reset: `[B]`, True where a new episode starts; None means nowhere.

    Returns:
      The carry, and the output `[B, H]`, float32.

    Raises:
      ValueError: the recurrence runs in both directions, so there is no single step of it.
    """
    if config.bidirectional:
        raise ValueError(
            "step needs bidirectional=False, got True: the backward direction starts in the "
            "future, which is not there yet; use `apply` on the whole sequence."
        )
    chex.assert_axis_dimension(inputs, -1, _input_size(params))
    cell, outputs, following = CELLS[config.cell], jnp.asarray(inputs), {}
    for layer, name in enumerate(_layers(config)):
        before, below = bptt.clear(carry[name]["forward"], reset), outputs
        after, outputs = cell.step(params[name]["forward"], before, below, dtype=config.dtype)
        if layer > 0 and config.residual:
            outputs = below + outputs
        following[name] = {"forward": after}
    return following, outputs


def _apply_cudnn(
    params: Params, config: RecurrenceConfig, carry: Carry, inputs: Array, mask, reset
) -> tuple[Carry, jax.Array]:
    if mask is not None or reset is not None:
        raise ValueError(
            "mask and reset must be None with implementation 'cudnn', which knows neither; choose "
            "'auto'."
        )
    places = [(name, direction) for name in _layers(config) for direction in _directions(config)]
    own, carries = ([tree[name][way] for name, way in places] for tree in (params, carry))
    last, outputs = cudnn.lstm(own, carries, inputs, bidirectional=config.bidirectional)
    following: Carry = {name: {} for name in _layers(config)}
    for (name, direction), after in zip(places, last, strict=True):
        following[name][direction] = after
    return following, outputs


def _check_cudnn(config: RecurrenceConfig) -> None:
    needed = {
        "cell": "lstm", "dropout": 0.0, "residual": False, "remat_chunk": 0, "dtype": "float32",
    }  # fmt: skip
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name} must be {value!r} with implementation 'cudnn', got "
                f"{getattr(config, name)!r}; choose implementation 'auto'."
            )


def _draw_kept(config: RecurrenceConfig, key: Key | None, shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns what dropout leaves of the inputs of each layer but the first, `[T, B, H]` bool."""
    if key is None or config.dropout == 0.0:
        return {}
    size = len(_directions(config)) * config.hidden_size
    return {
        name: jax.random.bernoulli(
            jax.random.fold_in(key, layer), 1.0 - config.dropout, (shape[1], shape[0], size)
        )
        for layer, name in enumerate(_layers(config))
        if layer > 0
    }


def _run_stack(
    params: Params, config: RecurrenceConfig, carry: Carry, steps: Any
) -> tuple[Carry, jax.Array]:
    """Runs all layers over steps: `inputs [T, B, D]`, `mask` and `reset [T, B]`, what is kept."""
    outputs, mask, reset, kept = steps
    last: Carry = {}
    for layer, name in enumerate(_layers(config)):
        below = outputs
        if name in kept:
            outputs = jnp.where(kept[name], below / (1.0 - config.dropout), 0.0)
        last[name], outputs = _run_layer(params[name], config, carry[name], outputs, mask, reset)
        if layer > 0 and config.residual:
            outputs = below + outputs
    return last, outputs


def _run_layer(
    params: Params, config: RecurrenceConfig, carry: dict[str, Any], inputs, mask, reset
) -> tuple[dict[str, Any], jax.Array]:
    """Runs one layer over `inputs [T, B, D]` in each of its directions."""
    last, outputs = {}, []
    for direction in _directions(config):
        backward = direction == "backward"
        steps = (inputs, mask, _episode_ends(reset) if backward else reset)
        run = partial(_run_cell, params[direction], config, reverse=backward)
        if config.remat_chunk and config.bidirectional:  # the layer above needs all of this one
            ended = _run_in_chunks(
                run, config.remat_chunk, carry[direction], steps, reverse=backward
            )
        else:
            ended = run(carry[direction], steps)
        last[direction], hidden = ended
        outputs.append(hidden)
    return last, jnp.concatenate(outputs, axis=-1)


def _run_cell(
    params: Params, config: RecurrenceConfig, carry: Any, steps: Any, *, reverse: bool
) -> tuple[Any, jax.Array]:
    """Runs a cell over `inputs [T, B, D]`, the inputs' product of all steps first."""
    cell, scan = CELLS[config.cell], SCANS[config.implementation]
    inputs, mask, reset = steps
    projected = cell.project(params, inputs, dtype=config.dtype)
    return scan(
        cell, params, carry, projected,
        mask=mask, reset=reset, reverse=reverse, dtype=config.dtype,
    )  # fmt: skip


def _run_in_chunks(
    run: Callable[[Any, Any], tuple[Any, jax.Array]],
    chunk: int,
    carry: Any,
    steps: tuple[Any, ...],
    *,
    reverse: bool = False,
) -> tuple[Any, jax.Array]:
    """Does what `run(carry, steps)` does, and keeps for the gradient but the carries in between.

    Two nested scans, the outer over chunks. A masked step more or less at the end changes nothing.
    """
    inputs, mask, *others = steps
    num_steps = inputs.shape[0]
    mask = jnp.ones(inputs.shape[:2], bool) if mask is None else mask
    chunks = jax.tree.map(partial(_cut, chunk=chunk), (inputs, mask, *others))
    run_chunk = jax.checkpoint(run, prevent_cse=False)
    carry, outputs = jax.lax.scan(run_chunk, carry, chunks, reverse=reverse)
    return carry, outputs.reshape(-1, *outputs.shape[2:])[:num_steps]


def _episode_ends(reset: Array | None) -> Array | None:
    """Returns where an episode starts for one who walks `[T, B]` backwards: at its last step."""
    if reset is None:
        return None
    return jnp.concatenate([reset[1:], jnp.zeros_like(reset[:1])])


def _cut(steps: Array, *, chunk: int) -> jax.Array:
    """Returns `[T, ...]` as `[ceil(T / chunk), chunk, ...]`, filled up with zeros (False)."""
    missing = -steps.shape[0] % chunk
    filled = jnp.pad(steps, [(0, missing)] + [(0, 0)] * (steps.ndim - 1))
    return filled.reshape(-1, chunk, *steps.shape[1:])


def _swap(steps: Array) -> jax.Array:
    """Turns batch-major into time-major and back."""
    return jnp.swapaxes(steps, 0, 1)


def _layers(config: RecurrenceConfig) -> list[str]:
    return [f"layers_{layer}" for layer in range(config.num_layers)]


def _directions(config: RecurrenceConfig) -> tuple[str, ...]:
    return ("forward", "backward") if config.bidirectional else ("forward",)


def _input_size(params: Params) -> int:
    return params["layers_0"]["forward"]["input_kernel"].shape[0]


def _is_turned(leaf: Any) -> bool:
    return isinstance(leaf, Turned)


def _check(params: Params, inputs: Array, mask: Array | None, reset: Array | None) -> None:
    if any(map(_is_turned, jax.tree.leaves(params, is_leaf=_is_turned))):
        raise ValueError(
            "params must be as from `init`, got kernels turned over; those of `lay_out` are for "
            "single steps."
        )
    chex.assert_shape(inputs, (None, None, _input_size(params)))
    for flags in (mask, reset):
        if flags is not None:
            chex.assert_shape(flags, inputs.shape[:2])
            chex.assert_type(flags, bool)
