"""Cells with matrices as their carry: against the original code, and chunkwise = step by step.

`golden/matrix_cells/matrix_cells.npz` holds outputs, carries and gradients of the recurrences of
xlstm 2.0.6, fla-core 0.6.0 and state-spaces/mamba at e9594ce1c732, written by
`golden/matrix_cells/make_matrix_cells.py`.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from tests.cell_cases import draw, draw_carry
from vla_jax.nn import bptt, cells, chrono, chunkwise, recurrence
from vla_jax.nn.cells import chunks
from vla_jax.nn.recurrence import RecurrenceConfig

B, T, D, M, H, C = 4, 11, 3, 2, 6, 4  # T is no multiple of the size C of a chunk
MATRIX = {
    name: cells.get(name, num_heads=M)
    for name, cell in cells.CELLS.items()
    if cell.chunk is not None
}
WITHOUT_CONVOLUTION = {
    f"{name}-1": cells.get(name, num_heads=M, conv_size=1) for name in ("gated_delta_net", "mamba2")
}
FLAGS = {"whole": (), "mask": ("mask",), "reset": ("reset",), "mask-reset": ("mask", "reset")}
each_cell = pytest.mark.parametrize("name", MATRIX)
each_scan = pytest.mark.parametrize("scan", [chunkwise.scan, bptt.plain_scan])


def assert_close(one, other, tolerance=1e-5):
    def compare(a, b):
        atol = tolerance * max(1.0, np.abs(b).max(initial=0.0))
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)

    jax.tree.map(compare, one, other)


def draw_case(cell, seed=0):
    """Returns params with gains and biases that differ, a carry, and inputs `[T, B, D]`."""
    params = cell.init(jax.random.key(seed), D, H)
    params |= {
        path: leaf + draw(7, *leaf.shape) / 4 for path, leaf in cells.extra_params(params).items()
    }
    params["input_bias"] += draw(8, *params["input_bias"].shape) / 2
    return params, draw_carry(cell.zero_carry(jnp.zeros((B, 1)), H)), 2 * draw(9, T, B, D)


def draw_flags(names):
    random = np.random.default_rng(5)
    flags = {flag: random.uniform(size=(T, B)) < 0.6 for flag in names}
    for flag in flags:
        flags[flag][:, 0] = flag == "mask"  # one row has neither padding nor resets
    return flags


def total(scan, cell, params, carry, inputs, **options):
    """Weighs every output and carry differently, so that no two errors cancel out."""
    results = scan(cell, params, carry, cells.project(params, inputs), **options)
    terms = jax.tree.map(lambda leaf: jnp.sum(jnp.sin(leaf) * draw(3, *leaf.shape)), results)
    return sum(jax.tree.leaves(terms)), results


def gradients(scan, cell, *arguments, **options):
    run = partial(total, scan, cell, **options)
    return jax.jit(jax.grad(run, (0, 1, 2), has_aux=True))(*arguments)


@pytest.fixture(scope="module")
def stored(golden):
    with np.load(golden / "matrix_cells" / "matrix_cells.npz") as arrays:
        return dict(arrays)


def part(stored, name, kind):
    prefix = f"{name}.{kind}."
    return {path[len(prefix) :]: x for path, x in stored.items() if path.startswith(prefix)}


@pytest.mark.sampled
@each_cell
@each_scan
def test_outputs_carry_and_gradients_equal_those_of_the_original(scan, name, stored):
    cell, leaves = cells.CELLS[name], part(stored, name, "in")
    carry_type = type(cell.zero_carry(jnp.zeros((1, 1)), H))
    fields = [field for field in carry_type._fields if field in leaves]
    options = {"chunk_size": 5} if scan is chunkwise.scan else {}

    def run(leaves):
        carry = carry_type(**{field: leaves[field] for field in fields})
        projected = jnp.swapaxes(leaves["projected"], 0, 1)
        extra = {path: leaf for path, leaf in leaves.items() if path not in ("projected", *fields)}
        last, outputs = scan(cell, extra, carry, projected, **options)
        results = {**last._asdict(), "outputs": jnp.swapaxes(outputs, 0, 1)}
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in results.values()), results

    slopes, results = jax.jit(jax.grad(run, has_aux=True))(leaves)
    assert_close(results.pop("outputs"), stored[f"{name}.outputs"])
    assert_close(results, part(stored, name, "last"))
    assert_close(slopes, part(stored, name, "slope"), 2e-5)


@each_scan
def test_an_mlstm_from_zeros_equals_the_parallel_form_of_xlstm(scan, stored):
    leaves = part(stored, "m_lstm", "in")
    projected = jnp.swapaxes(leaves["projected"], 0, 1)
    cell = cells.get("m_lstm", num_heads=3)
    carry = cell.zero_carry(leaves["projected"], 12)
    outputs = scan(cell, {"norm_scale": leaves["norm_scale"]}, carry, projected)[1]
    assert_close(jnp.swapaxes(outputs, 0, 1), stored["m_lstm.from_zeros"])


@pytest.mark.sampled
@pytest.mark.parametrize("cell", [*MATRIX.values(), *WITHOUT_CONVOLUTION.values()],
                         ids=[*MATRIX, *WITHOUT_CONVOLUTION])  # fmt: skip
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("flag_names", FLAGS.values(), ids=FLAGS)
def test_outputs_carry_and_gradients_equal_those_of_the_loop(cell, flag_names, reverse):
    options = {**draw_flags(flag_names), "reverse": reverse}
    arguments = draw_case(cell)
    by_chunks = gradients(chunkwise.scan, cell, *arguments, chunk_size=C, **options)
    by_steps = gradients(bptt.plain_scan, cell, *arguments, **options)
    assert_close(by_chunks, by_steps)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(by_steps))


@pytest.mark.sampled
@each_cell
@pytest.mark.parametrize("chunk_size", [1, T, 64])
def test_the_size_of_a_chunk_makes_no_difference(name, chunk_size):
    params, carry, inputs = draw_case(MATRIX[name])
    options = draw_flags(FLAGS["mask-reset"])
    results = [
        jax.jit(partial(total, chunkwise.scan, MATRIX[name], **options, chunk_size=size))(
            params, carry, inputs
        )[1]
        for size in (chunk_size, C)
    ]
    assert_close(*results)


@pytest.mark.slow
@each_cell
def test_a_long_sequence_of_strong_inputs_equals_the_loop(name):
    """300 steps, three chunks and a part of one, with gates from open to closed."""
    cell = MATRIX[name]
    params, carry, _ = draw_case(cell)
    inputs = 5 * draw(9, 300, B, D)
    results = [
        jax.jit(partial(total, scan, cell))(params, carry, inputs)[1]
        for scan in (chunkwise.scan, bptt.plain_scan)
    ]
    # The exponential gates of mLSTM amplify rounding: 3e-5 of the greatest output at this strength,
    # below 1e-5 with the inputs of the other tests.
    assert_close(*results, tolerance=5e-5 if name == "m_lstm" else 1e-5)


@pytest.mark.sampled
@each_cell
def test_vmap_equals_a_loop(name):
    params, carry, inputs = draw_case(MATRIX[name])
    options = draw_flags(FLAGS["mask-reset"])

    def gradient(inputs):
        run = partial(total, chunkwise.scan, MATRIX[name], params, carry, chunk_size=C, **options)
        return jax.grad(run, has_aux=True)(inputs)[0]

    stacked = np.stack([inputs, -inputs])
    expected = np.stack([jax.jit(gradient)(each) for each in stacked])
    assert_close(jax.jit(jax.vmap(gradient))(stacked), expected)


@pytest.mark.slow
@pytest.mark.sampled
@each_cell
def test_many_devices_equal_one(name):
    """In `shard_map`, and with an explicit mesh; outputs and gradients."""
    cell, flags = MATRIX[name], draw_flags(FLAGS["mask-reset"])
    params, carry, inputs = draw_case(cell)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows, steps, everywhere = PartitionSpec("data"), PartitionSpec(None, "data"), PartitionSpec()

    def square(params, carry, inputs, mask, reset):
        projected = cells.project(params, inputs)
        options = {"mask": mask, "reset": reset, "chunk_size": C}
        return jnp.sum(chunkwise.scan(cell, params, carry, projected, **options)[1] ** 2)

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(everywhere, rows, steps, steps, steps),
        out_specs=(everywhere, steps),
    )
    def on_devices(params, carry, inputs, mask, reset):
        def local(params, inputs):
            return jax.lax.psum(square(params, carry, inputs, mask, reset), "data")

        return jax.grad(local, argnums=(0, 1))(params, inputs)

    arguments = (params, carry, inputs, flags["mask"], flags["reset"])
    expected = jax.jit(jax.grad(square, argnums=(0, 2)))(*arguments)
    assert_close(on_devices(*arguments), expected)
    explicit = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(explicit):
        placed = [
            jax.device_put(x, spec)
            for x, spec in zip(arguments, (everywhere, rows, steps, steps, steps), strict=True)
        ]
        sharded = jax.jit(square)(*placed)
    np.testing.assert_allclose(sharded, jax.jit(square)(*arguments), rtol=1e-5)


@pytest.mark.sampled
@each_cell
@each_scan
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "backward"])
def test_nan_passes_neither_a_reset_nor_to_earlier_steps(scan, name, reverse):
    cell = MATRIX[name]
    params, carry, inputs = draw_case(cell)
    damaged, first = inputs.copy(), 5
    order = np.arange(T)[::-1] if reverse else np.arange(T)
    damaged[order[3]], damaged[order[4]] = np.nan, np.inf
    reset = np.zeros((T, B), bool)
    reset[order[first]] = True
    options = {"reset": reset, "reverse": reverse}
    if scan is chunkwise.scan:
        options["chunk_size"] = 8  # the reset is inside a chunk
    weights = np.zeros((T, 1, 1), np.float32)
    weights[order[first:]] = 1.0

    @partial(jax.jit)
    @partial(jax.grad, has_aux=True)
    def run(inputs, carry):
        last, outputs = scan(cell, params, carry, cells.project(params, inputs), **options)
        kept = jnp.where(weights > 0, outputs, 0.0)
        return jnp.sum(jnp.sin(kept)) + jnp.sum(jnp.cos(last.memory)), (outputs, last)

    slopes, (outputs, last) = run(damaged, carry)
    expected_slopes, (expected, expected_last) = run(inputs, carry)
    episode = order[first:]
    assert_close((outputs[episode], last), (expected[episode], expected_last), 1e-6)
    assert_close(slopes[episode], expected_slopes[episode], 1e-6)
    assert_close(outputs[order[:3]], expected[order[:3]], 1e-6)
    assert np.isnan(outputs[order[3:first]]).all()
    lost = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, np.float32), carry)
    slopes, (outputs, _) = run(inputs, lost)  # a carry that is not finite
    assert_close(outputs[episode], expected[episode], 1e-6)
    assert_close(slopes[episode], expected_slopes[episode], 1e-6)
    assert np.isnan(outputs[order[:first]]).all()


@each_cell
def test_bfloat16_products_keep_the_carry_in_float32(name):
    cell = MATRIX[name]
    params, carry, inputs = draw_case(cell)
    params = cell.init(jax.random.key(0), D, H)
    run = partial(total, chunkwise.scan, cell, params, carry, inputs / 2)
    half, full = (run(dtype=dtype)[1] for dtype in ("bfloat16", "float32"))
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("float32")}
    assert_close(half, full, 0.05)
    assert not np.array_equal(half[1], full[1])


@pytest.mark.sampled
@pytest.mark.parametrize("cell", [*MATRIX.values(), *WITHOUT_CONVOLUTION.values()],
                         ids=[*MATRIX, *WITHOUT_CONVOLUTION])  # fmt: skip
def test_the_convolution_leaves_out_masked_steps(cell):
    params, carry, inputs = draw_case(cell)
    mask = draw_flags(("mask",))["mask"]
    last, outputs = total(chunkwise.scan, cell, params, carry, inputs, mask=mask, chunk_size=C)[1]
    for row in range(B):
        real = mask[:, row]
        own = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], carry)
        cut = total(bptt.plain_scan, cell, params, own, inputs[real, row : row + 1])[1]
        assert_close((jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], last),
                      outputs[real, row : row + 1]), cut)  # fmt: skip


def test_the_stabiliser_of_an_mlstm_cancels_out_in_its_outputs():
    """The scale of C and n is free: a carry scaled by exp(−s) with m + s is the same memory."""
    cell = MATRIX["m_lstm"]
    params, carry, inputs = draw_case(cell)
    shift = draw(5, B, M)
    shifted = carry._replace(
        memory=carry.memory * np.exp(-shift)[..., None, None],
        normaliser=carry.normaliser * np.exp(-shift)[..., None],
        stabiliser=carry.stabiliser + shift,
    )
    for scan in (chunkwise.scan, bptt.plain_scan):
        ours, others = (total(scan, cell, params, each, inputs)[1][1] for each in (carry, shifted))
        assert_close(ours, others)


@each_scan
@pytest.mark.parametrize("size", [-300.0, 300.0])
def test_an_mlstm_neither_overflows_nor_underflows(scan, size):
    """Input gates of exp(±300) exceed float32."""
    cell = MATRIX["m_lstm"]
    params, _, inputs = draw_case(cell)
    bias = params["input_bias"].at[-2 * M : -M].set(size)
    carry = cell.zero_carry(jnp.zeros((B, 1)), H)
    slopes, (_, outputs) = gradients(scan, cell, {**params, "input_bias": bias}, carry, inputs)
    assert np.isfinite(outputs).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
    assert (np.abs(outputs).max() > 0.1) == (size > 0)


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_a_gated_deltanet_can_reflect_its_memory(repeats):
    """With β = 2, no decay and no new value, each step mirrors the memory along its key: parity."""
    cell = cells.get("gated_delta_net", num_heads=1, conv_size=1)
    size = 4
    extra = {"log_rate": jnp.full(1, -30.0), "norm_scale": jnp.ones(size)}
    key = jnp.array([3.0, -0.27, -0.27, -0.27])  # silu is 0 nowhere but at 0; direction below
    zeros = jnp.zeros(size)
    projected = jnp.concatenate([zeros, key, zeros, zeros, jnp.array([30.0, 0.0])])
    direction = np.asarray(jax.nn.silu(key), np.float64)
    direction /= np.linalg.norm(direction)
    memory = draw(0, 1, 1, size, size)
    carry = cells.GatedDeltaNetCarry(jnp.asarray(memory), None)
    steps = jnp.broadcast_to(projected, (repeats, 1, projected.shape[0]))
    last, _ = chunkwise.scan(cell, extra, carry, steps)
    mirror = np.eye(size) - 2 * np.outer(direction, direction)
    assert_close(last.memory[0, 0], memory[0, 0] @ np.linalg.matrix_power(mirror, repeats))


def test_repeated_reflections_by_one_key_stay_accurate():
    """The powers of the triangular system grow to 10¹⁸ here, but its solution stays bounded."""
    cell = cells.get("gated_delta_net", num_heads=1, conv_size=1)
    params, carry, _ = draw_case(cell)
    params["input_bias"] = params["input_bias"].at[-2:].set(jnp.array([20.0, -20.0]))
    inputs = jnp.broadcast_to(draw(1, 1, B, D), (64, B, D))
    results = [
        total(scan, cell, params, carry, inputs)[1] for scan in (chunkwise.scan, bptt.plain_scan)
    ]
    assert_close(*results, 1e-4)


@each_cell
@pytest.mark.parametrize("span", [0, 64, 1000])
def test_heads_start_with_short_and_long_time_constants(name, span, key):
    """Span 0: as initialised; otherwise after chrono initialisation."""
    cell = cells.get(name, num_heads=4)
    params = cell.init(key, D, 16)
    if span:
        params = chrono.spread_gates(key, name, params, span)
    projected = params["input_bias"][-4:]
    if name == "m_lstm":
        kept = jax.nn.sigmoid(projected)
    else:
        kept = jnp.exp(-jnp.exp(params["log_rate"]) * jax.nn.softplus(projected))
    steps = 1 / (1 - np.asarray(kept, np.float64))
    if span:
        np.testing.assert_allclose(sorted(steps), np.geomspace(2, span, 5)[1:], rtol=1e-3)
    else:
        assert steps.max() > 10 * steps.min()
        assert 60 < steps.max() < 1100


def test_a_carry_has_a_matrix_for_each_head(key):
    config = RecurrenceConfig("gated_delta_net", hidden_size=12, num_heads=3)
    carry = recurrence.layer(recurrence.zero_carry(config, jnp.zeros((B, D))))
    assert carry.memory.shape == (B, 3, 4, 4)
    assert carry.recent.shape == (B, 3, 36)
    plain = dataclasses.replace(config, conv_size=1)
    assert recurrence.layer(recurrence.zero_carry(plain, jnp.zeros((B, D)))).recent is None
    automatic = dataclasses.replace(config, num_heads=0)
    carry = recurrence.layer(recurrence.zero_carry(automatic, jnp.zeros((B, D))))
    assert carry.memory.shape == (B, 4, 3, 3)


@pytest.mark.parametrize(
    ("hidden_size", "num_heads"),
    [(2, 1), (4, 1), (5, 1), (6, 2), (8, 2), (12, 4), (15, 3), (64, 4)],
)
def test_automatic_heads_divide_the_units_and_are_not_too_small(hidden_size, num_heads):
    assert chunks.count_heads(0, hidden_size) == num_heads


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"num_heads": 5}, "num_heads must divide hidden_size = 12, got 5"),
        ({"num_heads": 12}, "num_heads must leave each head 2 of the hidden_size = 12 units"),
        ({"conv_size": 0}, "conv_size must be at least 1"),
        (
            {"cell": "lstm", "implementation": "chunkwise"},
            "such as 'm_lstm', .* 'auto'",
        ),
        ({"implementation": "associative"}, "needs a cell that is linear in its carry"),
    ],
)
def test_a_wrong_config_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        RecurrenceConfig(**{"cell": "m_lstm", "hidden_size": 12, **fields})


def test_sums_of_a_part_of_a_chunk_are_accurate_after_a_large_decay():
    decay = np.full((1, 1, 4), -0.125, np.float32)
    decay[0, 0, 1] = -1e6
    chunk = chunks.Chunk(jnp.ones((1, 4), bool), jnp.zeros((1, 4), jnp.int32))
    sums = chunks.sums_between(chunk, jnp.asarray(decay))
    assert sums[0, 0, 3, 1] == -0.25


@pytest.mark.slow
@each_cell
def test_chunks_take_less_memory_than_steps(name):
    cell = cells.get(name, num_heads=2)
    params = cell.init(jax.random.key(0), D, 128)
    carry, inputs = cell.zero_carry(jnp.zeros((2, 1)), 128), jnp.zeros((512, 2, D))

    def temporary_bytes(scan):
        def loss(params):
            return jnp.sum(scan(cell, params, carry, cells.project(params, inputs))[1])

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # 0.21 to 0.38 as the tests compile, without XLA's optimisations
    assert temporary_bytes(chunkwise.scan) < 0.5 * temporary_bytes(bptt.plain_scan)


@pytest.mark.sampled
@pytest.mark.parametrize("size", [1, 2, 5, 64])
@pytest.mark.parametrize("same_key", [False, True])
def test_a_triangular_system_is_solved_as_in_float64(size, same_key, key):
    """Also where all steps write to one key with β near 2, which makes the inverse oscillate."""
    keys = jax.random.normal(key, (2, size, 3))
    if same_key:
        keys = jnp.broadcast_to(keys[:, :1], keys.shape)
    keys /= jnp.linalg.norm(keys, axis=-1, keepdims=True)
    system = 1.99 * jnp.einsum("btk,bsk->bts", keys, keys)
    right = jax.random.normal(key, (2, size, 4))
    lower = np.tril(np.asarray(system, np.float64), -1) + np.eye(size)
    expected = np.linalg.solve(lower, np.asarray(right, np.float64))
    scale = np.max(np.abs(expected))
    np.testing.assert_allclose(chunks.solve_lower(system, right), expected, atol=1e-5 * scale)

    weights = jax.random.normal(jax.random.fold_in(key, 1), right.shape)
    gradient = jax.grad(lambda b: jnp.sum(weights * chunks.solve_lower(system, b)))(right)
    adjoint = np.linalg.solve(np.swapaxes(lower, 1, 2), np.asarray(weights, np.float64))
    np.testing.assert_allclose(gradient, adjoint, atol=1e-5 * np.max(np.abs(adjoint)))
    by_system = jax.grad(lambda a: jnp.sum(weights * chunks.solve_lower(a, right)))(system)
    outer = -np.tril(np.einsum("btx,bsx->bts", adjoint, expected), -1)
    np.testing.assert_allclose(by_system, outer, atol=1e-5 * max(1.0, np.max(np.abs(outer))))
