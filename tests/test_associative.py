"""Law: a parallel scan equals a step-by-step loop, outputs and gradients, for every linear cell."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.nn import associative, bptt, cells

B, T, H = 4, 11, 5  # T is no power of two
LINEAR = {name: cell for name, cell in cells.CELLS.items() if cell.coefficients is not None}
FLAGS = {"whole": (), "mask": ("mask",), "reset": ("reset",), "mask-reset": ("mask", "reset")}
each_cell = pytest.mark.parametrize("cell", LINEAR.values(), ids=LINEAR)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def draw_case(cell, flag_names=("mask", "reset")):
    """Returns flags, carry, extra params, and the input projections."""
    random = np.random.default_rng(5)
    flags = {flag: random.uniform(size=(T, B)) < 0.6 for flag in flag_names}
    for flag in flags:
        flags[flag][:, 0] = flag == "mask"  # one row has neither padding nor resets
    carry = type(cell.zero_carry(jnp.zeros((B, 1)), H))(draw(0, B, H))
    extra = cells.extra_params(cell.init(jax.random.key(0), 1, H))
    return flags, carry, extra, draw(9, T, B, cell.num_gates * H)


def weighted_sum(scan, cell, flags, reverse, carry, extra, projected):
    """Returns a differently weighted sum of all outputs and carries, and the results themselves."""
    results = scan(cell, extra, carry, projected, reverse=reverse, **flags)
    terms = jax.tree.map(lambda leaf: jnp.sum(jnp.sin(leaf) * draw(3, *leaf.shape)), results)
    return sum(jax.tree.leaves(terms)), results


def assert_close(one, other, tolerance=2e-6):
    def compare(a, b):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)

    jax.tree.map(compare, one, other)


def test_the_linear_cells_are_found():
    assert {"min_gru", "min_lstm", "rg_lru"} <= LINEAR.keys()


@pytest.mark.sampled
@each_cell
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("flag_names", FLAGS.values(), ids=FLAGS)
def test_outputs_carry_and_gradients_equal_those_of_the_loop(cell, flag_names, reverse):
    flags, *arguments = draw_case(cell, flag_names)
    parallel_results, expected_results = (
        jax.jit(
            jax.value_and_grad(
                partial(weighted_sum, scan, cell, flags, reverse), (0, 1, 2), has_aux=True
            )
        )(*arguments)
        for scan in (associative.scan, bptt.plain_scan)
    )
    assert_close(parallel_results, expected_results)
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(expected_results))


@pytest.mark.slow
@each_cell
def test_masked_inputs_may_be_nan(cell):
    flags, carry, extra, projected = draw_case(cell)
    with_nan = np.where(flags["mask"][..., None], projected, np.nan)
    expected = associative.scan(cell, extra, carry, projected, **flags)
    assert_close(associative.scan(cell, extra, carry, with_nan, **flags), expected, 0)


@each_cell
def test_a_sequence_of_one_step_equals_a_single_step(cell):
    _, carry, extra, projected = draw_case(cell)
    last, outputs = associative.scan(cell, extra, carry, projected[:1])
    expected = cell.combine(extra, carry, projected[0], None)
    assert_close((last, outputs[0]), expected)


def test_composition_of_two_steps_is_sequential_application_and_associative():
    """JAX does not check that an operator is associative; otherwise results would be silently
    wrong.
    """
    first, second, third = ((draw(i, H), draw(i + 10, H)) for i in range(3))
    compose = associative._compose
    assert_close(compose(compose(first, second), third), compose(first, compose(second, third)))
    hidden = draw(20, H)
    decay, added = compose(first, second)
    after = second[0] * (first[0] * hidden + first[1]) + second[1]
    assert_close(decay * hidden + added, after)


@pytest.mark.parametrize("name", sorted(cells.CELLS.keys() - LINEAR.keys()))
def test_a_cell_whose_gates_depend_on_the_carry_is_refused(name):
    with pytest.raises(ValueError, match=r"linear in its carry, such as .min_gru."):
        associative.check(cells.CELLS[name])


@each_cell
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("scan", [associative.scan, bptt.scan, bptt.plain_scan])
def test_nan_does_not_pass_a_reset(scan, cell, reverse):
    """Law 2, reset = separate episodes, where the episode before holds NaN and infinity."""
    first, second = np.arange(5), np.arange(5, T)
    if reverse:  # time runs from the last step to the first
        first, second = T - 1 - first, T - 1 - second
    reset = np.zeros((T, B), bool)
    reset[second[0]] = True
    _, carry, extra, projected = draw_case(cell, ())
    damaged = projected.copy()
    damaged[first[1]], damaged[first[3]] = np.nan, np.inf

    def loss(projected):
        last, outputs = scan(cell, extra, carry, projected, reset=reset, reverse=reverse)
        kept = outputs[np.sort(second)]
        return jnp.sum(jnp.sin(kept)) + jnp.sum(jnp.cos(last.hidden)), (kept, last)

    run = jax.jit(jax.grad(loss, has_aux=True))
    (gradient, results), (expected_gradient, expected) = run(damaged), run(projected)
    assert_close(results, expected, 0)
    assert_close(gradient[second], expected_gradient[second], 0)
    assert np.abs(expected_gradient[second]).max() > 1e-4
