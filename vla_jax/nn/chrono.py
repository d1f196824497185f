"""Chrono initialisation: gate biases that give units a range of time constants."""

import jax
import jax.numpy as jnp

from vla_jax.nn.cells import CELLS, CellName
from vla_jax.types import Key, Params


def spread_gates(key: Key, cell: CellName, params: Params, span: int) -> Params:
    """Returns params of a cell whose units have time constants between 1 and `span` steps.

        forget gate: b = log U(1, span − 1);    input gate of an LSTM: −b

    A gate that keeps with probability p forgets in about 1 / (1 − p) steps. A cell without
    `time_gates`, such as the plain RNN, keeps its params.

    Args:
      key: consumed.
      cell: name of the cell.
      params: from its `init`.
      span: steps, above 2.

    Source: Tallec & Ollivier 2018, "Can recurrent neural networks warp time?" (arXiv:1804.11188).
    """
    member = CELLS[cell]
    if not member.time_gates:
        return params
    bias = params[member.gate_bias]
    size = bias.shape[0] // member.num_gates
    magnitude = jnp.log(jax.random.uniform(key, (size,), minval=1.0, maxval=span - 1.0))
    for gate, sign in member.time_gates:
        bias = bias.at[gate * size : (gate + 1) * size].set(sign * magnitude)
    return {**params, member.gate_bias: bias}
