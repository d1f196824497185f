"""Gradients through several steps of a cell, compared with float64 finite differences in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cell_cases import draw
from tests.test_cells import B, D, draw_carry, draw_params, step_in_numpy
from vla_jax.nn import bptt, cells

T = 4
STEP = 1e-6  # of the central differences, in float64
NAMES = [name for name, cell in cells.CELLS.items() if cell.num_gates]


def total_in_numpy(name, params, carry, inputs):
    """Sum of the sines of the outputs of all steps and of the last carry."""
    total = 0.0
    for t in range(T):
        carry = step_in_numpy(name, params, carry, inputs[t])
        total += np.sin(carry.hidden).sum()
    return total + sum(np.sin(leaf).sum() for leaf in carry)


@pytest.mark.sampled
@pytest.mark.parametrize("name", NAMES)
def test_directional_derivatives_equal_float64_finite_differences(name):
    cell = cells.CELLS[name]
    point = (draw_params(cell), draw_carry(cell), draw(9, T, B, D))

    def total(params, carry, inputs):
        projected = cells.project(params, inputs)
        last, outputs = bptt.scan(cell, params, carry, projected)
        return jnp.sum(jnp.sin(outputs)) + sum(jnp.sum(jnp.sin(leaf)) for leaf in last)

    slopes = jax.jit(jax.grad(total, (0, 1, 2)))(*point)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), point)
    for seed in range(3):
        leaves, structure = jax.tree.flatten(exact)
        moved = [draw(10 * seed + index, *leaf.shape) for index, leaf in enumerate(leaves)]
        direction = structure.unflatten([np.asarray(each, np.float64) for each in moved])
        after, before = (
            jax.tree.map(lambda x, d, sign=sign: x + sign * STEP * d, exact, direction)
            for sign in (1, -1)
        )
        expected = (total_in_numpy(name, *after) - total_in_numpy(name, *before)) / (2 * STEP)
        terms = [
            np.sum(np.asarray(slope, np.float64) * d)
            for slope, d in zip(jax.tree.leaves(slopes), jax.tree.leaves(direction), strict=True)
        ]
        scale = sum(abs(term) for term in terms)
        assert sum(terms) == pytest.approx(expected, abs=3e-6 * scale + 1e-6)
