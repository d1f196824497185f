"""The cuDNN LSTM: packed params against JAX's own unpacking and reference; calls on a GPU."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from jax.experimental import rnn

from vla_jax.nn import cudnn, recurrence, seq2seq
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.nn.seq2seq import Seq2SeqConfig
from vla_jax.policies import decoders
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.training import parallel

B, T, D, H, L = 3, 5, 4, 6, 3
each_padding = pytest.mark.parametrize("padding", ["right", "anywhere"])
each_way = pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both-ways"])


def configured(bidirectional, implementation="auto"):
    return RecurrenceConfig(
        "lstm", L, H, bidirectional=bidirectional, implementation=implementation
    )


def draw(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def cells_of(params, bidirectional):
    ways = ("forward", "backward") if bidirectional else ("forward",)
    return [params[f"layers_{layer}"][way] for layer in range(L) for way in ways]


@each_way
def test_jax_unpacks_the_packed_params(bidirectional, key):
    cells = cells_of(recurrence.init(key, configured(bidirectional), D), bidirectional)
    packed = cudnn.pack(cells)
    assert packed.shape == (rnn.get_num_params_in_lstm(D, H, L, bidirectional),)
    names = ("input_kernel", "recurrent_kernel", "input_bias", "recurrent_bias")
    unpacked = rnn.unpack_lstm_weights(packed, D, H, L, bidirectional)
    for name, found in zip(names, unpacked, strict=True):
        for place, cell in enumerate(cells):
            np.testing.assert_array_equal(np.asarray(found[place]).T, cell[name])


def test_jaxs_reference_with_packed_params_equals_ours(key):
    config, inputs = configured(bidirectional=False), draw(B, T, D)
    params = recurrence.init(key, config, D)
    weights = rnn.unpack_lstm_weights(cudnn.pack(cells_of(params, False)), D, H, L, False)
    zeros, lengths = np.zeros((L, B, H), np.float32), np.full((B,), T, np.int32)
    expected, *_ = rnn.lstm_ref(
        inputs, zeros, zeros, *weights, lengths, D, H, L, 0.0, False
    )  # fmt: skip
    _, outputs = recurrence.apply(params, config, inputs)
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-6)


@pytest.fixture
def reference(monkeypatch):
    """JAX's reference takes the place of cuDNN's LSTM, whose arguments it has."""

    def lstm(inputs, hidden, cell, packed, lengths, **sizes):
        layers = sizes["input_size"], sizes["hidden_size"], sizes["num_layers"]
        kernels = rnn.unpack_lstm_weights(packed, *layers, sizes["bidirectional"])
        last = (*layers, sizes["dropout"], sizes["bidirectional"])
        return rnn.lstm_ref(inputs, hidden, cell, *kernels, lengths, *last)

    monkeypatch.setattr(cudnn.rnn, "lstm", lstm)
    monkeypatch.setattr(cudnn.jax, "default_backend", lambda: "gpu")


MASKS = {
    "right": [[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]],
    "anywhere": [[0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 0, 1, 0]],
}


def check_padding(bidirectional, padding, key):
    """Compares cuDNN to our loop, with a mask, and with lengths if these say the same."""
    mask, inputs = np.array(MASKS[padding], bool), draw(B, T, D)
    inputs[~mask] = np.nan
    params = recurrence.init(key, configured(bidirectional), D)
    carry = recurrence.zero_carry(configured(bidirectional), inputs)
    carry = jax.tree.map(lambda leaf: leaf + draw(*leaf.shape), carry)

    def loss(params, inputs, carry, implementation, **flags):
        config = configured(bidirectional, implementation)
        last, outputs = recurrence.apply(params, config, inputs, carry=carry, **flags)
        leaves = jax.tree.leaves((last, outputs))
        return sum(jax.numpy.sum(jax.numpy.sin(leaf)) for leaf in leaves), (last, outputs)

    with jax.default_matmul_precision("highest"):
        gradient = jax.grad(loss, (0, 1, 2), has_aux=True)
        expected = gradient(params, inputs, carry, "bptt", mask=mask)
        others = [("cudnn", {"mask": mask})]
        if padding == "right":
            lengths = mask.sum(1).astype(np.int32)
            others += [(name, {"lengths": lengths}) for name in ("cudnn", "bptt")]
        for implementation, flags in others:
            found = gradient(params, inputs, carry, implementation, **flags)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), found, expected
            )
    _, outputs = expected[1]
    assert not np.any(np.asarray(outputs)[~mask])


@each_way
@each_padding
@pytest.mark.usefixtures("reference")
def test_outputs_carries_and_gradients_equal_ours_with_any_mask(bidirectional, padding, key):
    check_padding(bidirectional, padding, key)


@pytest.mark.usefixtures("reference")
def test_a_decoder_on_left_padded_windows_trains_as_with_our_loop(key):
    config = DecoderConfig(
        token_dim=D, hidden_size=H, num_layers=L, window_size=T, action_horizon=2, head_sizes=(4,)
    )
    params, tokens = decoders.init(key, config), draw(B, T, 1, D)
    mask = np.arange(T) >= np.array([[0], [T - 1], [2]])
    tokens[~mask] = np.nan

    def loss(params, implementation):
        chosen = dataclasses.replace(config, implementation=implementation)
        prediction = decoders.apply(params, chosen, tokens, timestep_mask=mask)
        return jax.numpy.sum(jax.numpy.sin(prediction.arm)), prediction

    found, expected = (
        jax.value_and_grad(loss, has_aux=True)(params, implementation)
        for implementation in ("cudnn", "auto")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), found, expected)


@pytest.mark.usefixtures("reference")
def test_every_device_runs_its_own_rows(monkeypatch, key):
    mesh, inputs, num_rows = parallel.make_mesh("fsdp=2,tensor=2"), draw(4, T, D), []
    mask = np.arange(T) >= np.arange(4)[:, None]
    params, lstm = recurrence.init(key, configured(bidirectional=False), D), cudnn.rnn.lstm

    def counted_lstm(inputs, *args, **sizes):
        num_rows.append(len(inputs))
        return lstm(inputs, *args, **sizes)

    def loss(implementation, params, inputs):
        config = configured(False, implementation)
        leaves = jax.tree.leaves(recurrence.apply(params, config, inputs, mask=mask))
        return sum(jax.numpy.sum(jax.numpy.sin(leaf)) for leaf in leaves)

    monkeypatch.setattr(cudnn.rnn, "lstm", counted_lstm)
    gradient = {name: jax.value_and_grad(partial(loss, name), (0, 1)) for name in ("cudnn", "auto")}
    found = jax.jit(parallel.on_mesh(gradient["cudnn"], mesh))(
        params, parallel.shard_batch(inputs, mesh)
    )
    expected = gradient["auto"](params, inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), found, expected)
    assert set(num_rows) == {2}


@pytest.mark.usefixtures("reference")
def test_an_encoder_decoder_encodes_padded_sources_as_with_our_loop(key):
    config = Seq2SeqConfig(embed_size=D, hidden_size=H, score_size=D)
    params, sources = seq2seq.init(key, config), np.arange(1, 1 + B * T).reshape(B, T)
    mask, targets = np.array(MASKS["right"], bool), np.ones((B, 2), int)
    found, expected = (
        seq2seq.teacher_forcing(
            params, chosen, seq2seq.encode(params, chosen, sources, mask=mask), targets
        )
        for chosen in (dataclasses.replace(config, implementation="cudnn"), config)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), found, expected)


def test_lengths_and_a_mask_are_refused_together(key):
    params = recurrence.init(key, configured(bidirectional=False), D)
    mask, lengths = np.ones((B, T), bool), np.full(B, T)
    with pytest.raises(ValueError, match="mask must be None with lengths, got both"):
        recurrence.apply(params, configured(False), draw(B, T, D), mask=mask, lengths=lengths)


@pytest.mark.gpu
@pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs an NVIDIA GPU: JAX_PLATFORMS=cuda,cpu"
)
@each_way
@each_padding
def test_on_a_gpu_results_with_any_mask_equal_ours(bidirectional, padding, key):
    check_padding(bidirectional, padding, key)


@pytest.mark.gpu
@pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs an NVIDIA GPU: JAX_PLATFORMS=cuda,cpu"
)
@each_way
def test_on_a_gpu_outputs_carries_and_gradients_equal_ours(bidirectional, key):
    inputs = draw(B, T, D)
    params = recurrence.init(key, configured(bidirectional), D)

    def loss(params, implementation):
        config = configured(bidirectional, implementation)
        carry, outputs = recurrence.apply(params, config, inputs)
        return sum(jax.numpy.sum(jax.numpy.sin(leaf)) for leaf in jax.tree.leaves((carry, outputs)))

    with jax.default_matmul_precision("highest"):
        theirs, ours = (
            jax.value_and_grad(loss)(params, implementation) for implementation in ("cudnn", "bptt")
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), theirs, ours)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there it runs")
def test_without_a_gpu_it_raises_one_sentence(key):
    config = configured(bidirectional=False, implementation="cudnn")
    params = recurrence.init(key, config, D)
    with pytest.raises(ValueError, match="'cudnn' needs an NVIDIA GPU, got cpu; choose 'auto'"):
        recurrence.apply(params, config, draw(B, T, D))


def test_resets_are_refused(key):
    config = configured(bidirectional=False, implementation="cudnn")
    params = recurrence.init(key, config, D)
    with pytest.raises(ValueError, match="reset must be None with implementation 'cudnn'"):
        recurrence.apply(params, config, draw(B, T, D), reset=np.ones((B, T), bool))


@pytest.mark.parametrize(
    "change",
    [
        {"cell": "gru"},
        {"dropout": 0.1},
        {"residual": True},
        {"remat_chunk": 4},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_an_unsupported_config_is_refused(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} must be .* with implementation 'cudnn', got"):
        RecurrenceConfig(**{"cell": "lstm", "implementation": "cudnn", **change})
