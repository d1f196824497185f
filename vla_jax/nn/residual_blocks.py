"""Recurrent layers as residual blocks: layer normalisation, cell, projections, gated MLP.

`block` of a `StackConfig` chooses what surrounds every layer of a recurrence:

    "none"     h = cell(x), a stack as in `recurrence`
    "mlp"      x = x + Wₒ cell(LN(x));  x = x + W_d (gelu(W_g y) ⊙ W_u y),  y = LN(x)
    "gated"    x = x + W_d (LN(cell(y)) ⊙ silu(W_g y)),  y = LN(x)

"mlp" is the block with post-up-projection: a cell of width H, then an MLP of width
`expansion` · H (sLSTM in xLSTM, Griffin). In "gated", pre-up-projection, the cell itself has that
width and a gate beside it (mLSTM in xLSTM, Mamba). A dense layer in front gives the inputs the
width H; a layer normalisation follows the last block.

The blocks have the outer structure of those of xLSTM, Griffin and Mamba, without the gate branch of
Griffin's recurrent block, the group normalisation of xLSTM and the convolutions; some cells have a
convolution, or a normalisation of each head, of their own.

Source: Beck et al. 2024, "xLSTM" (arXiv:2405.04517), section 2.4 and appendix A.4; De et al. 2024,
"Griffin" (arXiv:2402.19427), sections 2.1 to 2.3; Gu & Dao 2023, "Mamba" (arXiv:2312.00752),
section 3.4.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vla_jax.config import checked, did_you_mean
from vla_jax.nn import bptt, layers, matmul, recurrence
from vla_jax.nn.chrono import spread_gates
from vla_jax.nn.recurrence import Carry, RecurrenceConfig
from vla_jax.types import Array, Key, Params, ShardingRules

BlockName = Literal["none", "mlp", "gated"]
# (params, config, carry, inputs [..., D], key) -> carry, outputs: `recurrence.apply` or `step`
_Advance = Callable[[Params, RecurrenceConfig, Carry, Array, Key | None], tuple[Carry, jax.Array]]
SHARDING: ShardingRules = (
    *recurrence.SHARDING,
    ("input/kernel", PartitionSpec("fsdp")),
    ("blocks_*/output/kernel", PartitionSpec("fsdp")),  # its input is whole, as the cell's output
    ("blocks_*/gate/kernel", layers.SPLIT_OUTPUTS),
    ("blocks_*/up/kernel", layers.SPLIT_OUTPUTS),
    ("blocks_*/down/kernel", layers.SPLIT_INPUTS),
)


@dataclasses.dataclass(frozen=True)
@checked(expansion=(0, 1024))
class StackConfig:
    """A recurrence whose layers may be residual blocks.

    `gate_span` is chrono initialisation: the units of every cell start with time constants between
    2 and `gate_span` steps (`cells.time_constants`); a cell without such gates keeps its params.
    """

    recurrence: RecurrenceConfig = RecurrenceConfig()  # the cells; hidden_size is the width H
    block: BlockName = (
        "none"  # around every layer: none, mlp (MLP after the cell), gated (wide cell)
    )
    expansion: float = 2.0  # width of a block's MLP or wide cell, as a multiple of H
    gate_span: int = (
        0  # longest time constant of the gates at the start, steps; 0 = as the cell does
    )

    def __post_init__(self):
        if self.block not in BLOCKS:
            raise ValueError(f"unknown block '{self.block}'; {did_you_mean(self.block, BLOCKS)}")
        if not self.expansion > 0:
            raise ValueError(f"expansion must be above 0, got {self.expansion}.")
        if self.gate_span < 0 or self.gate_span in (1, 2):
            raise ValueError(
                f"gate_span must be above 2 steps, or 0 for none, got {self.gate_span}."
            )
        BLOCKS[self.block].check(self)


class BlockStack(NamedTuple):
    """Member of the family `BLOCKS`: layers with some block around each of them."""

    check: Callable[[StackConfig], None]  # raises a ValueError for an unsupported config
    init: Callable[[Key, StackConfig, int], Params]  # (key, config, D) -> params
    zero_carry: Callable[[StackConfig, Array], Any]  # (config, like [B, ...]) -> carry
    # (params, config, carry, inputs [..., D], key, advance) -> carry, outputs [..., H]; `advance`
    # runs a recurrence over the steps of the inputs
    run: Callable[..., tuple[Any, jax.Array]]


class ResidualBlock(NamedTuple):
    """Functions in which residual blocks differ."""

    cell_size: Callable[[int, int], int]  # (H, wide) -> units of the cell
    init: Callable[[Key, int, int], Params]  # (key, H, wide) -> params beside cell and first norm
    # (params, x [..., H], y = LN(x), output of the cell, drop, dtype) -> next x
    finish: Callable[..., jax.Array]


def init(key: Key, config: StackConfig, input_size: int) -> Params:
    """Returns the params of a recurrence, or of a stack of blocks.

    Args:
      key: consumed.
      config: of the stack.
      input_size: D, features of the inputs.

    Returns:
      As `recurrence.init`; with blocks `{"input": dense, "blocks_0": {"norm", "recurrence", …},
      …, "norm"}`.
    """
    return BLOCKS[config.block].init(key, config, input_size)


def zero_carry(config: StackConfig, like: Array) -> Any:
    """Returns the carry before the first step: of the recurrence, or one per block.

    Args:
      config: of the stack.
      like: any array `[B, ...]` of the data; the carry is sharded like it.
    """
    return BLOCKS[config.block].zero_carry(config, like)


def apply(
    params: Params,
    config: StackConfig,
    inputs: Array,
    *,
    mask: Array | None = None,
    reset: Array | None = None,
    carry: Any = None,
    key: Key | None = None,
) -> tuple[Any, jax.Array]:
    """Returns the carry after the last step and the outputs of all steps; see `recurrence.apply`.

    With blocks, dropout applies to what a block adds, and `remat_chunk` rematerialises twice. The
    forward pass stores the inputs and the initial carry of each block. The backward pass runs a
    block again and stores its activations, except those of the cell, of which it stores the carries
    between chunks of `remat_chunk` steps and runs each chunk once more. So the cell runs forward
    three times and the other layers twice.

    Args:
      params: from `init`.
      config: the config given to `init`.
      inputs: `[B, T, D]`; masked steps may be NaN.
      mask: `[B, T]`, True where the step is real; None means everywhere.
      reset: `[B, T]`, True where a new episode starts; None means nowhere.
      carry: before the first step; None means zeros.
      key: consumed, for dropout; None means no dropout.

    Returns:
      The carry, and outputs `[B, T, H]`, float32, zeros at masked steps.
    """

    def advance(
        params: Params, cells: RecurrenceConfig, carry: Carry, inputs: Array, key: Key | None
    ) -> tuple[Carry, jax.Array]:
        return recurrence.apply(params, cells, inputs, mask=mask, reset=reset, carry=carry, key=key)

    carry = zero_carry(config, inputs) if carry is None else carry
    run, real = BLOCKS[config.block].run, bptt.keep_real(inputs, mask)
    carry, outputs = run(params, config, carry, real, key, advance)
    return carry, bptt.keep_real(outputs, mask)


def step(
    params: Params,
    config: StackConfig,
    carry: Any,
    inputs: Array,
    *,
    reset: Array | None = None,
    key: Key | None = None,
) -> tuple[Any, jax.Array]:
    """Returns the next carry and the output of one step; see `recurrence.step`.

    Args:
      params: from `init` or `prepare_params`.
      config: the config given to `init`.
      carry: leaves `[B, ...]`, or any leading axes to which those of `inputs` broadcast.
      inputs: `[B, D]`.
      reset: `[B]`, True where a new episode starts; None means nowhere.
      key: consumed, for dropout; None means no dropout.
    """

    def advance(
        params: Params, cells: RecurrenceConfig, carry: Carry, inputs: Array, key: Key | None
    ) -> tuple[Carry, jax.Array]:
        return recurrence.step(params, cells, carry, inputs, reset=reset, key=key)

    return BLOCKS[config.block].run(params, config, carry, inputs, key, advance)


def prepare_params(params: Params, config: StackConfig, *, num_rows: int) -> Params:
    """Returns params stored for fast calls of `step`; see `recurrence.prepare_params`."""
    return matmul.prepare_params(params, num_rows=num_rows, dtype=config.recurrence.dtype)


def _init_plain(key: Key, config: StackConfig, input_size: int) -> Params:
    return _init_cells(key, config.recurrence, input_size, config.gate_span)


def _zero_plain(config: StackConfig, like: Array) -> Carry:
    return recurrence.zero_carry(config.recurrence, like)


def _run_plain(
    params: Params,
    config: StackConfig,
    carry: Carry,
    inputs: Array,
    key: Key | None,
    advance: _Advance,
) -> tuple[Carry, jax.Array]:
    return advance(params, config.recurrence, carry, inputs, key)


def _check_blocks(config: StackConfig) -> None:
    for name in ("bidirectional", "residual"):
        if getattr(config.recurrence, name):
            raise ValueError(
                f"{name} must be False with block '{config.block}', got True; choose 'none'."
            )


def _init_blocks(block: ResidualBlock, key: Key, config: StackConfig, input_size: int) -> Params:
    size, wide = config.recurrence.hidden_size, _wide(config)
    input_key, *keys = jax.random.split(key, 1 + config.recurrence.num_layers)
    params = {"input": layers.init_dense(input_key, input_size, size)}
    for name, block_key in zip(_names(config), keys, strict=True):
        cell_key, other_key = jax.random.split(block_key)
        params[name] = {
            "norm": _init_norm(size),
            "recurrence": _init_cells(cell_key, _one_layer(block, config), size, config.gate_span),
            **block.init(other_key, size, wide),
        }
    return {**params, "norm": _init_norm(size)}


def _zero_blocks(block: ResidualBlock, config: StackConfig, like: Array) -> dict[str, Carry]:
    cells = _one_layer(block, config)
    return {name: recurrence.zero_carry(cells, like) for name in _names(config)}


def _run_blocks(
    block: ResidualBlock,
    params: Params,
    config: StackConfig,
    carry: dict[str, Carry],
    inputs: Array,
    key: Key | None,
    advance: _Advance,
) -> tuple[dict[str, Carry], jax.Array]:
    """Runs all blocks; `advance` runs the cell of one."""
    cells, dtype = _one_layer(block, config), config.recurrence.dtype

    def run_block(
        params: Params, carry: Carry, x: jax.Array, key: Key | None
    ) -> tuple[Carry, jax.Array]:
        drop = partial(_drop, key, config.recurrence.dropout)
        y = layers.layer_norm(x, **params["norm"])
        carry, hidden = advance(params["recurrence"], cells, carry, y, None)
        return carry, block.finish(params, x, y, hidden, drop, dtype)

    if config.recurrence.remat_chunk:
        # Without this the activations of the dense layers of all blocks would be stored. The cell
        # keeps its chunks: otherwise all its carries would be stored, in some cells matrices.
        run_block = jax.checkpoint(run_block)
    x, next_carry = layers.dense(inputs, **params["input"], dtype=dtype), {}
    for index, name in enumerate(_names(config)):
        block_key = None if key is None else jax.random.fold_in(key, index)
        next_carry[name], x = run_block(params[name], carry[name], x, block_key)
    return next_carry, layers.layer_norm(x, **params["norm"])


def _init_mlp(key: Key, size: int, wide: int) -> Params:
    keys = jax.random.split(key, 4)
    return {
        "output": layers.init_dense(keys[0], size, size),
        "mlp_norm": _init_norm(size),
        "gate": layers.init_dense(keys[1], size, wide),
        "up": layers.init_dense(keys[2], size, wide),
        "down": layers.init_dense(keys[3], wide, size),
    }


def _finish_mlp(
    params: Params, x: jax.Array, y: jax.Array, hidden: jax.Array, drop: Any, dtype: str
) -> jax.Array:
    del y
    dense = partial(layers.dense, dtype=dtype)
    x = x + drop(dense(hidden, **params["output"]), 0)
    y = layers.layer_norm(x, **params["mlp_norm"])
    product = jax.nn.gelu(dense(y, **params["gate"])) * dense(y, **params["up"])
    return x + drop(dense(product, **params["down"]), 1)


def _init_gated(key: Key, size: int, wide: int) -> Params:
    gate_key, down_key = jax.random.split(key)
    return {
        "output_norm": _init_norm(wide),
        "gate": layers.init_dense(gate_key, size, wide),
        "down": layers.init_dense(down_key, wide, size),
    }


def _finish_gated(
    params: Params, x: jax.Array, y: jax.Array, hidden: jax.Array, drop: Any, dtype: str
) -> jax.Array:
    dense = partial(layers.dense, dtype=dtype)
    normalised = layers.layer_norm(hidden, **params["output_norm"])
    product = normalised * jax.nn.silu(dense(y, **params["gate"]))
    return x + drop(dense(product, **params["down"]), 0)


def _stack_of(block: ResidualBlock) -> BlockStack:
    return BlockStack(
        check=_check_blocks,
        init=partial(_init_blocks, block),
        zero_carry=partial(_zero_blocks, block),
        run=partial(_run_blocks, block),
    )


BLOCKS: dict[str, BlockStack] = {
    "none": BlockStack(lambda config: None, _init_plain, _zero_plain, _run_plain),
    "mlp": _stack_of(ResidualBlock(lambda size, wide: size, _init_mlp, _finish_mlp)),
    "gated": _stack_of(ResidualBlock(lambda size, wide: wide, _init_gated, _finish_gated)),
}


def _drop(key: Key | None, rate: float, outputs: jax.Array, index: int) -> jax.Array:
    """Returns outputs after dropout with the key of the index-th addition of a block."""
    return layers.dropout(None if key is None else jax.random.fold_in(key, index), outputs, rate)


def _init_cells(key: Key, config: RecurrenceConfig, input_size: int, span: int) -> Params:
    """Returns params of a recurrence, with chrono initialisation if `span` is not 0."""
    params = recurrence.init(key, config, input_size)
    if not span:
        return params
    span_keys = jax.random.split(jax.random.fold_in(key, span), config.num_layers)
    return {
        name: {
            direction: spread_gates(layer_key, config.cell, cell_params, span)
            for direction, cell_params in directions.items()
        }
        for layer_key, (name, directions) in zip(span_keys, params.items(), strict=True)
    }


def _init_norm(size: int) -> Params:
    return {"scale": jnp.ones(size), "bias": jnp.zeros(size)}


def _wide(config: StackConfig) -> int:
    return max(1, round(config.expansion * config.recurrence.hidden_size))


def _one_layer(block: ResidualBlock, config: StackConfig) -> RecurrenceConfig:
    """Returns the config of the recurrence of one block."""
    size = block.cell_size(config.recurrence.hidden_size, _wide(config))
    return dataclasses.replace(config.recurrence, num_layers=1, hidden_size=size, dropout=0.0)


def _names(config: StackConfig) -> list[str]:
    return [f"blocks_{index}" for index in range(config.recurrence.num_layers)]
