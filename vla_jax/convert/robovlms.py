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

from vla_jax import decoders
from vla_jax.convert.files import as_numpy
from vla_jax.convert.report import Report, Shape, check, listed
from vla_jax.convert.robovlms_names import HEAD, Place, find_head, places_of
from vla_jax.convert.robovlms_sizes import read_config
from vla_jax.decoders import DecoderConfig
from vla_jax.types import Array, Key, Params

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
    allow_missing: Sequence[str] = (),
    key: Key | None = None,
) -> tuple[DecoderConfig, Params]:
    """Returns our decoder with the weights of RoboVLMs' policy head.

    Names may or may not begin with `module.`, `model.`, `act_head.`, in any order. Tensors beside
    the head (the vision-language model) are left over, and one warning counts them; weights of
    another dtype become float32, and one warning says so. The arguments say what shapes cannot.

    Args:
      tensors: name to array (NumPy, JAX or torch); the head alone is enough.
      window_size: W, RoboVLMs' top-level `window_size`; None means the positions of a GPT, 8 else.
      pooling: "max" for RoboVLMs' `down_sample` "pooling", "none" for its "none".
      num_tokens: N, tokens per step; 0 means any number, with pooling="none" `num_latents`.
      num_latents: RoboVLMs' `latent`; its sizes in the file are multiples of it.
      action_dim: A, where the arm's or the gripper's MLP is missing; else it is read off.
      num_heads: M, attention heads of a GPT.
      allow_missing: globs of names, such as "act_head.gripper.*", that may be missing; their
        params are drawn.
      key: consumed, to draw what is missing; None means that of seed 0.

    Returns:
      The config, and params in float32.

    Raises:
      ValueError: there is no head, or its tensors are not all and only those of one.

    Source: Li et al. 2024, RoboVLMs (arXiv:2412.14058), its policy heads.
    """
    _check_pooling(pooling)
    head = find_head(tensors)
    shapes = {name: _shape(tensors[full]) for name, full in head.items()}
    config = read_config(
        shapes, window_size, pooling, num_tokens, num_latents, action_dim, num_heads
    )
    report = report_robovlms(tensors, config)
    inside = set(head.values())
    check(report, [name for name in report.left_over if name in inside], allow_missing)
    params: dict[tuple[str, ...], Any] = {}
    if report.missing:
        params |= flatten_dict(decoders.init(jax.random.key(0) if key is None else key, config))
    for name, place in places_of(config).items():
        if name in head:
            array = _float32(head[name], tensors[head[name]])
            params[place.path] = jnp.array(array.T if place.is_turned else array)
    _warn(report)
    return config, unflatten_dict(params)


def to_robovlms(config: DecoderConfig, params: Params) -> dict[str, np.ndarray]:
    """Returns the policy head as RoboVLMs' `state_dict` has it, names beginning with `act_head.`.

    Args:
      config: of the decoder.
      params: of the decoder.

    Returns:
      Name to float32 array, sorted by name.

    Raises:
      ValueError: RoboVLMs has no such head, or the params are of another config.
    """
    _check_pooling(config.pooling)
    ours: dict[tuple[str, ...], Any] = flatten_dict(params)
    places = places_of(config)
    expected = {place.path: place.ours for place in places.values()}
    given = {path: _shape(array) for path, array in ours.items()}
    if given != expected:
        paths = sorted({path for path, _ in given.items() ^ expected.items()})
        raise ValueError(
            f"params must be those of the config, got others at "
            f"{listed(['/'.join(path) for path in paths])}; give the config they were made with."
        )
    return {HEAD + name: _theirs(ours[places[name].path], places[name]) for name in sorted(places)}


def report_robovlms(tensors: Mapping[str, Any], config: DecoderConfig) -> Report:
    """Returns what `from_robovlms` makes of each tensor.

    Args:
      tensors: as for `from_robovlms`.
      config: what it gave.
    """
    head = find_head(tensors)
    shapes = {full: _shape(tensor) for full, tensor in tensors.items()}
    places = places_of(config)
    found = {head[name]: place.theirs for name, place in places.items() if name in head}
    buffers = {full for name, full in head.items() if _BUFFER.fullmatch(name)}
    used = {full: shapes[full] for full in tensors if found.get(full) == shapes[full]}
    dtypes = {full: as_numpy(tensors[full]).dtype.name for full in used}
    return Report(
        used=used,
        missing={HEAD + name: place.theirs for name, place in places.items() if name not in head},
        left_over={full: s for full, s in shapes.items() if full not in {*found, *buffers}},
        misshapen={
            full: (shape, shapes[full]) for full, shape in found.items() if full not in used
        },
        cast={full: dtype for full, dtype in dtypes.items() if dtype != "float32"},
        buffers={full: shapes[full] for full in tensors if full in buffers},
    )


def _check_pooling(pooling: str) -> None:
    if pooling not in ("max", "none"):
        raise ValueError(
            f"pooling must be 'max' or 'none', got '{pooling}'; RoboVLMs has no other."
        )


def _theirs(array: Array, place: Place) -> np.ndarray:
    array = np.asarray(array)
    return np.array(array.T if place.is_turned else array, np.float32, order="C")


def _shape(tensor: Any) -> Shape:
    return tuple(np.shape(tensor))


def _float32(name: str, tensor: Any) -> np.ndarray:
    array = as_numpy(tensor)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point, got {array.dtype}; undo what made it so.")
    return np.asarray(array, np.float32)


def _warn(report: Report) -> None:
    if report.cast:
        dtypes = ", ".join(sorted(set(report.cast.values())))
        warnings.warn(f"{len(report.cast)} tensors became float32, from {dtypes}", stacklevel=3)
    if report.left_over:
        warnings.warn(
            f"{len(report.left_over)} tensors beside the head are left over", stacklevel=3
        )
