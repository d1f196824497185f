"""Chrono initialisation of one cell by its name; see `cells.time_constants`."""

from vla_jax.nn.cells import CELLS, CellName
from vla_jax.types import Key, Params


def spread_gates(key: Key, cell: CellName, params: Params, span: int) -> Params:
    """Returns params of a cell whose units have time constants between 2 and `span` steps.

    A cell without gates that set a time constant, such as the plain RNN, keeps its params.

    Args:
      key: consumed.
      cell: name of the cell.
      params: from its `init`.
      span: steps, above 2.

    Source: Tallec & Ollivier 2018, "Can recurrent neural networks warp time?" (arXiv:1804.11188).
    """
    spread = CELLS[cell].spread
    return params if spread is None else spread(key, params, span)
