"""The rotary transformer equals Mistral, and obeys the laws of masks, resets and the ring buffer.

`golden/rotary/rotary.npz` was written by `golden/rotary/make_rotary.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.finite_differences import assert_slopes
from vla_jax.nn import rotary_transformer
from vla_jax.nn.rotary_transformer import RotaryTransformerConfig

B, T, H, M, L, SPAN = 3, 7, 12, 4, 2, 3
CONFIG = RotaryTransformerConfig(L, M, num_kv_heads=2, hidden_size=H, span=SPAN)
MISTRAL = RotaryTransformerConfig(L, 4, num_kv_heads=2, hidden_size=16, span=4)

apply = jax.jit(rotary_transformer.apply, static_argnames="config")
step = jax.jit(rotary_transformer.step, static_argnames="config")


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def draw_params(config=CONFIG):
    """Params all of order 1, so that scales count too."""
    shapes = jax.eval_shape(lambda key: rotary_transformer.init(key, config), jax.random.key(0))
    leaves, structure = jax.tree.flatten(shapes)
    return structure.unflatten([0.5 * draw(n, *leaf.shape) for n, leaf in enumerate(leaves)])


def assert_close(one, other, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), one, other)


def flags(*true_at):
    """Flags `[B, T]`, the same in all rows."""
    return np.tile(np.isin(np.arange(T), true_at), (B, 1))


# --- Mistral, and NumPy in float64 ------------------------------------------------------------


def from_mistral(arrays, prefix=""):
    """Returns the arrays of Mistral's names as params."""
    params = {"output_norm": {"scale": arrays[f"{prefix}norm.weight"]}}
    for number in range(L):
        layer = f"{prefix}layers.{number}."

        def kernel(name, layer=layer):
            return {"kernel": arrays[f"{layer}{name}_proj.weight"].T}

        params[f"layers_{number}"] = {
            "attention_norm": {"scale": arrays[f"{layer}input_layernorm.weight"]},
            "attention": {
                ours: kernel(f"self_attn.{theirs}")
                for ours, theirs in {"query": "q", "key": "k", "value": "v", "output": "o"}.items()
            },
            "mlp_norm": {"scale": arrays[f"{layer}post_attention_layernorm.weight"]},
            "mlp": {name: kernel(f"mlp.{name}") for name in ("gate", "up", "down")},
        }
    return params


@pytest.fixture(scope="module")
def mistral(golden):
    with np.load(golden / "rotary" / "rotary.npz") as arrays:
        return dict(arrays)


def test_outputs_and_gradients_equal_those_of_mistral(mistral):
    params = from_mistral(mistral)

    def total(params, inputs):
        outputs = rotary_transformer.apply(params, MISTRAL, inputs)
        return jnp.sum(outputs * mistral["weights"]), outputs

    gradient = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    (by_params, by_inputs), outputs = gradient(params, mistral["inputs"])
    assert_close(outputs, mistral["outputs"])
    assert_close(by_inputs, mistral["d_inputs"], 1e-4)
    assert_close(by_params, from_mistral(mistral, "d_"), 1e-4)
    assert mistral["inputs"].shape[1] > 2 * MISTRAL.span


def norm_in_numpy(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * scale


def turn_in_numpy(x, position):
    """Rotates the pairs (i, i + E/2) of one head as complex numbers; an odd last one stays."""
    size = len(x) // 2
    pairs = x[:size] + 1j * x[size : 2 * size]
    pairs = pairs * np.exp(1j * position * 10_000.0 ** (-np.arange(size) / size))
    return np.concatenate([pairs.real, pairs.imag, x[2 * size :]])


def in_numpy(params, config, inputs):
    """Returns the outputs of one sequence `[T, H]`: loops over steps and heads, in float64."""
    size, group = config.hidden_size // config.num_heads, config.num_heads // config.num_kv_heads
    hidden = inputs
    for layer in (params[f"layers_{number}"] for number in range(config.num_layers)):
        y = norm_in_numpy(hidden, layer["attention_norm"]["scale"])
        q, k, v = (
            (y @ layer["attention"][part]["kernel"]).reshape(len(y), -1, size)
            for part in ("query", "key", "value")
        )
        attended = np.zeros((len(y), config.num_heads, size))
        for t in range(len(y)):
            first = max(0, t - config.span + 1)
            for head in range(config.num_heads):
                scores = [
                    turn_in_numpy(q[t, head], t) @ turn_in_numpy(k[s, head // group], s)
                    for s in range(first, t + 1)
                ]
                weights = np.exp(np.array(scores) / np.sqrt(size))
                attended[t, head] = weights / weights.sum() @ v[first : t + 1, head // group]
        hidden = hidden + attended.reshape(len(y), -1) @ layer["attention"]["output"]["kernel"]
        y, mlp = norm_in_numpy(hidden, layer["mlp_norm"]["scale"]), layer["mlp"]
        gate = y @ mlp["gate"]["kernel"]
        hidden = (
            hidden
            + (gate / (1 + np.exp(-gate)) * (y @ mlp["up"]["kernel"])) @ mlp["down"]["kernel"]
        )
    return norm_in_numpy(hidden, params["output_norm"]["scale"])


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_outputs_equal_a_loop_in_float64_with_an_odd_number_of_features_per_head(num_kv_heads):
    config = dataclasses.replace(CONFIG, num_kv_heads=num_kv_heads)  # E = 3
    params, inputs = draw_params(config), draw(50, B, T, H)
    wide = jax.tree.map(np.float64, params)
    expected = np.stack([in_numpy(wide, config, np.float64(row)) for row in inputs])
    assert_close(apply(params, config, inputs), expected)


def episodes_of(inputs, mask, reset):
    """Yields the real steps of every episode of `[B, T, H]`, by themselves."""
    for row, real, starts in zip(inputs, mask, np.cumsum(reset, axis=1), strict=True):
        for number in np.unique(starts[real]):
            yield row[real & (starts == number)]


def test_gradients_equal_float64_finite_differences():
    point = (draw_params(), draw(50, B, T, H))
    mask, reset = flags(0, 1, 2, 4, 5, 6), flags(5)

    def total(params, inputs):
        return jnp.sum(jnp.sin(apply(params, CONFIG, inputs, mask=mask, reset=reset)))

    def total_in_numpy(params, inputs):
        episodes = episodes_of(inputs, mask, reset)
        return sum(np.sin(in_numpy(params, CONFIG, episode)).sum() for episode in episodes)

    assert_slopes(jax.jit(jax.grad(total, (0, 1)))(*point), total_in_numpy, point)


# --- laws of a sequence -----------------------------------------------------------------------


def test_a_step_depends_on_as_many_steps_as_the_layers_reach():
    params, inputs = draw_params(), draw(0, B, T, H)
    outputs = apply(params, CONFIG, inputs)
    for t in range(T):
        changed = inputs.copy()
        changed[:, t] = draw(1, B, H)
        moved = np.abs(apply(params, CONFIG, changed) - outputs).max(axis=(0, 2)) > 1e-6
        assert moved.tolist() == [0 <= later - t <= L * (SPAN - 1) for later in range(T)]


@pytest.mark.parametrize("padding", ["left", "right", "middle"])
def test_padding_equals_removing_the_steps(padding):
    params, inputs = draw_params(), draw(0, B, T, H)
    padded = {"left": [0, 1], "right": [T - 2, T - 1], "middle": [1, 3]}[padding]
    real = np.setdiff1d(np.arange(T), padded)
    outputs = apply(params, CONFIG, inputs, mask=~flags(*padded))
    assert_close(outputs[:, real], apply(params, CONFIG, inputs[:, real]))
    assert not outputs[:, padded].any()


@pytest.mark.parametrize("masked", [(), (1,), (3,)])
def test_resets_equal_separate_episodes(masked):
    """Also if a step before the reset, or the step of the reset itself, is padding."""
    params, inputs, mask = draw_params(), draw(0, B, T, H), ~flags(*masked)
    outputs = apply(params, CONFIG, inputs, mask=mask, reset=flags(0, 3))
    halves = [
        apply(params, CONFIG, inputs[:, part], mask=mask[:, part])
        for part in (slice(0, 3), slice(3, T))
    ]
    assert_close(outputs, np.concatenate(halves, axis=1))


def test_rows_can_have_different_masks_and_resets():
    params, inputs = draw_params(), draw(0, B, T, H)
    random = np.random.default_rng(1)
    mask, reset = random.random((B, T)) > 0.3, random.random((B, T)) > 0.7
    outputs = apply(params, CONFIG, inputs, mask=mask, reset=reset)
    for row in range(B):
        one = slice(row, row + 1)
        assert_close(
            outputs[one], apply(params, CONFIG, inputs[one], mask=mask[one], reset=reset[one])
        )


def test_masked_inputs_have_no_effect_and_gradients_are_finite_even_in_fully_masked_rows():
    params, inputs, mask = draw_params(), draw(0, B, T, H), ~flags(0, 3)
    mask[0] = False

    def total(params, inputs):
        outputs = rotary_transformer.apply(params, CONFIG, inputs, mask=mask)
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
    outputs = rotary_transformer.apply(params, CONFIG, inputs, reset=reset)
    assert_close(apply(params, CONFIG, inputs, reset=reset), outputs)
    mapped = jax.vmap(lambda x, r: rotary_transformer.apply(params, CONFIG, x[None], reset=r[None]))
    assert_close(mapped(inputs, reset)[:, 0], outputs)


# --- the ring buffer --------------------------------------------------------------------------


@pytest.mark.parametrize(("span", "capacity"), [(SPAN, SPAN), (1, 1), (SPAN, T), (T, T)])
def test_single_steps_equal_the_sequence(span, capacity):
    """With different episode starts in each row, after which the cache is not cleared."""
    config = dataclasses.replace(CONFIG, span=span)
    params, inputs = draw_params(config), draw(0, B, T, H)
    reset = np.zeros((B, T), bool)
    reset[1, 3] = reset[2, [1, 4]] = True
    outputs = apply(params, config, inputs, reset=reset)
    cache, position = rotary_transformer.init_cache(config, B, capacity), np.full(B, -1)
    for t in range(T):
        position = np.where(reset[:, t], 0, position + 1)
        cache, output = step(params, config, cache, inputs[:, t], position)
        assert_close(output, outputs[:, t])


def test_the_results_are_the_same_after_a_million_steps():
    """Positions enter as differences; absolute ones would have lost their digits."""
    params, inputs = draw_params(), draw(0, B, T, H)
    late = 1_000_000 * SPAN
    caches = [rotary_transformer.init_cache(CONFIG, B, SPAN) for _ in range(2)]
    for t in range(T):
        caches[0], early = step(params, CONFIG, caches[0], inputs[:, t], np.full(B, t))
        caches[1], output = step(params, CONFIG, caches[1], inputs[:, t], np.full(B, late + t))
        if t >= L * (SPAN - 1):  # before that the second cache has steps of zeros
            assert_close(output, early, 0)


def test_a_step_ignores_entries_of_earlier_episodes_even_if_they_are_nan():
    params, inputs, position = draw_params(), draw(0, B, H), np.array([0, 1, 2])
    cache = rotary_transformer.init_cache(CONFIG, B, SPAN)
    earlier = (np.arange(SPAN) >= position[:, None])[..., None, None]
    poisoned = jax.tree.map(lambda leaf: np.where(earlier, np.nan, leaf), cache)
    one, other = (step(params, CONFIG, c, inputs, position)[1] for c in (cache, poisoned))
    assert_close(other, one, 0)


# --- numbers ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_bfloat16_products_give_float32_outputs_and_gradients_and_a_bfloat16_cache():
    half = dataclasses.replace(CONFIG, dtype="bfloat16")
    params, inputs = draw_params(), draw(0, B, T, H)
    outputs = apply(params, half, inputs)
    scale = np.abs(outputs).max()
    assert_close(outputs / scale, apply(params, CONFIG, inputs) / scale, 0.1)
    gradient = jax.grad(lambda p: apply(p, half, inputs).sum())(params)
    assert {leaf.dtype for leaf in jax.tree.leaves((outputs, gradient))} == {jnp.dtype("float32")}
    cache = rotary_transformer.init_cache(half, B, T)
    cache, output = step(params, half, cache, inputs[:, 0], np.zeros(B, int))
    assert output.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype("bfloat16")}


def test_dropout_needs_a_key_and_depends_on_it(key):
    config = dataclasses.replace(CONFIG, dropout=0.5)
    params, inputs = draw_params(), draw(0, B, T, H)
    plain = apply(params, CONFIG, inputs, key=key)
    assert_close(apply(params, config, inputs), plain, 0)
    one, again, other = (
        apply(params, config, inputs, key=k) for k in (key, key, jax.random.key(1))
    )
    assert_close(one, again, 0)
    assert np.abs(one - plain).max() > 0.1
    assert np.abs(one - other).max() > 0.1


@pytest.mark.slow
def test_params_are_drawn_independently_with_the_stated_deviations(key):
    config = RotaryTransformerConfig(3, 4, num_kv_heads=2, hidden_size=64)
    params = rotary_transformer.init(key, config)
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
    assert len({float(leaf[0, 0]) for leaf in kernels}) == len(kernels) == 7 * 3
    layer = params["layers_1"]
    assert layer["attention"]["key"]["kernel"].shape == (64, 32)
    assert layer["mlp"]["gate"]["kernel"].shape == (64, 176)
    for leaf in jax.tree.leaves((layer["attention"]["query"], layer["mlp"]["up"])):
        np.testing.assert_allclose(leaf.std(), 1 / 8, rtol=0.06)
    for leaf in jax.tree.leaves((layer["attention"]["output"], layer["mlp"]["down"])):
        np.testing.assert_allclose(leaf.std(), (6 * leaf.shape[0]) ** -0.5, rtol=0.06)
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(params) if leaf.ndim == 1)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"span": 0}, "span must be at least 1, got 0"),
        ({"num_heads": 5}, "hidden_size must be a multiple of num_heads = 5, .* got 12; choose"),
        ({"num_heads": 12}, "with 2 features per head or more, got 12; choose"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads = 4, got 3"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dtype": "float16"}, "unknown dtype 'float16'; .* 'bfloat16'"),
    ],
)
def test_a_wrong_config_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(CONFIG, **fields)
