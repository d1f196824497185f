"""Products with plain and with lazily transposed kernels, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from vla_jax.nn import matmul
from vla_jax.nn.matmul import Transposed

D, E = 6, 10
ROWS = [(), (1,), (5,), (2, 3), (0,)]

each_way = pytest.mark.parametrize("way", ["plain", "transposed"])
each_rows = pytest.mark.parametrize("rows", ROWS, ids=str)


def draw(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


@pytest.fixture
def kernel(way):
    """Kernel `[D, E]`, plain or lazily transposed."""
    return Transposed(draw(D, E).T) if way == "transposed" else draw(D, E)


@each_way
@each_rows
def test_product_equals_numpy(rows, kernel):
    inputs = draw(*rows, D)
    product = jax.jit(matmul.product)(inputs, kernel)
    assert product.dtype == jnp.float32
    np.testing.assert_allclose(product, inputs @ draw(D, E), rtol=0, atol=1e-5)


@pytest.mark.sampled
@each_way
@each_rows
def test_gradients_equal_closed_form(rows, kernel):
    inputs, by_product = draw(*rows, D), draw(*rows, E)
    _, pull = jax.vjp(matmul.product, inputs, kernel)
    by_inputs, by_kernel = pull(jnp.asarray(by_product))
    right = inputs.reshape(-1, D).T @ by_product.reshape(-1, E)
    found = by_kernel.kernel.T if isinstance(kernel, Transposed) else by_kernel
    np.testing.assert_allclose(by_inputs, by_product @ draw(D, E).T, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found, right, rtol=0, atol=2e-5)


@each_way
def test_factors_are_rounded_to_bfloat16_and_sums_stay_in_float32(kernel):
    ones = jnp.full((5, D), 1 + 2.0**-9)  # rounds to 1 in bfloat16
    product = matmul.product(ones, kernel, dtype="bfloat16")
    assert product.dtype == jnp.float32
    rounded = np.asarray(draw(D, E), jnp.bfloat16).astype(np.float32)
    np.testing.assert_allclose(product, np.tile(rounded.sum(0), (5, 1)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_only_large_kernels_are_stored_transposed(large, monkeypatch):
    monkeypatch.setattr(matmul, "LARGE", D * E + (not large))
    values, kernel = draw(5, E), jnp.asarray(draw(D, E))
    transpose = matmul.transpose(kernel)
    assert isinstance(transpose, Transposed) == large
    assert transpose.shape == (E, D)
    np.testing.assert_allclose(matmul.product(values, transpose), values @ draw(D, E).T, atol=1e-5)


@each_way
def test_export_supports_a_symbolic_batch_size(kernel):
    (size,) = export.symbolic_shape("b")
    inputs = jax.ShapeDtypeStruct((size, D), jnp.float32)
    exported = export.export(jax.jit(lambda inputs: matmul.product(inputs, kernel)))(inputs)
    np.testing.assert_allclose(exported.call(draw(3, D)), draw(3, D) @ draw(D, E), atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a matter of XLA on CPUs")
def test_the_compiled_product_has_the_kernel_as_first_operand():
    transposed = Transposed(jnp.asarray(draw(E, D)))
    program = jax.jit(lambda inputs: matmul.product(inputs, transposed)).lower(draw(4, D)).compile()
    (dot,) = [line for line in program.as_text().splitlines() if " dot(" in line]
    assert f"= f32[{E},4]" in dot
