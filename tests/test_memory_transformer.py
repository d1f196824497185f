"""The memory transformer equals a loop over segments, and obeys the laws of masks, resets, carry.

The loop is written from the paper in NumPy and float64; it uses the layers of the loop that the
rotary transformer is compared with.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.finite_differences import assert_slopes
from tests.test_rotary_transformer import episodes_of, norm_in_numpy, turn_in_numpy
from vla_jax.nn import memory_transformer, truncated
from vla_jax.nn.memory_transformer import MemoryTransformerConfig
from vla_jax.nn.rotary_transformer import RotaryTransformerConfig

B, T, H, M, L, S, TOKENS = 3, 8, 8, 2, 2, 3, 2
LAYERS = RotaryTransformerConfig(L, M, num_kv_heads=1, hidden_size=H)
CONFIG = MemoryTransformerConfig(LAYERS, num_memory_tokens=TOKENS, segment_size=S)

apply = jax.jit(memory_transformer.apply, static_argnames="config")
step = jax.jit(memory_transformer.step, static_argnames="config")


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def draw_params(config=CONFIG):
    """Params all of order 1, so that scales and the first memory count too."""
    shapes = jax.eval_shape(lambda key: memory_transformer.init(key, config), jax.random.key(0))
    leaves, structure = jax.tree.flatten(shapes)
    return structure.unflatten([0.5 * draw(n, *leaf.shape) for n, leaf in enumerate(leaves)])


def assert_close(one, other, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), one, other)


def flags(*true_at):
    """Flags `[B, T]`, the same in all rows."""
    return np.tile(np.isin(np.arange(T), true_at), (B, 1))


def drawn_flags():
    """A mask and resets that differ between rows; the last row has a masked reset at its end."""
    random = np.random.default_rng(2)
    mask, reset = random.random((B, T)) > 0.3, random.random((B, T)) > 0.7
    mask[-1, -2:], reset[-1, -1] = False, True
    return mask, reset


# --- the paper --------------------------------------------------------------------------------


def segment_in_numpy(params, tokens, seen):
    """Returns the outputs of one segment's tokens; token t attends to those in `seen[t]`."""
    size = H // M
    hidden = tokens
    for layer in (params[f"layers_{number}"] for number in range(L)):
        y = norm_in_numpy(hidden, layer["attention_norm"]["scale"])
        q, k, v = (
            (y @ layer["attention"][part]["kernel"]).reshape(len(y), -1, size)
            for part in ("query", "key", "value")
        )
        attended = np.zeros((len(y), M, size))
        for t, others in enumerate(seen):
            for head in range(M):
                query = turn_in_numpy(q[t, head], t)
                scores = [query @ turn_in_numpy(k[s, 0], s) / np.sqrt(size) for s in others]
                weights = np.exp(scores)
                attended[t, head] = weights / weights.sum() @ v[others, 0]
        hidden = hidden + attended.reshape(len(y), -1) @ layer["attention"]["output"]["kernel"]
        y, mlp = norm_in_numpy(hidden, layer["mlp_norm"]["scale"]), layer["mlp"]
        gate = y @ mlp["gate"]["kernel"]
        hidden = (
            hidden
            + (gate / (1 + np.exp(-gate)) * (y @ mlp["up"]["kernel"])) @ mlp["down"]["kernel"]
        )
    return norm_in_numpy(hidden, params["output_norm"]["scale"])


def in_numpy(params, steps):
    """Returns the outputs of an episode `[T, H]`, segment after segment."""
    memory, outputs = params["memory"], []
    for first in range(0, len(steps), S):
        segment = steps[first : first + S]
        end = TOKENS + len(segment)
        tokens = np.concatenate([memory, segment, memory])
        seen = [list(range(TOKENS)) for _ in range(TOKENS)]
        seen += [list(range(t + 1)) for t in range(TOKENS, end)]
        seen += [list(range(len(tokens))) for _ in range(TOKENS)]
        results = segment_in_numpy(params, tokens, seen)
        outputs.append(results[TOKENS:end])
        memory = results[end:]
    return np.concatenate(outputs)


def test_outputs_equal_a_loop_over_segments_in_float64():
    params, inputs = draw_params(), draw(50, B, T, H)
    wide = jax.tree.map(np.float64, params)
    expected = np.stack([in_numpy(wide, np.float64(row)) for row in inputs])
    assert_close(apply(params, CONFIG, inputs)[1], expected)


def test_gradients_equal_float64_finite_differences():
    point = (draw_params(), draw(50, B, T, H))
    mask, reset = drawn_flags()

    def total(params, inputs):
        return jnp.sum(jnp.sin(apply(params, CONFIG, inputs, mask=mask, reset=reset)[1]))

    def total_in_numpy(params, inputs):
        episodes = episodes_of(inputs, mask, reset)
        return sum(np.sin(in_numpy(params, episode)).sum() for episode in episodes)

    assert_slopes(jax.jit(jax.grad(total, (0, 1)))(*point), total_in_numpy, point)


# --- laws of a sequence -----------------------------------------------------------------------


def test_every_later_step_depends_on_a_step_and_the_gradient_reaches_it_through_the_memory():
    params, inputs = draw_params(), draw(0, B, T, H)
    outputs = apply(params, CONFIG, inputs)[1]
    for t in range(T):
        changed = inputs.copy()
        changed[:, t] = draw(1, B, H)
        moved = np.abs(apply(params, CONFIG, changed)[1] - outputs).max(axis=(0, 2)) > 1e-6
        assert moved.tolist() == [later >= t for later in range(T)]
    gradient = jax.grad(lambda x: apply(params, CONFIG, x)[1][:, -1].sum())(inputs)
    assert (np.abs(gradient).max(axis=-1) > 1e-6).all()


@pytest.mark.parametrize("padding", ["left", "right", "middle"])
def test_padding_equals_removing_the_steps(padding):
    params, inputs = draw_params(), draw(0, B, T, H)
    padded = {"left": [0, 1], "right": [T - 2, T - 1], "middle": [1, 4]}[padding]
    real = np.setdiff1d(np.arange(T), padded)
    carry, outputs = apply(params, CONFIG, inputs, mask=~flags(*padded))
    cut_carry, cut = apply(params, CONFIG, inputs[:, real])
    assert_close(outputs[:, real], cut)
    assert_close(carry, cut_carry)
    assert not outputs[:, padded].any()


@pytest.mark.parametrize("masked", [(), (3,), (4,)])
def test_resets_equal_separate_episodes(masked):
    """Also if a step before the reset, or the step of the reset itself, is padding."""
    params, inputs, mask = draw_params(), draw(0, B, T, H), ~flags(*masked)
    carry, outputs = apply(params, CONFIG, inputs, mask=mask, reset=flags(0, 4))
    halves = [
        apply(params, CONFIG, inputs[:, part], mask=mask[:, part])
        for part in (slice(0, 4), slice(4, T))
    ]
    assert_close(outputs, np.concatenate([half for _, half in halves], axis=1))
    assert_close(carry, halves[1][0])


def test_rows_can_have_different_masks_and_resets():
    params, inputs = draw_params(), draw(0, B, T, H)
    mask, reset = drawn_flags()
    result = apply(params, CONFIG, inputs, mask=mask, reset=reset)
    for row in range(B):
        one = slice(row, row + 1)
        alone = apply(params, CONFIG, inputs[one], mask=mask[one], reset=reset[one])
        assert_close(jax.tree.map(lambda leaf, one=one: leaf[one], result), alone)


@pytest.mark.parametrize("has_reset", [False, True])
def test_masked_inputs_have_no_effect_and_gradients_are_finite_even_in_fully_masked_rows(has_reset):
    params, inputs, mask = draw_params(), draw(0, B, T, H), ~flags(0, 3)
    mask[0] = False
    reset = flags(2) if has_reset else None

    def total(params, inputs):
        outputs = memory_transformer.apply(params, CONFIG, inputs, mask=mask, reset=reset)[1]
        return jnp.sum(outputs**2), outputs

    gradient_of = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    gradient, outputs = gradient_of(params, inputs)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert not outputs[~mask].any()
    assert not gradient[1][~mask].any()
    assert gradient[1][mask].any(axis=-1).all()
    poisoned = np.where(mask[..., None], inputs, np.nan)
    assert_close((gradient, outputs), gradient_of(params, poisoned), 0)


@pytest.mark.slow
def test_jit_vmap_and_recomputed_segments_change_nothing():
    params, inputs = draw_params(), draw(0, B, T, H)
    mask, reset = drawn_flags()
    expected = memory_transformer.apply(params, CONFIG, inputs, mask=mask, reset=reset)
    assert_close(apply(params, CONFIG, inputs, mask=mask, reset=reset), expected)
    mapped = jax.vmap(
        lambda x, m, r: memory_transformer.apply(
            params, CONFIG, x[None], mask=m[None], reset=r[None]
        )
    )
    assert_close(jax.tree.map(lambda leaf: leaf[:, 0], mapped(inputs, mask, reset)), expected)
    remat = dataclasses.replace(CONFIG, remat=True)
    gradients = [
        jax.grad(lambda p, c=c: apply(p, c, inputs)[1].sum())(params) for c in (CONFIG, remat)
    ]
    assert_close(*gradients, 1e-4)


@pytest.mark.slow
def test_a_sharded_batch_equals_an_unsharded_one():
    params, inputs = draw_params(), draw(0, 4, T, H)
    random = np.random.default_rng(3)
    mask, reset = random.random((4, T)) > 0.3, random.random((4, T)) > 0.7
    expected = apply(params, CONFIG, inputs, mask=mask, reset=reset)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    sharded = jax.device_put((inputs, mask, reset), rows)
    assert_close(apply(params, CONFIG, sharded[0], mask=sharded[1], reset=sharded[2]), expected)


# --- the carry, and single steps --------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.parametrize("cut", [1, 3, 4, 7])
@pytest.mark.parametrize("has_flags", [False, True])
def test_a_sequence_continues_from_the_carry(cut, has_flags):
    """Inside a segment and at its end, also with padding and resets."""
    params, inputs = draw_params(), draw(0, B, T, H)
    mask, reset = drawn_flags() if has_flags else (~flags(), None)
    parts = (slice(0, cut), slice(cut, T))

    def run(part, carry=None):
        return apply(
            params, CONFIG, inputs[:, part], mask=mask[:, part],
            reset=None if reset is None else reset[:, part], carry=carry,
        )  # fmt: skip

    whole_carry, whole = run(slice(None))
    carry, first = run(parts[0])
    carry, second = run(parts[1], carry)
    assert_close(np.concatenate([first, second], axis=1), whole)
    assert_close((carry["memory"], carry["count"]), (whole_carry["memory"], whole_carry["count"]))


def test_truncated_back_propagation_gives_the_outputs_of_the_whole_sequence():
    params, inputs = draw_params(), draw(0, B, T, H)

    def model(params, carry, steps):
        return memory_transformer.apply(params, CONFIG, steps, carry=carry)

    carry, outputs = None, []
    for chunk in truncated.chunks(inputs, 4):
        carry, chunk_outputs = truncated.apply(model, params, carry, chunk)
        outputs.append(chunk_outputs)
    assert_close(np.concatenate(outputs, axis=1), apply(params, CONFIG, inputs)[1])


@pytest.mark.parametrize("size", [1, S, T])
def test_single_steps_equal_the_sequence(size):
    """With different episode starts in each row, after which the state is not cleared."""
    config = dataclasses.replace(CONFIG, segment_size=size)
    params, inputs = draw_params(config), draw(0, B, T, H)
    reset = np.zeros((B, T), bool)
    reset[1, 3] = reset[2, [1, 4]] = True
    outputs = apply(params, config, inputs, reset=reset)[1]
    state, position = memory_transformer.init_state(config, B), np.full(B, -1)
    for t in range(T):
        position = np.where(reset[:, t], 0, position + 1)
        state, output = step(params, config, state, inputs[:, t], position)
        assert_close(output, outputs[:, t])


def test_an_episode_ignores_the_state_of_the_one_before_even_if_it_is_nan():
    params, inputs = draw_params(), draw(0, B, T, H)
    state = memory_transformer.init_state(CONFIG, B)
    poisoned = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), state)
    for t in range(S + 1):
        state, one = step(params, CONFIG, state, inputs[:, t], np.full(B, t))
        poisoned, other = step(params, CONFIG, poisoned, inputs[:, t], np.full(B, t))
        assert_close(other, one, 0)


# --- numbers ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_bfloat16_products_give_float32_outputs_and_gradients():
    half = dataclasses.replace(CONFIG, transformer=dataclasses.replace(LAYERS, dtype="bfloat16"))
    params, inputs = draw_params(), draw(0, B, T, H)
    carry, outputs = apply(params, half, inputs)
    scale = np.abs(outputs).max()
    assert_close(outputs / scale, apply(params, CONFIG, inputs)[1] / scale, 0.1)
    gradient = jax.grad(lambda p: apply(p, half, inputs)[1].sum())(params)
    floats = {leaf.dtype for leaf in jax.tree.leaves((outputs, gradient, carry["memory"]))}
    assert floats == {jnp.dtype("float32")}


def test_dropout_needs_a_key_and_differs_between_segments(key):
    config = dataclasses.replace(CONFIG, transformer=dataclasses.replace(LAYERS, dropout=0.5))
    params, inputs = draw_params(), draw(0, B, T, H)
    plain = apply(params, CONFIG, inputs, key=key)[1]
    assert_close(apply(params, config, inputs)[1], plain, 0)
    dropped = apply(params, config, inputs, key=key)[1]
    assert np.abs(dropped - plain).max() > 0.1
    # one segment's inputs twice, the memory without effect on them
    silent = jax.tree.map(lambda leaf: leaf if leaf.ndim == 1 else np.zeros_like(leaf), params)
    twice = np.tile(inputs[:, :S], (1, 2, 1))
    dropped = apply(silent, config, twice, key=key)[1]
    assert np.abs(dropped[:, :S] - dropped[:, S:]).max() > 0.1


@pytest.mark.parametrize("name", ["num_memory_tokens", "segment_size"])
def test_a_wrong_config_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        dataclasses.replace(CONFIG, **{name: 0})
