"""Some frames of a camera in an episode: brightness, and whether they are black or frozen."""

from typing import NamedTuple

import numpy as np

from vla_jax.data.raw import RawImages
from vla_jax.data.still_images import resize

BLACK = 4.0  # mean level below which a frame is black, of 255
UNIFORM = 1.0  # standard deviation of the levels below which a frame shows nothing
FROZEN = 0.05  # mean difference of levels below which two frames are the same picture
THUMBNAIL = 128  # pixels along the longer side


class FrameSamples(NamedTuple):
    """Sampled frames of one camera in one episode; `n` frames."""

    episode: str  # name of the episode
    steps: np.ndarray  # [n] int64, ascending
    thumbnails: np.ndarray  # [n, h, w, 3] uint8, resized
    brightness: np.ndarray  # [n] mean level in [0, 255]
    num_black: int
    num_uniform: int  # frames of one colour, black ones not counted
    frozen: tuple[int, int] | None  # first and last step of a run of equal frames


def sample_frames(name: str, images: RawImages, num_frames: int) -> FrameSamples:
    """Reads frames at equal distances from an episode.

    A run of equal frames is reported if it has at least 4 of the sampled frames and half of them.

    Args:
      name: of the episode.
      images: `[T, h, w, 3]`.
      num_frames: n, at most.
    """
    steps = np.unique(np.linspace(0, len(images) - 1, min(num_frames, len(images))).astype(int))
    frames = images[steps]
    flat = frames.reshape(len(frames), -1)
    brightness = flat.mean(1)
    is_black = brightness < BLACK
    is_uniform = (frames.std((1, 2)) < UNIFORM).all(-1) & ~is_black
    return FrameSamples(
        name,
        steps,
        _thumbnails(frames),
        brightness,
        int(is_black.sum()),
        int(is_uniform.sum()),
        _frozen(steps, flat),
    )


def _thumbnails(frames: np.ndarray) -> np.ndarray:
    height, width = frames.shape[1:3]
    scale = min(1.0, THUMBNAIL / max(height, width))
    return resize(frames, (max(1, round(height * scale)), max(1, round(width * scale))), "area")


def _frozen(steps: np.ndarray, flat: np.ndarray) -> tuple[int, int] | None:
    """Returns the first and last step of the longest run of equal frames, if it is long."""
    best = run = (0, 0)
    for i in range(1, len(flat)):
        difference = np.abs(flat[i].astype(np.int16) - flat[i - 1]).mean()
        run = (run[0], i) if difference < FROZEN else (i, i)
        best = max(best, run, key=lambda ends: ends[1] - ends[0])
    count = best[1] - best[0] + 1
    return (int(steps[best[0]]), int(steps[best[1]])) if count >= max(4, len(flat) / 2) else None
