"""The dots on the table of the task `path`."""

import numpy as np

DOT_SPACING = 0.09  # m between neighbouring dots
NUM_DOTS = 9  # in a square of 3 × 3


def dots() -> np.ndarray:
    """Returns the places of the dots `[9, 2]`, metres from the table's centre."""
    rows = (np.arange(3) - 1) * DOT_SPACING
    return np.stack(np.meshgrid(rows, rows, indexing="ij"), axis=-1).reshape(NUM_DOTS, 2)
