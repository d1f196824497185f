"""The tasks are what their papers say, and the gradient's reach is what can be worked out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import memory_tasks
from train.memory_tasks import TASKS, Trials
from vla_jax.nn import cells, recurrence
from vla_jax.nn.recurrence import RecurrenceConfig

B, H = 400, 6


@pytest.mark.parametrize("length", [3, 10])
def test_adding_asks_for_the_sum_of_one_marked_number_of_each_half(length, key):
    (values, marks), target = split_adding(memory_tasks.draw_adding(key, B, length))
    assert ((values >= 0) & (values < 1)).all()
    assert (marks[:, : length // 2].sum(1) == 1).all()
    assert (marks[:, length // 2 :].sum(1) == 1).all()
    assert marks.any(axis=0).all()  # anywhere
    np.testing.assert_allclose(target, (values * marks).sum(1), atol=1e-6)


def split_adding(trials):
    return np.moveaxis(np.asarray(trials.inputs), -1, 0), np.asarray(trials.target)


def test_who_remembers_nothing_is_at_chance(key):
    adding = memory_tasks.draw_adding(key, 20_000, 8)
    loss, error = TASKS["adding"].judge(jnp.ones((20_000, 1)), adding.target)
    assert loss == error
    assert float(error) == pytest.approx(TASKS["adding"].chance, rel=0.03)
    recall = memory_tasks.draw_recall(key, 20_000, 3)
    same = jnp.tile(jnp.arange(memory_tasks.NUM_SYMBOLS, dtype=float)[None], (20_000, 1))
    loss, error = TASKS["recall"].judge(0.0 * same, recall.target)
    assert float(loss) == pytest.approx(np.log(memory_tasks.NUM_SYMBOLS), rel=1e-5)
    assert float(TASKS["recall"].judge(same, recall.target)[1]) == pytest.approx(
        TASKS["recall"].chance, rel=0.03
    )


@pytest.mark.parametrize("delay", [1, 5])
def test_recall_asks_at_the_cue_for_the_symbol_that_was_marked(delay, key):
    inputs, target = map(np.asarray, memory_tasks.draw_recall(key, B, delay))
    assert inputs.shape == (B, delay + 1, memory_tasks.NUM_SYMBOLS + 2)
    symbols, marks, cues = inputs[..., :-2], inputs[..., -2], inputs[..., -1]
    assert (symbols[:, 0].argmax(-1) == target).all()
    assert (symbols[:, :-1].sum(-1) == 1).all()
    assert not symbols[:, -1].any()
    assert (marks == (np.arange(delay + 1) == 0)).all()
    assert (cues == (np.arange(delay + 1) == delay)).all()
    assert set(target) == set(range(memory_tasks.NUM_SYMBOLS))


@pytest.mark.parametrize("cell", cells.CELLS)
def test_spread_gates_forget_after_one_to_span_steps(cell, key):
    span, num_units = 100, 64
    drawn = cells.CELLS[cell].init(key, 2, num_units)
    params = memory_tasks.spread_gates(key, cell, drawn, span)
    changed = {name for name, leaf in params.items() if not np.array_equal(leaf, drawn[name])}
    if cell == "rnn":
        assert not changed
        return
    kept = keeping_gate(cell, params)
    steps = 1 / (1 - kept)
    assert len(changed) == 1
    assert (steps > 1).all()
    assert (steps < span + 1).all()
    assert steps.min() < 10 < 60 < steps.max()


def keeping_gate(cell, params):
    """Share of its memory that each unit keeps in a step whose products are zero."""
    leaf = np.asarray(params["gate_bias" if cell == "layer_norm_lstm" else "input_bias"])
    first, second, *_ = np.split(leaf, cells.CELLS[cell].num_gates)
    if cell == "min_gru":  # z n, of which z lets in
        return 1 / (1 + np.exp(first))
    if cell != "gru":  # i f g o
        np.testing.assert_allclose(first, -second)
    return 1 / (1 + np.exp(-second))  # f; or z of r z n


def draw_net(cell, key, num_steps=7):
    config = RecurrenceConfig(cell, hidden_size=H)
    task = TASKS["adding"]
    return config, memory_tasks.init(key, config, task), task.draw(key, 3, num_steps)


def test_the_reach_of_a_linear_cell_is_the_product_of_what_it_keeps(key):
    """Of one row: ∂hₜ₊₁/∂hₜ is a diagonal, the a of hₜ₊₁ = a hₜ + b."""
    config, params, trials = draw_net("min_gru", key)
    row = Trials(trials.inputs[:1], trials.target[:1])
    cell, own = cells.MIN_GRU, params["recurrence"]["layers_0"]["forward"]
    decay = np.asarray(cell.coefficients(cell.project(own, row.inputs[0]))[0], np.float64)
    readout = np.asarray(params["readout"]["layers_0"]["kernel"], np.float64)[:, 0]
    kept = np.cumprod(np.vstack([np.ones(H), decay[:0:-1]]), axis=0)  # by lag
    expected = np.linalg.norm(kept * readout, axis=-1)
    found = memory_tasks.gradient_norms(params, config, row)[::-1]
    np.testing.assert_allclose(found, expected / expected[0], rtol=1e-5)


@pytest.mark.parametrize("cell", cells.CELLS)
def test_the_reach_is_the_slope_of_the_last_answer(cell, key):
    config, params, trials = draw_net(cell, key)
    norms = memory_tasks.gradient_norms(params, config, trials)

    def answer(carry, first):
        carry = {"layers_0": {"forward": carry}}
        _, outputs = recurrence.apply(
            params["recurrence"], config, trials.inputs[:, first:], carry=carry
        )
        readout = params["readout"]["layers_0"]
        return jnp.sum(outputs[:, -1] @ readout["kernel"])

    zero = recurrence.zero_carry(config, trials.inputs)
    middle, _ = recurrence.apply(params["recurrence"], config, trials.inputs[:, :4], carry=zero)
    slopes = jax.tree.leaves(jax.grad(answer)(middle["layers_0"]["forward"], 4))
    size = np.sqrt(sum(np.sum(np.square(slope), -1).mean() for slope in slopes))
    assert norms.shape == (7,)
    readout = np.linalg.norm(params["readout"]["layers_0"]["kernel"])
    np.testing.assert_allclose(norms[3], size / readout, rtol=1e-4)
    assert norms[-1] == 1.0
