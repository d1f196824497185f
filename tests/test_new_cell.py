"""A cell defined outside of the library, added by one line to `CELLS`, obeys the laws of cells."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.nn import associative, bptt, cells, recurrence
from vla_jax.nn.cells.contract import Cell, init_uniform, zeros
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.policies import decoders
from vla_jax.policies.decoder_config import DecoderConfig

B, T, D, H = 3, 6, 2, 4


class Hidden(NamedTuple):
    hidden: jax.Array


def init_integrator(key, input_size, hidden_size):
    params = init_uniform(key, input_size, hidden_size, num_gates=1)
    return {name: params[name] for name in ("input_kernel", "input_bias")}


def integrate(extra_params, carry, projected, recurrent):
    hidden = 0.9 * carry.hidden + projected
    return Hidden(hidden), hidden


LEAKY_INTEGRATOR = Cell(
    num_gates=1,
    init=init_integrator,
    zero_carry=partial(zeros, carry_type=Hidden),
    combine=integrate,
    coefficients=lambda extra_params, projected: (jnp.full_like(projected, 0.9), projected),
)


def init_coupled(key, input_size, hidden_size):
    params = init_uniform(key, input_size, hidden_size, num_gates=3)
    return {**params, "peephole": jnp.full(hidden_size, 0.3)}


def couple_gates(extra_params, carry, projected, recurrent):
    """An LSTM with input gate 1 − f, and an output gate computed from the cell state."""
    f, g, o = jnp.split(projected + recurrent, 3, axis=-1)
    f = jax.nn.sigmoid(f)
    cell = f * carry.cell + (1 - f) * jnp.tanh(g)
    peephole = jnp.broadcast_to(extra_params["peephole"], cell.shape)
    hidden = jax.nn.sigmoid(o + peephole * cell) * jnp.tanh(cell)
    return cells.LSTMCarry(hidden, cell), hidden


COUPLED_LSTM = Cell(
    num_gates=3,
    init=init_coupled,
    zero_carry=partial(zeros, carry_type=cells.LSTMCarry),
    combine=couple_gates,
    sums_gates=True,
)


@pytest.fixture(params=[LEAKY_INTEGRATOR, COUPLED_LSTM], ids=["leaky_integrator", "coupled_lstm"])
def cell(request, monkeypatch):
    monkeypatch.setitem(cells.CELLS, "new", request.param)
    return request.param


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def draw_case(key, **fields):
    config = RecurrenceConfig("new", num_layers=2, hidden_size=H, **fields)
    return config, recurrence.init(key, config, D), draw(0, B, T, D)


def draw_flags():
    random = np.random.default_rng(1)
    return {name: random.uniform(size=(T, B)) < 0.6 for name in ("mask", "reset")}


def assert_close(actual, expected, atol=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), actual, expected)


def gradients(scan, cell, params, projected):
    def loss(params, projected):
        carry = cell.zero_carry(projected[0], H)
        results = scan(cell, params, carry, projected, **draw_flags())
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(results))

    return jax.jit(jax.grad(loss, (0, 1)))(params, projected)


def test_the_custom_backward_pass_equals_autodiff(cell, key):
    params, projected = cell.init(key, D, H), draw(2, T, B, cell.num_gates * H)
    by_hand, derived = (
        gradients(scan, cell, params, projected) for scan in (bptt.scan, bptt.plain_scan)
    )
    assert_close(by_hand, derived)
    assert all(derived[0][name].any() for name in cells.extra_params(params))


def test_streamed_equals_windowed_with_resets(cell, key):
    config, params, inputs = draw_case(key)
    reset = draw_flags()["reset"].T
    last, outputs = recurrence.apply(params, config, inputs, reset=reset)
    carry = recurrence.zero_carry(config, inputs)
    for t in range(T):
        carry, output = recurrence.step(params, config, carry, inputs[:, t], reset=reset[:, t])
        assert_close(output, outputs[:, t])
    assert_close(carry, last)


@pytest.mark.parametrize("fields", [{}, {"bidirectional": True, "remat_chunk": 4}], ids=str)
def test_padding_equals_truncation_and_resets_equal_separate_episodes(fields, cell, key):
    config, params, inputs = draw_case(key, **fields)
    mask = np.tile(np.arange(T) > 1, (B, 1))
    last, outputs = recurrence.apply(params, config, inputs, mask=mask)
    assert_close((last, outputs[:, 2:]), recurrence.apply(params, config, inputs[:, 2:]))
    reset = np.tile(np.arange(T) == 3, (B, 1))
    _, outputs = recurrence.apply(params, config, inputs, reset=reset)
    halves = [
        recurrence.apply(params, config, inputs[:, part])[1] for part in (slice(3), slice(3, T))
    ]
    assert_close(outputs, jnp.concatenate(halves, axis=1))


def test_only_a_linear_cell_runs_as_an_associative_scan(cell, key):
    if cell.coefficients is None:
        with pytest.raises(ValueError, match="linear in its carry"):
            RecurrenceConfig("new", implementation="associative")
        return
    projected = draw(2, T, B, H)
    params = cell.init(key, D, H)
    by_scan, by_loop = (
        gradients(scan, cell, params, projected) for scan in (associative.scan, bptt.plain_scan)
    )
    assert_close(by_scan[1], by_loop[1])


@pytest.mark.parametrize("mode", ["refresh", "periodic", "persistent"])
def test_a_decoder_with_the_cell_streams_as_in_training(mode, cell, key):
    config = DecoderConfig(
        kind="new", token_dim=D, window_size=3, action_horizon=2, hidden_size=H, num_layers=2,
        head_sizes=(8,),
    )  # fmt: skip
    params = decoders.init(key, config)
    tokens = np.random.default_rng(0).normal(size=(B, T, 1, D)).astype(np.float32)
    state = decoders.init_stream(params, config, B, mode=mode)
    step, apply = (jax.jit(f, static_argnums=1) for f in (decoders.step, decoders.apply))
    first = {"refresh": lambda t: max(0, t - 2), "periodic": lambda t: t - t % 3}
    for t in range(T):
        state, chunk = step(params, config, state, tokens[:, t])
        start = first.get(mode, lambda t: 0)(t)
        window = apply(params, config, tokens[:, start : t + 1])
        np.testing.assert_allclose(chunk.arm, window.arm[:, -1], atol=1e-6)
