"""Conversion of `torch.nn.RNN`, `LSTM` and `GRU` to a recurrence and back.

    weight_ih_l{k}{_reverse} [G·H, D]   ↔  layers_{k}/{direction}/input_kernel [D, G·H]
    weight_hh_l{k}{_reverse} [G·H, H]   ↔  layers_{k}/{direction}/recurrent_kernel [H, G·H]
    bias_ih_l{k}{_reverse}   [G·H]      ↔  layers_{k}/{direction}/input_bias
    bias_hh_l{k}{_reverse}   [G·H]      ↔  layers_{k}/{direction}/recurrent_bias

The cells compute the same and have the same gate order: only names change and kernels are
transposed. A round trip preserves every byte, and training is the same. A state dict does not
contain `dropout`, `batch_first` (here the batch axis is always first), or the `nonlinearity` of
a plain RNN, which must be tanh.

Tensors may be NumPy, JAX or PyTorch arrays; PyTorch need not be installed.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vla_jax.convert.arrays import as_float32
from vla_jax.convert.conversion_report import Report, Shape, abbreviate, check, compare, warn
from vla_jax.convert.sizes import (
    check_known,
    check_params,
    count_layers,
    read_size,
    recurrence_shapes,
)
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.types import Params

LEAVES = {  # our name -> PyTorch's, in the order of its state dict
    "input_kernel": "weight_ih",
    "recurrent_kernel": "weight_hh",
    "input_bias": "bias_ih",
    "recurrent_bias": "bias_hh",
}
# rows / columns of weight_hh -> cell
CELLS: dict[float, Literal["rnn", "gru", "lstm"]] = {1: "rnn", 3: "gru", 4: "lstm"}
NAME = r"(?:weight|bias)_(?:ih|hh)_l(\d+)(_reverse)?"


class RecurrenceSizes(NamedTuple):
    """Sizes of a PyTorch recurrence inferred from names and shapes; None = not determined."""

    cell: Literal["rnn", "gru", "lstm"] | None
    input_size: int | None  # D
    hidden_size: int | None  # H
    num_layers: int  # L
    bidirectional: bool


def from_torch(tensors: Mapping[str, Any], *, prefix: str = "") -> tuple[RecurrenceConfig, Params]:
    """Converts a PyTorch module to the equivalent recurrence.

    Args:
      tensors: state dict of a `torch.nn.RNN`, `LSTM` or `GRU`. Biases of a module with
        `bias=False` become zero; float16 and bfloat16 become float32, with one warning.
      prefix: prefix of the names, such as "encoder.rnn."; tensors without it are ignored.

    Returns:
      The config, its `dropout` 0, and params as from `recurrence.init`.

    Raises:
      ValueError: tensors are missing, left over, of another shape, not floating point of 32 or 16
        bits, or of an LSTM with `proj_size`.
    """
    config, input_size = _read_config(tensors, prefix)
    report = report_torch(tensors, config, prefix=prefix)
    check(
        report,
        "tensors must be all those of one torch.nn.RNN, LSTM or GRU",
        "give its complete state dict and nothing else",
        left_over=[name for name in report.left_over if name.startswith(prefix)],
    )
    params = {}
    shapes, names = recurrence_shapes(config, input_size), _names(config)
    for path, shape in shapes.items():
        name = prefix + names[path]
        array = as_float32(name, tensors[name]) if name in tensors else np.zeros(shape, np.float32)
        # A copy: on a CPU a JAX array may share the memory of the tensor, which may change.
        params[path] = jnp.array(array.T)
    warn(report, tensors)
    return config, unflatten_dict(params, sep="/")


def to_torch(
    config: RecurrenceConfig, params: Params, *, prefix: str = "", bias: bool = True
) -> dict[str, np.ndarray]:
    """Converts a recurrence to the state dict of the equivalent PyTorch module.

        module.load_state_dict({name: torch.from_numpy(x) for name, x in tensors.items()})

    Args:
      config: of the recurrence.
      params: from `recurrence.init`, or a tree of the same shapes, such as gradients.
      prefix: prefix of the names.
      bias: False omits the biases, for a module with `bias=False`.

    Returns:
      Name -> array, in PyTorch's order, copied.

    Raises:
      ValueError: params of another config, a cell or residual that PyTorch does not have, or
        `bias` is False and a bias is not zero.
    """
    check_params(config, params)
    check_cell(config.cell)
    if config.residual:
        raise ValueError(
            "residual must be False, got True: torch.nn.RNN, LSTM and GRU have no residual "
            "connections; convert the layers one by one."
        )
    flat = flatten_dict(params, sep="/")
    tensors = {
        name: np.array(as_float32(path, flat[path]).T, order="C")
        for path, name in _names(config).items()
    }
    selected = [name for name in tensors if bias or not name.startswith("bias")]
    nonzero = [name for name in tensors if name not in selected and tensors[name].any()]
    if nonzero:
        raise ValueError(
            f"bias=False needs biases of zero, got nonzero {abbreviate(nonzero)}; use bias=True."
        )
    return {prefix + name: tensors[name] for name in selected}


def check_cell(cell: str) -> None:
    """Raises a ValueError unless PyTorch has the cell."""
    if cell not in CELLS.values():
        raise ValueError(
            f"cell must be one that PyTorch has ({', '.join(CELLS.values())}), got '{cell}'; it "
            "cannot be converted."
        )


def report_torch(
    tensors: Mapping[str, Any], config: RecurrenceConfig, *, prefix: str = ""
) -> Report:
    """Returns the report of `from_torch` on the same tensors.

    Args:
      tensors: as for `from_torch`.
      config: its result.
      prefix: as for `from_torch`.
    """
    has_bias = any(name.startswith(f"{prefix}bias") for name in tensors)
    input_size = read_sizes(_shapes_of(tensors, prefix)).input_size or 1
    shapes = recurrence_shapes(config, input_size)
    expected = {
        prefix + name: shapes[path][::-1]
        for path, name in _names(config).items()
        if has_bias or not name.startswith("bias")
    }
    return compare(expected, tensors)


def read_sizes(shapes: Mapping[str, Shape], hidden_size: int | None = None) -> RecurrenceSizes:
    """Infers the sizes of a PyTorch recurrence, each from any tensor that determines it.

    Args:
      shapes: of the tensors, by their names without prefix.
      hidden_size: H, if known otherwise.

    Raises:
      ValueError: the tensors are of another cell.
    """
    bidirectional = any(name.endswith("_reverse") for name in shapes if re.fullmatch(NAME, name))
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    inner = read_size(matrices, 1, r"weight_ih_l[1-9]\d*(_reverse)?")
    from_inputs = inner // (1 + bidirectional) if inner else hidden_size
    hidden_size = read_size(matrices, 1, r"weight_hh_l\d+(_reverse)?") or from_inputs
    rows = read_size(matrices, 0, r"weight_hh_\w+", r"weight_ih_\w+") or read_size(
        shapes, 0, r"bias_[ih]h_\w+"
    )
    if hidden_size and rows and rows / hidden_size not in CELLS:
        raise ValueError(
            "weight_hh_l0 must have 1, 3 or 4 times as many rows as columns (RNN, GRU, LSTM), got "
            f"[{rows}, {hidden_size}]; only these three can be converted, without projection."
        )
    return RecurrenceSizes(
        cell=CELLS[rows / hidden_size] if hidden_size and rows else None,
        input_size=read_size(matrices, 1, r"weight_ih_l0(_reverse)?"),
        hidden_size=hidden_size,
        num_layers=count_layers(shapes, NAME),
        bidirectional=bidirectional,
    )


def _read_config(tensors: Mapping[str, Any], prefix: str) -> tuple[RecurrenceConfig, int]:
    """Returns the config and the input size D."""
    shapes = _shapes_of(tensors, prefix)
    projected = [name for name in shapes if name.startswith("weight_hr_")]
    if projected:
        raise ValueError(
            f"proj_size must be 0, got an LSTM with projections ({abbreviate(projected)}); "
            "vla_jax has no such cell."
        )
    sizes = read_sizes(shapes)
    config = RecurrenceConfig(
        cell=sizes.cell or "lstm",  # where unknown: the names are the same for all cells
        num_layers=sizes.num_layers,
        hidden_size=sizes.hidden_size or 1,
        bidirectional=sizes.bidirectional,
    )
    known = {"input_size": sizes.input_size, "hidden_size": sizes.hidden_size}
    input_size = sizes.input_size or 1
    expected = recurrence_shapes(config, input_size)
    check_known(
        [name for name, size in known.items() if not size],
        {name: expected[path] for path, name in _names(config).items()},
        shapes,
        f"`prefix` must be the prefix of the names, got '{prefix}' and {abbreviate(list(tensors))}",
    )
    return config, input_size


def _shapes_of(tensors: Mapping[str, Any], prefix: str) -> dict[str, Shape]:
    return {
        name.removeprefix(prefix): tuple(np.shape(tensor))
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _names(config: RecurrenceConfig) -> dict[str, str]:
    """Returns path in our params -> PyTorch's name, in the order of its state dict."""
    directions = (
        {"forward": "", "backward": "_reverse"} if config.bidirectional else {"forward": ""}
    )
    return {
        f"layers_{layer}/{direction}/{ours}": f"{theirs}_l{layer}{suffix}"
        for layer in range(config.num_layers)
        for direction, suffix in directions.items()
        for ours, theirs in LEAVES.items()
    }
