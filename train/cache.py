"""Computes the tokens of every frame once, for fast training on a frozen backbone.

    python -m train.cache --dataset demos/table --backbone-from runs/pretrain
    python -m train.cache --dataset demos/table --frames raw        # the images themselves

The tokens and their mask are memory-mapped files (`vla_jax.data.token_files`) in a folder whose
name is a hash of everything that they depend on: files that the params come from, config of the
backbone, dtype, data, statistics, ids of the instructions, and when the instruction is visible. The
params are stored beside the tokens, for the runs that use them: a complete cache is sufficient to
train. `train.imitate` computes tokens that are missing; the options are the same. An interrupted
computation continues after its last complete file. The checksums of files that exist are compared
before they are used. One command at a time writes into a folder; another one waits for it. With
`--frames` the resized images are written instead (`train.cache_frames`).
"""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console

from train.backbone_source import check_backbone, resolve, source_files
from train.cache_frames import CACHE, CacheConfig, cache_frames
from train.configs import ImitateConfig
from train.data_parts import read_parts
from train.file_hashes import hash_files
from train.memory_check import check_encoding
from train.mixture_file import read_mixture
from train.setup import init_backbone, make_windows, param_shapes
from vla_jax import config as configs
from vla_jax import folder_lock, stopping
from vla_jax.backbones import registry
from vla_jax.backbones.registry import BackboneConfig
from vla_jax.command_line import run
from vla_jax.data import normalize, token_files
from vla_jax.data.dataset import Dataset, digest
from vla_jax.data.mixing import fit_observation
from vla_jax.data.token_files import TokenSizes
from vla_jax.data.windows import Windows
from vla_jax.files import check_space
from vla_jax.training import checkpoint, parallel
from vla_jax.training.distributed import together
from vla_jax.training.progress import progress_bar
from vla_jax.types import Observation, Params, Tokens

Encode = Callable[[Observation], tuple[jax.Array, jax.Array]]  # [B, 1, ...] -> [B, N, D], [B, N]
_GB = 1e9  # bytes
_PARAMS = "params"  # folder of the params, beside the shards
_HASHES = "hashes.json"  # of the files that params come from, for all caches of a data set


class FrameTokens(NamedTuple):
    """Cached tokens of every frame."""

    tokens: Tokens  # [num_frames, N, D] of `cache_dtype` and mask [num_frames, N], arrays on disk
    params_folder: pathlib.Path  # {"backbone"} that computed them, from `checkpoint.save_params`


@together
def cache(config: ImitateConfig) -> list[pathlib.Path]:
    """Writes the tokens that `imitate` will read, and checks them; returns their folders.

    There is one folder for each data set, which all mixtures that contain it share.
    """
    read_mixture(config.mixture, config.dataset)
    config = resolve(replace(config, frozen_backbone=True))
    check_backbone(config, param_shapes(config))
    return [
        frame_tokens(part.config, part.dataset, part.norm_stats).params_folder.parent
        for part in read_parts(config)
    ]


def frame_tokens(
    config: ImitateConfig,
    dataset: Dataset,
    norm_stats: dict[str, normalize.NormStats],
) -> FrameTokens:
    """Returns the tokens of every frame, from files in the data set's folder if they exist.

    With several processes each one encodes its share of the missing files, which lie on a disk
    that all of them share.

    Args:
      config: config of the training.
      dataset: from `read_dataset`.
      norm_stats: statistics of that data set.

    Raises:
      OSError: the disk is full, or will be; complete files are kept, no partial file is left.
      ValueError: the tokens take more than `max_cache_gb`, or one is NaN or infinite; a file is
        damaged; the devices have too little memory.
    """
    backbone = config.agent.policy.backbone
    frames = make_windows(config, dataset, norm_stats, window_size=1, action_horizon=1)
    sizes = TokenSizes(len(frames), backbone.num_tokens, backbone.token_dim, config.cache_dtype)
    folder = token_folder(config) / fingerprint(config, frames, sizes)
    missing = parallel.agree(token_files.missing_shards(folder, sizes))
    token_files.check_shards(folder, sorted({*range(sizes.num_shards)} - {*missing}), sizes)
    if missing:
        check_encoding(config, _local_mesh(config))
        _check_space(folder, sizes, missing, config)
        with _alone(folder):  # another command may have written some of them before
            missing = parallel.agree(token_files.missing_shards(folder, sizes))
            if missing:
                _encode_missing(config, folder, sizes, missing, frames)
    return FrameTokens(token_files.open_tokens(folder, sizes), folder / _PARAMS)


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    """Waits for the lock of a folder of tokens, for all processes of this command."""
    if not parallel.is_first_process():
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f"{folder.name}.lock")
    with folder_lock.hold(lock, str(folder), "stop it to compute them here", wait=True):
        yield


def _encode_missing(
    config: ImitateConfig,
    folder: pathlib.Path,
    sizes: TokenSizes,
    missing: Sequence[int],
    frames: Windows,
) -> None:
    mesh = _local_mesh(config)
    params = init_backbone(config, mesh)
    _write_params(folder / _PARAMS, params)
    try:
        _write(folder, sizes, missing, _make_encode(params, config, mesh), frames, config)
    except OSError as error:
        raise OSError(
            error.errno, f"{folder} could not be written ({error.strerror}); free space."
        ) from error


def fingerprint(config: ImitateConfig, frames: Windows, sizes: TokenSizes) -> str:
    """Returns a hash of everything that the tokens depend on: 16 hexadecimal digits.

    The params are represented by the files that they come from, so that they need not be read.

    Args:
      config: of the training.
      frames: windows of one step.
      sizes: of the tokens.
    """
    backbone = config.agent.policy.backbone
    files = source_files(config)
    settings = [
        hash_files(files, token_folder(config) / _HASHES) if files else config.seed,
        _relevant(configs.to_dict(backbone)),
        registry.get(backbone).image_spec(backbone),
        frames.identity,
        digest(frames.instructions),  # with the ids of a hidden instruction
        [sizes.dtype, sizes.frames_per_shard],
    ]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def _relevant(settings: Any) -> Any:
    """Returns nested settings without those that the tokens do not depend on."""
    if not isinstance(settings, dict):
        return settings
    # The tokenizer's ids are hashed instead of its path.
    others = ("tokenizer", "remat", "images_per_pass", "reference_version")
    return {name: _relevant(value) for name, value in settings.items() if name not in others}


def token_folder(config: ImitateConfig) -> pathlib.Path:
    """Returns the folder of cached tokens, inside the data set's or beside its file."""
    path = pathlib.Path(config.dataset.path)
    return (path if path.is_dir() else path.parent) / ".tokens"


def _check_space(
    folder: pathlib.Path, sizes: TokenSizes, missing: Sequence[int], config: ImitateConfig
) -> None:
    """Prints the size of the tokens; raises an error if it exceeds the bound or the free space."""
    size, max_gb = sizes.total_bytes / _GB, config.max_cache_gb
    shape = f"{sizes.num_frames} frames of {sizes.num_tokens} × {sizes.token_dim} {sizes.dtype}"
    if size > max_gb:
        raise ValueError(
            f"max_cache_gb must be at least {size:.2f} for the tokens of {shape}, got {max_gb:g}; "
            "use a readout of fewer tokens, --cache-dtype bfloat16, or raise --max-cache-gb."
        )
    needed = sum(len(sizes.frames(shard)) for shard in missing) * sizes.frame_bytes
    if not (folder / _PARAMS).exists():
        params = jax.tree.leaves(param_shapes(config)["backbone"])
        needed += sum(leaf.size * leaf.dtype.itemsize for leaf in params)
    check_space(folder, needed, "use --cache-dtype bfloat16")
    if parallel.is_first_process():
        done = sizes.num_shards - len(missing)
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"{folder}: {size:.2f} GB in {sizes.num_shards} files, tokens of {shape}"
            + (f"; {done} files are done" if done else "")
        )


def _make_encode(params: Params, config: ImitateConfig, mesh: Mesh) -> Encode:
    """Returns the compiled backbone, over all devices of this process.

    Cameras and numbers that the data set lacks are masked, as in a mixture.
    """
    backbone = config.agent.policy.backbone
    example = registry.get(backbone).example
    like = Observation() if example is None else example(backbone)
    return lambda observation: _encode(
        params,
        backbone,
        config.cache_dtype,
        parallel.shard_batch(fit_observation(observation, like), mesh),
    )


@partial(jax.jit, static_argnums=(1, 2))
def _encode(
    params: Params, config: BackboneConfig, dtype: str, observation: Observation
) -> tuple[jax.Array, jax.Array]:
    encoded = registry.get(config).apply(params, config, observation)
    return jnp.asarray(encoded.tokens[:, 0], jnp.dtype(dtype)), jnp.asarray(encoded.mask[:, 0])


def _local_mesh(config: ImitateConfig) -> jax.sharding.Mesh:
    """Returns a mesh of this process's devices: each process encodes other frames."""
    return parallel.local_mesh(parallel.make_mesh(config.loop.mesh))


def _write(
    folder: pathlib.Path,
    sizes: TokenSizes,
    missing: Sequence[int],
    encode: Encode,
    frames: Windows,
    config: ImitateConfig,
) -> None:
    """Writes the missing shards, each by one of the processes, and waits for the others."""
    num_parts = parallel.num_row_shards(_local_mesh(config))
    chunk_size = max(1, config.cache_batch // num_parts) * num_parts
    own = missing[jax.process_index() :: jax.process_count()]
    done = sizes.num_frames - sum(len(sizes.frames(shard)) for shard in missing)
    total = done + sum(len(sizes.frames(shard)) for shard in own)
    console = None if parallel.is_first_process() else Console(quiet=True)
    with progress_bar("encode", total, unit="frames", start=done, console=console) as show:

        def chunks(shard: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            nonlocal done
            first = sizes.frames(shard).start
            for tokens, mask in _encode_frames(encode, frames, sizes.frames(shard), chunk_size):
                _check_finite(tokens, mask, first)
                yield tokens, mask
                first += len(tokens)
                done += len(tokens)
                show(done, "")

        for shard in own:
            token_files.write_shard(folder, shard, sizes, chunks(shard))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("tokens")


def _write_params(folder: pathlib.Path, params: Params) -> None:
    """Writes the params that the tokens belong to, unless they are there."""
    if jax.process_count() > 1:
        params = jax.device_get(params)  # Orbax would take arrays of one process for shards
    if parallel.agree([0] if not folder.exists() else []):
        with stopping.deferred("copy of the backbone") as stop:
            checkpoint.save_params(folder, {"backbone": params})
            if stop.requested:
                stop.end(f"{folder} is complete; the same command continues")


def _encode_frames(
    encode: Encode, frames: Windows, wanted: range, chunk_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields tokens `[C, N, D]` and mask `[C, N]` of the frames, in chunks."""
    running: tuple[int, Any] | None = None
    for start in range(wanted.start, wanted.stop, chunk_size):
        # The last chunk repeats its last frame, so that one shape is compiled.
        rows = np.minimum(np.arange(start, start + chunk_size), wanted.stop - 1)
        started = (min(chunk_size, wanted.stop - start), encode(frames[rows].observation))
        if running:  # the devices compute while the frames of the next chunk are read
            yield _fetch(*running)
        running = started
    if running:
        yield _fetch(*running)


def _fetch(count: int, encoded: tuple[jax.Array, jax.Array]) -> tuple[np.ndarray, np.ndarray]:
    tokens, mask = (np.asarray(part)[:count] for part in encoded)
    return tokens, mask


def _check_finite(tokens: np.ndarray, mask: np.ndarray, first: int) -> None:
    """Raises a ValueError for a token that is NaN or infinite; masked ones may be.

    Args:
      tokens: `[C, N, D]` of consecutive frames.
      mask: `[C, N]`.
      first: number of the first of these frames in the data set.
    """
    bad = np.argwhere(mask & ~np.isfinite(tokens).all(axis=-1))
    if not len(bad):
        return
    row, place = bad[0]
    token = tokens[row, place]
    value = token[~np.isfinite(token)][0]
    if tokens.dtype == np.float16 and np.isinf(value):
        raise ValueError(
            f"cache_dtype must hold the tokens, got float16, whose range those of frame "
            f"{first + row} exceed; use --cache-dtype bfloat16."
        )
    raise ValueError(
        f"the tokens of frame {first + row} must be finite, got {value} in token {place}: the "
        "backbone's params are the likely cause; give another --backbone-from."
    )


def write(config: CacheConfig) -> str:
    """Writes tokens or images; returns their folders, one per line."""
    folders = cache(config) if config.frames is None else cache_frames(config)
    return "\n".join(map(str, folders))


if __name__ == "__main__":
    run(
        write,
        CACHE,
        description="Encodes, or resizes, each frame of a data set or of those of a mixture once.",
    )
