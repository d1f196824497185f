"""The cells compared with NumPy equations and Flax's cells; properties of a step."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads

from tests import cell_cases
from tests.cell_cases import draw
from vla_jax.nn import cells

B, D, H, T = 4, 3, 5, 6

# Of the cells that normalise a sum of H products, whose errors add up.
TOLERANCE = {"m_lstm": 5e-6, "gated_delta_net": 5e-6, "mamba2": 5e-6}
LINEAR = {name: cell for name, cell in cells.CELLS.items() if cell.coefficients is not None}
each_cell = pytest.mark.parametrize("cell", cells.CELLS.values(), ids=cells.CELLS)


def draw_carry(cell):
    return cell_cases.draw_carry(cell.zero_carry(jnp.zeros((B, 1)), H))


def draw_params(cell, input_size=D):
    """Params as from `init`, with gains that differ from one."""
    params = cell.init(jax.random.key(0), input_size, H)
    drawn = {name: leaf + draw(7, *leaf.shape) for name, leaf in cells.extra_params(params).items()}
    return {**params, **drawn}


def assert_close(one, other, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), one, other)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def normalise(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def step_in_numpy(name, params, carry, inputs):
    """Returns the carry and the outputs of a step, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = inputs @ params["input_kernel"] + params["input_bias"]
    if name in MATRIX:
        return MATRIX[name](params, carry, x)
    carry = next_carry(name, params, carry, x)
    return carry, carry.hidden


def next_carry(name, params, carry, x):
    """Returns the next carry of a cell whose output is in it, from the product with the input."""
    if name == "min_gru":
        z, n = np.split(x, 2, axis=-1)
        return cells.MinGRUCarry((1 - sigmoid(z)) * carry.hidden + sigmoid(z) * n)
    if name == "min_lstm":
        i, f, g = np.split(x, 3, axis=-1)
        i, f = sigmoid(i), sigmoid(f)
        return cells.MinLSTMCarry(f / (f + i) * carry.hidden + i / (f + i) * g)
    if name == "rg_lru":
        r, i, u = np.split(x, 3, axis=-1)
        a = sigmoid(params["decay_logit"]) ** (8 * sigmoid(r))
        return cells.RGLRUCarry(a * carry.hidden + np.sqrt(1 - a**2) * sigmoid(i) * u)
    h = carry.hidden @ params["recurrent_kernel"] + params["recurrent_bias"]
    if name == "rnn":
        return cells.RNNCarry(np.tanh(x + h))
    if name == "s_lstm":
        i, f, g, o = np.split(x + h, 4, axis=-1)
        m = np.maximum(np.log(sigmoid(f)) + carry.stabiliser, i)
        admit, keep = np.exp(i - m), np.exp(np.log(sigmoid(f)) + carry.stabiliser - m)
        cell, weights = keep * carry.cell + admit * np.tanh(g), keep * carry.normaliser + admit
        return cells.SLSTMCarry(sigmoid(o) * cell / weights, cell, weights, m)
    if name == "lstm":
        i, f, g, o = np.split(x + h, 4, axis=-1)
        cell = sigmoid(f) * carry.cell + sigmoid(i) * np.tanh(g)
        return cells.LSTMCarry(sigmoid(o) * np.tanh(cell), cell)
    if name == "layer_norm_lstm":
        x, h = params["input_scale"] * normalise(x), params["recurrent_scale"] * normalise(h)
        i, f, g, o = np.split(x + h + params["gate_bias"], 4, axis=-1)
        cell = sigmoid(f) * carry.cell + sigmoid(i) * np.tanh(g)
        shown = params["cell_scale"] * normalise(cell) + params["cell_bias"]
        return cells.LSTMCarry(sigmoid(o) * np.tanh(shown), cell)
    (xr, xz, xn), (hr, hz, hn) = np.split(x, 3, axis=-1), np.split(h, 3, axis=-1)
    z, n = sigmoid(xz + hz), np.tanh(xn + sigmoid(xr + hr) * hn)
    return cells.GRUCarry((1 - z) * n + z * carry.hidden)


def silu(x):
    return x * sigmoid(x)


def convolve(params, recent, inputs):
    window = np.concatenate([recent, inputs[:, None]], axis=1)
    return window[:, 1:], (window * params["conv_weights"]).sum(1)


def m_lstm_in_numpy(params, carry, x):
    """xLSTM (arXiv:2405.04517), equations 19–27; one head, E = H."""
    q, k, v, o = np.split(x[:, :-2], 4, axis=-1)
    i, f, k = x[:, -2:-1], sigmoid(x[:, -1:]), k / np.sqrt(H)
    m = np.maximum(np.log(f) + carry.stabiliser, i)
    keep, admit = f * np.exp(carry.stabiliser - m), np.exp(i - m)
    memory = keep[..., None] * carry.memory[:, 0] + (admit * v)[:, :, None] * k[:, None]
    weights = keep * carry.normaliser[:, 0] + admit * k
    scale = np.maximum(np.abs((weights * q).sum(-1, keepdims=True)), np.exp(-m))
    read = np.einsum("bvk,bk->bv", memory, q) / scale
    outputs = sigmoid(o) * normalise(read) * params["norm_scale"]
    return cells.MLSTMCarry(memory[:, None], weights[:, None], m), outputs


def gated_delta_net_in_numpy(params, carry, x):
    """Gated DeltaNet (arXiv:2412.06464), equation 10; one head, E = H."""
    recent, mixed = convolve(params, carry.recent, x[:, : 3 * H])
    q, k, v = np.split(silu(mixed), 3, axis=-1)
    q, k = (part / np.sqrt((part**2).sum(-1, keepdims=True) + 1e-6) for part in (q, k))
    strength = 2 * sigmoid(x[:, -2])[:, None, None]
    decay = np.exp(-np.exp(params["log_rate"]) * np.log1p(np.exp(x[:, -1:])))[..., None]
    reflection = np.eye(H) - strength * k[:, :, None] * k[:, None]
    memory = decay * carry.memory[:, 0] @ reflection + strength * v[:, :, None] * k[:, None]
    read = np.einsum("bvk,bk->bv", memory, q)
    read /= np.sqrt((read**2).mean(-1, keepdims=True) + 1e-5)
    outputs = read * params["norm_scale"] * silu(x[:, 3 * H : 4 * H])
    return cells.GatedDeltaNetCarry(memory[:, None], recent), outputs


def mamba2_in_numpy(params, carry, x):
    """Mamba-2 (arXiv:2405.21060), sections 6 and 7.1; one head, E = H."""
    recent, mixed = convolve(params, carry.recent, x[:, H : 4 * H])
    values, keys, queries = np.split(silu(mixed + params["conv_bias"]), 3, axis=-1)
    step = np.log1p(np.exp(x[:, -1:]))[..., None]
    decay = np.exp(-np.exp(params["log_rate"]) * step)
    memory = decay * carry.memory[:, 0] + step * values[:, :, None] * keys[:, None]
    read = np.einsum("bvk,bk->bv", memory, queries) + params["skip_scale"] * values
    read *= silu(x[:, :H])
    outputs = read / np.sqrt((read**2).mean(-1, keepdims=True) + 1e-5) * params["norm_scale"]
    return cells.Mamba2Carry(memory[:, None], recent), outputs


MATRIX = {
    "m_lstm": m_lstm_in_numpy,
    "gated_delta_net": gated_delta_net_in_numpy,
    "mamba2": mamba2_in_numpy,
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", cells.CELLS)
def test_a_step_equals_the_equations_in_numpy(name):
    cell, inputs = cells.CELLS[name], draw(9, B, D)
    params, carry = draw_params(cell), draw_carry(cell)
    expected = step_in_numpy(name, params, carry, inputs)
    assert_close(cells.step(cell, params, carry, inputs), expected, TOLERANCE.get(name, 1e-6))


def to_flax(name, params):
    """Our gates under Flax's names, with the two biases summed where Flax has one."""
    gates = {"rnn": [""], "lstm": "ifgo", "gru": "rzn"}[name]
    split = {leaf: np.split(np.asarray(x), len(gates), -1) for leaf, x in params.items()}
    flax_params = {}
    for index, gate in enumerate(gates):
        own = {leaf: parts[index] for leaf, parts in split.items()}
        both = own["input_bias"] + own["recurrent_bias"]
        flax_params[f"i{gate}"] = {"kernel": own["input_kernel"]}
        flax_params[f"h{gate}"] = {"kernel": own["recurrent_kernel"]}
        biased = "h" if name == "lstm" else "i"
        flax_params[biased + gate]["bias"] = both
        if gate == "n":
            flax_params["in"]["bias"] = own["input_bias"]
            flax_params["hn"]["bias"] = own["recurrent_bias"]
    return {"params": flax_params}


@pytest.mark.parametrize(
    ("name", "flax_cell"),
    [("rnn", nn.SimpleCell), ("lstm", nn.OptimizedLSTMCell), ("gru", nn.GRUCell)],
)
def test_a_step_equals_that_of_flax(name, flax_cell, key):
    cell, inputs = cells.CELLS[name], draw(9, B, D)
    params, carry = cell.init(key, D, H), draw_carry(cell)
    theirs = (carry.cell, carry.hidden) if name == "lstm" else carry.hidden
    _, expected = flax_cell(features=H).apply(to_flax(name, params), theirs, inputs)
    assert_close(cells.step(cell, params, carry, inputs)[1], expected)


@pytest.mark.sampled
@pytest.mark.parametrize("cell", [cell for name, cell in cells.CELLS.items() if name not in MATRIX])
def test_products_are_initialised_as_in_pytorch(cell, key):
    params = cell.init(key, D, 100)
    width = cell.num_gates * 100
    expected = {"input_kernel": (D, width), "input_bias": (width,)}
    if cell.coefficients is None:  # otherwise the gates do not depend on the carry
        expected |= {"recurrent_kernel": (100, width), "recurrent_bias": (width,)}
    drawn = {name: leaf for name, leaf in params.items() if name in cells.PRODUCT_PARAMS}
    assert {name: leaf.shape for name, leaf in drawn.items()} == expected
    for leaf in drawn.values():  # U(-0.1, 0.1) has a standard deviation of 0.1 / sqrt(3)
        assert np.abs(leaf).max() <= 0.1
        assert np.std(leaf) == pytest.approx(0.1 / np.sqrt(3), rel=0.15)
    assert len({leaf.tobytes() for leaf in map(np.asarray, drawn.values())}) == len(drawn)


def test_gains_start_at_one_and_offsets_at_zero(key):
    extra = cells.extra_params(cells.LAYER_NORM_LSTM.init(key, D, H))
    assert len(extra) == 5
    for path, leaf in extra.items():
        assert np.array_equal(leaf, np.full(leaf.shape, float(path.endswith("scale"))))


def test_the_decay_of_an_rg_lru_starts_as_in_griffin(key):
    """Section 2.4: σ(Λ)^c is uniform between 0.9 and 0.999, c = 8."""
    kept = sigmoid(np.asarray(cells.RG_LRU.init(key, D, 1000)["decay_logit"], np.float64)) ** 8
    assert kept.min() == pytest.approx(0.9, abs=1e-3)
    assert kept.max() == pytest.approx(0.999, abs=1e-3)
    assert kept.mean() == pytest.approx(0.9495, abs=3e-3)


def test_a_closed_gate_of_an_rg_lru_has_finite_derivatives():
    """σ(−200) is 0 in float32: a is 1, where the derivative of √(1 − a²) is infinite."""
    closed = jnp.array([-200.0, 0.5, 0.7])
    extra = {"decay_logit": jnp.ones(1)}

    def added(projected):
        return cells.RG_LRU.coefficients(extra, projected)[1][0]

    assert added(closed) == 0.0
    assert np.isfinite(jax.grad(added)(closed)).all()
    assert np.isfinite(jax.hessian(added)(closed)).all()


def test_the_stabiliser_of_an_slstm_cancels_out_in_its_outputs(key):
    """The scale of c and n is free: a carry scaled by exp(−s) with m + s is the same memory."""
    cell, inputs = cells.S_LSTM, draw(9, B, D)
    params, carry = cell.init(key, D, H), draw_carry(cells.S_LSTM)
    shift = draw(5, B, H)
    shifted = carry._replace(
        cell=carry.cell * np.exp(-shift),
        normaliser=carry.normaliser * np.exp(-shift),
        stabiliser=carry.stabiliser + shift,
    )
    ours, others = (cells.step(cell, params, each, inputs)[1] for each in (carry, shifted))
    assert_close(ours, others)


@pytest.mark.parametrize("size", [-300.0, 300.0])
def test_an_slstm_neither_overflows_nor_underflows(size, key):
    """Input gates of exp(±300) exceed float32; equal weights leave the mean of the inputs."""
    params = cells.S_LSTM.init(key, D, H)
    params = jax.tree.map(jnp.zeros_like, params)
    biases = jnp.concatenate([jnp.full(H, size), jnp.full(H, 50.0), jnp.zeros(H), jnp.zeros(H)])
    kernel = jnp.zeros((D, 4 * H)).at[0, 2 * H : 3 * H].set(1.0)
    params |= {"input_bias": biases, "input_kernel": kernel}
    inputs = draw(3, T, B, D)

    def total(inputs):
        outputs = run(cells.S_LSTM, params, inputs)
        return jnp.sum(outputs[-1]), outputs

    gradient, outputs = jax.grad(total, has_aux=True)(inputs)
    expected = 0.5 * np.tanh(inputs[..., 0]).mean(0)
    assert_close(outputs[-1], np.repeat(expected[:, None], H, axis=1))
    assert np.isfinite(gradient).all()
    assert np.abs(gradient[..., 0]).min() > 0


def test_layer_normalisation_removes_the_scale_of_each_product(key):
    """Equations 20–22: only the direction of a product counts; ε matters little at this scale."""
    cell, inputs = cells.LAYER_NORM_LSTM, draw(9, B, D)
    params, carry = cell.init(key, D, H), draw_carry(cell)
    larger = {
        path: 50.0 * leaf if path in cells.PRODUCT_PARAMS else leaf for path, leaf in params.items()
    }
    assert_close(
        cells.step(cell, larger, carry, inputs), cells.step(cell, params, carry, inputs), atol=1e-3
    )


@pytest.mark.parametrize("cell", LINEAR.values(), ids=LINEAR)
def test_the_coefficients_of_a_linear_cell_give_its_next_carry(cell, key):
    params, carry, inputs = cell.init(key, D, H), draw_carry(cell), draw(9, B, D)
    decay, added = cell.coefficients(cells.extra_params(params), cells.project(params, inputs))
    assert_close(decay * carry.hidden + added, cells.step(cell, params, carry, inputs)[1])
    assert ((decay > 0) & (decay < 1)).all()


@each_cell
def test_the_input_product_of_all_steps_can_be_computed_at_once(cell, key):
    params, inputs = cell.init(key, D, H), draw(9, B, T, D)
    carry = draw_carry(cell)
    projected = cells.project(params, inputs)
    for t in range(T):
        expected = cells.step(cell, params, carry, inputs[:, t])
        recurrent = cells.recur(params, carry)
        carry, outputs = cell.combine(cells.extra_params(params), carry, projected[:, t], recurrent)
        assert_close((carry, outputs), expected)


@pytest.mark.sampled
@each_cell
def test_jit_and_vmap_change_nothing(cell, key):
    params, carry, inputs = cell.init(key, D, H), draw_carry(cell), draw(9, B, D)
    expected = cells.step(cell, params, carry, inputs)
    assert_close(jax.jit(partial(cells.step, cell))(params, carry, inputs), expected)
    assert_close(jax.vmap(partial(cells.step, cell, params))(carry, inputs), expected)


@pytest.mark.sampled
@each_cell
def test_gradients_equal_finite_differences(cell):
    params, carry, inputs = draw_params(cell), draw_carry(cell), draw(9, B, D)
    check_grads(
        partial(cells.step, cell),
        (params, carry, inputs),
        order=1,
        modes=["rev"],
        rtol=2e-2,
        atol=1e-3,
    )


@each_cell
def test_bfloat16_products_keep_carry_and_outputs_in_float32(cell, key):
    params, carry, inputs = cell.init(key, D, H), draw_carry(cell), draw(9, B, D)
    half = cells.step(cell, params, carry, inputs.astype(jnp.bfloat16), dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("float32")}
    full = cells.step(cell, params, carry, inputs)
    assert_close(half, full, atol=0.03 if cell.has_vector_carry else 0.06)
    assert not np.array_equal(half[1], full[1])


@each_cell
def test_the_zero_carry_ignores_the_data_and_shares_no_buffers(cell):
    carry = cell.zero_carry(jnp.full((B, T, D), jnp.nan), H)
    for leaf in carry:
        assert leaf.shape[0] == B
        assert leaf.dtype == jnp.float32
        assert not leaf.any()
    assert carry[0].shape == ((B, H) if cell.has_vector_carry else (B, 1, H, H))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in carry]
    assert len(set(pointers)) == len(pointers)


def run(cell, params, inputs):
    """Outputs `[T, B, H]` of a scan over `inputs [T, B, D]` from zeros."""
    return jax.lax.scan(partial(cells.step, cell, params), cell.zero_carry(inputs[0], H), inputs)[1]


@pytest.mark.sampled
@each_cell
def test_a_scan_from_the_zero_carry_runs_on_a_sharded_batch(cell, key):
    params, inputs = cell.init(key, D, H), draw(9, T, B, D)
    expected = run(cell, params, inputs)
    spec, everywhere = PartitionSpec(None, "data"), PartitionSpec()
    for axis_type in (AxisType.Explicit, AxisType.Auto):
        mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
        with jax.set_mesh(mesh):
            sharded = jax.device_put(inputs, spec)
            replicated = jax.device_put(params, everywhere)
            assert_close(jax.jit(partial(run, cell))(replicated, sharded), expected)
    mapped = jax.shard_map(
        partial(run, cell), mesh=mesh, in_specs=(everywhere, spec), out_specs=spec
    )
    assert_close(jax.jit(mapped)(params, inputs), expected)
