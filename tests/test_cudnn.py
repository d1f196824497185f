"""The cuDNN LSTM: packed params against JAX's own unpacking and reference; calls on a GPU."""

import jax
import numpy as np
import pytest
from jax.experimental import rnn

from vla_jax.nn import cudnn, recurrence
from vla_jax.nn.recurrence import RecurrenceConfig

B, T, D, H, L = 3, 5, 4, 6, 3
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


def check_lengths(bidirectional, key):
    """Compares cuDNN with lengths to our loop with a mask; steps after the length are NaN."""
    lengths, inputs = np.array([T, 1, 3], np.int32), draw(B, T, D)
    mask = np.arange(T) < lengths[:, None]
    inputs[~mask] = np.nan
    params = recurrence.init(key, configured(bidirectional), D)
    carry = recurrence.zero_carry(configured(bidirectional), inputs)
    carry = jax.tree.map(lambda leaf: leaf + draw(*leaf.shape), carry)

    def loss(params, inputs, implementation, **flags):
        config = configured(bidirectional, implementation)
        last, outputs = recurrence.apply(params, config, inputs, carry=carry, **flags)
        leaves = jax.tree.leaves((last, outputs))
        return sum(jax.numpy.sum(jax.numpy.sin(leaf)) for leaf in leaves), (last, outputs)

    with jax.default_matmul_precision("highest"):
        gradient = jax.grad(loss, (0, 1), has_aux=True)
        expected = gradient(params, inputs, "bptt", mask=mask)
        for implementation in ("cudnn", "bptt"):
            found = gradient(params, inputs, implementation, lengths=lengths)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), found, expected
            )


@each_way
@pytest.mark.usefixtures("reference")
def test_lengths_equal_a_mask_of_padding_on_the_right(bidirectional, key):
    check_lengths(bidirectional, key)


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
def test_on_a_gpu_lengths_equal_a_mask_of_padding_on_the_right(bidirectional, key):
    check_lengths(bidirectional, key)


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


@pytest.mark.parametrize("flags", ["mask", "reset"])
def test_masks_and_resets_are_refused(flags, key):
    config = configured(bidirectional=False, implementation="cudnn")
    params = recurrence.init(key, config, D)
    with pytest.raises(ValueError, match="mask and reset must be None with implementation 'cudnn'"):
        recurrence.apply(params, config, draw(B, T, D), **{flags: np.ones((B, T), bool)})


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
