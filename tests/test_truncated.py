"""Chunks with a carry: outputs of the whole sequence, gradients of each chunk only."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.nn import cells, recurrence, truncated
from vla_jax.nn.recurrence import RecurrenceConfig

B, T, D, H = 3, 10, 2, 4
each_cell = pytest.mark.parametrize("cell", cells.CELLS)
each_cut = pytest.mark.parametrize(("chunk_size", "burn_in"), [(4, 0), (4, 2), (5, 3), (3, 1)])


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def draw_case(cell):
    """Returns a model, params, a carry, and steps with left padding and several episodes."""
    config = RecurrenceConfig(cell=cell, num_layers=2, hidden_size=H)
    random = np.random.default_rng(1)
    steps = {
        "inputs": draw(0, B, T, D),
        "mask": random.uniform(size=(B, T)) < 0.8,
        "reset": random.uniform(size=(B, T)) < 0.2,
    }
    zeros = recurrence.zero_carry(config, jnp.zeros((B, 1)))
    carry = jax.tree.map(lambda leaf: leaf + draw(2, *leaf.shape), zeros)
    params = recurrence.init(jax.random.key(0), config, D)
    return partial(run, config), params, carry, steps


def run(config, params, carry, steps):
    return recurrence.apply(params, config, **steps, carry=carry)


def run_chunks(model, params, carry, steps, chunk_size, burn_in):
    """Carry and outputs `[B, C·S, H]` of all chunks, with the same params throughout."""

    def body(carry, chunk):
        return truncated.apply(model, params, carry, chunk, burn_in=burn_in)

    cut = truncated.chunks(steps, chunk_size, burn_in=burn_in)
    carry, outputs = jax.lax.scan(body, carry, cut)
    return carry, jnp.concatenate(list(outputs), axis=1)


def total(outputs, seed=3):
    return jnp.sum(jnp.sin(outputs) * draw(seed, *outputs.shape))


def assert_close(one, other, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=atol), one, other)


@each_cut
def test_chunks_are_the_steps_in_order_each_after_its_burn_in(chunk_size, burn_in):
    numbers = np.arange(1, T + 1)[None] + 100 * np.arange(B)[:, None]
    cut = truncated.chunks({"numbers": numbers}, chunk_size, burn_in=burn_in)["numbers"]
    num_chunks = -(-T // chunk_size)
    assert cut.shape == (num_chunks, B, burn_in + chunk_size)
    counted = np.concatenate(list(cut[:, :, burn_in:]), axis=1)
    assert np.array_equal(counted[:, :T], numbers)
    assert not counted[:, T:].any()
    assert not cut[0, :, :burn_in].any()
    for one, following in pairwise(cut):
        assert np.array_equal(following[:, :burn_in], one[:, chunk_size:])


@pytest.mark.sampled
@each_cell
@each_cut
def test_chunks_with_a_carry_give_the_outputs_of_the_whole_sequence(cell, chunk_size, burn_in):
    model, params, carry, steps = draw_case(cell)
    _, expected = model(params, carry, steps)
    _, outputs = run_chunks(model, params, carry, steps, chunk_size, burn_in)
    assert_close(outputs[:, :T], expected)


@pytest.mark.slow
@pytest.mark.sampled
@each_cell
def test_a_chunk_as_long_as_the_episode_gives_the_full_gradient(cell):
    model, params, carry, steps = draw_case(cell)

    def chunked(params, chunk_size):
        return total(run_chunks(model, params, carry, steps, chunk_size, 0)[1][:, :T])

    whole = jax.grad(lambda params: total(model(params, carry, steps)[1]))(params)
    for chunk_size in (T, T + 3):
        assert_close(jax.grad(chunked)(params, chunk_size), whole, atol=1e-5)
    shorter = jax.grad(chunked)(params, 5)
    assert max(map(float, jax.tree.leaves(jax.tree.map(max_difference, shorter, whole)))) > 1e-2


def max_difference(one, other):
    return np.abs(one - other).max()


@pytest.mark.sampled
@each_cell
def test_the_gradient_of_a_chunk_equals_that_of_a_sequence_that_starts_there(cell):
    model, params, carry, steps = draw_case(cell)
    first, second = (
        jax.tree.map(lambda leaf, half=half: leaf[half], truncated.chunks(steps, 5))
        for half in (0, 1)
    )

    def loss_of_second_chunk(params):
        handed_on, _ = truncated.apply(model, params, carry, first)
        return total(truncated.apply(model, params, handed_on, second)[1])

    before, _ = model(params, carry, first)
    expected = jax.grad(lambda params: total(model(params, before, second)[1]))(params)
    assert_close(jax.grad(loss_of_second_chunk)(params), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.sampled
@each_cell
def test_burn_in_affects_the_outputs_but_has_no_gradient(cell):
    model, params, carry, steps = draw_case(cell)
    everywhere = {"mask": np.ones((B, T), bool), "reset": np.zeros((B, T), bool)}

    def loss(inputs, carry):
        chunk = {"inputs": inputs, **everywhere}
        handed_on, outputs = truncated.apply(model, params, carry, chunk, burn_in=3)
        assert outputs.shape == (B, T - 3, H)
        return total(outputs) + sum(leaf.sum() for leaf in jax.tree.leaves(handed_on))

    by_inputs, by_carry = jax.grad(loss, (0, 1))(steps["inputs"], carry)
    assert not by_inputs[:, :3].any()
    assert not any(leaf.any() for leaf in jax.tree.leaves(by_carry))
    assert by_inputs[:, 3:].any(axis=(0, 2)).all()
    other = np.concatenate([-steps["inputs"][:, :3], steps["inputs"][:, 3:]], axis=1)
    assert abs(loss(other, carry) - loss(steps["inputs"], carry)) > 1e-3


@pytest.mark.slow
def test_burn_in_reduces_the_error_of_a_stale_carry():
    """A carry from older params has little effect after a long burn-in of a forgetful cell."""
    model, params, carry, steps = draw_case("rnn")
    steps = {**steps, "mask": np.ones((B, T), bool), "reset": np.zeros((B, T), bool)}
    stale = jax.tree.map(lambda leaf: leaf + 1.0, carry)
    _, expected = truncated.apply(model, params, carry, steps, burn_in=4)
    _, mended = truncated.apply(model, params, stale, steps, burn_in=4)
    _, unmended = model(params, stale, steps)
    _, right = model(params, carry, steps)
    assert max_difference(mended, expected) < 0.2 * max_difference(unmended, right)


@pytest.mark.parametrize(("chunk_size", "burn_in"), [(4, 4), (4, -1), (0, 0)])
def test_a_chunk_with_no_steps_after_burn_in_is_refused(chunk_size, burn_in):
    with pytest.raises(ValueError, match=f"below chunk_size, got burn_in {burn_in} and"):
        truncated.chunks(np.zeros((B, T)), chunk_size, burn_in=burn_in)
