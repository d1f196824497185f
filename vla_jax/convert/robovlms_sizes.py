"""Sizes of RoboVLMs' policy heads, read off the names and shapes of their tensors."""

import math
import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

from vla_jax.convert.report import Shape, listed
from vla_jax.convert.robovlms_names import HEAD, MLPS
from vla_jax.decoders import DecoderConfig, Kind

_WINDOW_SIZE = 8  # W of most of RoboVLMs' runs; only a GPT's is in its file


class _Trunk(NamedTuple):
    """What the shapes between the tokens and the MLPs of the actions say."""

    kind: Kind
    input_size: int  # D', features of a step after pooling
    hidden_size: int  # H
    num_layers: int  # L
    window_size: int | None = None  # W


def read_config(
    shapes: Mapping[str, Shape],
    window_size: int | None,
    pooling: Literal["max", "none"],
    num_tokens: int,
    num_latents: int,
    action_dim: int,
    num_heads: int,
) -> DecoderConfig:
    """Returns the config of a head.

    Args:
      shapes: of its tensors, by their names without prefix.
      window_size: as for `from_robovlms`, and so are the others.
      pooling: "max" or "none".
      num_tokens: N.
      num_latents: RoboVLMs' `latent`.
      action_dim: A.
      num_heads: M.

    Raises:
      ValueError: a tensor that sizes are read off is missing, or an argument contradicts them.
    """
    trunk = _read_trunk(shapes)
    widths, action_horizon, action_dim = _read_actions(shapes, action_dim)
    num_vectors = (num_tokens or num_latents) if pooling == "none" else num_latents
    if num_vectors < 1 or trunk.input_size % num_vectors:
        raise ValueError(
            f"num_latents must divide the head's {trunk.input_size} inputs, got {num_vectors}; "
            "give the run's 'latent'."
        )
    if window_size and trunk.window_size and window_size != trunk.window_size:
        raise ValueError(
            f"window_size must be the {trunk.window_size} positions of the GPT, got {window_size}; "
            "leave it out, and stream with a smaller one."
        )
    return DecoderConfig(
        kind=trunk.kind,
        token_dim=trunk.input_size // num_vectors,
        num_tokens=num_vectors if pooling == "none" else num_tokens,
        window_size=trunk.window_size or _WINDOW_SIZE if window_size is None else window_size,
        action_horizon=action_horizon,
        action_dim=action_dim,
        hidden_size=trunk.hidden_size,
        num_layers=trunk.num_layers,
        num_heads=num_heads,
        pooling=pooling,
        num_latents=num_latents,
        head_sizes=widths,
    )


def _read_trunk(shapes: Mapping[str, Shape]) -> _Trunk:
    for part, read in (("rnn.", _read_rnn), ("gpt.", _read_gpt), ("mlp.", _read_fc)):
        if any(name.startswith(part) for name in shapes):
            return read(shapes)
    raise ValueError(
        f"act_head must have rnn., gpt. or mlp. beside its actions, got {listed(list(shapes))}; "
        "convert a checkpoint of LSTMDecoder, GPTDecoder or FCDecoder."
    )


def _read_rnn(shapes: Mapping[str, Shape]) -> _Trunk:
    rows, hidden_size = _matrix(shapes, r"rnn\.weight_hh_l\d+")
    kinds: dict[float, Kind] = {1: "rnn", 3: "gru", 4: "lstm"}  # by gates
    if rows / hidden_size not in kinds:
        raise ValueError(
            f"act_head.rnn.weight_hh must have 1, 3 or 4 times as many rows as columns, got "
            f"{[rows, hidden_size]}; a recurrence with a projection is not supported."
        )
    input_size = _matrix(shapes, r"rnn\.weight_ih_l0")[1]
    return _Trunk(
        kinds[rows / hidden_size], input_size, hidden_size, _count(shapes, r"rnn\.\w+_l(\d+)")
    )


def _read_gpt(shapes: Mapping[str, Shape]) -> _Trunk:
    window_size, hidden_size = _matrix(shapes, r"gpt\.wpe\.weight")
    has_projection = any(name.startswith("fc.") for name in shapes)
    input_size = _matrix(shapes, r"fc\.weight")[1] if has_projection else hidden_size
    num_layers = _count(shapes, r"gpt\.h\.(\d+)\..*")
    return _Trunk("gpt", input_size, hidden_size, num_layers, window_size)


def _read_fc(shapes: Mapping[str, Shape]) -> _Trunk:
    hidden_size = _matrix(shapes, r"mlp\.2\.weight")[0]
    return _Trunk("fc", _matrix(shapes, r"mlp\.0\.weight")[1], hidden_size, 1)


def _read_actions(shapes: Mapping[str, Shape], action_dim: int) -> tuple[tuple[int, ...], int, int]:
    """Returns the hidden layers of the two MLPs, K, and A (that given, where one is missing)."""
    arm, gripper = (_rows(shapes, mlp) for mlp in MLPS.values())
    last = max({**arm, **gripper}, default=0)
    rows = {**gripper, **arm}
    lacking = [layer for layer in range(last) if layer not in rows]
    if not rows or lacking:
        names = listed([f"{HEAD}{MLPS['arm']}.{2 * layer}" for layer in lacking or [0]])
        raise ValueError(f"{names} is missing, and its sizes with it; convert a whole checkpoint.")
    arm_rows, action_horizon = arm.get(last), gripper.get(last)
    if action_horizon is None:
        action_horizon = rows[last] // max(action_dim - 1, 1)
    elif arm_rows is not None:
        action_dim = arm_rows // max(action_horizon, 1) + 1
    return tuple(rows[layer] for layer in range(last)), action_horizon, action_dim


def _rows(shapes: Mapping[str, Shape], mlp: str) -> dict[int, int]:
    """Returns the outputs of each layer of an MLP, whose odd layers are ReLUs."""
    pattern = re.compile(rf"{re.escape(mlp)}\.(\d+)\.(?:weight|bias)")
    found = ((pattern.fullmatch(name), shape) for name, shape in shapes.items())
    return {int(m[1]) // 2: shape[0] for m, shape in found if m and shape and int(m[1]) % 2 == 0}


def _matrix(shapes: Mapping[str, Shape], pattern: str) -> tuple[int, int]:
    """Returns the shape of the first matrix of that name."""
    for name, shape in shapes.items():
        if re.fullmatch(pattern, name) and len(shape) == 2 and math.prod(shape):
            return shape[0], shape[1]
    name = pattern.replace("\\", "").replace("d+", "0")
    raise ValueError(
        f"{HEAD}{name} is missing, or not a matrix, and sizes are read off it; convert a whole "
        "checkpoint."
    )


def _count(shapes: Mapping[str, Shape], pattern: str) -> int:
    found = (re.fullmatch(pattern, name) for name in shapes)
    return 1 + max(int(match[1]) for match in found if match)
