"""Images of data sets that store them as videos, shared by the readers."""

import pathlib
from collections.abc import Mapping, Sequence

from vla_jax.data.dataset import Frames
from vla_jax.data.frame_cache import FrameCache
from vla_jax.data.frames_on_demand import FramesOnDemand
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.data.video_frames import Segment, read_frames
from vla_jax.types import Resampling


def open_videos(
    cameras: Mapping[str, Sequence[Segment]],
    config: DatasetConfig,
    *,
    image_size: tuple[int, int] | None,
    resampling: Resampling,
) -> dict[str, Frames]:
    """Opens the images of all episodes, decoded on demand or as a whole (`config.decode`).

    Args:
      cameras: camera -> video segment of every episode, inside the folder `config.path`.
      config: `decode`, `cache_bytes` (for all cameras together) and `decoded_dir`.
      image_size: (h, w) in pixels to resize to; None keeps the size of the videos.
      resampling: how to resize.

    Returns:
      Camera -> images `[F, h, w, 3]` uint8, to be indexed along F.

    Raises:
      FileNotFoundError: a video is missing.
      ValueError: a video is damaged; with "on_demand" most damage is found only at indexing.
      OSError: no space for the decoded images ("whole").
    """
    if config.decode == "whole":
        decoded_dir = pathlib.Path(config.decoded_dir) if config.decoded_dir else None
        root = pathlib.Path(config.path)
        images = read_frames(
            cameras, root, decoded_dir=decoded_dir, image_size=image_size, resampling=resampling
        )
        return {**images}
    cache = FrameCache(config.cache_bytes)
    return {
        name: FramesOnDemand(segments, cache, image_size=image_size, resampling=resampling)
        for name, segments in cameras.items()
    }
