"""Cells of Flax (Linen, NNX) and ours agree: outputs, carries, gradients, round trips of params."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from vla_jax import convert
from vla_jax.nn import cells, recurrence
from vla_jax.nn.recurrence import RecurrenceConfig

B, T, D, H = 3, 6, 4, 5
LENGTHS = np.array([6, 2, 4])
MASK = np.arange(T) < LENGTHS[:, None]

FLAX: dict[str, tuple[str, Any, Any]] = {  # id -> our cell, style, Flax's class
    "linen.LSTMCell": ("lstm", "linen", nn.LSTMCell),
    "linen.OptimizedLSTMCell": ("lstm", "linen", nn.OptimizedLSTMCell),
    "linen.GRUCell": ("gru", "linen", nn.GRUCell),
    "linen.SimpleCell": ("rnn", "linen", nn.SimpleCell),
    "nnx.LSTMCell": ("lstm", "nnx", nnx.LSTMCell),
    "nnx.OptimizedLSTMCell": ("lstm", "nnx_optimized", nnx.OptimizedLSTMCell),
    "nnx.GRUCell": ("gru", "nnx", nnx.GRUCell),
    "nnx.SimpleCell": ("rnn", "nnx", nnx.SimpleCell),
}
each_flax_cell = pytest.mark.parametrize(("cell", "style", "flax_cell"), FLAX.values(), ids=FLAX)

apply = jax.jit(recurrence.apply, static_argnames="config")


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def randomise(params, seed=0):
    """Random params of the same shapes, biases included, which Flax initialises to zero."""
    leaves, structure = jax.tree.flatten(params)
    return structure.unflatten([0.4 * draw(seed + n, *x.shape) for n, x in enumerate(leaves)])


def flax_params(flax_cell, style):
    if style == "linen":
        cell = flax_cell(H)
        carry = cell.initialize_carry(jax.random.key(0), (B, D))
        return randomise(cell.init(jax.random.key(0), carry, jnp.zeros((B, D)))["params"])
    return randomise(nnx.to_pure_dict(nnx.state(flax_cell(D, H, rngs=nnx.Rngs(0)), nnx.Param)))


def run_flax(flax_cell, style, params, inputs):
    """Runs Flax's loop over padded rows; outputs after the end of a row become zero."""
    if style == "linen":
        run = nn.RNN(flax_cell(H), return_carry=True)
        last, outputs = run.apply({"params": {"cell": params}}, inputs, seq_lengths=LENGTHS)
    else:
        cell = flax_cell(D, H, rngs=nnx.Rngs(0))
        nnx.update(cell, params)
        last, outputs = nnx.RNN(cell, return_carry=True)(inputs, seq_lengths=LENGTHS)
    return last, jnp.where(MASK[..., None], outputs, 0.0)


def run_ours(cell, params, inputs):
    stack = {"layers_0": {"forward": params}}
    config = RecurrenceConfig(cell, hidden_size=H)
    last, outputs = recurrence.apply(stack, config, inputs, mask=MASK)
    carry = last["layers_0"]["forward"]
    return (carry.cell, carry.hidden) if cell == "lstm" else carry.hidden, outputs


def assert_close(one, other):
    """Asserts agreement to 1e-6 · max(1, largest number of the array)."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(1.0, np.abs(b).max()))


def assert_same_bytes(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())


def with_gradients(run):
    """Returns gradients by params and inputs of a weighted sum of carry and outputs, and both."""

    def total(params, inputs):
        last, outputs = run(params, inputs)
        ends = sum((leaf * draw(8, B, H)).sum() for leaf in jax.tree.leaves(last))
        return (outputs * draw(9, B, T, H)).sum() + ends, (last, outputs)

    return jax.jit(jax.grad(total, (0, 1), has_aux=True))


@pytest.mark.sampled
@each_flax_cell
def test_outputs_carries_and_gradients_agree_with_flax(cell, style, flax_cell):
    theirs, inputs = flax_params(flax_cell, style), draw(7, B, T, D)
    name, ours = convert.from_flax(theirs)
    assert name == cell
    (by_params, by_inputs), results = with_gradients(lambda p, x: run_ours(cell, p, x))(
        ours, inputs
    )
    (by_theirs, expected_by_inputs), expected = with_gradients(
        lambda p, x: run_flax(flax_cell, style, p, x)
    )(theirs, inputs)
    assert_close(results, expected)
    assert_close(by_inputs, expected_by_inputs)
    _, expected_by_params = convert.from_flax(by_theirs)
    separate_bias = expected_by_params.pop("recurrent_bias")
    bias = by_params.pop("recurrent_bias")
    assert_close(by_params, expected_by_params)
    if (cell, style) == ("gru", "linen"):
        assert_close(bias[2 * H :], separate_bias[2 * H :])


@pytest.mark.sampled
@each_flax_cell
def test_our_params_in_flax_compute_the_same(cell, style, flax_cell, key):
    ours, inputs = cells.CELLS[cell].init(key, D, H), draw(7, B, T, D)
    if (cell, style) == ("gru", "nnx"):
        ours["recurrent_bias"] = ours["recurrent_bias"].at[2 * H :].set(0.0)
    theirs = convert.to_flax(cell, ours, style)
    results = jax.jit(lambda x: run_flax(flax_cell, style, theirs, x))(inputs)
    assert_close(results, run_ours(cell, ours, inputs))


@each_flax_cell
def test_a_round_trip_of_flax_params_preserves_bytes(cell, style, flax_cell):
    theirs = flax_params(flax_cell, style)
    for module in theirs.values():
        module["kernel"][0, 0] = -0.0
        if "bias" in module:
            module["bias"][:2] = -0.0, 0.0
    assert_same_bytes(convert.to_flax(*convert.from_flax(theirs), style), theirs)


@each_flax_cell
def test_a_round_trip_of_params_with_one_bias_preserves_bytes(cell, style, flax_cell):
    _, ours = convert.from_flax(flax_params(flax_cell, style))
    assert_same_bytes(convert.from_flax(convert.to_flax(cell, ours, style)), (cell, ours))


def test_nnx_states_are_accepted():
    cell = nnx.OptimizedLSTMCell(D, H, rngs=nnx.Rngs(0))
    name, params = convert.from_flax(nnx.state(cell, nnx.Param))
    assert name == "lstm"
    assert_same_bytes(params["input_kernel"], cell.dense_i.kernel[...])


def test_under_adam_the_sum_of_two_biases_moves_twice_as_far_as_one_bias():
    theirs, inputs = flax_params(nn.LSTMCell, "linen"), draw(7, B, T, D)

    def moved(run, params):
        (gradients, _), _ = with_gradients(run)(params, inputs)
        optimizer = optax.adam(1e-3)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        return updates

    _, one = convert.from_flax(moved(lambda p, x: run_flax(nn.LSTMCell, "linen", p, x), theirs))
    _, params = convert.from_flax(theirs)
    two = moved(lambda p, x: run_ours("lstm", p, x), params)
    both = two["input_bias"] + two["recurrent_bias"]
    np.testing.assert_allclose(both, 2 * one["input_bias"], rtol=1e-3)
    np.testing.assert_allclose(two["input_kernel"], one["input_kernel"], rtol=1e-3, atol=1e-6)


class Stack(nn.Module):
    """Two Flax layers, in one or both directions."""

    flax_cell: Any
    both: bool

    @nn.compact
    def __call__(self, inputs):
        for _ in range(2):
            run = nn.RNN(self.flax_cell(H))
            if self.both:
                run = nn.Bidirectional(run, nn.RNN(self.flax_cell(H)))
            inputs = run(inputs, seq_lengths=LENGTHS)
        return inputs


@pytest.mark.sampled
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("flax_cell", [nn.OptimizedLSTMCell, nn.GRUCell, nn.SimpleCell])
def test_a_flax_stack_becomes_a_recurrence(flax_cell, both, key):
    inputs, stack = draw(7, B, T, D), Stack(flax_cell, both)
    variables = randomise(stack.init(key, inputs))
    named = [variables["params"][f"{flax_cell.__name__}_{n}"] for n in range(4 if both else 2)]
    layers = [(named[0], named[1]), (named[2], named[3])] if both else named
    config, params = convert.from_flax_stack(layers)
    assert config == RecurrenceConfig(config.cell, 2, H, bidirectional=both)
    _, outputs = apply(params, config, inputs, mask=MASK)
    expected = jax.jit(stack.apply)(variables, inputs)
    assert_close(outputs, jnp.where(MASK[..., None], expected, 0.0))
    assert_same_bytes(convert.to_flax_stack(config, params), layers)


def test_an_nnx_stack_becomes_a_recurrence():
    sizes, rngs = (D, H), nnx.Rngs(0)
    layers = [nnx.RNN(nnx.LSTMCell(size, H, rngs=rngs)) for size in sizes]
    expected = inputs = draw(7, B, T, D)
    for layer in layers:
        expected = layer(expected)
    config, params = convert.from_flax_stack([nnx.state(x.cell, nnx.Param) for x in layers])
    assert_close(apply(params, config, inputs)[1], expected)


OTHER = {
    "nothing": {},
    "a dense layer": {"kernel": np.zeros((D, H), np.float32)},
    "variables": {"params": {"i": {"kernel": np.zeros((D, H), np.float32)}}},
    "a cell of MGU": {
        name: {"kernel": np.zeros((H, H), np.float32), "bias": np.zeros(H, np.float32)}
        for name in ("if", "in", "hf", "hn")
    },
    "another shape": {
        "i": {"kernel": np.zeros((D, H), np.float32), "bias": np.zeros(H + 1, np.float32)},
        "h": {"kernel": np.zeros((H, H), np.float32)},
    },
}


@pytest.mark.parametrize("other", OTHER)
def test_params_of_other_modules_raise_one_sentence(other):
    remedy = "give variables" if other == "variables" else "of an `nn.RNN`"
    with pytest.raises(ValueError, match=rf"those of one LSTMCell, .* got \d+ .*; {remedy}"):
        convert.from_flax(OTHER[other])


@each_flax_cell
def test_missing_extra_and_misshapen_tensors_are_named_for_the_most_similar_cell(
    cell, style, flax_cell
):
    params = flax_params(flax_cell, style)
    module = next(name for name in params if "bias" in params[name])
    bias = params[module].pop("bias")
    with pytest.raises(ValueError, match=rf"got 1 missing: {module}\.bias; of an"):
        convert.from_flax(params)
    params[module]["bias"] = np.append(bias, bias)
    with pytest.raises(ValueError, match=rf"got 1 of another shape: {module}\.bias \(expected"):
        convert.from_flax(params)
    params[module] |= {"bias": bias, "scale": bias}
    with pytest.raises(ValueError, match=rf"got 1 left over: {module}\.scale; of an"):
        convert.from_flax(params)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_becomes_float32_with_one_warning(dtype):
    half = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), flax_params(nn.SimpleCell, "linen"))
    with pytest.warns(UserWarning, match=f"3 tensors cast from {dtype} to float32"):
        name, params = convert.from_flax(half)
    assert_same_bytes(convert.to_flax(name, params), jax.tree.map(np.float32, half))


def test_double_precision_is_refused():
    params = jax.tree.map(np.float64, flax_params(nn.SimpleCell, "linen"))
    with pytest.raises(ValueError, match=r"\w\.kernel must be floating .* got float64; save it"):
        convert.from_flax(params)


@pytest.mark.parametrize(
    ("cell", "style", "sentence"),
    [
        ("lstmm", "linen", "unknown cell 'lstmm'; .* Did you mean 'lstm'"),
        ("min_gru", "linen", "unknown cell 'min_gru'; choose from gru, lstm, rnn"),
        ("gru", "nnx_optimized", "unknown style 'nnx_optimized' of gru; choose from linen, nnx"),
        ("gru", "nnx", "needs a recurrent bias of zero for gate n, .* choose style='linen'"),
    ],
)
def test_cells_that_flax_does_not_have_raise_one_sentence(cell, style, sentence, key):
    with pytest.raises(ValueError, match=sentence):
        convert.to_flax(cell, cells.GRU.init(key, D, H), style)


def linen_layers(*sizes, cell="rnn"):
    params = [cells.CELLS[cell].init(jax.random.key(0), one, other) for one, other in sizes]
    return [convert.to_flax(cell, own) for own in params]


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ([], "got no cell in"),
        (
            linen_layers((D, H)) + linen_layers((H, H), cell="gru"),
            "the same cell and .* got gru, rnn",
        ),
        ([linen_layers((D, H))[0], tuple(linen_layers((H, H), (H, H)))], r"in \[1, 2\] directions"),
        (linen_layers((D, H), (D, H)), r"layers_1/forward/input_kernel \(expected \[5, 5\], got"),
        (linen_layers((D, H), (H, D)), r"layers_1/forward.* got \[4, 4\]\).*; give all"),
    ],
)
def test_layers_that_do_not_match_raise_one_sentence(layers, sentence):
    with pytest.raises(ValueError, match=sentence):
        convert.from_flax_stack(layers)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"cell": "gru", "num_layers": 1}, "4 left over: layers_1/forward/input_kernel"),
        ({"cell": "gru", "num_layers": 3}, "4 missing: layers_2/forward/input_bias"),
        ({"cell": "lstm"}, r"layers_0/forward/input_kernel \(expected \[4, 20\], got"),
    ],
)
def test_a_stack_of_another_config_raises_one_sentence(fields, sentence, key):
    params = recurrence.init(key, RecurrenceConfig("gru", 2, H), D)
    with pytest.raises(ValueError, match=sentence):
        convert.to_flax_stack(
            RecurrenceConfig(**{"hidden_size": H, "num_layers": 2, **fields}), params
        )


def test_an_empty_stack_or_swapped_arguments_raise_one_sentence(key):
    config = RecurrenceConfig("gru", 1, H)
    with pytest.raises(ValueError, match="one recurrence, got 4 missing: layers_0/forward/input_b"):
        convert.to_flax_stack(config, {})
    with pytest.raises(ValueError, match="config must be a RecurrenceConfig, got a dict"):
        convert.to_flax_stack({}, config)  # pyright: ignore[reportArgumentType]


def test_params_of_another_cell_raise_one_sentence(key):
    params = cells.GRU.init(key, D, 4)  # 3 · 4 columns can be split into four as well
    with pytest.raises(
        ValueError, match=r"one cell 'lstm', got 4 of another shape: input_kernel .*; for"
    ):
        convert.to_flax("lstm", params)


def test_the_documented_example_runs():
    """docs: From torch.nn and Flax."""
    inputs, key = jnp.asarray(draw(7, B, T, D)), jax.random.key(0)
    model = nn.RNN(nn.OptimizedLSTMCell(H))
    variables = model.init(key, inputs)

    config, params = convert.from_flax_stack([variables["params"]["cell"]])
    carry, outputs = recurrence.apply(params, config, inputs)
    variables = {"params": {"cell": convert.to_flax_stack(config, params)[0]}}

    assert_close(outputs, model.apply(variables, inputs))

    cell = nnx.OptimizedLSTMCell(D, H, rngs=nnx.Rngs(0))
    name, params = convert.from_flax(nnx.state(cell, nnx.Param))
    nnx.update(cell, convert.to_flax(name, params, "nnx_optimized"))

    carry = cells.CELLS[name].zero_carry(inputs, H)
    _, outputs = cells.step(cells.CELLS[name], params, carry, inputs[:, 0])
    assert_close(outputs, cell((carry.cell, carry.hidden), inputs[:, 0])[1])
