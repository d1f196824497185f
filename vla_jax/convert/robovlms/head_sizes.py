"""Sizes of RoboVLMs' policy heads, read off the names and shapes of their tensors."""

import re
import warnings
from collections.abc import Mapping
from typing import Literal, NamedTuple

from vla_jax.convert import torch_rnn
from vla_jax.convert.conversion_report import Shape
from vla_jax.convert.robovlms.key_names import HEAD, MLPS, places_of
from vla_jax.convert.sizes import check_known, count_layers, read_size
from vla_jax.policies.decoder_config import DecoderConfig, Kind

_WINDOW_SIZE = 8  # W of most of RoboVLMs' runs; only a GPT's is in its file


class _Trunk(NamedTuple):
    """What the shapes between the tokens and the MLPs of the actions say; None: they do not."""

    kind: Kind | None
    input_size: int | None  # D', features of a step after pooling
    hidden_size: int | None  # H
    num_layers: int = 1  # L
    window_size: int | None = None  # W


class _Actions(NamedTuple):
    """What the shapes of the MLPs of the actions say; None: they do not."""

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
      shapes: of its tensors, by their names without prefix; a size is read off any that has it.
      window_size: as for `from_robovlms`, and so are the others.
      pooling: "max" or "none".
      num_tokens: N.
      num_latents: RoboVLMs' `latent`.
      action_dim: A.
      num_heads: M.

    Raises:
      ValueError: all tensors that say a size are missing, or an argument contradicts them.
    """
    trunk, actions = _read_trunk(shapes), _read_actions(shapes, action_dim)
    num_vectors = (num_tokens or num_latents) if pooling == "none" else num_latents
    hidden_size = trunk.hidden_size or num_heads
    # A size that is not known becomes one that fits: the names of all tensors follow from it.
    input_size = trunk.input_size or num_vectors * (hidden_size + 1)
    if num_vectors < 1 or input_size % num_vectors:
        raise ValueError(
            f"num_latents must divide the head's {input_size} inputs, got {num_vectors}; "
            "give the run's 'latent'."
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
    shapes: Mapping[str, Shape], config: DecoderConfig, trunk: _Trunk, actions: _Actions
) -> None:
    known = {
        "the kind": trunk.kind,
        "the number of inputs": trunk.input_size,
        "hidden_size": trunk.hidden_size,
        "head_sizes": all(actions.head_sizes),
        "action_horizon": actions.action_horizon,
    }
    expected = {name: place.theirs for name, place in places_of(config).items()}
    if trunk.kind is None:
        expected = {name: s for name, s in expected.items() if not name.startswith("mlp.")}
        expected["rnn., gpt. or mlp."] = (0,)
    check_known(
        [name for name, value in known.items() if not value],
        {HEAD + name: shape for name, shape in expected.items()},
        {HEAD + name: shape for name, shape in shapes.items()},
        "convert a whole checkpoint of LSTMDecoder, GPTDecoder or FCDecoder",
    )


def _window_size(trunk: _Trunk, window_size: int | None) -> int:
    if window_size and trunk.window_size and window_size != trunk.window_size:
        raise ValueError(
            f"window_size must be the {trunk.window_size} positions of the GPT, got {window_size}; "
            "leave it out, and stream with a smaller one."
        )
    known = trunk.window_size if window_size is None else window_size
    if known is None:
        warnings.warn(
            f"window_size {_WINDOW_SIZE} is assumed, which the tensors do not say; give the run's",
            stacklevel=4,
        )
        return _WINDOW_SIZE
    return known


def _read_trunk(shapes: Mapping[str, Shape]) -> _Trunk:
    outer = read_size(shapes, 1, r"(?:actions|gripper)\.mlp\.0\.weight")  # H, as the MLPs get it
    for part, read in (("rnn.", _read_rnn), ("gpt.", _read_gpt), ("mlp.", _read_fc)):
        if any(name.startswith(part) for name in shapes):
            return read(shapes, outer)
    return _Trunk(None, None, outer)


def _read_rnn(shapes: Mapping[str, Shape], outer: int | None) -> _Trunk:
    own = {n.removeprefix("rnn."): shape for n, shape in shapes.items() if n.startswith("rnn.")}
    sizes = torch_rnn.read_sizes(own, outer)
    kind = sizes.cell or "lstm"  # all have the same names; where no gates are known, nor is H or D'
    return _Trunk(kind, sizes.input_size, sizes.hidden_size, sizes.num_layers)


def _read_gpt(shapes: Mapping[str, Shape], outer: int | None) -> _Trunk:
    layer = r"gpt\.h\.\d+\."
    rows = (  # GPT-2's own products are [in, out]
        rf"gpt\.ln_f\.\w+|{layer}(?:ln_\d\.\w+|(?:attn|mlp)\.c_proj\.bias)",
        rf"{layer}(?:attn\.c_attn|mlp\.c_fc)\.weight",
        r"fc\.\w+",
    )
    hidden_size = (
        read_size(shapes, 1, r"gpt\.wpe\.weight", rf"{layer}(?:attn|mlp)\.c_proj\.weight")
        or read_size(shapes, 0, *rows)
        or outer
    )
    has_projection = any(name.startswith("fc.") for name in shapes)
    input_size = read_size(shapes, 1, r"fc\.weight") if has_projection else hidden_size
    num_layers = count_layers(shapes, r"gpt\.h\.(\d+)\..*")
    window_size = read_size(shapes, 0, r"gpt\.wpe\.weight")
    return _Trunk("gpt", input_size, hidden_size, num_layers, window_size)


def _read_fc(shapes: Mapping[str, Shape], outer: int | None) -> _Trunk:
    hidden_size = read_size(shapes, 0, r"mlp\.2\.(?:weight|bias)") or outer
    return _Trunk("fc", read_size(shapes, 1, r"mlp\.0\.weight"), hidden_size)


def _read_actions(shapes: Mapping[str, Shape], action_dim: int) -> _Actions:
    """Reads the two MLPs, whose odd layers are ReLUs."""
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
    num_numbers = max(action_dim - 1, 1)
    if action_horizon is None and arm_size and arm_size % num_numbers == 0:
        return _Actions(head_sizes, arm_size // num_numbers, action_dim)
    if action_horizon is None or (arm_size == action_horizon and num_numbers > 1):
        return _Actions((*head_sizes, arm_size), None, action_dim)  # the last there is is hidden
    if arm_size is not None:
        action_dim = arm_size // action_horizon + 1
    return _Actions(head_sizes, action_horizon, action_dim)
