"""Image augmentation in NumPy: one random shift, brightness and contrast per window.

`vla_jax.training.device_augment` is the same inside `jit`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vla_jax.types import Batch

# Steps per unit of brightness and contrast. Of such numbers every product and sum below is exact
# in float32, so that the same change gives the same picture whoever computes it.
GRAIN = 4096


@dataclass(frozen=True)
class AugmentConfig:
    """How far images are changed."""

    shift: int = 0  # pixels in each direction, at most
    brightness: float = 0.0  # added to pixels in [0, 1], at most
    contrast: float = 0.0  # factor lies in 1 ± this

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.shift < 0:
            raise ValueError(f"shift must be at least 0 pixels, got {self.shift}.")
        for name in ("brightness", "contrast"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}.")


class Change(NamedTuple):
    """What happens to one camera's pictures of one window, the same at all its steps."""

    down: Any  # pixels
    right: Any  # pixels
    brightness: Any  # added to pixels in [0, 1]
    contrast: Any  # factor about grey


def apply(batch: Batch, config: AugmentConfig, rng: np.random.Generator) -> Batch:
    """The batch with its images changed; each window and camera draws once for all its steps.

    Args:
      batch: windows with images `[B, W, h, w, 3]` uint8, or none.
      config: how far.
      rng: source of the draws; advanced.

    Returns:
      A batch of the same shapes and dtypes.
    """
    if config == AugmentConfig():
        return batch
    changed = {
        name: np.stack([change(window, draw(config, rng)) for window in images])
        for name in ("image_primary", "image_wrist")
        if (images := getattr(batch.observation, name)) is not None
    }
    return batch._replace(observation=batch.observation._replace(**changed))


def draw(config: AugmentConfig, rng: np.random.Generator) -> Change:
    """A change within the ranges of `config`; `rng` is advanced."""
    down, right = rng.integers(-config.shift, config.shift + 1, 2)
    brightness = rng.uniform(-config.brightness, config.brightness)
    contrast = rng.uniform(1 - config.contrast, 1 + config.contrast)
    return Change(down, right, *(np.rint(np.array([brightness, contrast]) * GRAIN) / GRAIN))


def change(images: np.ndarray, by: Change) -> np.ndarray:
    """Images `[W, h, w, 3]` uint8, moved with their edges repeated, in another light.

    A pixel x in [0, 1] becomes `contrast · (x - ½) + ½ + brightness`, within [0, 1].

    Source: the shift is that of Yarats et al. 2021, DrQ-v2 (arXiv:2107.09645), section 3.1.
    """
    h, w = images.shape[1:3]
    rows = np.clip(np.arange(h) - by.down, 0, h - 1)
    columns = np.clip(np.arange(w) - by.right, 0, w - 1)
    levels = by.contrast * (np.arange(256) - 127.5) + (127.5 + 255 * by.brightness)
    lit = np.rint(np.clip(levels, 0, 255)).astype(np.uint8)
    return lit[images[:, rows[:, None], columns]]
