"""The transformer agrees with PyTorch, and obeys the laws of masks, resets and the cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vla_jax.nn import transformer
from vla_jax.nn.transformer import TransformerConfig

B, T, H, M, L = 3, 6, 8, 2, 2
CONFIG = TransformerConfig(num_layers=L, num_heads=M, hidden_size=H, num_positions=T)
torch.set_num_threads(1)

apply = jax.jit(transformer.apply, static_argnames="config")
step = jax.jit(transformer.step, static_argnames="config")


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def draw_params(config=CONFIG):
    """Params all of order 1, so that biases, scales and positions count too."""
    shapes = jax.eval_shape(lambda key: transformer.init(key, config), jax.random.key(0))
    leaves, structure = jax.tree.flatten(shapes)
    return structure.unflatten([0.5 * draw(n, *leaf.shape) for n, leaf in enumerate(leaves)])


def assert_close(one, other, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), one, other)


def flags(*true_at):
    """Flags `[B, T]`, the same in all rows."""
    return np.tile(np.isin(np.arange(T), true_at), (B, 1))


# --- PyTorch ----------------------------------------------------------------------------------


def norm_in_torch(params, hidden):
    return torch.nn.functional.layer_norm(hidden, (H,), params["scale"], params["bias"], eps=1e-5)


def dense_in_torch(params, hidden):
    return hidden @ params["kernel"] + params["bias"]


def in_torch(params, inputs):
    """Returns the outputs of GPT-2 built from PyTorch functions."""
    hidden = inputs + params["position_embedding"][: inputs.shape[1]]
    for layer in (params[f"layers_{number}"] for number in range(L)):
        qkv = dense_in_torch(
            layer["attention"]["qkv"], norm_in_torch(layer["attention_norm"], hidden)
        )
        q, k, v = (part.unflatten(-1, (M, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended = attended.transpose(1, 2).flatten(2)
        hidden = hidden + dense_in_torch(layer["attention"]["output"], attended)
        widened = dense_in_torch(layer["mlp"]["layers_0"], norm_in_torch(layer["mlp_norm"], hidden))
        widened = torch.nn.functional.gelu(widened, approximate="tanh")
        hidden = hidden + dense_in_torch(layer["mlp"]["layers_1"], widened)
    return norm_in_torch(params["output_norm"], hidden)


def test_outputs_and_gradients_equal_pytorch():
    params, inputs, weights = draw_params(), draw(100, B, T, H), draw(101, B, T, H)

    def total(params, inputs):
        outputs = transformer.apply(params, CONFIG, inputs)[1]
        return jnp.sum(outputs * weights), outputs

    (_, outputs), gradient = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(
        params, inputs
    )
    theirs = jax.tree.map(lambda leaf: torch.tensor(leaf, requires_grad=True), (params, inputs))
    expected = in_torch(*theirs)
    (expected * torch.tensor(weights)).sum().backward()
    assert_close(outputs, expected.detach().numpy())
    for ours, leaf in zip(jax.tree.leaves(gradient), jax.tree.leaves(theirs), strict=True):
        scale = max(1.0, float(leaf.grad.abs().max()))
        assert_close(ours / scale, leaf.grad.numpy() / scale)


# --- laws of a window -------------------------------------------------------------------------


def test_a_step_depends_only_on_itself_and_earlier_steps():
    params, inputs = draw_params(), draw(0, B, T, H)
    _, outputs = apply(params, CONFIG, inputs)
    for t in range(T):
        changed = inputs.copy()
        changed[:, t] = draw(1, B, H)
        moved = np.abs(apply(params, CONFIG, changed)[1] - outputs).max(axis=(0, 2)) > 1e-6
        assert moved.tolist() == [later >= t for later in range(T)]


@pytest.mark.parametrize("padding", ["left", "right", "middle"])
def test_padding_equals_removing_the_steps(padding):
    params, inputs = draw_params(), draw(0, B, T, H)
    padded = {"left": [0, 1], "right": [T - 2, T - 1], "middle": [1, 3]}[padding]
    real = np.setdiff1d(np.arange(T), padded)
    _, outputs = apply(params, CONFIG, inputs, mask=~flags(*padded))
    _, cut = apply(params, CONFIG, inputs[:, real])
    assert_close(outputs[:, real], cut)
    assert not outputs[:, padded].any()


@pytest.mark.parametrize("masked", [(), (1,), (3,)])
def test_resets_equal_separate_episodes(masked):
    """Also if a step before the reset, or the step of the reset itself, is padding."""
    params, inputs, mask = draw_params(), draw(0, B, T, H), ~flags(*masked)
    _, outputs = apply(params, CONFIG, inputs, mask=mask, reset=flags(0, 3))
    halves = [
        apply(params, CONFIG, inputs[:, part], mask=mask[:, part])[1]
        for part in (slice(0, 3), slice(3, T))
    ]
    assert_close(outputs, np.concatenate(halves, axis=1))


def test_rows_can_have_different_masks_and_resets():
    params, inputs = draw_params(), draw(0, B, T, H)
    random = np.random.default_rng(1)
    mask, reset = random.random((B, T)) > 0.3, random.random((B, T)) > 0.7
    _, outputs = apply(params, CONFIG, inputs, mask=mask, reset=reset)
    for row in range(B):
        one = slice(row, row + 1)
        _, alone = apply(params, CONFIG, inputs[one], mask=mask[one], reset=reset[one])
        assert_close(outputs[one], alone)


def test_masked_inputs_have_no_effect_and_gradients_are_finite_even_in_fully_masked_rows():
    params, inputs, mask = draw_params(), draw(0, B, T, H), ~flags(0, 3)
    mask[0] = False

    def total(params, inputs):
        outputs = transformer.apply(params, CONFIG, inputs, mask=mask)[1]
        return jnp.sum(outputs**2), outputs

    gradient_of = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    gradient, outputs = gradient_of(params, inputs)
    assert not outputs[~mask].any()
    assert not gradient[1][~mask].any()
    assert gradient[1][mask].all()
    poisoned = np.where(mask[..., None], inputs, np.nan)
    assert_close((gradient, outputs), gradient_of(params, poisoned), 0)


@pytest.mark.slow
def test_jit_and_vmap_change_nothing():
    params, inputs, reset = draw_params(), draw(0, B, T, H), flags(2)
    cache, outputs = transformer.apply(params, CONFIG, inputs, reset=reset)
    assert_close(apply(params, CONFIG, inputs, reset=reset), (cache, outputs))
    mapped = jax.vmap(lambda x, r: transformer.apply(params, CONFIG, x[None], reset=r[None]))
    one_each = jax.tree.map(lambda leaf: leaf[:, 0], mapped(inputs, reset))
    assert_close(one_each, (cache, outputs))


@pytest.mark.slow
def test_a_sharded_batch_equals_an_unsharded_one(key):
    config = dataclasses.replace(CONFIG, dropout=0.5)
    params, inputs, mask = draw_params(), draw(0, 4, T, H), np.tile(np.arange(T) > 0, (4, 1))
    expected = apply(params, config, inputs, mask=mask, key=key)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    sharded = jax.device_put((inputs, mask), rows)
    assert_close(apply(params, config, sharded[0], mask=sharded[1], key=key), expected)


# --- the cache --------------------------------------------------------------------------------


def test_single_steps_equal_the_window():
    """With different episode starts in each row."""
    params, inputs = draw_params(), draw(0, B, T, H)
    reset = np.zeros((B, T), bool)
    reset[1, 3] = reset[2, [1, 4]] = True
    _, outputs = apply(params, CONFIG, inputs, reset=reset)
    cache, position = transformer.init_cache(CONFIG, B, T), np.full(B, -1)
    for t in range(T):
        position = np.where(reset[:, t], 0, position + 1)
        cache, output = step(params, CONFIG, cache, inputs[:, t], position)
        assert_close(output, outputs[:, t])


def test_a_step_continues_from_the_cache_of_a_window():
    params, inputs = draw_params(), draw(0, B, T, H)
    lengths = np.array([1, 3, 5])
    _, outputs = apply(params, CONFIG, inputs)
    cache, _ = apply(params, CONFIG, inputs, mask=np.arange(T) < lengths[:, None])
    rows = np.arange(B)
    _, output = step(params, CONFIG, cache, inputs[rows, lengths], lengths)
    assert_close(output, outputs[rows, lengths])


def test_a_step_ignores_later_cache_entries_even_if_they_are_nan():
    params, inputs, position = draw_params(), draw(0, B, 2, H), np.array([0, 1, 1])
    cache = transformer.init_cache(CONFIG, B, T)
    cache, _ = step(params, CONFIG, cache, inputs[:, 0], np.zeros(B, int))
    later = (np.arange(T) >= position[:, None])[..., None, None]
    poisoned = jax.tree.map(lambda leaf: np.where(later, np.nan, leaf), cache)
    one, other = (step(params, CONFIG, c, inputs[:, 1], position) for c in (cache, poisoned))
    assert_close(other[1], one[1])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(other))


# --- numbers ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_bfloat16_products_give_float32_outputs_and_gradients_and_a_bfloat16_cache():
    half = dataclasses.replace(CONFIG, dtype="bfloat16")
    params, inputs = draw_params(), draw(0, B, T, H)
    cache, outputs = apply(params, half, inputs)
    scale = np.abs(outputs).max()
    assert_close(outputs / scale, apply(params, CONFIG, inputs)[1] / scale, 0.1)
    gradient = jax.grad(lambda p: apply(p, half, inputs)[1].sum())(params)
    assert {leaf.dtype for leaf in jax.tree.leaves((outputs, gradient))} == {jnp.dtype("float32")}
    empty = transformer.init_cache(half, B, T)
    assert {leaf.dtype for leaf in jax.tree.leaves((cache, empty))} == {jnp.dtype("bfloat16")}


def test_dropout_needs_a_key_and_depends_on_it(key):
    config = dataclasses.replace(CONFIG, dropout=0.5)
    params, inputs = draw_params(), draw(0, B, T, H)
    plain = apply(params, CONFIG, inputs, key=key)[1]
    assert_close(apply(params, config, inputs)[1], plain, 0)
    one, again, other = (
        apply(params, config, inputs, key=k)[1] for k in (key, key, jax.random.key(1))
    )
    assert_close(one, again, 0)
    assert np.abs(one - plain).max() > 0.1
    assert np.abs(one - other).max() > 0.1


def leaves_at(params, *names):
    """Returns the leaves of all layers at a path."""
    flat = flatten_dict(params)
    return [leaf for path, leaf in flat.items() if path[-len(names) :] == names]


def test_dropout_applies_to_the_embedding_the_attention_and_the_residual(key):
    """Tests each of the three alone, with zeros where the two others apply."""
    config = TransformerConfig(1, M, H, T, dropout=0.5)
    inputs = draw(0, B, T, H)
    silent = jax.tree.map(np.zeros_like, draw_params(config))
    silent["output_norm"]["scale"] += 1.0

    def depends_on_key(params, inputs):
        one, other = (apply(params, config, inputs, key=k)[1] for k in (None, key))
        return np.abs(one - other).max() > 1e-3

    assert depends_on_key(silent, inputs)  # embedding
    nothing = np.zeros_like(inputs)
    assert not depends_on_key(silent, nothing)
    residual = jax.tree.map(np.copy, silent)
    residual["layers_0"]["mlp"]["layers_1"]["bias"] += draw(1, H)
    assert depends_on_key(residual, nothing)
    # attention alone, with its weights dropped or not
    attention = draw_params(config)["layers_0"]
    qkv = transformer._project(attention, config, jnp.asarray(inputs))
    visible = np.broadcast_to(np.tril(np.ones((T, T), bool)), (B, T, T))
    one, other = (transformer._attend(*qkv, visible, config, k) for k in (None, key))
    assert np.abs(one - other).max() > 1e-3


@pytest.mark.slow
def test_params_are_initialised_as_in_gpt_2(key):
    config = TransformerConfig(num_layers=3, num_heads=4, hidden_size=64, num_positions=32)
    params = transformer.init(key, config)
    residual = 0.02 / np.sqrt(2 * 3)
    for deviation, leaves in (
        (0.02, leaves_at(params, "position_embedding")),
        (0.02, leaves_at(params, "qkv", "kernel")),
        (0.02, leaves_at(params, "layers_0", "kernel")),
        (residual, leaves_at(params, "output", "kernel")),
        (residual, leaves_at(params, "layers_1", "kernel")),
    ):
        for leaf in leaves:
            np.testing.assert_allclose(leaf.std(), deviation, rtol=0.06)
            np.testing.assert_allclose(leaf.mean(), 0.0, atol=deviation / 10)
    assert all((leaf == 1).all() for leaf in leaves_at(params, "scale"))
    assert all((leaf == 0).all() for leaf in leaves_at(params, "bias"))
    kernels = leaves_at(params, "kernel")
    assert len({float(leaf[0, 0]) for leaf in kernels}) == len(kernels) == 4 * 3


# --- wrong input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"num_positions": 0}, "num_positions must be at least 1, got 0"),
        ({"num_heads": 3}, "hidden_size must be a multiple of num_heads = 3, got 8; choose"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dtype": "float16"}, "unknown dtype 'float16'; .* 'bfloat16'"),
    ],
)
def test_a_wrong_config_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(CONFIG, **fields)


def test_more_steps_than_positions_are_refused():
    with pytest.raises(ValueError, match="at most num_positions = 6 steps, got 7; shorten the"):
        transformer.apply(draw_params(), CONFIG, draw(0, B, T + 1, H))


@pytest.mark.parametrize("name", ["mask", "reset"])
def test_flags_of_another_size_or_dtype_are_refused(name):
    params, inputs = draw_params(), draw(0, B, T, H)
    with pytest.raises(AssertionError, match="assert_shape"):
        transformer.apply(params, CONFIG, inputs, **{name: np.ones((B, T + 1), bool)})
    with pytest.raises(AssertionError, match="assert_type"):
        transformer.apply(params, CONFIG, inputs, **{name: np.ones((B, T), np.float32)})
