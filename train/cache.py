"""Computes the tokens of every frame once, for fast training on a frozen backbone.

    python -m train.cache --dataset demos/table --backbone-from runs/pretrain

The tokens `[F, N, D]` are stored in a memory-mapped file, named by a hash of everything they
depend on: the backbone's params and config, the data, its statistics, and the steps that show the
instruction. `train.imitate` writes the file itself if it is missing; the options are the same.
"""

import hashlib
import json
import pathlib

import jax
import numpy as np
from rich.progress import track

from train.configs import IMITATE, ImitateConfig
from train.setup import compute_norm_stats, init_params, make_windows, read_dataset
from vla_jax import config as configs
from vla_jax.backbones.backbone import BACKBONES, BackboneConfig
from vla_jax.command_line import run
from vla_jax.data import normalize
from vla_jax.data.dataset import Dataset
from vla_jax.data.windows import Windows
from vla_jax.files import replacing
from vla_jax.types import Params

CHUNK = 256  # frames per forward pass


def cache(config: ImitateConfig) -> pathlib.Path:
    """Writes the tokens that `imitate` will read with the same config; returns their file."""
    dataset = read_dataset(config)
    key, _ = jax.random.split(jax.random.key(config.seed))
    params = init_params(key, config)
    tokens = frame_tokens(params, config, dataset, compute_norm_stats(config, dataset))
    return pathlib.Path(str(tokens.filename))


def frame_tokens(
    params: Params,
    config: ImitateConfig,
    dataset: Dataset,
    norm_stats: dict[str, normalize.NormStats],
) -> np.memmap:
    """Returns the tokens of every frame, from a file in the data set's folder if it exists.

    Args:
      params: params of the policy.
      config: config of the training.
      dataset: from `read_dataset`.
      norm_stats: statistics of that data set.

    Returns:
      `[F, N, D]` float32, a read-only memory map.

    Raises:
      OSError: the disk is full; no partial file is left.
    """
    backbone = config.agent.policy.backbone
    frames = make_windows(config, dataset, norm_stats, window_size=1, action_horizon=1)
    folder = pathlib.Path(config.dataset.path) / ".tokens"
    path = folder / f"tokens-{fingerprint(params['backbone'], backbone, frames)}.npy"
    if not path.exists():
        try:
            with replacing(path) as part:
                _write(part, params["backbone"], backbone, frames)
        except OSError as error:
            raise OSError(
                error.errno, f"{path} could not be written ({error.strerror}); free space."
            ) from error
    return np.load(path, mmap_mode="r")


def fingerprint(params: Params, config: BackboneConfig, frames: Windows) -> str:
    """Returns a hash of everything that the tokens depend on: 16 hexadecimal digits."""
    state = hashlib.sha256(json.dumps([configs.to_dict(config), frames.identity]).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        state.update(jax.tree_util.keystr(path).encode())
        state.update(np.ascontiguousarray(leaf).tobytes())
    return state.hexdigest()[:16]


def _write(path: pathlib.Path, params: Params, config: BackboneConfig, frames: Windows) -> None:
    encode = jax.jit(BACKBONES[config.kind].apply, static_argnums=1)
    shape = (len(frames), config.num_tokens, config.token_dim)
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    # Written, not mapped: writing to a memory map on a full disk kills the process.
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in track(range(0, len(frames), CHUNK), "cache"):
            # The last chunk repeats its last frame, so that one shape is compiled.
            rows = np.minimum(np.arange(start, start + CHUNK), len(frames) - 1)
            encoded = encode(params, config, frames[rows].observation)[:, 0]
            file.write(np.asarray(encoded, "<f4")[: len(frames) - start].tobytes())


if __name__ == "__main__":
    run(cache, IMITATE, description="Encodes every frame of a data set once.")
