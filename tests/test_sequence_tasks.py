"""Memory tasks as in their papers; gradient norms agree with closed forms; chrono biases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.nn import cells, chrono, recurrence, sequence_tasks
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.nn.sequence_tasks import TASKS, Trials

B, H = 400, 6


@pytest.mark.parametrize("length", [3, 10])
def test_adding_marks_one_number_in_each_half_and_targets_their_sum(length, key):
    (values, marks), target = split_adding(sequence_tasks.draw_adding(key, B, length))
    assert ((values >= 0) & (values < 1)).all()
    assert (marks[:, : length // 2].sum(1) == 1).all()
    assert (marks[:, length // 2 :].sum(1) == 1).all()
    assert marks.any(axis=0).all()  # every position occurs
    np.testing.assert_allclose(target, (values * marks).sum(1), atol=1e-6)


def split_adding(trials):
    return np.moveaxis(np.asarray(trials.inputs), -1, 0), np.asarray(trials.target)


@pytest.mark.slow
def test_constant_outputs_are_at_chance(key):
    adding = sequence_tasks.draw_adding(key, 20_000, 8)
    loss, error = TASKS["adding"].evaluate(jnp.ones((20_000, 1)), adding.target)
    assert loss == error
    assert float(error) == pytest.approx(TASKS["adding"].chance, rel=0.03)
    recall = sequence_tasks.draw_recall(key, 20_000, 3)
    same = jnp.tile(jnp.arange(sequence_tasks.NUM_SYMBOLS, dtype=float)[None], (20_000, 1))
    loss, error = TASKS["recall"].evaluate(0.0 * same, recall.target)
    assert float(loss) == pytest.approx(np.log(sequence_tasks.NUM_SYMBOLS), rel=1e-5)
    assert float(TASKS["recall"].evaluate(same, recall.target)[1]) == pytest.approx(
        TASKS["recall"].chance, rel=0.03
    )


@pytest.mark.parametrize("delay", [1, 5])
def test_recall_targets_the_marked_symbol_at_the_cue(delay, key):
    inputs, target = map(np.asarray, sequence_tasks.draw_recall(key, B, delay))
    assert inputs.shape == (B, delay + 1, sequence_tasks.NUM_SYMBOLS + 2)
    symbols, marks, cues = inputs[..., :-2], inputs[..., -2], inputs[..., -1]
    assert (symbols[:, 0].argmax(-1) == target).all()
    assert (symbols[:, :-1].sum(-1) == 1).all()
    assert not symbols[:, -1].any()
    assert (marks == (np.arange(delay + 1) == 0)).all()
    assert (cues == (np.arange(delay + 1) == delay)).all()
    assert set(target) == set(range(sequence_tasks.NUM_SYMBOLS))


@pytest.mark.parametrize(
    "cell", [name for name, cell in cells.CELLS.items() if cell.has_vector_carry]
)
def test_spread_gates_have_time_constants_from_one_to_span_steps(cell, key):
    span, num_units = 100, 64
    drawn = cells.CELLS[cell].init(key, 2, num_units)
    params = chrono.spread_gates(key, cell, drawn, span)
    changed = {name for name, leaf in params.items() if not np.array_equal(leaf, drawn[name])}
    if cells.CELLS[cell].spread is None:
        assert not changed
        return
    kept = kept_in_a_step(cell, params)
    steps = 1 / (1 - kept)
    assert changed
    assert (steps > 1).all()
    assert (steps < span + 1).all()
    assert steps.min() < 10 < 60 < steps.max()


def kept_in_a_step(cell, params):
    """Fraction of its carry that each unit keeps in a step with zero matrix products."""
    projected = params["input_bias"][None]
    if cells.CELLS[cell].coefficients is not None:
        return np.asarray(cells.CELLS[cell].coefficients(cells.extra_params(params), projected)[0])
    leaf = np.asarray(params["gate_bias" if cell == "layer_norm_lstm" else "input_bias"])
    first, second, *_ = np.split(leaf, cells.CELLS[cell].num_gates)
    if cell in ("lstm", "layer_norm_lstm"):  # i f g o
        np.testing.assert_allclose(first, -second)
    return 1 / (1 + np.exp(-second))  # f; or z of r z n


def draw_net(cell, key, num_steps=7):
    config = RecurrenceConfig(cell, hidden_size=H)
    task = TASKS["adding"]
    return config, sequence_tasks.init(key, config, task), task.draw(key, 3, num_steps)


@pytest.mark.slow
def test_the_gradient_norms_of_a_linear_cell_are_products_of_its_decays(key):
    """∂hₜ₊₁/∂hₜ is diagonal, with the factors a of hₜ₊₁ = a hₜ + b."""
    config, params, trials = draw_net("min_gru", key)
    row = Trials(trials.inputs[:1], trials.target[:1])
    cell, own = cells.MIN_GRU, params["recurrence"]["layers_0"]["forward"]
    projected = cells.project(own, row.inputs[0])
    decay = np.asarray(cell.coefficients(cells.extra_params(own), projected)[0], np.float64)
    readout = np.asarray(params["readout"]["layers_0"]["kernel"], np.float64)[:, 0]
    kept = np.cumprod(np.vstack([np.ones(H), decay[:0:-1]]), axis=0)  # by lag
    expected = np.linalg.norm(kept * readout, axis=-1)
    found = sequence_tasks.gradient_norms(params, config, row)[::-1]
    np.testing.assert_allclose(found, expected / expected[0], rtol=1e-5)


@pytest.mark.sampled
@pytest.mark.parametrize("cell", cells.CELLS)
def test_the_gradient_norms_equal_the_gradient_with_respect_to_an_initial_carry(cell, key):
    config, params, trials = draw_net(cell, key)
    norms = sequence_tasks.gradient_norms(params, config, trials)

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
    size = np.sqrt(sum(np.sum(np.square(slope)) / len(slope) for slope in slopes))
    assert norms.shape == (7,)
    readout = np.linalg.norm(params["readout"]["layers_0"]["kernel"])
    np.testing.assert_allclose(norms[3], size / readout, rtol=1e-4)
    assert norms[-1] == 1.0


@pytest.mark.parametrize("cell", ["lstm", "min_gru", "rg_lru"])
def test_the_gates_of_every_layer_are_spread_by_draws_of_their_own(cell, key):
    config = RecurrenceConfig(cell, num_layers=2, hidden_size=24)
    layers = sequence_tasks.init(key, config, TASKS["s3"], span=50)["recurrence"].values()
    spread = "decay_logit" if cell == "rg_lru" else "input_bias"
    first, second = (layer["forward"][spread] for layer in layers)
    assert (np.asarray(first) != np.asarray(second)).any()
