"""Law 3: the hand-written backward pass equals JAX's automatic differentiation in every case."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads

from tests.cell_cases import draw, draw_carry
from vla_jax.nn import bptt, cells, matmul, recurrence
from vla_jax.nn.recurrence import RecurrenceConfig

B, T, D, H = 4, 7, 3, 5
FLAGS = {
    "whole": {},
    "mask": {"mask": True},
    "reset": {"reset": True},
    "mask-reset": {"mask": True, "reset": True},
}
# The others have no recurrent product; see `test_chunkwise`.
NAMES = [name for name, cell in cells.CELLS.items() if cell.chunk is None]
each_cell = pytest.mark.parametrize("name", NAMES)
# How the kernel is multiplied; see `size`.
each_size = pytest.mark.parametrize("size", ["small", "large"], indirect=True)
SIZES = [*(("small", which) for which in FLAGS), ("large", "mask-reset")]


def draw_flags(which):
    random = np.random.default_rng(5)
    return {flag: random.uniform(size=(T, B)) < 0.6 for flag in which}


def draw_case(name, key):
    cell = cells.CELLS[name]
    carry = draw_carry(cell.zero_carry(jnp.zeros((B, 1)), H))
    params = cell.init(key, D, H)
    params |= {
        path: leaf + draw(7, *leaf.shape) / 4 for path, leaf in cells.extra_params(params).items()
    }
    return cell, params, carry, draw(9, T, B, cell.num_gates * H)


def loss(scan, cell, flags, params, carry, projected, **options):
    """Weighs every output and carry differently, so that no two errors cancel out."""
    carry, outputs = scan(cell, params, carry, projected, **flags, **options)
    weighted = jax.tree.map(
        lambda leaf: jnp.sum(jnp.sin(leaf) * draw(3, *leaf.shape)), (carry, outputs)
    )
    return sum(jax.tree.leaves(weighted))


@pytest.fixture(autouse=True)
def size(request, monkeypatch):
    """large": treats the small kernels of these tests as large ones."""
    if getattr(request, "param", "small") == "large":
        monkeypatch.setattr(matmul, "LARGE", 1)


def gradients(name, key, flags, **options):
    """Gradients by params, initial carry and inputs: hand-written, and by JAX."""
    cell, *arguments = draw_case(name, key)
    return [
        jax.jit(jax.grad(partial(loss, scan, cell, flags, **options), argnums=(0, 1, 2)))(
            *arguments
        )
        for scan in (bptt.scan, bptt.plain_scan)
    ]


def mean_square(errors):
    return np.mean(np.square(errors))


def assert_close(one, other, atol=2e-6):
    """Asserts agreement to `atol`, relative to the largest absolute value where that is above 1."""

    def compare(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol * max(1.0, np.abs(b).max(initial=0.0)))

    jax.tree.map(compare, one, other)


@pytest.mark.sampled
@each_cell
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("size", "which"), SIZES, indirect=["size"])
def test_the_gradients_equal_those_of_jax(name, which, reverse, key):
    flags = draw_flags(FLAGS[which])
    by_hand, derived = gradients(name, key, flags, reverse=reverse)
    assert_close(by_hand, derived)
    by_params, *others = derived  # the comparison is not one of zeros
    used = [by_params[path] for path in by_params if path not in ("input_kernel", "input_bias")]
    assert all(np.abs(leaf).max() > 0.01 for leaf in jax.tree.leaves((used, others)))


@pytest.mark.sampled
@each_cell
@each_size
def test_bfloat16_products_give_the_gradients_of_float32_up_to_rounding(name, key):
    flags = draw_flags(FLAGS["mask-reset"])
    by_hand, derived = gradients(name, key, flags, dtype="bfloat16")
    exact = gradients(name, key, flags)[1]
    for ours, theirs, right in zip(*map(jax.tree.leaves, (by_hand, derived, exact)), strict=True):
        assert ours.dtype == jnp.float32
        # As accurate as JAX's, by the mean over elements: the maximum is one random rounding error.
        assert mean_square(ours - right) <= 4 * mean_square(theirs - right) + 1e-12
        assert np.abs(ours - right).max() <= 0.03 * np.abs(right).max() + 1e-6


@pytest.mark.sampled
@each_cell
def test_the_outputs_and_the_carry_are_equal(name, key):
    cell, *arguments = draw_case(name, key)
    flags = draw_flags(FLAGS["mask-reset"])
    by_hand, plain = (
        jax.jit(partial(scan, cell, **flags))(*arguments) for scan in (bptt.scan, bptt.plain_scan)
    )
    assert_close(by_hand, plain, atol=0)


@pytest.mark.sampled
@each_cell
def test_the_gradients_equal_finite_differences(name, key):
    cell, *arguments = draw_case(name, key)
    flags = draw_flags(FLAGS["mask-reset"])
    check_grads(partial(loss, bptt.scan, cell, flags), arguments, 1, ["rev"], rtol=0.02)


@pytest.mark.sampled
@each_cell
@each_size
def test_second_derivatives_equal_those_of_jax(name, key):
    cell, params, carry, projected = draw_case(name, key)

    def penalty(scan, projected):
        by_inputs = jax.grad(partial(loss, scan, cell, {}, params, carry))(projected)
        return jnp.sum(by_inputs**2)

    by_hand, derived = (
        jax.jit(jax.grad(partial(penalty, scan)))(projected)
        for scan in (bptt.scan, bptt.plain_scan)
    )
    assert_close(by_hand, derived, atol=1e-5)


def test_a_large_kernel_is_never_transposed(key, monkeypatch):
    cell, hidden_size = cells.LSTM, 48  # makes the shape of the kernel unique
    params = cell.init(key, D, hidden_size)
    carry = cell.zero_carry(jnp.zeros((B, 1)), hidden_size)
    projected = draw(9, T, B, 4 * hidden_size)

    def copies():
        """Lines of the compiled program that copy or transpose a kernel."""
        gradient = jax.grad(partial(loss, bptt.scan, cell, {}), argnums=(0, 1, 2))
        program = jax.jit(lambda *args: gradient(*args)).lower(params, carry, projected).compile()
        shapes = (f"f32[{hidden_size},{4 * hidden_size}]", f"f32[{4 * hidden_size},{hidden_size}]")
        lines = [line.split("metadata")[0] for line in program.as_text().splitlines()]
        moves = [line for line in lines if " transpose(" in line or " copy(" in line]
        return [line for line in moves if any(f"= {shape}" in line for shape in shapes)]

    assert copies()  # small kernels are transposed
    monkeypatch.setattr(matmul, "LARGE", 1)
    assert copies() == []


def test_forward_mode_is_refused_and_available_with_implementation_scan(key):
    config = RecurrenceConfig(cell="gru", hidden_size=H)
    inputs = draw(0, B, T, D)
    params = recurrence.init(key, config, D)

    def outputs(implementation, inputs):
        chosen = RecurrenceConfig(cell="gru", hidden_size=H, implementation=implementation)
        return recurrence.apply(params, chosen, inputs)[1]

    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(partial(outputs, "bptt"), (inputs,), (inputs,))
    tangent = jax.jvp(partial(outputs, "scan"), (inputs,), (inputs,))[1]
    _, pull = jax.vjp(partial(outputs, "bptt"), inputs)
    ones = jnp.ones_like(tangent)  # ⟨1, J x⟩ = ⟨Jᵀ 1, x⟩
    assert float(jnp.sum(tangent)) == pytest.approx(float(jnp.sum(pull(ones)[0] * inputs)), 1e-4)


@pytest.mark.sampled
@each_cell
@each_size
def test_vmap_equals_a_loop(name, key):
    cell, params, carry, projected = draw_case(name, key)
    stacked = np.stack([projected, 2 * projected])
    gradient = jax.grad(partial(loss, bptt.scan, cell, draw_flags(FLAGS["mask"]), params, carry))
    mapped = jax.jit(jax.vmap(gradient))(stacked)
    assert_close(mapped, np.stack([jax.jit(gradient)(each) for each in stacked]))


@pytest.mark.sampled
@each_cell
@each_size
def test_the_gradients_on_many_devices_are_equal(name, key):
    cell, params, carry, projected = draw_case(name, key)
    flags = draw_flags(FLAGS["mask-reset"])
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows, steps = PartitionSpec("data"), PartitionSpec(None, "data")

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), rows, steps, steps, steps),
        out_specs=(PartitionSpec(), steps),
    )
    def on_devices(params, carry, projected, mask, reset):
        def local(params, projected):
            _, outputs = bptt.scan(cell, params, carry, projected, mask=mask, reset=reset)
            return jax.lax.psum(jnp.sum(outputs**2), "data")

        return jax.grad(local, argnums=(0, 1))(params, projected)

    def whole(params, projected):
        return jnp.sum(bptt.plain_scan(cell, params, carry, projected, **flags)[1] ** 2)

    expected = jax.jit(jax.grad(whole, argnums=(0, 1)))(params, projected)
    assert_close(on_devices(params, carry, projected, flags["mask"], flags["reset"]), expected)
