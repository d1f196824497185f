"""Writes the resized images of a data set once, for trainings with `--dataset.decode records`.

    python -m train.cache --preset gpu_end_to_end --dataset demos/table --frames raw
    python -m train.imitate --preset gpu_end_to_end --dataset demos/table --dataset.decode records

The images of each camera are in a folder of shards (`vla_jax.data.frame_records`), whose name is a
hash of the data, the size and the resampling. An interrupted command continues after its last
complete shard. Images in memory take at most `--dataset.cache-bytes` in each process.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, cast

import jax
from jax.experimental import multihost_utils
from rich.console import Console

from train.backbone_source import resolve
from train.configs import ImitateConfig
from train.mixture_file import read_mixture
from train.presets import IMITATE
from train.setup import read_dataset
from vla_jax.config import checked
from vla_jax.data import frame_writer
from vla_jax.data.frame_records import FrameFormat, FrameSizes, records_folder
from vla_jax.data.raw_frames import RawFrames
from vla_jax.data.shard_files import shard_folder
from vla_jax.files import check_space
from vla_jax.training import parallel
from vla_jax.training.distributed import together
from vla_jax.training.progress import progress_bar

_GB = 1e9  # bytes


@dataclass(frozen=True)
@checked()
class CacheConfig(ImitateConfig):
    """Config of `train.cache`: that of the training which will read the files."""

    # write the resized images of the data set, "raw" or as "jpeg"; None = tokens of the backbone
    frames: FrameFormat | None = None


def _with_frames(preset: Callable[[], ImitateConfig]) -> Callable[[], CacheConfig]:
    """Returns a preset of `train.imitate` as one of `train.cache`."""

    @functools.wraps(preset)
    def make() -> CacheConfig:
        config = preset()
        return CacheConfig(**{each.name: getattr(config, each.name) for each in fields(config)})

    return make


CACHE = {name: _with_frames(preset) for name, preset in IMITATE.items()}


class Camera(NamedTuple):
    """Images of one camera of one data set, and where they are written."""

    folder: pathlib.Path
    images: RawFrames
    sizes: FrameSizes
    max_bytes: int  # of images in memory


class Shard(NamedTuple):
    """One shard of a camera."""

    camera: Camera
    number: int

    @property
    def path(self) -> pathlib.Path:
        """Folder of the shard."""
        return shard_folder(self.camera.folder, self.number)

    @property
    def num_frames(self) -> int:
        """Images of the shard."""
        return len(self.camera.sizes.frames(self.number))


@together
def cache_frames(config: CacheConfig) -> list[pathlib.Path]:
    """Writes the images that a training reads, and checks those that exist; returns their folders.

    With several processes each one writes its share of the missing shards, on a disk that all of
    them share.

    Raises:
      BlockingIOError: another process writes the same shard.
      OSError: the disk is full, or will be; complete shards are kept, no partial one is left.
      ValueError: the policy reads no images; a folder holds other images, or images of another
        format; a shard, image or video is damaged; `cache_bytes` is too small.
    """
    cameras = _cameras(resolve(config), config.frames or "raw")
    shards = [Shard(each, number) for each in cameras for number in range(each.sizes.num_shards)]
    missing = parallel.agree([i for i, shard in enumerate(shards) if not shard.path.exists()])
    written = [each for i, each in enumerate(shards) if i not in {*missing}]
    frame_writer.check_shards([(at.folder, number, at.sizes) for at, number in written])
    absent = [shards[i] for i in missing]
    _announce(cameras, absent)
    _write(absent, sum(shard.num_frames for shard in shards))
    return [camera.folder for camera in cameras]


def _cameras(config: ImitateConfig, form: FrameFormat) -> list[Camera]:
    """Returns the cameras of all data sets that the policy reads."""
    cameras = []
    for _, _, entry in read_mixture(config.mixture, config.dataset):
        # No cache: every image is decoded once.
        entry = replace(entry, decode="on_demand")
        data = read_dataset(replace(config, dataset=entry), partial=bool(config.mixture))
        for name, frames in data.frames.items():
            images = cast(RawFrames, frames)  # those of "on_demand"
            folder = records_folder(images, name, entry.decoded_dir)
            sizes = frame_writer.prepare(folder, images, form)
            cameras.append(Camera(folder, images, sizes, entry.cache_bytes))
    if not cameras:
        backbone = config.agent.policy.backbone.kind
        raise ValueError(
            f"frames can be written for a policy that reads images, got backbone '{backbone}'; "
            "choose another --preset."
        )
    return cameras


def _announce(cameras: Sequence[Camera], missing: Sequence[Shard]) -> None:
    """Prints the size of the images; raises an OSError if raw ones exceed the free space."""
    for camera in cameras:
        folder, sizes = camera.folder, camera.sizes
        own = [shard for shard in missing if shard.camera is camera]
        size = sizes.num_frames * sizes.frame_bytes / _GB
        needed = sum(shard.num_frames for shard in own) * sizes.frame_bytes
        if sizes.format == "raw":
            check_space(folder, needed, "use --frames jpeg, or give another --dataset.decoded-dir")
        if parallel.is_first_process():
            done = sizes.num_shards - len(own)
            Console(stderr=True, highlight=False, soft_wrap=True).print(
                f"{folder}: {sizes.num_frames} frames of {sizes.height} × {sizes.width} in "
                f"{sizes.num_shards} files, {sizes.format}, {size:.2f} GB when decoded"
                + (f"; {done} files are done" if done else "")
            )


def _write(missing: Sequence[Shard], num_frames: int) -> None:
    """Writes the missing shards, each by one of the processes, and waits for the others."""
    own = missing[jax.process_index() :: jax.process_count()]
    done = num_frames - sum(shard.num_frames for shard in missing)
    total = done + sum(shard.num_frames for shard in own)
    console = None if parallel.is_first_process() else Console(quiet=True)
    with progress_bar("frames", total, unit="frames", start=done, console=console) as show:

        def count(number: int) -> None:
            nonlocal done
            done += number
            show(done, "")

        for (folder, images, sizes, max_bytes), shard in own:
            frame_writer.write_shard(folder, shard, sizes, images, max_bytes=max_bytes, done=count)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("frames")
