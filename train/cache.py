"""Computes the tokens of every frame once, for fast training on a frozen backbone.

    python -m train.cache --dataset demos/table --backbone-from runs/pretrain

The tokens and their mask are memory-mapped files in a folder whose name is a hash of everything
that they depend on: params and config of the backbone, data, statistics, and when the instruction
is visible. `train.imitate` computes them if they are missing; the options are the same.
"""

import hashlib
import json
import pathlib
from typing import IO, Any

import jax
import numpy as np

from train.configs import IMITATE, ImitateConfig
from train.setup import compute_norm_stats, init_params, make_windows, read_dataset, resolve
from vla_jax import config as configs
from vla_jax import trees
from vla_jax.backbones import registry
from vla_jax.backbones.registry import BackboneConfig
from vla_jax.command_line import run
from vla_jax.data import normalize
from vla_jax.data.dataset import Dataset
from vla_jax.data.windows import Windows
from vla_jax.files import replacing
from vla_jax.training.progress import progress_bar
from vla_jax.types import Params, Tokens

CHUNK = 64  # frames per forward pass; larger ones do not fit the cache of a CPU
TOKENS, MASK = "tokens.npy", "mask.npy"


def cache(config: ImitateConfig) -> pathlib.Path:
    """Writes the tokens that `imitate` will read; returns their folder."""
    config = resolve(config)
    dataset = read_dataset(config)
    key, _ = jax.random.split(jax.random.key(config.seed))
    params = init_params(key, config)
    tokens = frame_tokens(params, config, dataset, compute_norm_stats(config, dataset))
    memory_map: Any = tokens.tokens
    return pathlib.Path(memory_map.filename).parent


def frame_tokens(
    params: Params,
    config: ImitateConfig,
    dataset: Dataset,
    norm_stats: dict[str, normalize.NormStats],
) -> Tokens:
    """Returns the tokens of every frame, from files in the data set's folder if they exist.

    Args:
      params: params of the policy.
      config: config of the training.
      dataset: from `read_dataset`.
      norm_stats: statistics of that data set.

    Returns:
      Tokens `[num_frames, N, D]` float32 and mask `[num_frames, N]` bool, read-only memory maps.

    Raises:
      OSError: the disk is full; no partial file is left.
    """
    backbone = config.agent.policy.backbone
    frames = make_windows(config, dataset, norm_stats, window_size=1, action_horizon=1)
    folder = token_folder(config) / fingerprint(params["backbone"], backbone, frames)
    if not folder.exists():
        try:
            with replacing(folder) as part:
                part.mkdir()
                _write(part, params["backbone"], backbone, frames)
        except OSError as error:
            raise OSError(
                error.errno, f"{folder} could not be written ({error.strerror}); free space."
            ) from error
    return Tokens(*(np.load(folder / name, mmap_mode="r") for name in (TOKENS, MASK)))


def fingerprint(params: Params, config: BackboneConfig, frames: Windows) -> str:
    """Returns a hash of everything that the tokens depend on: 16 hexadecimal digits."""
    state = hashlib.sha256(json.dumps([configs.to_dict(config), frames.identity]).encode())
    for path, leaf in trees.leaves_by_path(params).items():
        state.update(path.encode())
        state.update(np.ascontiguousarray(leaf).tobytes())
    return state.hexdigest()[:16]


def token_folder(config: ImitateConfig) -> pathlib.Path:
    """Returns the folder of cached tokens, inside the data set's."""
    return pathlib.Path(config.dataset.path) / ".tokens"


def _write(folder: pathlib.Path, params: Params, config: BackboneConfig, frames: Windows) -> None:
    encode = jax.jit(registry.get(config).apply, static_argnums=1)
    shape = (len(frames), config.num_tokens)
    # No memory map: writing to one on a full disk kills the process.
    with (folder / TOKENS).open("wb") as tokens, (folder / MASK).open("wb") as mask:
        _write_header(tokens, "<f4", (*shape, config.token_dim))
        _write_header(mask, "|b1", shape)
        with progress_bar("encode", len(frames), unit="frames") as show:
            for start in range(0, len(frames), CHUNK):
                # The last chunk repeats its last frame, so that one shape is compiled.
                rows = np.minimum(np.arange(start, start + CHUNK), len(frames) - 1)
                encoded = encode(params, config, frames[rows].observation)
                count = len(frames) - start
                tokens.write(np.asarray(encoded.tokens[:, 0], "<f4")[:count].tobytes())
                mask.write(np.asarray(encoded.mask[:, 0], bool)[:count].tobytes())
                show(min(start + CHUNK, len(frames)), "")


def _write_header(file: IO[bytes], dtype: str, shape: tuple[int, ...]) -> None:
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


if __name__ == "__main__":
    run(cache, IMITATE, description="Encodes every frame of a data set once.")
