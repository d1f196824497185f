"""Raw data sets whose images are parts of given videos of 10 Hz."""

import pathlib
from functools import partial
from typing import NamedTuple

import numpy as np

from vla_jax.data.dataset import digest
from vla_jax.data.frame_cache import FrameCache
from vla_jax.data.raw import Feature, Lazy, LazyEpisodes, RawDataset, RawEpisode
from vla_jax.data.raw_frames import RawFrames, decode_all
from vla_jax.data.video_images import VideoImages
from vla_jax.data.video_pieces import VideoPieces

KEY = "camera"


class Segment(NamedTuple):
    """The frames of one episode in a video."""

    path: pathlib.Path
    start: int  # first frame
    length: int  # frames


def make_raw(segments):
    """Returns a data set with one episode per segment and one camera."""
    files = sorted({(s.path.name, s.path.stat().st_mtime_ns) for s in segments if s.path.exists()})
    return RawDataset(
        kind="tiny",
        path=segments[0].path.parent,
        episodes=LazyEpisodes(len(segments), partial(_episode, tuple(segments), VideoPieces())),
        lengths=np.array([segment.length for segment in segments]),
        columns={},
        images={KEY: Feature("uint8", (-1, -1, 3))},
        fps=10.0,
        fingerprint=digest(files, [(s.path.name, s.start, s.length) for s in segments]),
    )


def open_frames(segments, cache=None, **options):
    """Returns the frames of all segments, decoded on demand."""
    raw = make_raw(segments)
    episodes = np.arange(len(segments))
    return RawFrames(raw, KEY, cache or FrameCache(0), episodes=episodes, **options)


def decode_segments(segments, root, *, decoded_dir=None, **options):
    """Returns the frames of all segments as a memory map."""
    return decode_all(open_frames(segments, **options), "image_primary", root, decoded_dir)


def _episode(segments, videos, index):
    segment = segments[index]
    times = np.arange(segment.start, segment.start + segment.length) / 10
    images = Lazy([KEY], partial(_images, segment.path, times, videos))
    return RawEpisode(str(index), {}, images, [""] * segment.length, times)


def _images(path, times, videos, key):
    return VideoImages(path, times, videos)
