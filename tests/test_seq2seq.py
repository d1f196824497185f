"""Laws of the encoder-decoder, over cells, scores, directions and kinds; agreement with PyTorch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from vla_jax import convert
from vla_jax.nn import seq2seq
from vla_jax.nn.seq2seq import Seq2SeqConfig
from vla_jax.training import losses

torch.set_num_threads(1)

B, S, T, H, E = 4, 5, 3, 6, 7
SIZES = {"source_size": 8, "target_size": 5, "embed_size": E, "hidden_size": H, "score_size": 4}
CONFIGS = {
    "rnn-additive": Seq2SeqConfig(**SIZES, cell="rnn"),
    "lstm-general-stacked": Seq2SeqConfig(**SIZES, score="general", num_layers=2),
    "gru-scaled-fed": Seq2SeqConfig(**SIZES, cell="gru", score="scaled_dot", feed_context=True),
    "lstm-dot-one-way": Seq2SeqConfig(**SIZES, score="dot", bidirectional=False),
    "gru-bottleneck": Seq2SeqConfig(**SIZES, cell="gru", score="none"),
    "vectors": Seq2SeqConfig(**SIZES, source="vectors", target="vectors"),
}
LENGTHS = np.array([5, 2, 4, 1])
MASK = np.arange(S) < LENGTHS[:, None]
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def make_sequence(kind, seed, steps, size):
    rng = np.random.default_rng(seed)
    if kind == "tokens":
        return rng.integers(1, size, (B, steps))
    return rng.normal(size=(B, steps, size)).astype(np.float32)


init = jax.jit(seq2seq.init, static_argnums=1)


def prepare(config):
    params = init(jax.random.key(0), config)
    source = make_sequence(config.source, 0, S, config.source_size)
    return params, source, make_sequence(config.target, 1, T, config.target_size)


def run(params, config, source, targets, mask=None, key=None):
    memory = seq2seq.encode(params, config, source, mask=mask, key=key)
    return seq2seq.teacher_forcing(params, config, memory, targets, key=key)


jit_run = jax.jit(run, static_argnums=1)
encode = jax.jit(seq2seq.encode, static_argnums=1)
step = jax.jit(seq2seq.step, static_argnums=1)


def assert_close(one, other, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), one, other)


@pytest.mark.sampled
@each_config
def test_teacher_forcing_equals_single_steps(config):
    params, source, targets = prepare(config)
    memory = encode(params, config, source, mask=MASK)
    state, inputs = seq2seq.start(params, config, memory)
    whole = jit_run(params, config, source, targets, MASK)
    for t in range(T):
        state, decoded = step(params, config, memory, state, inputs)
        assert_close(decoded, jax.tree.map(lambda part, t=t: part[:, t], whole))
        inputs = seq2seq.embed(params, config, targets[:, t])


@pytest.mark.sampled
@each_config
def test_padding_equals_truncation(config):
    params, source, targets = prepare(config)
    dirty = np.where(MASK if source.ndim == 2 else MASK[..., None], source, 7)
    whole = jit_run(params, config, dirty, targets, MASK)
    cut = jit_run(params, config, source[1:2, : LENGTHS[1]], targets[1:2])
    assert_close(whole.outputs[1:2], cut.outputs)
    if whole.weights is not None:
        assert_close(whole.weights[1:2, :, : LENGTHS[1]], cut.weights)


@each_config
def test_weights_sum_to_1_over_the_real_positions(config):
    params, source, targets = prepare(config)
    weights = jit_run(params, config, source, targets, MASK).weights
    assert (weights is None) == (config.score == "none")
    if weights is not None:
        assert weights.shape == (B, T, S)
        assert_close(weights.sum(axis=-1), np.ones((B, T)))
        assert not (np.asarray(weights) * ~MASK[:, None]).any()


@pytest.mark.sampled
@each_config
def test_an_output_depends_on_the_whole_source_and_on_the_previous_targets(config):
    params, source, targets = prepare(config)
    plain = jit_run(params, config, source, targets).outputs
    for place in (0, S - 1):
        changed = source.copy()
        changed[:, place] = source[:, (place + 2) % S]
        outputs = jit_run(params, config, changed, targets).outputs
        differs = np.abs(outputs - plain).max(axis=(1, 2)) > 1e-6
        assert (differs == (changed != source).reshape(B, -1).any(axis=1)).all()
    changed = targets.copy()
    changed[:, 1] = (targets[:, 1] + 1) % 5
    outputs = jit_run(params, config, source, changed).outputs
    assert_close(outputs[:, :2], plain[:, :2])
    assert (np.abs(outputs[:, 2] - plain[:, 2]).max(axis=1) > 1e-6).all()


@pytest.mark.sampled
@each_config
def test_jit_and_vmap_change_nothing(config):
    params, source, targets = prepare(config)
    expected = run(params, config, source, targets, MASK)
    assert_close(jit_run(params, config, source, targets, MASK), expected)
    mapped = jax.jit(jax.vmap(lambda *row: run(params, config, *row)))(
        source[:, None], targets[:, None], MASK[:, None]
    )
    assert_close(jax.tree.map(lambda part: part[:, 0], mapped), expected)


@pytest.mark.sampled
@each_config
def test_every_param_gets_a_finite_gradient_even_with_an_empty_source(config):
    params, source, targets = prepare(config)
    mask = MASK & (np.arange(B) != 1)[:, None]

    @jax.jit
    @jax.grad
    def gradients(params):
        outputs = run(params, config, source, targets, mask).outputs
        if config.target == "vectors":
            return jnp.square(outputs - targets).sum()
        return losses.token_loss(outputs, targets, seq2seq.target_mask(targets))[0]

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients(params)):
        assert np.isfinite(leaf).all(), path
        assert leaf.any(), path


def test_without_attention_the_memory_is_only_the_carry():
    config = CONFIGS["gru-bottleneck"]
    params, source, _ = prepare(config)
    memory = encode(params, config, source)
    assert memory.source is None
    assert jax.tree.leaves(memory.carry)[0].shape == (B, H)


@pytest.mark.parametrize("name", ["lstm-general-stacked", "gru-scaled-fed", "gru-bottleneck"])
def test_dropout_needs_a_key(name, key):
    config = CONFIGS[name]
    dropping = dataclasses.replace(config, dropout=0.5)
    params, source, targets = prepare(config)
    plain = jit_run(params, config, source, targets).outputs
    assert_close(jit_run(params, dropping, source, targets).outputs, plain, atol=0)
    dropped = jit_run(params, dropping, source, targets, key=key).outputs
    assert np.abs(dropped - plain).max() > 1e-3


@pytest.mark.parametrize("name", ["rnn-additive", "gru-scaled-fed"])
def test_bfloat16_products_give_float32_outputs(name):
    config = CONFIGS[name]
    params, source, targets = prepare(config)
    half = jit_run(params, dataclasses.replace(config, dtype="bfloat16"), source, targets)
    assert_close(half, jit_run(params, config, source, targets), atol=0.1)
    assert {part.dtype for part in half} == {jnp.dtype("float32")}


def test_a_target_is_masked_after_its_end():
    mask = seq2seq.target_mask(np.array([[3, 1, 0, 0], [0, 0, 0, 0], [2, 2, 2, 2]]))
    np.testing.assert_array_equal(mask, [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])


# --- PyTorch ----------------------------------------------------------------------------------


def torch_params(params):
    return jax.tree.map(lambda leaf: torch.from_numpy(np.array(leaf)), params)


def torch_affine(inputs, p):
    return inputs @ p["kernel"] + p["bias"]


def torch_run(config, params, encoder, decoder, source, targets):
    """The same in PyTorch: packed sequences, attention by `bmm` and `softmax`."""
    p = torch_params(params)
    embedded = p["source"]["embedding"][torch.from_numpy(source)]
    packed = pack_padded_sequence(
        embedded, torch.from_numpy(LENGTHS), batch_first=True, enforce_sorted=False
    )
    states, last = encoder(packed)
    states, _ = pad_packed_sequence(states, batch_first=True, total_length=S)
    last = last if isinstance(last, tuple) else (last,)
    bridge = p["bridge"]["layers_0"]
    names = ("hidden", "cell")[: len(last)]
    first = [
        torch.tanh(torch_affine(torch.cat([part[0], part[1]], dim=-1), bridge[name]))[None]
        for name, part in zip(names, last, strict=True)
    ]
    embedded = p["target"]["embedding"][torch.from_numpy(targets[:, :-1])]
    inputs = torch.cat([p["start"].expand(B, 1, E), embedded], dim=1)
    hidden, _ = decoder(inputs, tuple(first) if len(first) > 1 else first[0])
    scores = torch.bmm(hidden, (states @ p["attention"]["key_kernel"]).transpose(1, 2))
    weights = scores.masked_fill(~torch.from_numpy(MASK)[:, None], -torch.inf).softmax(dim=-1)
    both = torch.cat([hidden, torch.bmm(weights, states)], dim=-1)
    return torch_affine(torch.tanh(torch_affine(both, p["combine"])), p["output"]), weights


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_outputs_and_weights_equal_pytorch(cell):
    torch.manual_seed(0)
    config = Seq2SeqConfig(**SIZES, cell=cell, score="general")
    params, source, targets = prepare(config)
    module = {"rnn": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[cell]
    encoder, decoder = (
        module(E, H, batch_first=True, bidirectional=both) for both in (True, False)
    )
    for name, part in (("encoder", encoder), ("decoder", decoder)):
        _, params[name] = convert.from_torch(part.state_dict())
    with torch.no_grad():
        expected = torch_run(config, params, encoder, decoder, source, targets)
    ours = jit_run(params, config, source, targets, MASK)
    assert_close(tuple(ours), tuple(part.numpy() for part in expected))


# --- wrong input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"source": "words"}, "unknown source 'words'; choose from tokens, vectors"),
        ({"target": "vector"}, "unknown target 'vector'; .* Did you mean 'vectors'"),
        ({"score": "aditive"}, "unknown score 'aditive'; .* Did you mean 'additive'"),
        ({"source_size": 0}, "source_size must be at least 1, got 0"),
        ({"embed_size": 0}, "embed_size must be at least 1, got 0"),
        ({"cell": "lstmm"}, "unknown cell 'lstmm'; .* Did you mean 'lstm'"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        (
            {"score": "none", "feed_context": True},
            "feed_context must be False with score 'none', got True; choose a score",
        ),
        (
            {"score": "dot"},
            "bidirectional must be False with score 'dot', got True; choose score 'general'",
        ),
    ],
)
def test_a_wrong_config_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        Seq2SeqConfig(**{**SIZES, **fields})


def test_a_memory_without_a_source_is_refused():
    config = CONFIGS["rnn-additive"]
    params, source, targets = prepare(config)
    memory = encode(params, config, source)._replace(source=None)
    with pytest.raises(ValueError, match=r"memory.source must not be None with attention"):
        seq2seq.teacher_forcing(params, config, memory, targets)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("vectors", np.zeros((B, S, 9), np.float32)),
        ("rnn-additive", np.zeros((B, S), np.float32)),
        ("rnn-additive", np.zeros((B, S, 2), int)),
    ],
)
def test_a_source_of_another_kind_or_size_is_refused(name, source, key):
    config = CONFIGS[name]
    with pytest.raises(AssertionError, match="assert_"):
        seq2seq.encode(seq2seq.init(key, config), config, source)


@pytest.mark.parametrize("is_negative", [False, True])
def test_ids_outside_the_table_are_not_those_of_its_last_row(is_negative, key):
    config = CONFIGS["rnn-additive"]
    params = seq2seq.init(key, config)
    size = config.target_size
    wrong = -1 if is_negative else size
    embedded = np.asarray(seq2seq.embed(params, config, np.array([0, size - 1, wrong])))
    assert np.isfinite(embedded[:2]).all()
    assert np.isnan(embedded[2]).all()
    source = np.full((B, S), -1 if is_negative else config.source_size)
    assert np.isnan(np.asarray(encode(params, config, source).source.values)).all()
