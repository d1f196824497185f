"""Rotation vectors of matrices agree with SciPy's."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vla_jax.actions import rotations


@pytest.mark.parametrize("scale", [3.0, 1.0, 1e-3, 1e-9, 0.0])
def test_rotation_vectors_of_matrices_equal_scipy(scale):
    axes = np.random.default_rng(0).normal(size=(50, 3))
    expected = scale * axes / np.linalg.norm(axes, axis=1, keepdims=True)
    matrix = Rotation.from_rotvec(expected).as_matrix()
    vector = rotations.matrix_to_rotation_vector(matrix)
    np.testing.assert_allclose(vector, expected, atol=1e-7)
    np.testing.assert_array_equal(rotations.matrix_to_rotation_vector(matrix[7]), vector[7])
    in_jax = rotations.matrix_to_rotation_vector(jnp.asarray(matrix))
    np.testing.assert_allclose(in_jax, expected, atol=2e-3)  # float32 arccos loses half the digits
