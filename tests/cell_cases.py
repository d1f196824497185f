"""Random carries of any cell, for the tests of the laws of cells."""

import jax
import numpy as np


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def draw_carry(zeros):
    """Normal numbers shaped like a carry, or a tree of carries, of zeros.

    A normaliser, a sum of positive weights that starts with a weight of 1, is at least 1.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(zeros)
    leaves = []
    for seed, (path, leaf) in enumerate(paths):
        drawn = draw(seed, *leaf.shape)
        is_normaliser = getattr(path[-1], "name", "") == "normaliser"
        leaves.append(1 + np.abs(drawn) if is_normaliser else drawn)
    return structure.unflatten(leaves)
