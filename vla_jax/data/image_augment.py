"""Image augmentation in NumPy: one random shift, brightness and contrast per window.

`vla_jax.training.device_augment` does the same inside `jit`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vla_jax.config import MAX_SIDE, checked
from vla_jax.types import Batch, get_images, replace_images

# Brightness and contrast are multiples of 1 / GRAIN. Every product and sum below is then exact in
# float32, so that NumPy and JAX give identical images.
GRAIN = 4096


@dataclass(frozen=True)
@checked(shift=(0, MAX_SIDE))
class AugmentConfig:
    """Ranges of the random changes."""

    shift: int = 0  # largest shift in each direction, pixels
    brightness: float = 0.0  # largest offset added to pixels in [0, 1]
    contrast: float = 0.0  # the contrast factor is within 1 ± this value

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.shift < 0:
            raise ValueError(f"shift must be at least 0 pixels, got {self.shift}.")
        for name in ("brightness", "contrast"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}.")


class Change(NamedTuple):
    """One random change, applied to all images of one camera in one window."""

    down: Any  # pixels
    right: Any  # pixels
    brightness: Any  # added to pixels in [0, 1]
    contrast: Any  # factor around mid-grey


def apply(
    batch: Batch,
    config: AugmentConfig,
    rng: np.random.Generator,
    *,
    part: tuple[int, int] = (0, 1),
) -> Batch:
    """Augments the images of a batch: one random change per window and camera, for all steps.

    Args:
      batch: windows with images `[B, W, h, w, 3]` uint8, or None.
      config: ranges of the changes.
      rng: source of randomness; advanced.
      part: index of these windows among the equal parts of a larger batch, and number of parts.
        All parts together are changed as the larger batch would be.

    Returns:
      A batch of the same shapes and dtypes.
    """
    if config == AugmentConfig():
        return batch
    index, num_parts = part
    changed = {}
    for name, images in get_images(batch.observation).items():
        size = len(images)
        own = slice(index * size, (index + 1) * size)
        drawn = [field[own] for field in draw(config, rng, num_parts * size)]
        changed[name] = np.stack(
            [change(window, Change(*by)) for window, *by in zip(images, *drawn, strict=True)]
        )
    return batch._replace(observation=replace_images(batch.observation, changed))


def draw(config: AugmentConfig, rng: np.random.Generator, count: int) -> Change:
    """Returns random changes `[count]` within the ranges of `config`; advances `rng`."""
    down, right = rng.integers(-config.shift, config.shift + 1, (2, count))
    ranges = np.array([[config.brightness], [config.contrast]])
    light = np.rint(rng.uniform(-1, 1, (2, count)) * ranges * GRAIN) / GRAIN
    return Change(down, right, light[0], 1 + light[1])


def change(images: np.ndarray, by: Change) -> np.ndarray:
    """Returns images `[W, h, w, 3]` uint8, shifted, with other brightness and contrast.

    The shift repeats edge pixels. A pixel x in [0, 1] becomes
    `contrast · (x - ½) + ½ + brightness`, clipped to [0, 1].

    Source: shift from Yarats et al. 2021, DrQ-v2 (arXiv:2107.09645), section 3.1.
    """
    h, w = images.shape[1:3]
    rows = np.clip(np.arange(h) - by.down, 0, h - 1)
    columns = np.clip(np.arange(w) - by.right, 0, w - 1)
    levels = by.contrast * (np.arange(256) - 127.5) + (127.5 + 255 * by.brightness)
    new_levels = np.rint(np.clip(levels, 0, 255)).astype(np.uint8)
    return new_levels[images[:, rows[:, None], columns]]
