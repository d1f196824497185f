"""Law 2 over every cell and both directions: padding, resets, chunks, dropout, remat."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from tests import cell_cases
from tests.cell_cases import draw
from vla_jax.nn import cells, layers, recurrence
from vla_jax.nn.recurrence import RecurrenceConfig

B, T, D, H = 4, 7, 3, 5

KINDS = {
    "stacked": {"num_layers": 2},
    "both": {"bidirectional": True},
    "both-remat": {"bidirectional": True, "remat_chunk": 3},
}
LINEAR = {"both": {**KINDS["both"], "num_layers": 2}, "remat": KINDS["both-remat"]}
CONFIGS = {
    f"{cell}-{kind}": RecurrenceConfig(cell=cell, hidden_size=H, **fields)
    for cell in cells.CELLS
    for kind, fields in KINDS.items()
} | {
    f"{cell}-associative-{kind}": RecurrenceConfig(
        cell, hidden_size=H, implementation="associative", **fields
    )
    for cell, member in cells.CELLS.items()
    if member.coefficients is not None
    for kind, fields in LINEAR.items()
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
each_cell = pytest.mark.parametrize("cell", cells.CELLS)

apply = jax.jit(recurrence.apply, static_argnames="config")
step = jax.jit(recurrence.step, static_argnames="config")


def draw_carry(config, batch_size=B):
    return cell_cases.draw_carry(recurrence.zero_carry(config, jnp.zeros((batch_size, 1))))


def assert_close(one, other, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), one, other)


def tolerance(cell):
    """A chunk sums in another order than steps: law 3 allows it 1e-5, in units of a carry."""
    return 1e-6 if cells.CELLS[cell].chunk is None else 1e-5


def flags(*true_at):
    """Flags `[B, T]`, the same in all rows."""
    return np.tile(np.isin(np.arange(T), true_at), (B, 1))


@pytest.mark.sampled
@each_cell
@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_sequence_equals_single_steps_and_single_layers(cell, num_layers, key):
    config = RecurrenceConfig(cell=cell, num_layers=num_layers, hidden_size=H)
    params, inputs = recurrence.init(key, config, D), draw(0, B, T, D)
    last, outputs = apply(params, config, inputs)
    layer_inputs = inputs
    for name in params:
        carry, hidden = cells.CELLS[cell].zero_carry(inputs, H), []
        for t in range(T):
            carry, output = cells.step(
                cells.CELLS[cell], params[name]["forward"], carry, layer_inputs[:, t]
            )
            hidden.append(output)
        layer_inputs = jnp.stack(hidden, axis=1)
        assert_close(last[name]["forward"], carry)
    assert_close(outputs, layer_inputs)


@pytest.mark.sampled
@each_cell
@pytest.mark.parametrize("residual", [False, True])
def test_streamed_equals_windowed(cell, residual, key):
    config = RecurrenceConfig(cell=cell, num_layers=2, hidden_size=H, residual=residual)
    params, inputs, reset = recurrence.init(key, config, D), draw(0, B, T, D), flags(3)
    reset[1] = False
    carry = draw_carry(config)
    last, outputs = apply(params, config, inputs, reset=reset, carry=carry)
    for t in range(T):
        carry, output = step(params, config, carry, inputs[:, t], reset=reset[:, t])
        assert_close(output, outputs[:, t], tolerance(cell))
    assert_close(carry, last, tolerance(cell))


@pytest.mark.sampled
@each_cell
def test_many_carries_can_share_one_input(cell, key):
    """As in refresh streaming: carries `[B, S, H]`, inputs `[B, 1, D]`."""
    config = RecurrenceConfig(cell=cell, num_layers=2, hidden_size=H)
    params, inputs = recurrence.init(key, config, D), draw(0, B, D)
    carry = draw_carry(config)
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf], axis=1), carry)
    following, outputs = step(params, config, both, inputs[:, None])
    for slot in range(2):
        alone = jax.tree.map(lambda leaf, slot=slot: (1 + slot) * leaf, carry)
        expected = step(params, config, alone, inputs)
        taken = jax.tree.map(lambda leaf, slot=slot: leaf[:, slot], (following, outputs))
        assert_close(taken, expected)


@pytest.mark.sampled
@each_config
@pytest.mark.parametrize("padding", ["left", "right", "middle"])
def test_padding_equals_removing_the_steps(config, padding, key):
    params, inputs, carry = recurrence.init(key, config, D), draw(0, B, T, D), draw_carry(config)
    padded = {"left": [0, 1], "right": [T - 2, T - 1], "middle": [2, 4]}[padding]
    real = np.setdiff1d(np.arange(T), padded)
    last, outputs = apply(params, config, inputs, mask=~flags(*padded), carry=carry)
    cut_last, cut_outputs = apply(params, config, inputs[:, real], carry=carry)
    assert_close(last, cut_last)
    assert_close(outputs[:, real], cut_outputs)
    assert not outputs[:, padded].any()


@pytest.mark.sampled
@each_config
def test_masked_inputs_have_no_effect_and_no_gradient(config, key):
    params, inputs, mask = recurrence.init(key, config, D), draw(0, B, T, D), ~flags(0, 4)

    def total(params, inputs):
        last, outputs = apply(params, config, inputs, mask=mask)
        return sum(leaf.sum() for leaf in jax.tree.leaves((last, outputs)))

    by_params, by_inputs = jax.grad(total, (0, 1))(params, inputs)
    changed = jax.grad(total, (0, 1))(params, np.where(mask[..., None], inputs, 7.0))
    assert_close((by_params, by_inputs), changed, atol=1e-5)
    assert not by_inputs[~mask].any()
    assert by_inputs[mask].any(axis=-1).all()


@pytest.mark.sampled
@each_config
def test_a_fully_masked_sequence_returns_its_carry(config, key):
    params, carry = recurrence.init(key, config, D), draw_carry(config)
    last, outputs = apply(
        params, config, draw(0, B, T, D), mask=np.zeros((B, T), bool), carry=carry
    )
    assert_close(last, carry, atol=0)
    assert not outputs.any()


@pytest.mark.sampled
@each_config
def test_resets_equal_separate_episodes(config, key):
    params, inputs = recurrence.init(key, config, D), draw(0, B, T, D)
    _, outputs = apply(params, config, inputs, reset=flags(0, 2, 5))
    for start, stop in ((0, 2), (2, 5), (5, T)):
        _, episode = apply(params, config, inputs[:, start:stop])
        assert_close(outputs[:, start:stop], episode)


@pytest.mark.sampled
@each_cell
def test_a_reset_on_a_masked_step_applies(cell, key):
    config = RecurrenceConfig(cell=cell, hidden_size=H)
    params, inputs = recurrence.init(key, config, D), draw(0, B, T, D)
    _, outputs = apply(params, config, inputs, mask=~flags(3), reset=flags(3))
    _, episode = apply(params, config, inputs[:, 4:])
    assert_close(outputs[:, 4:], episode)


@pytest.mark.sampled
@each_cell
def test_rows_can_have_different_lengths(cell, key):
    config = RecurrenceConfig(cell=cell, hidden_size=H, bidirectional=True)
    params, inputs = recurrence.init(key, config, D), draw(0, B, T, D)
    lengths = [7, 5, 5, 0]
    mask = np.arange(T)[None] < np.array(lengths)[:, None]
    last, outputs = apply(params, config, inputs, mask=mask)
    for row, length in enumerate(lengths[:2]):
        expected = recurrence.apply(params, config, inputs[row : row + 1, :length])
        own = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], last)
        assert_close((own, outputs[row : row + 1, :length]), expected)


@pytest.mark.sampled
@each_cell
def test_the_backward_direction_equals_the_forward_one_on_the_reversed_sequence(cell, key):
    both = RecurrenceConfig(cell=cell, hidden_size=H, bidirectional=True)
    one = RecurrenceConfig(cell=cell, hidden_size=H)
    params, inputs = recurrence.init(key, both, D), draw(0, B, T, D)
    last, outputs = apply(params, both, inputs)
    backward = {"layers_0": {"forward": params["layers_0"]["backward"]}}
    reversed_last, reversed_outputs = apply(backward, one, inputs[:, ::-1])
    assert_close(outputs[..., H:], reversed_outputs[:, ::-1])
    assert_close(last["layers_0"]["backward"], reversed_last["layers_0"]["forward"])
    assert_close(outputs[..., :H], apply(params, one, inputs)[1])


@each_cell
def test_exchanging_directions_and_reversing_the_sequence_reverses_the_outputs(cell, key):
    """The two halves of the outputs are exchanged as well."""
    config = RecurrenceConfig(cell=cell, hidden_size=H, bidirectional=True)
    params, inputs = recurrence.init(key, config, D), draw(0, B, T, D)
    layer = params["layers_0"]
    exchanged = {"layers_0": {"forward": layer["backward"], "backward": layer["forward"]}}
    _, outputs = apply(params, config, inputs)
    _, other = apply(exchanged, config, inputs[:, ::-1])
    assert_close(np.roll(other[:, ::-1], H, axis=-1), outputs)


@pytest.mark.sampled
@each_cell
def test_two_halves_equal_the_whole_sequence(cell, key):
    config = RecurrenceConfig(cell=cell, num_layers=2, hidden_size=H)
    params, inputs = recurrence.init(key, config, D), draw(0, B, 6, D)
    carry, first = apply(params, config, inputs[:, :3])
    last, second = apply(params, config, inputs[:, 3:], carry=carry)
    assert_close((last, jnp.concatenate([first, second], 1)), apply(params, config, inputs))


STACKS = {
    "stack": ({"num_layers": 3, "residual": True, "dropout": 0.5}, 3),
    "both": ({"bidirectional": True}, 3),
    "longer than the sequence": ({}, 2**24),
}


@pytest.mark.sampled
@each_cell
@pytest.mark.parametrize(("kind", "remat_chunk"), STACKS.values(), ids=STACKS)
def test_remat_changes_neither_outputs_nor_gradients(cell, kind, remat_chunk, key):
    config = RecurrenceConfig(cell=cell, hidden_size=H, **kind)
    params, inputs = recurrence.init(key, config, D), draw(0, B, T, D)
    mask, reset = ~flags(0, 1), flags(4)

    def total(params, remat_chunk):
        chunked = dataclasses.replace(config, remat_chunk=remat_chunk)
        last, outputs = apply(params, chunked, inputs, mask=mask, reset=reset, key=key)
        return jnp.square(outputs).sum() + sum(leaf.sum() for leaf in jax.tree.leaves(last))

    plain, chunked = (jax.value_and_grad(total)(params, chunk) for chunk in (0, remat_chunk))
    # Exponential gates give gradients above 1000, which float32 holds to 1e-4 at best.
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
    assert_close(chunked, plain, atol=1e-5 * max(1.0, largest))


@pytest.mark.slow
def test_remat_takes_less_memory(key):
    inputs = jnp.zeros((8, 128, 16))

    def temporary_bytes(remat_chunk):
        config = RecurrenceConfig(num_layers=3, hidden_size=32, remat_chunk=remat_chunk)

        def total(params, inputs):
            return recurrence.apply(params, config, inputs)[1].sum()

        params = recurrence.init(key, config, 16)
        compiled = jax.jit(jax.grad(total)).lower(params, inputs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8) < 0.25 * temporary_bytes(0)


@pytest.mark.sampled
@each_config
def test_jit_and_vmap_change_nothing(config, key):
    params, inputs = recurrence.init(key, config, D), draw(0, B, T, D)
    expected = recurrence.apply(params, config, inputs)
    assert_close(apply(params, config, inputs), expected)
    last, outputs = jax.vmap(partial(recurrence.apply, params, config))(inputs[:, None])
    assert_close(outputs[:, 0], expected[1])
    assert_close(jax.tree.map(lambda leaf: leaf[:, 0], last), expected[0])


@pytest.mark.sampled
@each_cell
def test_no_training_calls_lapack(cell, key):
    """LAPACK's solution of triangular systems never returns if all threads of XLA are in it."""
    config = RecurrenceConfig(cell, hidden_size=H)
    params = recurrence.init(key, config, D)

    def total(params, inputs):
        return jnp.sum(recurrence.apply(params, config, inputs)[1])

    program = jax.jit(jax.grad(total)).lower(params, jnp.ones((B, T, D))).as_text()
    assert "dot_general" in program
    assert "lapack" not in program
    assert "triangular_solve" not in program


@pytest.mark.sampled
@each_cell
def test_bfloat16_products_keep_carries_and_outputs_in_float32(cell, key):
    half = RecurrenceConfig(cell=cell, hidden_size=H, dtype="bfloat16")
    full = RecurrenceConfig(cell=cell, hidden_size=H)
    params, inputs = recurrence.init(key, full, D), draw(0, B, T, D)
    coarse = apply(params, half, inputs.astype(jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(coarse)} == {jnp.dtype("float32")}
    assert_close(coarse, apply(params, full, inputs), atol=0.05)
    gradient = jax.grad(lambda p: apply(p, half, inputs)[1].sum())(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_residual_connection_adds_the_input_of_every_layer_above_the_first(bidirectional, key):
    config = RecurrenceConfig(num_layers=3, hidden_size=H, bidirectional=bidirectional)
    adding = dataclasses.replace(config, residual=True)
    params, mask = recurrence.init(key, config, 2 * H), ~flags(0, 4)
    carry, expected = draw_carry(config), draw(0, B, T, 2 * H)
    last, outputs = apply(params, adding, expected, mask=mask, carry=carry)
    alone = dataclasses.replace(config, num_layers=1)
    for layer, name in enumerate(params):
        one = {"layers_0": params[name]}
        own, above = apply(one, alone, expected, mask=mask, carry={"layers_0": carry[name]})
        expected = above if layer == 0 else expected + above
        assert_close(last[name], own["layers_0"])
    assert_close(outputs, expected)
    assert not outputs[~mask].any()


def test_dropout_does_not_apply_to_the_residual_connection(key):
    config = RecurrenceConfig(num_layers=2, hidden_size=H, residual=True, dropout=0.9)
    params, inputs = recurrence.init(key, config, D), draw(0, B, T, D)
    params["layers_1"] = jax.tree.map(jnp.zeros_like, params["layers_1"])  # outputs zeros
    first = apply(params, dataclasses.replace(config, num_layers=1), inputs)[1]
    assert_close(apply(params, config, inputs, key=key)[1], first, atol=0)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_acts_only_between_layers_and_only_with_a_key(bidirectional, key):
    config = RecurrenceConfig(num_layers=2, hidden_size=H, bidirectional=bidirectional)
    dropping = dataclasses.replace(config, dropout=0.5)
    params, inputs = recurrence.init(key, config, D), draw(0, B, T, D)
    _, plain = apply(params, config, inputs)
    assert_close(apply(params, dropping, inputs)[1], plain, atol=0)
    _, dropped = apply(params, dropping, inputs, key=key)
    assert np.abs(dropped - plain).max() > 1e-3
    assert dropped.all()  # no dropout after the last layer
    assert_close(apply(params, dropping, inputs, key=key)[1], dropped, atol=0)
    other = apply(params, dropping, inputs, key=jax.random.key(1))[1]
    assert np.abs(dropped - other).max() > 1e-3


@pytest.mark.sampled
@each_cell
def test_dropout_of_a_step_acts_only_between_layers_and_only_with_a_key(cell, key):
    config = RecurrenceConfig(cell, num_layers=2, hidden_size=H, dropout=0.5)
    params, inputs = recurrence.init(key, config, D), draw(0, B, D)
    carry = recurrence.zero_carry(config, inputs)
    without = recurrence.step(params, config, carry, inputs)
    assert_close(
        without, recurrence.step(params, dataclasses.replace(config, dropout=0.0), carry, inputs)
    )

    one = dataclasses.replace(config, num_layers=1)
    first, hidden = recurrence.step({"layers_0": params["layers_0"]}, one, carry, inputs)
    dropped = layers.dropout(jax.random.fold_in(key, 1), hidden, 0.5)
    above, below = ({"layers_0": tree["layers_1"]} for tree in (params, carry))
    second, expected = recurrence.step(above, one, below, dropped)
    last, outputs = recurrence.step(params, config, carry, inputs, key=key)
    assert_close(outputs, expected)
    assert_close(last, {**first, "layers_1": second["layers_0"]})
    assert np.abs(outputs - without[1]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_batch_equals_an_unsharded_one(axis_type, key):
    config = RecurrenceConfig(
        num_layers=2, hidden_size=H, bidirectional=True, dropout=0.5, remat_chunk=3
    )
    params, inputs, mask = recurrence.init(key, config, D), draw(0, B, T, D), ~flags(0, 1)
    expected = apply(params, config, inputs, mask=mask, key=key)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        rows, everywhere = PartitionSpec("data"), PartitionSpec()
        sharded, mask = jax.device_put((inputs, mask), rows)
        params, key = jax.device_put((params, key), everywhere)
        assert_close(apply(params, config, sharded, mask=mask, key=key), expected)


def test_params_and_carries_have_the_same_paths(key):
    config = RecurrenceConfig(num_layers=3, hidden_size=H, bidirectional=True)
    params, carry = recurrence.init(key, config, D), recurrence.zero_carry(config, jnp.ones((B, T)))
    assert {name: set(layer) for name, layer in params.items()} == {
        name: set(layer) for name, layer in carry.items()
    }
    assert params["layers_0"]["backward"]["input_kernel"].shape == (D, 4 * H)
    assert params["layers_2"]["forward"]["input_kernel"].shape == (2 * H, 4 * H)
    assert recurrence.output_size(config) == 2 * H
    assert carry["layers_2"]["backward"].cell.shape == (B, H)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"cell": "lstmm"}, "unknown cell 'lstmm'; .* Did you mean 'lstm'"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"remat_chunk": -1}, "remat_chunk must be .* got -1"),
        ({"dtype": "float16"}, "unknown dtype 'float16'; choose from float32, bfloat16"),
        (
            {"cell": "gru", "implementation": "associative"},
            "implementation='associative' needs a cell that is linear in its carry, .* 'min_gru'",
        ),
        ({"implementation": "bpt"}, "unknown implementation .bpt.; .* Did you mean .bptt."),
    ],
)
def test_a_wrong_config_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        RecurrenceConfig(**fields)


def test_a_bidirectional_recurrence_cannot_be_stepped(key):
    config = RecurrenceConfig(hidden_size=H, bidirectional=True)
    params, carry = recurrence.init(key, config, D), recurrence.zero_carry(config, jnp.ones((B, D)))
    with pytest.raises(ValueError, match=r"step needs bidirectional=False, got True: .* future"):
        recurrence.step(params, config, carry, draw(0, B, D))


@pytest.mark.parametrize(
    "wrong",
    [
        {"inputs": np.zeros((B, T, D + 1), np.float32)},
        {"inputs": np.zeros((B, D), np.float32)},
        {"mask": np.ones((B, T + 1), bool)},
        {"mask": np.ones((B, T), np.float32)},
        {"reset": np.ones((B,), bool)},
    ],
)
def test_wrong_shapes_are_refused(wrong, key):
    config = RecurrenceConfig(hidden_size=H)
    params = recurrence.init(key, config, D)
    arguments = {"inputs": np.zeros((B, T, D), np.float32), **wrong}
    with pytest.raises(AssertionError, match=r"assert_(shape|type)"):
        recurrence.apply(params, config, **arguments)


@pytest.mark.slow
def test_a_carry_of_another_batch_size_is_refused(key):
    config = RecurrenceConfig(hidden_size=H)
    params, carry = recurrence.init(key, config, D), draw_carry(config, batch_size=B + 1)
    with pytest.raises(AssertionError, match="assert_tree_shape_prefix"):
        recurrence.apply(params, config, draw(0, B, T, D), carry=carry)
