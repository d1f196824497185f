"""Config of a stack of recurrent layers; see `recurrence`."""

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

from vla_jax.config import checked, did_you_mean
from vla_jax.nn import associative, chunkwise, cudnn
from vla_jax.nn.cells import CELLS, CellName
from vla_jax.nn.cells.chunks import count_heads

Implementation = Literal["auto", "bptt", "scan", "associative", "chunkwise", "cudnn"]


@dataclasses.dataclass(frozen=True)
@checked()
class RecurrenceConfig:
    """A stack of recurrent layers."""

    cell: CellName = "lstm"  # a key of `CELLS`: rnn, lstm, gru, min_gru, m_lstm, mamba2, …
    num_layers: int = 1  # L, stacked layers
    hidden_size: int = 256  # H, units per layer and direction
    num_heads: int = 0  # M, heads of a cell with matrices as its carry; 0 = automatic, up to 4
    conv_size: int = 4  # S, steps of the convolution of gated_delta_net and mamba2; 1 = none
    dropout: float = 0.0  # probability of zeroing an output between two layers, in [0, 1)
    residual: bool = False  # add the inputs of every layer except the first to its outputs
    bidirectional: bool = False  # run a second cell per layer from the last step to the first
    remat_chunk: int = 0  # steps per rematerialised chunk; 0 stores all activations
    # time loop: "bptt" (hand-written backward pass), "scan" (derived by JAX), "associative" (linear
    # cells, no loop), "chunkwise" (cells with matrices, some steps at once), "cudnn" (NVIDIA GPUs),
    # "auto" (the recommended one, at present "chunkwise" where the cell has it, otherwise "bptt")
    implementation: Implementation = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of the factors of matrix products

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
        implementations = get_args(Implementation)
        if self.implementation not in implementations:
            raise ValueError(
                f"unknown implementation '{self.implementation}'; "
                f"{did_you_mean(self.implementation, implementations)}"
            )
        if self.conv_size < 1:
            raise ValueError(f"conv_size must be at least 1 (none), got {self.conv_size}.")
        if CELLS[self.cell].configure is not None:
            count_heads(self.num_heads, self.hidden_size)  # raises
        if self.implementation in _CHECKS:
            _CHECKS[self.implementation](self)
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"unknown dtype '{self.dtype}'; {did_you_mean(self.dtype, ('float32', 'bfloat16'))}"
            )


# Raise a ValueError if an implementation does not support a config; the others support all.
_CHECKS: dict[str, Callable[[RecurrenceConfig], None]] = {
    "associative": lambda config: associative.check(CELLS[config.cell]),
    "chunkwise": lambda config: chunkwise.check(CELLS[config.cell]),
    "cudnn": lambda config: cudnn.check(vars(config)),
}
