"""Sizes of RoboVLMs' policy heads, inferred from names and shapes of their tensors."""

import re
import warnings
from collections.abc import Mapping
from typing import Literal, NamedTuple

from vla_jax.convert import torch_rnn
from vla_jax.convert.conversion_report import Shape
from vla_jax.convert.robovlms.key_names import HEAD, MLPS, head_tensors
from vla_jax.convert.sizes import check_known, count_layers, read_size
from vla_jax.policies.decoder_config import DecoderConfig

_WINDOW_SIZE = 8  # W of most RoboVLMs configs; only a GPT's tensors determine it


class _TrunkSizes(NamedTuple):
    """Sizes between the tokens and the action MLPs; None = not determined."""

    kind: str | None
    input_size: int | None  # D', features of a step after pooling
    hidden_size: int | None  # H
    num_layers: int = 1  # L
    window_size: int | None = None  # W


class _ActionSizes(NamedTuple):
    """Sizes of the action MLPs; None = not determined."""

    head_sizes: tuple[int | None, ...]
    action_horizon: int | None  # K
    action_dim: int  # A


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
      shapes: of its tensors, by name without prefix; any tensor may determine a size.
      window_size: as for `from_robovlms`.
      pooling: "max" or "none".
      num_tokens: N.
      num_latents: RoboVLMs' `latent`.
      action_dim: A.
      num_heads: M.

    Raises:
      ValueError: all tensors that determine a size are missing, or contradict an argument.
    """
    trunk, actions = _read_trunk(shapes), _read_actions(shapes, action_dim)
    num_vectors = (num_tokens or num_latents) if pooling == "none" else num_latents
    hidden_size = trunk.hidden_size or num_heads
    # An unknown size becomes one that fits, so that the names of all tensors can be listed.
    input_size = trunk.input_size or num_vectors * (hidden_size + 1)
    if num_vectors < 1 or input_size % num_vectors:
        raise ValueError(
            f"num_latents must divide the head's {input_size} inputs, got {num_vectors}; "
            "give 'latent' of the training config."
        )
    config = DecoderConfig(
        kind=trunk.kind or "fc",
        token_dim=input_size // num_vectors,
        num_tokens=num_vectors if pooling == "none" else num_tokens,
        window_size=_window_size(trunk, window_size),
        action_horizon=actions.action_horizon or 1,
        action_dim=actions.action_dim,
        hidden_size=hidden_size,
        num_layers=trunk.num_layers,
        num_heads=num_heads,
        pooling=pooling,
        num_latents=num_latents,
        head_sizes=tuple(size or 1 for size in actions.head_sizes),
    )
    _check_known(shapes, config, trunk, actions)
    return config


def _check_known(
    shapes: Mapping[str, Shape], config: DecoderConfig, trunk: _TrunkSizes, actions: _ActionSizes
) -> None:
    known = {
        "kind": trunk.kind,
        "number of inputs": trunk.input_size,
        "hidden_size": trunk.hidden_size,
        "head_sizes": all(actions.head_sizes),
        "action_horizon": actions.action_horizon,
    }
    expected = {name: tensor.their_shape for name, tensor in head_tensors(config).items()}
    if trunk.kind is None:
        expected = {name: s for name, s in expected.items() if not name.startswith("mlp.")}
        expected["rnn., gpt. or mlp."] = (0,)
    check_known(
        [name for name, value in known.items() if not value],
        {HEAD + name: shape for name, shape in expected.items()},
        {HEAD + name: shape for name, shape in shapes.items()},
        "convert a complete checkpoint of LSTMDecoder, GPTDecoder or FCDecoder",
    )


def _window_size(trunk: _TrunkSizes, window_size: int | None) -> int:
    if window_size and trunk.window_size and window_size != trunk.window_size:
        raise ValueError(
            f"window_size must be {trunk.window_size}, the number of positions of the GPT, got "
            f"{window_size}; omit it (streaming can use a smaller one)."
        )
    known = trunk.window_size if window_size is None else window_size
    if known is None:
        warnings.warn(
            f"assuming window_size {_WINDOW_SIZE}, which the tensors do not determine; give "
            "window_size of the training config",
            stacklevel=4,
        )
        return _WINDOW_SIZE
    return known


def _read_trunk(shapes: Mapping[str, Shape]) -> _TrunkSizes:
    mlp_input_size = read_size(shapes, 1, r"(?:actions|gripper)\.mlp\.0\.weight")  # H
    for part, read in (("rnn.", _read_rnn), ("gpt.", _read_gpt), ("mlp.", _read_fc)):
        if any(name.startswith(part) for name in shapes):
            return read(shapes, mlp_input_size)
    return _TrunkSizes(None, None, mlp_input_size)


def _read_rnn(shapes: Mapping[str, Shape], mlp_input_size: int | None) -> _TrunkSizes:
    rnn = {n.removeprefix("rnn."): shape for n, shape in shapes.items() if n.startswith("rnn.")}
    sizes = torch_rnn.read_sizes(rnn, mlp_input_size)
    kind = sizes.cell or "lstm"  # names are the same for all cells
    return _TrunkSizes(kind, sizes.input_size, sizes.hidden_size, sizes.num_layers)


def _read_gpt(shapes: Mapping[str, Shape], mlp_input_size: int | None) -> _TrunkSizes:
    layer = r"gpt\.h\.\d+\."
    rows = (  # kernels of GPT-2 are [in, out]
        rf"gpt\.ln_f\.\w+|{layer}(?:ln_\d\.\w+|(?:attn|mlp)\.c_proj\.bias)",
        rf"{layer}(?:attn\.c_attn|mlp\.c_fc)\.weight",
        r"fc\.\w+",
    )
    hidden_size = (
        read_size(shapes, 1, r"gpt\.wpe\.weight", rf"{layer}(?:attn|mlp)\.c_proj\.weight")
        or read_size(shapes, 0, *rows)
        or mlp_input_size
    )
    has_projection = any(name.startswith("fc.") for name in shapes)
    input_size = read_size(shapes, 1, r"fc\.weight") if has_projection else hidden_size
    num_layers = count_layers(shapes, r"gpt\.h\.(\d+)\..*")
    window_size = read_size(shapes, 0, r"gpt\.wpe\.weight")
    return _TrunkSizes("gpt", input_size, hidden_size, num_layers, window_size)


def _read_fc(shapes: Mapping[str, Shape], mlp_input_size: int | None) -> _TrunkSizes:
    hidden_size = read_size(shapes, 0, r"mlp\.2\.(?:weight|bias)") or mlp_input_size
    return _TrunkSizes("fc", read_size(shapes, 1, r"mlp\.0\.weight"), hidden_size)


def _read_actions(shapes: Mapping[str, Shape], action_dim: int) -> _ActionSizes:
    """Returns the sizes of the two MLPs, whose odd layers are ReLUs."""
    arm, gripper = (re.escape(name) for name in MLPS.values())
    both = rf"(?:{arm}|{gripper})"

    def outputs(mlp: str, layer: int) -> int | None:
        return read_size(shapes, 0, rf"{mlp}\.{2 * layer}\.(?:weight|bias)")

    last = count_layers(shapes, rf"{both}\.(\d+)\.(?:weight|bias)") // 2
    head_sizes = tuple(
        outputs(both, layer) or read_size(shapes, 1, rf"{both}\.{2 * layer + 2}\.weight")
        for layer in range(last)
    )
    arm_size, action_horizon = outputs(arm, last), outputs(gripper, last)
    arm_dim = max(action_dim - 1, 1)
    if action_horizon is None and arm_size and arm_size % arm_dim == 0:
        return _ActionSizes(head_sizes, arm_size // arm_dim, action_dim)
    if action_horizon is None or (arm_size == action_horizon and arm_dim > 1):
        return _ActionSizes((*head_sizes, arm_size), None, action_dim)  # outputs are missing
    if arm_size is not None:
        action_dim = arm_size // action_horizon + 1
    return _ActionSizes(head_sizes, action_horizon, action_dim)
