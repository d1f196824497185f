"""Conversion of RoboVLMs' policy heads `LSTMDecoder`, `FCDecoder` and `GPTDecoder` and back.

Kind, sizes, number of layers and action horizon are inferred from names and shapes of the tensors.
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
from vla_jax.convert.robovlms.key_names import HEAD, HeadTensor, find_head, head_tensors
from vla_jax.convert.sizes import check_config
from vla_jax.convert.torch_rnn import CELLS
from vla_jax.policies import decoders
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.types import Key, Params

KINDS = (*CELLS.values(), "gpt", "fc")  # of decoders that RoboVLMs' names can express
_BUFFER = re.compile(r"gpt\.h\.\d+\.attn\.(masked_)?bias")  # constants in files of old releases


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
    """Converts RoboVLMs' policy head to a decoder.

    Names may begin with any of `module.`, `model.`, `act_head.`, in any order. Tensors outside the
    head (the vision-language model) are left over, with one warning that counts them; float16 and
    bfloat16 become float32, with one warning.

    Args:
      tensors: name to array (NumPy, JAX or torch); the head alone suffices.
      window_size: W, RoboVLMs' top-level `window_size`; None means the number of positions of a
        GPT, and 8 for other kinds, with a warning.
      pooling: "max" for RoboVLMs' `down_sample` "pooling", "none" for its "none".
      num_tokens: N, tokens per step; 0 means any number, with pooling="none" `num_latents`.
      num_latents: RoboVLMs' `latent`; the sizes in the file are multiples of it.
      action_dim: A; used only if it cannot be inferred: the MLP of arm or gripper is missing, or
        both have the same output size (taken as missing outputs unless A = 2).
      num_heads: M, attention heads of a GPT.
      allow_missing: glob or globs of names, such as "act_head.gripper.*", that may be missing;
        their params are randomly initialised, with one warning that names them.
      key: consumed to initialise missing params; None means `jax.random.key(0)`.

    Returns:
      The config, and params in float32.

    Raises:
      ValueError: there is no head, or a tensor of it is missing, unknown or of another shape.

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
        "tensors must be all those of one policy head",
        "convert the complete checkpoint, or name tensors that may be missing with allow_missing",
        left_over=[name for name in report.left_over if name in inside],
        allow_missing=allow_missing,
    )
    params: dict[tuple[str, ...], Any] = {}
    if report.missing:
        params |= flatten_dict(decoders.init(jax.random.key(0) if key is None else key, config))
    for name, tensor in head_tensors(config).items():
        if name in head:
            array = as_float32(head[name], tensors[head[name]])
            params[tensor.path] = jnp.array(array.T if tensor.is_transposed else array)
    warn(report, tensors)
    if report.left_over:
        warnings.warn(
            f"{len(report.left_over)} tensors outside the head are left over", stacklevel=2
        )
    return config, unflatten_dict(params)


def to_robovlms(config: DecoderConfig, params: Params) -> dict[str, np.ndarray]:
    """Converts a decoder to RoboVLMs' `state_dict`, names beginning with `act_head.`.

    A GRU or an RNN, and MLPs with other than the default `head_sizes`, get analogous names, which
    `from_robovlms` can read; RoboVLMs' classes cannot load them.

    Args:
      config: of the decoder.
      params: of the decoder.

    Returns:
      Name to float32 array, sorted by name.

    Raises:
      ValueError: RoboVLMs has no counterpart of the decoder's kind, pooling or head, or the
        params are of another config.
    """
    check_config(config, DecoderConfig)
    if config.kind not in KINDS:
        raise ValueError(
            f"kind must be one that RoboVLMs has ({', '.join(KINDS)}), got '{config.kind}'; it "
            "cannot be converted."
        )
    if config.block != "none":
        raise ValueError(
            f"block must be 'none', got '{config.block}': RoboVLMs has no residual blocks; it "
            "cannot be converted."
        )
    _check_pooling(config.pooling)
    leaves: dict[str, Any] = flatten_dict(params, sep="/")
    tensors = head_tensors(config)
    check(
        compare({"/".join(tensor.path): tensor.shape for tensor in tensors.values()}, leaves),
        "params must be those of the config",
        "give the config they were made with",
    )
    return {HEAD + name: _to_tensor(leaves, tensors[name]) for name in sorted(tensors)}


def report_robovlms(tensors: Mapping[str, Any], config: DecoderConfig) -> Report:
    """Returns the report of `from_robovlms` on the same tensors.

    Args:
      tensors: as for `from_robovlms`.
      config: its result.
    """
    head = find_head(tensors)
    expected = {
        head.get(name, HEAD + name): tensor.their_shape
        for name, tensor in head_tensors(config).items()
    }
    buffers = [full for name, full in head.items() if _BUFFER.fullmatch(name)]
    return compare(expected, tensors, buffers)


def _check_pooling(pooling: str) -> None:
    if pooling not in ("max", "none"):
        raise ValueError(
            f"pooling must be 'max' or 'none', got '{pooling}'; RoboVLMs has no other."
        )


def _to_tensor(leaves: Mapping[str, Any], tensor: HeadTensor) -> np.ndarray:
    path = "/".join(tensor.path)
    array = as_float32(path, leaves[path])
    return np.array(array.T if tensor.is_transposed else array, order="C")
