"""The Flax modules equal the pure functions with the same params, also in Flax's loops and NNX."""

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vla_jax.nn import cells, recurrence
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.policies import decoders, linen
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.policies.head import TeacherForcing

B, T, D, H, N = 3, 6, 4, 5, 2
LENGTHS = np.array([6, 2, 4])
MASK = np.arange(T) < LENGTHS[:, None]
SIZES = {"token_dim": D, "num_tokens": N, "window_size": 4, "action_horizon": 2}
SIZES |= {"hidden_size": H, "num_layers": 2, "head_sizes": (6,)}

DECODERS = {
    "lstm": DecoderConfig("lstm", **SIZES),
    "gru-attention": DecoderConfig("gru", pooling="attention", **SIZES),
    "rnn": DecoderConfig("rnn", **SIZES),
    "fc": DecoderConfig("fc", **SIZES),
    "encoder-decoder": DecoderConfig("lstm", head="autoregressive", **SIZES),
}
each_decoder = pytest.mark.parametrize("config", DECODERS.values(), ids=DECODERS)
each_cell = pytest.mark.parametrize("cell", cells.CELLS)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_close(one, other, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), one, other)


def assert_same_tree(one, other):
    """Checks that two trees have the same paths, shapes and dtypes, in plain dicts."""
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (one, other)]
    assert shapes[0] == shapes[1]


def assert_all_differ(params):
    """Checks that any two leaves of one shape differ, except constant zeros and ones."""
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params) if np.ptp(leaf)]
    assert len(set(leaves)) == len(leaves)


@pytest.mark.sampled
@each_cell
def test_a_cell_in_flaxs_loop_equals_the_recurrence(cell, key):
    inputs, run = draw(0, B, T, D), nn.RNN(linen.RecurrentCell(cell, H), return_carry=True)
    params = run.init(key, inputs)["params"]
    assert_same_tree(params["cell"], cells.CELLS[cell].init(key, D, H))
    assert_all_differ(params)
    if cells.CELLS[cell].chunk is None:  # the others have biases and convolutions of their own
        drawn = {name: leaf for name, leaf in params["cell"].items() if name != "decay_logit"}
        leaves = [leaf for leaf in drawn.values() if np.ptp(leaf)]
        assert all(np.abs(leaf).max() <= H**-0.5 for leaf in leaves)
    last, outputs = jax.jit(run.apply)({"params": params}, inputs, seq_lengths=LENGTHS)
    config, stack = RecurrenceConfig(cell, hidden_size=H), {"layers_0": {"forward": params["cell"]}}
    expected_last, expected = recurrence.apply(stack, config, inputs, mask=MASK)
    assert_close(jnp.where(MASK[..., None], outputs, 0.0), expected)
    assert_close(last, expected_last["layers_0"]["forward"])


@pytest.mark.sampled
@each_cell
@pytest.mark.parametrize("lead", [(), (B,), (2, B)])
def test_a_cell_takes_any_batch_axes(cell, lead, key):
    module, inputs = linen.RecurrentCell(cell, H), draw(0, *lead, D)
    carry = module.initialize_carry(key, inputs.shape)
    variables = module.init(key, carry, inputs)
    following, outputs = module.apply(variables, carry, inputs)
    own = cells.CELLS[cell].zero_carry(jnp.zeros((1, 1)), H)
    shapes = jax.tree.map(lambda leaf: (*lead, *leaf.shape[1:]), own)
    for found in (carry, following):
        assert jax.tree.map(lambda leaf: leaf.shape, found) == shapes
    assert outputs.shape == (*lead, H)
    assert not any(np.any(leaf) for leaf in carry)
    rows = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(lead) :]), (carry, inputs))
    _, expected = cells.step(cells.CELLS[cell], variables["params"], *rows)
    assert_close(outputs.reshape(-1, H), expected)


def test_a_cell_in_bfloat16_keeps_params_carries_and_outputs_in_float32(key):
    module, inputs = linen.RecurrentCell("gru", H, dtype="bfloat16"), draw(0, B, D)
    carry = module.initialize_carry(key, inputs.shape)
    results, variables = module.init_with_output(key, carry, inputs)
    leaves = jax.tree.leaves((results, variables))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    expected = cells.step(cells.GRU, variables["params"], carry, inputs, dtype="bfloat16")
    assert_close(results, expected, atol=0)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.RNN(linen.RecurrentCell("gru", H)), (B, T, D)),
        (linen.Recurrence(RecurrenceConfig("gru", num_layers=2, hidden_size=H)), (B, T, D)),
        (linen.Decoder(DECODERS["gru-attention"]), (B, T, N, D)),
    ],
    ids=["cell", "recurrence", "decoder"],
)
def test_params_depend_on_the_key(module, shape):
    init = jax.jit(lambda number: module.init(jax.random.key(number), jnp.zeros(shape)))
    one, same, other = init(0), init(0), init(1)
    assert_close(one, same, atol=0)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert not np.array_equal(a, b) or not np.any(a)  # biases of the heads start at zero


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("lstmm", H), "unknown cell 'lstmm'; .* Did you mean 'lstm'"),
        (("lstm", 0), "hidden_size must be at least 1, got 0"),
        (("lstm", H, "float16"), "unknown dtype 'float16'"),
    ],
)
def test_a_wrong_cell_raises_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        linen.RecurrentCell(*arguments)


@pytest.mark.sampled
@each_cell
def test_the_recurrence_equals_the_pure_function(cell, key):
    config = RecurrenceConfig(cell, num_layers=2, hidden_size=H, bidirectional=True)
    module, inputs, reset = linen.Recurrence(config), draw(0, B, T, D), np.zeros((B, T), bool)
    reset[:, 3] = True
    params = module.init(key, inputs)["params"]
    assert_same_tree(params, recurrence.init(key, config, D))
    assert_all_differ(params)
    carry = jax.tree.map(lambda leaf: draw(1, *leaf.shape), recurrence.zero_carry(config, inputs))
    given = {"mask": MASK, "reset": reset, "carry": carry}
    results = module.apply({"params": params}, inputs, **given)
    assert_close(results, recurrence.apply(params, config, inputs, **given))


@each_cell
def test_the_recurrence_steps(cell, key):
    config = RecurrenceConfig(cell, num_layers=2, hidden_size=H)
    module, inputs, reset = linen.Recurrence(config), draw(0, B, D), np.array([True, False, False])
    carry = jax.tree.map(lambda leaf: draw(1, *leaf.shape), recurrence.zero_carry(config, inputs))
    variables = module.init(key, carry, inputs, method="step")
    results = module.apply(variables, carry, inputs, reset=reset, method="step")
    assert_close(results, recurrence.step(variables["params"], config, carry, inputs, reset=reset))


@pytest.mark.sampled
@each_decoder
def test_the_decoder_equals_the_pure_function(config, key):
    module, tokens = linen.Decoder(config), draw(0, B, T, N, D)
    params = module.init(key, tokens)["params"]
    assert_same_tree(params, decoders.init(key, config))
    assert_all_differ(params)
    reset, token_mask = np.zeros((B, T), bool), np.ones((B, T, N), bool)
    reset[:, 3], token_mask[:, 1, 0] = True, False
    given = {"timestep_mask": MASK, "token_mask": token_mask, "reset": reset}
    chunk = jax.jit(module.apply)({"params": params}, tokens, **given)
    assert_close(chunk, decoders.apply(params, config, tokens, **given))


def test_the_decoder_takes_targets_like_the_pure_function(key):
    config, tokens = DECODERS["encoder-decoder"], draw(0, B, T, N, D)
    targets = TeacherForcing(np.tanh(draw(1, B, T, 2, 7)), np.ones((B, T, 2), bool))
    params = decoders.init(key, config)
    chunk = linen.Decoder(config).apply({"params": params}, tokens, targets=targets)
    assert_close(chunk, decoders.apply(params, config, tokens, targets=targets))


@pytest.mark.sampled
@each_decoder
def test_the_decoder_streams(config, key):
    module, tokens = linen.Decoder(config), draw(0, B, T, N, D)
    variables = module.init(key, tokens)
    state = decoders.init_stream(variables["params"], config, B, mode="periodic")
    assert_same_tree(variables, module.init(key, state, tokens[:, 0], method="step"))
    expected_state, reset = state, np.array([True, False, False])
    for t in range(2):
        given = {"token_mask": np.array([[True, False]] * B), "reset": reset}
        state, chunk = module.apply(variables, state, tokens[:, t], **given, method="step")
        expected_state, expected = decoders.step(
            variables["params"], config, expected_state, tokens[:, t], **given
        )
        assert_close((state, chunk), (expected_state, expected))


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (linen.Recurrence(RecurrenceConfig(num_layers=2, hidden_size=H, dropout=0.5)), (B, T, D)),
        (linen.Decoder(DecoderConfig(dropout=0.5, **SIZES)), (B, T, N, D)),
    ],
    ids=["recurrence", "decoder"],
)
def test_dropout_uses_an_rng_and_is_off_by_default(module, inputs, key):
    inputs = draw(0, *inputs)
    variables = module.init(key, inputs)

    def run(number, deterministic=False):
        rngs = {"dropout": jax.random.key(number)}
        results = module.apply(variables, inputs, deterministic=deterministic, rngs=rngs)
        return jax.tree.leaves(results)[-1]

    plain = jax.tree.leaves(module.apply(variables, inputs))[-1]
    assert_close(run(0, deterministic=True), plain, atol=0)
    assert_close(run(0), run(0), atol=0)
    for other in (plain, run(1)):
        assert np.abs(run(0) - other).max() > 1e-3
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        module.apply(variables, inputs, deterministic=False)


def test_dropout_of_a_step_uses_an_rng_and_is_off_by_default(key):
    config = RecurrenceConfig(num_layers=2, hidden_size=H, dropout=0.5)
    module, inputs = linen.Recurrence(config), draw(0, B, D)
    carry = recurrence.zero_carry(config, inputs)
    variables = module.init(key, draw(0, B, T, D))

    def run(number, deterministic=False):
        return module.apply(
            variables, carry, inputs, deterministic=deterministic, method="step",
            rngs={"dropout": jax.random.key(number)},
        )[1]  # fmt: skip

    plain = module.apply(variables, carry, inputs, method="step")[1]
    assert_close(run(0, deterministic=True), plain, atol=0)
    for other in (plain, run(1)):
        assert np.abs(run(0) - other).max() > 1e-3


def test_params_of_another_size_are_refused_by_flax(key):
    module, config = linen.Recurrence(RecurrenceConfig(hidden_size=H)), RecurrenceConfig("gru")
    params = recurrence.init(key, config, D)
    with pytest.raises(flax.errors.ScopeParamShapeError):
        module.apply({"params": params}, draw(0, B, T, D))


class Policy(nn.Module):
    """A user's model that contains our decoder."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, images):
        tokens = nn.Dense(D, name="encoder")(images)
        return linen.Decoder(self.config, name="decoder")(tokens)


def test_the_decoder_is_trained_inside_a_flax_model(key):
    config, images = DECODERS["lstm"], draw(0, B, T, N, 7)
    model = Policy(config)
    variables = model.init(key, images)
    own = variables["params"]
    tokens = images @ np.asarray(own["encoder"]["kernel"]) + np.asarray(own["encoder"]["bias"])
    chunk = model.apply(variables, images)
    assert_close(chunk, decoders.apply(own["decoder"], config, tokens))

    def total(variables):
        return jnp.square(model.apply(variables, images).arm).sum()

    gradients = jax.jit(jax.grad(total))(variables)["params"]
    assert_same_tree(gradients["decoder"], own["decoder"])
    assert np.any(gradients["encoder"]["kernel"])
    assert np.any(gradients["decoder"]["recurrence"]["layers_0"]["forward"]["input_kernel"])


@pytest.mark.sampled
@each_decoder
def test_the_documented_conversion_to_nnx_runs(config, key):
    tokens = draw(0, B, T, N, D)

    decoder = nnx.bridge.ToNNX(linen.Decoder(config), rngs=nnx.Rngs(0)).lazy_init(tokens)
    params = nnx.to_pure_dict(nnx.state(decoder, nnx.Param))
    assert_close(decoder(tokens), decoders.apply(params, config, tokens))

    params = decoders.init(key, config)
    nnx.update(decoder, params)
    assert_close(decoder(tokens), decoders.apply(params, config, tokens))
    state = decoders.init_stream(params, config, B)
    assert_close(
        decoder.step(state, tokens[:, 0]), decoders.step(params, config, state, tokens[:, 0])
    )
    gradients = nnx.grad(lambda model: model(tokens).arm.sum())(decoder)
    expected = jax.grad(lambda params: decoders.apply(params, config, tokens).arm.sum())(params)
    assert_close(nnx.to_pure_dict(gradients), expected, atol=1e-5)


def test_dropout_in_nnx_differs_between_calls():
    tokens, module = draw(0, B, T, N, D), linen.Decoder(DecoderConfig(dropout=0.5, **SIZES))
    decoder = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0, dropout=1)).lazy_init(tokens)
    one, other = (decoder(tokens, deterministic=False).arm for _ in range(2))
    assert np.abs(one - other).max() > 1e-3
