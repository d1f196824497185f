"""Gradients through several steps of a cell, compared with float64 finite differences in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cell_cases import draw
from tests.finite_differences import assert_slopes
from tests.test_cells import B, D, draw_carry, draw_params, step_in_numpy
from vla_jax.nn import bptt, cells, chunkwise

T = 4
SCANS = {"steps": bptt.scan, "chunks": chunkwise.scan}
CASES = [
    (name, scan)
    for name, cell in cells.CELLS.items()
    for scan in SCANS
    if scan == "steps" or cell.chunk is not None
]


def total_in_numpy(name, params, carry, inputs):
    """Sum of the sines of the outputs of all steps and of the last carry."""
    total = 0.0
    for t in range(T):
        carry, outputs = step_in_numpy(name, params, carry, inputs[t])
        total += np.sin(outputs).sum()
    return total + sum(np.sin(leaf).sum() for leaf in carry)


@pytest.mark.sampled
@pytest.mark.parametrize(("name", "scan"), CASES)
def test_directional_derivatives_equal_float64_finite_differences(name, scan):
    cell = cells.CELLS[name]
    point = (draw_params(cell), draw_carry(cell), draw(9, T, B, D))

    def total(params, carry, inputs):
        projected = cells.project(params, inputs)
        last, outputs = SCANS[scan](cell, params, carry, projected)
        return jnp.sum(jnp.sin(outputs)) + sum(jnp.sum(jnp.sin(leaf)) for leaf in last)

    slopes = jax.jit(jax.grad(total, (0, 1, 2)))(*point)
    assert_slopes(slopes, partial(total_in_numpy, name), point)
