"""Cells compared with their authors' code: outputs, carries and gradients.

`golden/cells/cells.npz` was written by `golden/cells/make_cells.py` with recurrentgemma 1.0.1 and
xlstm 2.0.6.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.linalg import block_diag

from vla_jax.nn import associative, bptt, cells


@pytest.fixture(scope="module")
def stored(golden):
    with np.load(golden / "cells" / "cells.npz") as file:
        return dict(file)


def part(stored, name):
    """Returns the arrays of one cell, without its prefix."""
    size = len(name) + 1
    return {key[size:]: value for key, value in stored.items() if key.startswith(f"{name}.")}


def assert_close(one, other, atol=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), one, other)


@pytest.mark.parametrize("scan", [bptt.plain_scan, associative.scan])
def test_an_rg_lru_equals_that_of_recurrentgemma(scan, stored):
    """Its gates are linear in the unit's input u: kernels [gate of a, gate of u, identity]."""
    theirs = part(stored, "rg_lru")
    num_units = theirs["carry"].shape[-1]
    gates = [block_diag(*theirs[f"{gate}_w"]) for gate in ("a_gate", "input_gate")]
    biases = [theirs[f"{gate}_b"].ravel() for gate in ("a_gate", "input_gate")]
    params = {
        "input_kernel": jnp.concatenate([*gates, jnp.eye(num_units)], axis=1),
        "input_bias": jnp.concatenate([*biases, jnp.zeros(num_units)]),
        "decay_logit": -theirs["a_param"],  # softplus(a_param) = −log σ(Λ)
    }

    def total(inputs, carry):
        steps = jnp.swapaxes(cells.project(params, inputs), 0, 1)
        last, outputs = scan(cells.RG_LRU, params, cells.RGLRUCarry(carry), steps)
        return jnp.sum(jnp.sin(outputs)), (jnp.swapaxes(outputs, 0, 1), last.hidden)

    slopes, (outputs, last) = jax.grad(total, (0, 1), has_aux=True)(
        theirs["inputs"], theirs["carry"]
    )
    assert_close((outputs, last), (theirs["outputs"], theirs["last"]))
    assert_close(slopes, (theirs["d_inputs"], theirs["d_carry"]), atol=1e-5)


@pytest.mark.parametrize("scan", [bptt.scan, bptt.plain_scan])
def test_an_slstm_equals_that_of_xlstm(scan, stored):
    """Its recurrent kernel is block-diagonal over heads, `[M, 4·E, E]`."""
    theirs = part(stored, "s_lstm")
    _, batch_size, width = theirs["projected"].shape
    heads = theirs["kernel"]
    num_heads, _, size = heads.shape
    # [M, 4, E out, E in] -> for each gate a block-diagonal [H, H], input first
    by_gate = heads.reshape(num_heads, 4, size, size).transpose(1, 0, 3, 2)
    kernel = jnp.concatenate([block_diag(*blocks) for blocks in by_gate], axis=1)

    def total(projected, kernel, bias):
        params = {"recurrent_kernel": kernel, "recurrent_bias": bias}
        carry = cells.S_LSTM.zero_carry(jnp.zeros((batch_size, 1)), width // 4)
        last, outputs = scan(cells.S_LSTM, params, carry, projected)
        return jnp.sum(jnp.sin(outputs)), (outputs, last)

    (d_projected, d_kernel, d_bias), (outputs, last) = jax.grad(total, (0, 1, 2), has_aux=True)(
        theirs["projected"], kernel, theirs["bias"]
    )
    assert_close(outputs, theirs["states"][0, 1:])
    assert_close(tuple(last), tuple(theirs["states"][:, -1]), atol=1e-5)
    assert_close(d_projected, theirs["d_projected"], atol=1e-5)
    assert_close(d_bias, theirs["d_bias"], atol=1e-5)
    blocks = theirs["d_kernel"].reshape(num_heads, 4, size, size).transpose(1, 0, 3, 2)
    expected = np.concatenate([block_diag(*each) for each in blocks], axis=1)
    assert_close(np.where(kernel != 0, d_kernel, 0.0), expected, atol=1e-5)
