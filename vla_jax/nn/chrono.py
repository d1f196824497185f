"""Chrono initialisation: gate biases that give units a range of time constants."""

import jax
import jax.numpy as jnp

from vla_jax.nn.cells import CELLS, CellName
from vla_jax.types import Key, Params

# cell -> bias of its gates, and gate -> sign: 1 if the gate keeps the carry, -1 if it admits input
_GATES: dict[str, tuple[str, dict[int, int]]] = {
    "lstm": ("input_bias", {0: -1, 1: 1}),
    "layer_norm_lstm": ("gate_bias", {0: -1, 1: 1}),
    "gru": ("input_bias", {1: 1}),
    "min_gru": ("input_bias", {0: -1}),
}


def spread_gates(key: Key, cell: CellName, params: Params, span: int) -> Params:
    """Returns params of a cell whose units have time constants between 1 and `span` steps.

        forget gate: b = log U(1, span − 1);    input gate of an LSTM: −b

    A gate that keeps with probability p forgets in about 1 / (1 − p) steps. A plain RNN has no
    such gate, and its params are returned unchanged.

    Args:
      key: consumed.
      cell: name of the cell.
      params: from its `init`.
      span: steps, above 2.

    Source: Tallec & Ollivier 2018, "Can recurrent neural networks warp time?" (arXiv:1804.11188).
    """
    if cell not in _GATES:
        return params
    leaf, signs = _GATES[cell]
    bias = params[leaf]
    size = bias.shape[0] // CELLS[cell].num_gates
    magnitude = jnp.log(jax.random.uniform(key, (size,), minval=1.0, maxval=span - 1.0))
    for gate, sign in signs.items():
        bias = bias.at[gate * size : (gate + 1) * size].set(sign * magnitude)
    return {**params, leaf: bias}
