"""Recurrent cells as pure functions, from the plain RNN to cells that are linear in their carry.

`contract` defines what a cell is. To add one, write a module with a `Cell` and add a line to
`CELLS`; stacks, masks, resets, the backward pass, streaming and decoders then work with it.

Gates lie on the last axis in PyTorch's and cuDNN's order: LSTM `i f g o`; GRU `r z n`, with the
reset gate applied after the recurrent product. Other cells say their order in `combine`,
those that are linear in their carry in `coefficients`.
"""

from vla_jax.nn.cells.contract import PRODUCT_PARAMS, Cell, extra_params, project, recur, step
from vla_jax.nn.cells.gated_delta_net import GATED_DELTA_NET, GatedDeltaNetCarry
from vla_jax.nn.cells.gru import GRU, GRUCarry
from vla_jax.nn.cells.layer_norm_lstm import LAYER_NORM_LSTM
from vla_jax.nn.cells.lstm import LSTM, LSTMCarry
from vla_jax.nn.cells.m_lstm import M_LSTM, MLSTMCarry
from vla_jax.nn.cells.mamba2 import MAMBA2, Mamba2Carry
from vla_jax.nn.cells.min_gru import MIN_GRU, MinGRUCarry
from vla_jax.nn.cells.min_lstm import MIN_LSTM, MinLSTMCarry
from vla_jax.nn.cells.rg_lru import RG_LRU, RGLRUCarry
from vla_jax.nn.cells.rnn import RNN, RNNCarry
from vla_jax.nn.cells.s_lstm import S_LSTM, SLSTMCarry

CellName = str  # key of `CELLS`
CELLS: dict[CellName, Cell] = {
    "rnn": RNN,
    "lstm": LSTM,
    "gru": GRU,
    "layer_norm_lstm": LAYER_NORM_LSTM,
    "min_gru": MIN_GRU,
    "min_lstm": MIN_LSTM,
    "rg_lru": RG_LRU,
    "s_lstm": S_LSTM,
    "m_lstm": M_LSTM,
    "gated_delta_net": GATED_DELTA_NET,
    "mamba2": MAMBA2,
}


def get(name: CellName, *, num_heads: int = 0, conv_size: int = 4) -> Cell:
    """Returns a cell with some sizes; a cell without heads or convolution ignores them.

    Args:
      name: key of `CELLS`.
      num_heads: M, heads of a cell with several; 0 means an automatic number.
      conv_size: S, steps of a short convolution of the inputs; 1 means none.
    """
    cell = CELLS[name]
    return cell if cell.configure is None else cell.configure(num_heads, conv_size)


__all__ = [
    "CELLS",
    "GATED_DELTA_NET",
    "GRU",
    "LAYER_NORM_LSTM",
    "LSTM",
    "MAMBA2",
    "MIN_GRU",
    "MIN_LSTM",
    "M_LSTM",
    "PRODUCT_PARAMS",
    "RG_LRU",
    "RNN",
    "S_LSTM",
    "Cell",
    "CellName",
    "GRUCarry",
    "GatedDeltaNetCarry",
    "LSTMCarry",
    "MLSTMCarry",
    "Mamba2Carry",
    "MinGRUCarry",
    "MinLSTMCarry",
    "RGLRUCarry",
    "RNNCarry",
    "SLSTMCarry",
    "extra_params",
    "get",
    "project",
    "recur",
    "step",
]
