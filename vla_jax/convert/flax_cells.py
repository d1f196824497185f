"""Conversion of Flax's recurrent cells, Linen and NNX, to ours and back.

    Flax                             Linen, NNX                       ours
    LSTMCell, OptimizedLSTMCell      ii if ig io, hi hf hg ho         lstm
    GRUCell                          ir iz in, hr hz hn               gru
    SimpleCell                       i, h                             rnn

(NNX writes `if_` for `if`; its OptimizedLSTMCell, GRUCell and SimpleCell store all gates together
in `dense_i` and `dense_h`.) Flax has one bias per gate where we and PyTorch have two, except for
`hn` of Linen's GRUCell, which is separate.

- Flax → ours → Flax preserves every byte: the bias becomes our input bias, the recurrent bias is
  zero.
- Ours → Flax computes the same to float32 rounding (1e-6): the two biases are summed. It does not
  train the same: the two biases of a gate have equal gradients, so that under Adam their sum
  moves twice as fast as a single bias.
- NNX's GRUCell has no `hn` bias: a GRU of ours can be converted only while that bias is zero.

The options `gate_fn`, `activation_fn` and `SimpleCell(residual=True)` are not part of the params
and must have their defaults, which are what our cells compute.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax.numpy as jnp
import numpy as np

from vla_jax.config import did_you_mean
from vla_jax.convert.arrays import as_float32
from vla_jax.convert.conversion_report import Report, Shape, check, compare, warn
from vla_jax.convert.sizes import check_params
from vla_jax.nn import recurrence
from vla_jax.nn.cells import CELLS
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.types import Params

CellName = Literal["rnn", "lstm", "gru"]
Style = Literal["linen", "nnx", "nnx_optimized"]


class Layout(NamedTuple):
    """Submodules of a Flax cell that hold our gates, the same number of gates in each."""

    inputs: tuple[str, ...]  # modules of the input kernels, in the order of our gates
    recurrent: tuple[str, ...]  # modules of the recurrent kernels
    biased: tuple[str, ...]  # modules that have a bias


_LSTM_RECURRENT = ("hi", "hf", "hg", "ho")
_JOINED = (("dense_i",), ("dense_h",))

LAYOUTS: dict[tuple[CellName, Style], Layout] = {  # (our cell, style) -> layout
    ("lstm", "linen"): Layout(("ii", "if", "ig", "io"), _LSTM_RECURRENT, _LSTM_RECURRENT),
    ("lstm", "nnx"): Layout(("ii", "if_", "ig", "io"), _LSTM_RECURRENT, _LSTM_RECURRENT),
    ("lstm", "nnx_optimized"): Layout(*_JOINED, ("dense_h",)),
    ("gru", "linen"): Layout(("ir", "iz", "in"), ("hr", "hz", "hn"), ("ir", "iz", "in", "hn")),
    ("gru", "nnx"): Layout(*_JOINED, ("dense_i",)),
    ("rnn", "linen"): Layout(("i",), ("h",), ("i",)),
    ("rnn", "nnx"): Layout(*_JOINED, ("dense_i",)),
}


def from_flax(params: Mapping[str, Any]) -> tuple[CellName, Params]:
    """Converts the params of a Flax cell.

    Args:
      params: of one cell: Linen's `variables["params"]` (of an `nn.RNN` its entry "cell", or
        in the surrounding module the entry "LSTMCell_0" or similar), or NNX's
        `nnx.state(cell, nnx.Param)`. float16 and bfloat16 become float32, with one warning.

    Returns:
      Name in `cells.CELLS`, and `{"input_kernel", "recurrent_kernel", "input_bias",
      "recurrent_bias"}`.

    Raises:
      ValueError: params of something else, or not floating point of 32 or 16 bits.
    """
    arrays = dict(_leaves(params))
    cell, layout, report = _recognise(arrays)
    check(
        report,
        "params must be those of one LSTMCell, OptimizedLSTMCell, GRUCell or SimpleCell of Flax",
        "give variables['params']"
        if "params" in params
        else "of an `nn.RNN`, give the params of its cell, such as params['cell'] or "
        "params['LSTMCell_0']",
    )
    leaves = {name: as_float32(name, leaf) for name, leaf in arrays.items()}
    warn(report, leaves)
    pairs = list(zip(layout.inputs, layout.recurrent, strict=True))
    biases = [_two_biases(leaves.get(f"{i}.bias"), leaves.get(f"{h}.bias")) for i, h in pairs]
    parts = {
        "input_kernel": [leaves[f"{i}.kernel"] for i, _ in pairs],
        "recurrent_kernel": [leaves[f"{h}.kernel"] for _, h in pairs],
        "input_bias": [first for first, _ in biases],
        "recurrent_bias": [second for _, second in biases],
    }
    return cell, {name: jnp.array(np.concatenate(part, axis=-1)) for name, part in parts.items()}


def to_flax(cell: CellName, params: Params, style: Style = "linen") -> Params:
    """Converts the params of a cell to those of the equivalent Flax cell.

    Args:
      cell: name in `cells.CELLS`.
      params: of that cell, from its `init`.
      style: "linen" for every Linen cell, "nnx" for NNX cells, "nnx_optimized" for NNX's
        OptimizedLSTMCell.

    Returns:
      `{"ii": {"kernel": ...}, ...}`: Linen's `variables["params"]`, or what
      `nnx.update(cell, ...)` takes.

    Raises:
      ValueError: the style has no such cell, the params are of another cell, or the style is
        "nnx" and the recurrent bias of a GRU's gate n is not zero.
    """
    layout = _layout(cell, style)
    _check_cell(cell, params)
    if (cell, style) == ("gru", "nnx") and np.any(np.split(params["recurrent_bias"], 3)[2]):
        raise ValueError(
            "style='nnx' needs a recurrent bias of zero for gate n, which NNX's GRUCell does not "
            "have, got nonzero values; choose style='linen'."
        )
    parts = {name: np.split(leaf, len(layout.inputs), axis=-1) for name, leaf in params.items()}
    converted: Params = {}
    for gate, (i, h) in enumerate(zip(layout.inputs, layout.recurrent, strict=True)):
        converted[i] = {"kernel": jnp.array(parts["input_kernel"][gate])}
        converted[h] = {"kernel": jnp.array(parts["recurrent_kernel"][gate])}
        first, second = parts["input_bias"][gate], parts["recurrent_bias"][gate]
        biased = [module for module in (i, h) if module in layout.biased]
        biases = (first, second) if len(biased) == 2 else (_one_bias(first, second),)
        for module, bias in zip(biased, biases, strict=True):
            converted[module]["bias"] = jnp.array(bias)
    return converted


def from_flax_stack(
    layers: Sequence[Mapping[str, Any] | tuple[Mapping[str, Any], Mapping[str, Any]]],
) -> tuple[RecurrenceConfig, Params]:
    """Converts a stack of Flax cells to a recurrence.

    Args:
      layers: params of one cell, or a pair (forward, backward), per layer, lowest layer first.

    Returns:
      The config, its `dropout` 0, and params as from `recurrence.init`.

    Raises:
      ValueError: no layers, layers of different cells, or sizes that do not match.
    """
    pairs = [(layer,) if isinstance(layer, Mapping) else tuple(layer) for layer in layers]
    cells = [[from_flax(params) for params in pair] for pair in pairs]
    names = sorted({name for pair in cells for name, _ in pair})
    directions = {len(pair) for pair in cells}
    if len(names) != 1 or len(directions) != 1:
        raise ValueError(
            "layers must have the same cell and the same directions, got "
            f"{', '.join(names) or 'no cell'} in {sorted(directions)} directions; give one cell, "
            "or one pair of cells, per layer."
        )
    params = {
        f"layers_{layer}": dict(
            zip(("forward", "backward"), (cell_params for _, cell_params in pair), strict=False)
        )
        for layer, pair in enumerate(cells)
    }
    first = recurrence.layer(params)
    config = RecurrenceConfig(
        cell=cells[0][0][0],
        num_layers=len(layers),
        hidden_size=first["recurrent_kernel"].shape[0],
        bidirectional=directions == {2},
    )
    check_params(config, params)
    return config, params


def to_flax_stack(
    config: RecurrenceConfig, params: Params, style: Style = "linen"
) -> list[Params | tuple[Params, Params]]:
    """Converts a recurrence to a stack of Flax cells, as `from_flax_stack` takes it.

    Args:
      config: of the recurrence.
      params: from `recurrence.init`.
      style: see `to_flax`.

    Raises:
      ValueError: params of another config; and as `to_flax`.
    """
    check_params(config, params)

    def convert(layer: int, direction: str) -> Params:
        return to_flax(cast(CellName, config.cell), params[f"layers_{layer}"][direction], style)

    if config.bidirectional:
        numbers = range(config.num_layers)
        return [(convert(layer, "forward"), convert(layer, "backward")) for layer in numbers]
    return [convert(layer, "forward") for layer in range(config.num_layers)]


def _leaves(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields "module.leaf" and its array, from nested dicts or NNX states."""
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", np.asarray(value)


def _recognise(leaves: Mapping[str, np.ndarray]) -> tuple[CellName, Layout, Report]:
    """Returns cell and layout with the most matching tensors, and their report."""
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    candidates: list[tuple[CellName, Layout, Report]] = [
        (cell, layout, compare(_shapes(CELLS[cell].num_gates, layout, shapes), leaves))
        for (cell, _), layout in LAYOUTS.items()
    ]
    return max(candidates, key=lambda candidate: len(candidate[2].used))


def _shapes(num_gates: int, layout: Layout, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Returns the shapes of a cell of this layout, with D and H of `shapes`."""
    input_size = shapes.get(f"{layout.inputs[0]}.kernel", ())[:1]
    hidden_size = shapes.get(f"{layout.recurrent[0]}.kernel", ())[:1]
    width = tuple(num_gates // len(layout.inputs) * size for size in hidden_size)
    return {
        **{f"{module}.kernel": input_size + width for module in layout.inputs},
        **{f"{module}.kernel": hidden_size + width for module in layout.recurrent},
        **{f"{module}.bias": width for module in layout.biased},
    }


def _check_cell(cell: CellName, params: Params) -> None:
    """Raises a ValueError unless `params` are the four params of this cell."""
    arrays = dict(_leaves(params))
    shapes = {name: leaf.shape for name, leaf in arrays.items()}
    input_size = shapes.get("input_kernel", ())[:1]
    hidden_size = shapes.get("recurrent_kernel", ())[:1]
    width = tuple(CELLS[cell].num_gates * size for size in hidden_size)
    expected = {
        "input_kernel": input_size + width,
        "recurrent_kernel": hidden_size + width,
        "input_bias": width,
        "recurrent_bias": width,
    }
    check(
        compare(expected, arrays),
        f"params must be those of one cell '{cell}'",
        "for a recurrence, use `to_flax_stack`",
    )


def _layout(cell: CellName, style: Style) -> Layout:
    known = [known_style for known_cell, known_style in LAYOUTS if known_cell == cell]
    if not known:
        cells = sorted({known_cell for known_cell, _ in LAYOUTS})
        raise ValueError(f"unknown cell '{cell}'; {did_you_mean(cell, cells)}")
    if style not in known:
        raise ValueError(f"unknown style '{style}' of {cell}; {did_you_mean(style, known)}")
    return LAYOUTS[cell, style]


def _two_biases(
    first: np.ndarray | None, second: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns input and recurrent bias of a gate that has either or both."""
    if first is not None and second is not None:
        return first, second
    bias = np.asarray(second if first is None else first)
    return bias, np.zeros_like(bias)


def _one_bias(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    # Where the second is zero the first is returned as it is: −0 + 0 would change its bytes.
    return np.where(second == 0, first, first + second)
