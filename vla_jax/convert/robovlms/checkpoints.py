"""RoboVLMs' policy heads as ours, and back: `LSTMDecoder`, `FCDecoder`, `GPTDecoder`.

Kind, sizes, layers and chunk are read off the names and shapes of the tensors.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vla_jax.convert.arrays import as_float32
from vla_jax.convert.conversion_report import Report, check, compare, warn
from vla_jax.convert.robovlms.head_sizes import read_config
from vla_jax.convert.robovlms.key_names import HEAD, Place, find_head, places_of
from vla_jax.convert.sizes import check_config
from vla_jax.convert.torch_rnn import check_cell
from vla_jax.nn.cells import CELLS
from vla_jax.policies import decoders
from vla_jax.policies.decoders import DecoderConfig
from vla_jax.types import Key, Params

_BUFFER = re.compile(r"gpt\.h\.\d+\.attn\.(masked_)?bias")  # constants that old releases save


def from_robovlms(
    tensors: Mapping[str, Any],
    *,
    window_size: int | None = None,
    pooling: Literal["max", "none"] = "max",
    num_tokens: int = 0,
    num_latents: int = 1,
    action_dim: int = 7,
    num_heads: int = 8,
    allow_missing: str | Sequence[str] = (),
    key: Key | None = None,
) -> tuple[DecoderConfig, Params]:
    """Returns our decoder with the weights of RoboVLMs' policy head.

    Names may or may not begin with `module.`, `model.`, `act_head.`, in any order. Tensors beside
    the head (the vision-language model) are left over, and one warning counts them; weights in
    float16 or bfloat16 become float32, and one warning says so. The arguments say what shapes
    cannot.

    Args:
      tensors: name to array (NumPy, JAX or torch); the head alone is enough.
      window_size: W, RoboVLMs' top-level `window_size`; None means the positions of a GPT, and of
        another kind 8, with a warning.
      pooling: "max" for RoboVLMs' `down_sample` "pooling", "none" for its "none".
      num_tokens: N, tokens per step; 0 means any number, with pooling="none" `num_latents`.
      num_latents: RoboVLMs' `latent`; its sizes in the file are multiples of it.
      action_dim: A, where the arm's or the gripper's MLP is missing, or both are of one size (of
        7 numbers they are not: then the outputs are missing); else it is read off.
      num_heads: M, attention heads of a GPT.
      allow_missing: glob or globs of names, such as "act_head.gripper.*", that may be missing;
        their params are drawn, and one warning names them.
      key: consumed, to draw what is missing; None means that of seed 0.

    Returns:
      The config, and params in float32.

    Raises:
      ValueError: there is no head, or its tensors are not all and only those of one.

    Source: Li et al. 2024, RoboVLMs (arXiv:2412.14058), its policy heads.
    """
    _check_pooling(pooling)
    head = find_head(tensors)
    shapes = {name: tuple(np.shape(tensors[full])) for name, full in head.items()}
    config = read_config(
        shapes, window_size, pooling, num_tokens, num_latents, action_dim, num_heads
    )
    report = report_robovlms(tensors, config)
    inside = set(head.values())
    check(
        report,
        "the tensors must be all those of one policy head",
        "convert the file it was saved to, or name with allow_missing what may be missing",
        left_over=[name for name in report.left_over if name in inside],
        allow_missing=allow_missing,
    )
    params: dict[tuple[str, ...], Any] = {}
    if report.missing:
        params |= flatten_dict(decoders.init(jax.random.key(0) if key is None else key, config))
    for name, place in places_of(config).items():
        if name in head:
            array = as_float32(head[name], tensors[head[name]])
            params[place.path] = jnp.array(array.T if place.is_turned else array)
    warn(report)
    if report.left_over:
        warnings.warn(
            f"{len(report.left_over)} tensors beside the head are left over", stacklevel=2
        )
    return config, unflatten_dict(params)


def to_robovlms(config: DecoderConfig, params: Params) -> dict[str, np.ndarray]:
    """Returns the policy head as RoboVLMs' `state_dict` has it, names beginning with `act_head.`.

    A GRU or an RNN, and MLPs of other `head_sizes` than the default, get the names that they would
    have there, so that they come back here; RoboVLMs' own classes cannot load them.

    Args:
      config: of the decoder.
      params: of the decoder.

    Returns:
      Name to float32 array, sorted by name.

    Raises:
      ValueError: RoboVLMs has no names for the decoder's cell, pooling or head, or the params are
        of another config.
    """
    check_config(config, DecoderConfig)
    if config.kind in CELLS:
        check_cell(config.kind)
    _check_pooling(config.pooling)
    ours: dict[str, Any] = flatten_dict(params, sep="/")
    places = places_of(config)
    check(
        compare({"/".join(place.path): place.ours for place in places.values()}, ours),
        "params must be those of the config",
        "give the config they were made with",
    )
    return {HEAD + name: _theirs(ours, places[name]) for name in sorted(places)}


def report_robovlms(tensors: Mapping[str, Any], config: DecoderConfig) -> Report:
    """Returns what `from_robovlms` makes of each tensor.

    Args:
      tensors: as for `from_robovlms`.
      config: what it gave.
    """
    head = find_head(tensors)
    places = places_of(config)
    expected = {head.get(name, HEAD + name): place.theirs for name, place in places.items()}
    buffers = [full for name, full in head.items() if _BUFFER.fullmatch(name)]
    return compare(expected, tensors, buffers)


def _check_pooling(pooling: str) -> None:
    if pooling not in ("max", "none"):
        raise ValueError(
            f"pooling must be 'max' or 'none', got '{pooling}'; RoboVLMs has no other."
        )


def _theirs(ours: Mapping[str, Any], place: Place) -> np.ndarray:
    array = as_float32("/".join(place.path), ours["/".join(place.path)])
    return np.array(array.T if place.is_turned else array, order="C")
