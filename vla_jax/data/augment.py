"""Image augmentation in NumPy: one random shift, brightness and contrast per window."""

from dataclasses import dataclass

import numpy as np

from vla_jax.types import Batch


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


def apply(batch: Batch, config: AugmentConfig, rng: np.random.Generator) -> Batch:
    """The batch with its images changed; each window and camera draws once for all its steps.

    Args:
      batch: windows with images `[B, W, h, w, 3]` uint8, or none.
      config: how far.
      rng: source of the draws; advanced.

    Returns:
      A batch of the same shapes and dtypes.
    """
    changed = {
        name: np.stack([_change(window, config, rng) for window in images])
        for name in ("image_primary", "image_wrist")
        if (images := getattr(batch.observation, name)) is not None
    }
    return batch._replace(observation=batch.observation._replace(**changed))


def random_shift(images: np.ndarray, pixels: int, rng: np.random.Generator) -> np.ndarray:
    """Images `[W, h, w, 3]` moved by up to `pixels`, all alike, edges repeated.

    Source: Yarats et al. 2021, DrQ-v2 (arXiv:2107.09645), section 3.1.
    """
    down, right = rng.integers(-pixels, pixels + 1, 2)
    h, w = images.shape[1:3]
    rows = np.clip(np.arange(h) - down, 0, h - 1)
    columns = np.clip(np.arange(w) - right, 0, w - 1)
    return images[:, rows[:, None], columns]


def random_light(
    images: np.ndarray, brightness: float, contrast: float, rng: np.random.Generator
) -> np.ndarray:
    """Images `[W, h, w, 3]` uint8 with one brightness and contrast for all: `c (x - ½) + ½ + b`."""
    b, c = rng.uniform(-brightness, brightness), rng.uniform(1 - contrast, 1 + contrast)
    levels = np.linspace(0, 1, 256)
    changed = np.clip(c * (levels - 0.5) + 0.5 + b, 0, 1) * 255
    return np.rint(changed).astype(np.uint8)[images]


def _change(images: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    shifted = random_shift(images, config.shift, rng)
    return random_light(shifted, config.brightness, config.contrast, rng)
