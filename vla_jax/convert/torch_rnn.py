"""`torch.nn.RNN`, `LSTM` and `GRU` to a recurrence and back, tensor for tensor.

    weight_ih_l{k}{_reverse} [G·H, D]   ↔  layers_{k}/{direction}/input_kernel [D, G·H]
    weight_hh_l{k}{_reverse} [G·H, H]   ↔  layers_{k}/{direction}/recurrent_kernel [H, G·H]
    bias_ih_l{k}{_reverse}   [G·H]      ↔  layers_{k}/{direction}/input_bias
    bias_hh_l{k}{_reverse}   [G·H]      ↔  layers_{k}/{direction}/recurrent_bias

The cells compute the same and have the same gate order, so only names change and kernels are
transposed: there and back again gives the same bytes, and both train alike. Three things are not
in a state dict: `dropout`; `batch_first` (here the batch always leads); and the `nonlinearity` of
a plain RNN, which must be tanh.

Tensors are anything that `numpy.asarray` reads; PyTorch itself is not needed.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from vla_jax import recurrence
from vla_jax.recurrence import RecurrenceConfig
from vla_jax.types import Params

LEAVES = {  # ours -> PyTorch's, in the order of its state dict
    "input_kernel": "weight_ih",
    "recurrent_kernel": "weight_hh",
    "input_bias": "bias_ih",
    "recurrent_bias": "bias_hh",
}
# rows of weight_hh over its columns -> cell
CELLS: dict[float, Literal["rnn", "gru", "lstm"]] = {1: "rnn", 3: "gru", 4: "lstm"}
NAME = re.compile(r"(?:weight|bias)_(?:ih|hh)_l(\d+)(_reverse)?")
SHOWN = 8  # names of each list in an error


def from_torch(tensors: Mapping[str, Any], *, prefix: str = "") -> tuple[RecurrenceConfig, Params]:
    """Returns the config and params of a recurrence that does what the PyTorch module does.

    Args:
      tensors: state dict of a `torch.nn.RNN`, `LSTM` or `GRU`, float32; without biases where it
        was made with `bias=False`, which become zeros.
      prefix: what stands before the names, such as "encoder.rnn."; tensors without it are left
        alone.

    Returns:
      The config, its `dropout` 0, and params as from `recurrence.init`.

    Raises:
      ValueError: tensors are missing, left over, of another shape or dtype, or of an LSTM with
        `proj_size`.
    """
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    config, input_size = _sizes(tensors, prefix)
    shapes = _shapes(config, input_size)
    if not any(name.startswith("bias") for name in tensors):
        biases = {name: shape for name, shape in shapes.items() if name.startswith("bias")}
        tensors |= {name: np.zeros(shape, np.float32) for name, shape in biases.items()}
    _check(tensors, shapes, "tensors")
    # A copy: on a CPU an array of JAX may lie in the memory of the tensor, which may yet change.
    flat = {path: jnp.array(np.asarray(tensors[name]).T) for path, name in _names(config).items()}
    return config, traverse_util.unflatten_dict(flat)


def to_torch(
    config: RecurrenceConfig, params: Params, *, prefix: str = "", bias: bool = True
) -> dict[str, np.ndarray]:
    """Returns the state dict of the PyTorch module that does what the recurrence does.

        module.load_state_dict({name: torch.from_numpy(x) for name, x in tensors.items()})

    Args:
      config: of the recurrence.
      params: from `recurrence.init`, or anything alike, such as their gradients.
      prefix: what to put before the names.
      bias: False leaves the biases out, for a module made with `bias=False`.

    Returns:
      Name -> array, in PyTorch's order, each with memory of its own.

    Raises:
      ValueError: params of another config, or biases that are to be left out and are not zero.
    """
    names = _names(config)
    flat = traverse_util.flatten_dict(params)
    tensors = {
        names.get(path, "/".join(path)): np.array(np.asarray(leaf).T, order="C")
        for path, leaf in flat.items()
    }
    _check(tensors, _shapes(config, _matrix(tensors, "weight_ih_l0", "")[1]), "params")
    kept = [name for name in names.values() if bias or not name.startswith("bias")]
    nonzero = [name for name in tensors if name not in kept and tensors[name].any()]
    if nonzero:
        raise ValueError(
            f"bias=False needs biases of zero, got others in {_listed(nonzero)}; leave them in."
        )
    return {prefix + name: tensors[name] for name in kept}


def _names(config: RecurrenceConfig) -> dict[tuple[str, str, str], str]:
    """Returns path in our params -> name of PyTorch's, in the order of its state dict."""
    directions = (
        {"forward": "", "backward": "_reverse"} if config.bidirectional else {"forward": ""}
    )
    return {
        (f"layers_{layer}", direction, ours): f"{theirs}_l{layer}{suffix}"
        for layer in range(config.num_layers)
        for direction, suffix in directions.items()
        for ours, theirs in LEAVES.items()
    }


def _shapes(config: RecurrenceConfig, input_size: int) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of every tensor that the PyTorch module has."""
    params = jax.eval_shape(lambda key: recurrence.init(key, config, input_size), jax.random.key(0))
    return {
        name: params[layer][direction][leaf].shape[::-1]
        for (layer, direction, leaf), name in _names(config).items()
    }


def _sizes(tensors: Mapping[str, Any], prefix: str) -> tuple[RecurrenceConfig, int]:
    """Returns what names and shapes say: the config, and D."""
    projected = [name for name in tensors if name.startswith("weight_hr_")]
    if projected:
        raise ValueError(
            f"proj_size must be 0, got an LSTM with projections ({_listed(projected)}); there is "
            "no such cell here."
        )
    _, input_size = _matrix(tensors, "weight_ih_l0", prefix)
    rows, hidden_size = _matrix(tensors, "weight_hh_l0", prefix)
    if rows / max(hidden_size, 1) not in CELLS:
        raise ValueError(
            "weight_hh_l0 must have 1, 3 or 4 times as many rows as columns (RNN, GRU, LSTM), got "
            f"[{rows}, {hidden_size}]; only these three can be read."
        )
    found = [match for match in map(NAME.fullmatch, tensors) if match]
    config = RecurrenceConfig(
        cell=CELLS[rows // hidden_size],
        num_layers=len({match[1] for match in found}),
        hidden_size=hidden_size,
        bidirectional=any(match[2] for match in found),
    )
    return config, input_size


def _matrix(tensors: Mapping[str, Any], name: str, prefix: str) -> tuple[int, int]:
    shape = tuple(np.shape(tensors[name])) if name in tensors else ()
    if len(shape) != 2:
        raise ValueError(
            f"'{prefix}{name}' must be a matrix of a torch.nn.RNN, LSTM or GRU, got "
            f"{f'{list(shape)}' if name in tensors else 'none'} among {_listed(tensors)}; "
            "`prefix` is what stands before the names."
        )
    return shape[0], shape[1]


def _check(tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raises a ValueError that lists what is missing, left over, of another shape or dtype."""
    both = [name for name in shapes if name in tensors]
    faults = {
        "missing": [name for name in shapes if name not in tensors],
        "left over": [name for name in tensors if name not in shapes],
        "of another shape": [
            f"{name} {list(shapes[name])} (got {list(np.shape(tensors[name]))})"
            for name in both
            if tuple(np.shape(tensors[name])) != shapes[name]
        ],
        "not float32": [name for name in both if not str(tensors[name].dtype).endswith("float32")],
    }
    listed = "; ".join(f"{fault}: {_listed(names)}" for fault, names in faults.items() if names)
    if listed:
        raise ValueError(
            f"{what} must be all those of one recurrence in float32, got {listed}; give the whole "
            "of it and nothing else."
        )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
