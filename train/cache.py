"""Computes every frame's tokens once, so that a decoder on a frozen backbone trains fast.

    python -m train.cache --dataset demos/table --backbone-from runs/pretrain

The tokens `[F, N, D]` lie in a memory-mapped file whose name is the fingerprint of all that they
depend on: the backbone's params and config, the data, its statistics, and when the instruction
is visible. `train.imitate` makes the file itself where it is missing.
"""

import hashlib
import json
import os
import pathlib
from dataclasses import dataclass, replace

import jax
import numpy as np
from rich.progress import track

from train.command_line import command_line
from vla_jax import checkpoint
from vla_jax import config as configs
from vla_jax.backbones.family import BACKBONES, BackboneConfig
from vla_jax.data.windows import Windows
from vla_jax.types import Params

CHUNK = 256  # frames that are encoded at once


def cached_tokens(
    params: Params, config: BackboneConfig, frames: Windows, folder: pathlib.Path
) -> np.ndarray:
    """The tokens of every frame, from the file if it is there.

    Args:
      params: of the backbone.
      config: of the backbone.
      frames: the data set as windows of one step, stride 1: item i is frame i.
      folder: where the file is kept.

    Returns:
      `[F, N, D]` float32, a read-only memory map.

    Raises:
      OSError: the disk is full; nothing is left behind.
    """
    path = folder / f"tokens-{fingerprint(params, config, frames)}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            _write(partial, params, config, frames)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return np.load(path, mmap_mode="r")


def fingerprint(params: Params, config: BackboneConfig, frames: Windows) -> str:
    """Sixteen hexadecimal digits of everything that the tokens depend on."""
    state = hashlib.sha256(json.dumps([configs.to_dict(config), frames.identity]).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        state.update(jax.tree_util.keystr(path).encode())
        state.update(np.ascontiguousarray(leaf).tobytes())
    return state.hexdigest()[:16]


def _write(path: pathlib.Path, params: Params, config: BackboneConfig, frames: Windows) -> None:
    encode = jax.jit(BACKBONES[config.kind].apply, static_argnums=1)
    shape = (len(frames), config.num_tokens, config.token_dim)
    tokens = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    for start in track(range(0, len(frames), CHUNK), "cache"):
        # The last chunk repeats its last frame: one shape, one compilation.
        rows = np.minimum(np.arange(start, start + CHUNK), len(frames) - 1)
        encoded = encode(params, config, frames[rows].observation)[:, 0]
        tokens[start : start + CHUNK] = np.asarray(encoded)[: len(frames) - start]
    tokens.flush()
