"""Residual blocks: equations, and the laws of sequences over blocks and cells."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cell_cases import draw, draw_carry
from vla_jax.nn import layers, recurrence, residual_blocks
from vla_jax.nn.cells import CELLS
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.nn.residual_blocks import BLOCKS, StackConfig
from vla_jax.policies import decoders
from vla_jax.policies.decoder_config import DecoderConfig

B, T, D, H = 3, 6, 3, 4
each_block = pytest.mark.parametrize("block", [name for name in BLOCKS if name != "none"])
each_cell = pytest.mark.parametrize("cell", CELLS)

apply = jax.jit(residual_blocks.apply, static_argnames="config")
step = jax.jit(residual_blocks.step, static_argnames="config")


def make_config(block, cell="gru", num_layers=2, **fields):
    return StackConfig(RecurrenceConfig(cell, num_layers, H, **fields), block, 1.5)


def assert_close(one, other, atol=3e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), one, other)


def normalise(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def dense(params, x):
    return x @ np.asarray(params["kernel"]) + np.asarray(params["bias"])


@each_block
def test_a_block_has_the_equations_of_the_module(block, key):
    """With norms of scale 1 and offset 0, as at the start."""
    config = make_config(block, num_layers=1)
    params, inputs = residual_blocks.init(key, config, D), draw(0, B, T, D)
    own = params["blocks_0"]
    x = dense(params["input"], inputs)
    y = normalise(x)
    units = {"mlp": H, "gated": 6}[block]
    cell = RecurrenceConfig("gru", 1, units)
    hidden = np.asarray(recurrence.apply(own["recurrence"], cell, y)[1])
    if block == "mlp":
        x = x + dense(own["output"], hidden)
        z = normalise(x)
        wide = np.asarray(jax.nn.gelu(dense(own["gate"], z))) * dense(own["up"], z)
        assert wide.shape[-1] == 6
        x = x + dense(own["down"], wide)
    else:
        gate = np.asarray(jax.nn.silu(dense(own["gate"], y)))
        x = x + dense(own["down"], normalise(hidden) * gate)
    assert_close(apply(params, config, inputs)[1], normalise(x))


@pytest.mark.sampled
@each_block
@each_cell
def test_streamed_equals_windowed_with_resets_and_a_carry(cell, block, key):
    config = make_config(block, cell)
    params, inputs = residual_blocks.init(key, config, D), draw(0, B, T, D)
    reset = np.tile(np.arange(T) == 3, (B, 1))
    reset[1] = False
    carry = draw_carry(residual_blocks.zero_carry(config, inputs))
    last, outputs = apply(params, config, inputs, reset=reset, carry=carry)
    for t in range(T):
        carry, output = step(params, config, carry, inputs[:, t], reset=reset[:, t])
        assert_close(output, outputs[:, t], atol=1e-5)
    assert_close(carry, last, atol=1e-5)


@pytest.mark.sampled
@each_block
@each_cell
def test_padding_equals_removing_the_steps_even_if_it_is_nan(cell, block, key):
    config = make_config(block, cell)
    params, inputs = residual_blocks.init(key, config, D), draw(0, B, T, D)
    mask = np.tile(np.isin(np.arange(T), (0, 1, 4)), (B, 1))
    padded = np.where(mask[..., None], inputs, np.nan)

    def total(params, inputs, mask):
        last, outputs = residual_blocks.apply(params, config, inputs, mask=mask)
        return jnp.sum(jnp.sin(outputs)), (last, outputs)

    run = jax.jit(jax.grad(total, has_aux=True))
    gradient, (last, outputs) = run(params, padded, mask)
    expected, (cut_last, cut_outputs) = run(params, inputs[:, [0, 1, 4]], None)
    assert_close(last, cut_last, atol=1e-5)
    assert_close(outputs[:, [0, 1, 4]], cut_outputs, atol=1e-5)
    assert not outputs[:, [2, 3, 5]].any()
    assert_close(gradient, expected, atol=1e-4)


@pytest.mark.sampled
@each_block
def test_remat_changes_nothing_and_dropout_needs_a_key(block, key):
    config = make_config(block, dropout=0.5)
    params, inputs = residual_blocks.init(key, config, D), draw(0, B, T, D)
    chunked = make_config(block, dropout=0.5, remat_chunk=4)

    def total(params, config):
        return jnp.sum(jnp.sin(residual_blocks.apply(params, config, inputs, key=key)[1]))

    gradients = (jax.grad(total)(params, each) for each in (config, chunked))
    assert_close(*gradients, atol=2e-5)  # up to 4.3; 1.1e-5 apart with jaxlib 0.10.0
    plain = apply(params, config, inputs)[1]
    assert_close(plain, apply(params, make_config(block), inputs)[1], atol=0)
    assert np.abs(apply(params, config, inputs, key=key)[1] - plain).max() > 1e-2


@each_block
def test_dropout_of_a_step_is_that_of_a_sequence_of_one_step(block, key):
    config = make_config(block, dropout=0.5)
    params, inputs = residual_blocks.init(key, config, D), draw(0, B, D)
    carry = residual_blocks.zero_carry(config, inputs)
    expected = residual_blocks.apply(params, config, inputs[:, None], key=key)[1][:, 0]
    assert_close(residual_blocks.step(params, config, carry, inputs, key=key)[1], expected)
    plain = residual_blocks.step(params, config, carry, inputs)[1]
    assert np.abs(plain - expected).max() > 1e-2


@pytest.mark.sampled
@pytest.mark.parametrize("num_layers", [1, 12])
@each_block
def test_many_blocks_pass_a_gradient_to_the_inputs(block, num_layers, key):
    config = make_config(block, "min_gru", num_layers)
    params, inputs = residual_blocks.init(key, config, D), draw(0, B, T, D)
    assert len([name for name in params if name.startswith("blocks_")]) == num_layers

    def total(inputs):
        return jnp.sum(jnp.sin(residual_blocks.apply(params, config, inputs)[1][:, -1]))

    sizes = np.abs(jax.jit(jax.grad(total))(inputs)).max((0, 2))
    assert np.isfinite(sizes).all()
    assert sizes.min() > 1e-4


def test_without_blocks_a_stack_is_the_recurrence(key):
    config = make_config("none")
    params = residual_blocks.init(key, config, D)
    assert_close(params, recurrence.init(key, config.recurrence, D), atol=0)
    inputs = draw(0, B, T, D)
    expected = jax.jit(recurrence.apply, static_argnums=1)(params, config.recurrence, inputs)
    assert_close(apply(params, config, inputs), expected, atol=0)


@each_block
def test_bfloat16_keeps_carry_and_outputs_in_float32(block, key):
    config = make_config(block)
    half = dataclasses.replace(
        config, recurrence=dataclasses.replace(config.recurrence, dtype="bfloat16")
    )
    params, inputs = residual_blocks.init(key, config, D), draw(0, B, T, D)
    coarse = apply(params, half, inputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(coarse)} == {jnp.dtype("float32")}
    assert_close(coarse, apply(params, config, inputs), atol=0.1)


@pytest.mark.sampled
@each_block
@pytest.mark.parametrize("mode", ["refresh", "periodic", "persistent"])
@each_cell
def test_a_decoder_of_blocks_streams_as_in_training(cell, mode, block, key):
    config = DecoderConfig(
        kind=cell, token_dim=D, window_size=3, action_horizon=2, hidden_size=H, num_layers=2,
        block=block, head_sizes=(8,), num_heads=2,
    )  # fmt: skip
    params = decoders.init(key, config)
    tokens = draw(0, B, T, 1, D)
    state = decoders.init_stream(params, config, B, mode=mode)
    advance, whole = (jax.jit(f, static_argnums=1) for f in (decoders.step, decoders.apply))
    first = {"refresh": lambda t: max(0, t - 2), "periodic": lambda t: t - t % 3}
    for t in range(T):
        state, chunk = advance(params, config, state, tokens[:, t])
        start = first.get(mode, lambda t: 0)(t)
        mask = np.tile(np.arange(T) >= T - 1 - t + start, (B, 1))
        window = np.concatenate([tokens[:, t + 1 :], tokens[:, : t + 1]], axis=1)
        expected = whole(params, config, window, timestep_mask=mask)
        np.testing.assert_allclose(chunk.arm, expected.arm[:, -1], atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_gate_span_spreads_the_gates_of_every_layer_differently(block, key):
    config = make_config(block, "lstm")
    plain, spread = (
        residual_blocks.init(key, each, D)
        for each in (config, dataclasses.replace(config, gate_span=50))
    )
    path = "input_bias"
    biases = {
        jax.tree_util.keystr(where): leaf
        for where, leaf in jax.tree_util.tree_leaves_with_path(spread)
        if path in jax.tree_util.keystr(where)
    }
    first, second = biases.values()
    gates = [np.split(np.asarray(leaf), 4) for leaf in (first, second)]
    for i, f, _, _ in gates:
        np.testing.assert_array_equal(i, -f)
        assert ((f >= 0) & (f < np.log(49))).all()
    assert not np.allclose(gates[0][1], gates[1][1])
    same = jax.tree.map(np.array_equal, plain, spread)
    changed = [
        jax.tree_util.keystr(where)
        for where, equal in jax.tree_util.tree_leaves_with_path(same)
        if not equal
    ]
    assert changed == list(biases)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"block": "mpl"}, "unknown block 'mpl'; .* Did you mean 'mlp'"),
        ({"expansion": 0.0}, "expansion must be above 0, got 0.0"),
        ({"gate_span": 2}, "gate_span must be above 2 steps, or 0 for none, got 2"),
        (
            {"block": "mlp", "recurrence": RecurrenceConfig(bidirectional=True)},
            "bidirectional must be False with block 'mlp'",
        ),
        (
            {"block": "gated", "recurrence": RecurrenceConfig(residual=True)},
            "residual must be False with block 'gated'",
        ),
    ],
)
def test_a_wrong_config_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        StackConfig(**fields)


def test_the_first_layer_has_the_width_of_the_stack(key):
    params = residual_blocks.init(key, make_config("gated"), D)
    assert params["input"]["kernel"].shape == (D, H)
    assert params["blocks_0"]["down"]["kernel"].shape == (6, H)
    assert layers.dense(draw(0, B, D), **params["input"]).shape == (B, H)
