"""Gradients compared with central differences of the same function in NumPy and float64."""

import jax
import numpy as np
import pytest

STEP = 1e-6


def assert_slopes(gradient, function, point, *, tolerance=3e-6):
    """Compares the gradient with the slopes of a function along three random directions.

    Args:
      gradient: tree of `point`, from JAX.
      function: of the leaves of `point` in float64; returns a number.
      point: a tuple of trees.
      tolerance: of the slope, relative to the sum of the absolute products that it consists of.
    """
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), point)
    leaves, structure = jax.tree.flatten(exact)
    for seed in range(3):
        random = np.random.default_rng(seed)
        moves = [random.normal(size=leaf.shape) for leaf in leaves]
        direction = structure.unflatten(moves)
        after, before = (
            function(*jax.tree.map(lambda x, d, sign=sign: x + sign * STEP * d, exact, direction))
            for sign in (1, -1)
        )
        terms = [
            np.sum(np.asarray(slope, np.float64) * d)
            for slope, d in zip(jax.tree.leaves(gradient), moves, strict=True)
        ]
        scale = sum(abs(term) for term in terms)
        expected = (after - before) / (2 * STEP)
        assert sum(terms) == pytest.approx(expected, abs=tolerance * scale + 1e-6)
