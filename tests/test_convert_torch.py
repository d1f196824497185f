"""RNN, LSTM and GRU of PyTorch and ours agree: outputs, carries, gradients, streaming, files."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from vla_jax import convert
from vla_jax.nn import recurrence
from vla_jax.nn.recurrence import RecurrenceConfig

torch.set_num_threads(1)

B, T, D, H = 4, 6, 3, 5
LENGTHS = np.array([6, 2, 4, 1])
MODULES: dict[str, Any] = {"rnn": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}

each_cell = pytest.mark.parametrize("cell", MODULES)
each_module = pytest.mark.parametrize(
    ("cell", "num_layers", "bidirectional"),
    [(cell, n, both) for cell in MODULES for n in (1, 2, 3) for both in (False, True)],
)

apply = jax.jit(recurrence.apply, static_argnames="config")
step = jax.jit(recurrence.step, static_argnames="config")


def make_module(cell, num_layers=1, bidirectional=False, **kwargs):
    torch.manual_seed(0)
    return MODULES[cell](D, H, num_layers, batch_first=True, bidirectional=bidirectional, **kwargs)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def leaf(array):
    return torch.from_numpy(array).requires_grad_()


def our_carry(config, hidden, cell):
    """Converts PyTorch's carry `[L · directions, B, H]` to ours."""
    zeros = recurrence.zero_carry(config, np.zeros((B, 1)))
    directions = [(name, direction) for name in zeros for direction in zeros[name]]
    carry: dict[str, Any] = {name: {} for name in zeros}
    for place, (name, direction) in enumerate(directions):
        kept = type(zeros[name][direction])
        carry[name][direction] = kept(*(x[place] for x in (hidden, cell)[: len(kept._fields)]))
    return carry


def assert_close(one, other):
    """Asserts agreement to 1e-6 · max(1, largest number of the array).

    Outputs are of order 1; gradients are sums over batch and time, each rounded to 6e-8.
    """
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(1.0, np.abs(b).max()))


def assert_same_bytes(one, other):
    assert list(one) == list(other)
    for name, array in one.items():
        expected = np.asarray(other[name])
        assert array.shape == expected.shape
        assert array.dtype == expected.dtype
        assert array.tobytes() == expected.tobytes()


def run_torch(module, inputs, hidden, cell):
    """Returns outputs and carry of padded rows, run as a packed sequence."""
    packed = pack_padded_sequence(
        inputs, torch.from_numpy(LENGTHS), batch_first=True, enforce_sorted=False
    )
    lstm = isinstance(module, torch.nn.LSTM)
    outputs, last = module(packed, (hidden, cell) if lstm else hidden)
    outputs, _ = pad_packed_sequence(outputs, batch_first=True, total_length=T)
    return outputs, last if lstm else (last,)


@pytest.mark.sampled
@each_module
def test_outputs_carries_and_gradients_agree_with_pytorch(cell, num_layers, bidirectional):
    module = make_module(cell, num_layers, bidirectional)
    config, params = convert.from_torch(module.state_dict())
    places = num_layers * (1 + bidirectional)
    x, hidden, memory = draw(0, B, T, D), draw(1, places, B, H), draw(2, places, B, H)
    weights, last_weights = draw(3, B, T, H * (1 + bidirectional)), draw(4, places, B, H)

    given = [leaf(array) for array in (x, hidden, memory)]
    outputs, last = run_torch(module, *given)
    loss = (outputs * torch.from_numpy(weights)).sum()
    (loss + sum((part * torch.from_numpy(last_weights)).sum() for part in last)).backward()

    mask = np.arange(T) < LENGTHS[:, None]
    carry = our_carry(config, hidden, memory)
    carry_weights = our_carry(config, last_weights, last_weights)

    @jax.jit
    @jax.grad
    def gradients(arguments):
        params, x, carry = arguments
        last, outputs = recurrence.apply(params, config, x, mask=mask, carry=carry)
        ends = jax.tree.map(lambda part, weight: (part * weight).sum(), last, carry_weights)
        return (outputs * weights).sum() + sum(jax.tree.leaves(ends))

    ours = apply(params, config, x, mask=mask, carry=carry)
    theirs = [part.detach().numpy() for part in (outputs, *last)]
    expected_last = our_carry(config, theirs[1], theirs[-1])
    assert_close(ours, (expected_last, theirs[0]))
    by_params, by_inputs, by_carry = gradients((params, x, carry))
    expected = {name: p.grad.numpy() for name, p in module.named_parameters()}
    assert_close(convert.to_torch(config, by_params), expected)
    grads = [None if part.grad is None else part.grad.numpy() for part in given]
    assert_close(by_inputs, grads[0])
    assert_close(by_carry, our_carry(config, *grads[1:]))


@each_module
def test_a_round_trip_of_tensors_preserves_bytes(cell, num_layers, bidirectional):
    module = make_module(cell, num_layers, bidirectional)
    config, params = convert.from_torch(module.state_dict())
    assert config == RecurrenceConfig(cell, num_layers, H, bidirectional=bidirectional)
    tensors = convert.to_torch(config, params)
    assert_same_bytes(tensors, module.state_dict())
    other = MODULES[cell](D, H, num_layers, bidirectional=bidirectional)
    other.load_state_dict({name: torch.from_numpy(x) for name, x in tensors.items()})
    assert_same_bytes(tensors, other.state_dict())


@each_cell
def test_a_round_trip_of_params_preserves_them(cell, key):
    config = RecurrenceConfig(cell, num_layers=2, hidden_size=H, bidirectional=True)
    params = recurrence.init(key, config, D)
    again, converted = convert.from_torch(convert.to_torch(config, params))
    assert again == config
    assert jax.tree.structure(converted) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, converted, params))


@each_cell
def test_streaming_agrees_with_pytorch_one_step_at_a_time(cell):
    module = make_module(cell, num_layers=2)
    config, params = convert.from_torch(module.state_dict())
    x, state = draw(0, B, T, D), None
    carry = recurrence.zero_carry(config, x)
    for t in range(T):
        carry, output = step(params, config, carry, x[:, t])
        with torch.no_grad():
            expected, state = module(torch.from_numpy(x[:, t : t + 1]), state)
        assert_close(output, expected[:, 0])
    hidden, memory = state if cell == "lstm" else (state, state)
    assert_close(carry, our_carry(config, hidden.numpy(), memory.numpy()))


@each_cell
def test_a_module_without_biases_gets_zeros_and_a_round_trip_omits_them(cell):
    module = make_module(cell, 2, True, bias=False)
    config, params = convert.from_torch(module.state_dict())
    x = draw(0, B, T, D)
    with torch.no_grad():
        expected, _ = module(torch.from_numpy(x))
    assert_close(apply(params, config, x)[1], expected)
    assert not any(
        np.any(x) for name, x in convert.to_torch(config, params).items() if name.startswith("bias")
    )
    assert_same_bytes(convert.to_torch(config, params, bias=False), module.state_dict())


def test_a_prefix_selects_a_part_of_a_larger_module():
    model = torch.nn.ModuleDict({"rnn": make_module("gru"), "head": torch.nn.Linear(H, 2)})
    config, params = convert.from_torch(model.state_dict(), prefix="rnn.")
    own = {name: x for name, x in model.state_dict().items() if name.startswith("rnn.")}
    assert_same_bytes(convert.to_torch(config, params, prefix="rnn."), own)


@each_cell
def test_a_conversion_copies_the_tensors(cell):
    """PyTorch optimizers change tensors in place."""
    module = make_module(cell)
    config, params = convert.from_torch(module.state_dict())
    before = jax.tree.map(np.array, params)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert jax.tree.all(jax.tree.map(np.array_equal, params, before))
    tensors = convert.to_torch(config, params)
    for array in tensors.values():
        array[...] = 0.0
    assert jax.tree.all(jax.tree.map(np.array_equal, params, before))


def without(name, tensors):
    return {own: tensor for own, tensor in tensors.items() if own != name}


WRONG = {
    "nothing": (
        lambda given: {},
        "input_size and hidden_size cannot .*: weight_ih_l0, weight_hh_l0, bias_ih_l0, bias_hh",
    ),
    "another prefix": (
        lambda given: {f"rnn.{name}": tensor for name, tensor in given.items()},
        "missing .*; `prefix` must be the prefix of the names, got '' and rnn.weight_ih_l0, ",
    ),
    "not a matrix": (
        lambda given: given | {"weight_hh_l0": np.zeros(3, np.float32)},
        r"of another shape: weight_hh_l0 \(expected \[20, 5\], got \[3\]\)",
    ),
    "another cell": (
        lambda given: given | {"weight_hh_l0": np.zeros((2 * H, H), np.float32)},
        r"weight_hh_l0 must have 1, 3 or 4 times as many rows .* got \[10, 5\]",
    ),
    "no units": (
        lambda given: given | {"weight_hh_l0": np.zeros((0, 0), np.float32)},
        r"of another shape: weight_hh_l0 \(expected \[20, 5\], got \[0, 0\]\)",
    ),
    "missing": (
        lambda given: without("bias_hh_l1", given),
        "must be all those of one torch.nn.RNN, .* got 1 missing: bias_hh_l1; give its complete",
    ),
    "a layer in one direction": (
        lambda given: given | {"weight_ih_l0_reverse": np.zeros((4 * H, D), np.float32)},
        "7 missing: weight_hh_l0_reverse, bias_ih_l0_reverse, .*; 1 of another shape: weight_ih_l1 "
        r"\(expected \[20, 10\], got \[20, 5\]\)",
    ),
    "a layer left out": (
        lambda given: {name.replace("l1", "l2"): tensor for name, tensor in given.items()},
        "4 missing: weight_ih_l1, weight_hh_l1, bias_ih_l1, bias_hh_l1; give",
    ),
    "left over": (
        lambda given: given | {f"head.{number}": np.zeros(1) for number in range(10)},
        "10 left over: head.0, .* head.5 and 4 more;",
    ),
    "misshapen": (
        lambda given: given | {"bias_ih_l0": np.zeros(3, np.float32)},
        r"of another shape: bias_ih_l0 \(expected \[20\], got \[3\]\)",
    ),
    "double precision": (
        lambda given: given | {"bias_ih_l0": given["bias_ih_l0"].double()},
        "bias_ih_l0 must be floating point of 32 or 16 bits, got float64; save it as float32",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_tensors_raise_one_sentence(wrong):
    change, sentence = WRONG[wrong]
    with pytest.raises(ValueError, match=sentence):
        convert.from_torch(change(dict(make_module("lstm", 2).state_dict())))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32_with_one_warning(dtype):
    module = make_module("gru", 2).to(dtype)
    with pytest.warns(UserWarning, match=f"8 tensors cast from {str(dtype)[6:]} to float32"):
        config, params = convert.from_torch(module.state_dict())
    assert_same_bytes(convert.to_torch(config, params), module.float().state_dict())


def test_parameters_that_require_gradients_are_accepted():
    module = make_module("lstm")
    config, params = convert.from_torch(dict(module.named_parameters()))
    assert_same_bytes(convert.to_torch(config, params), module.state_dict())


def test_every_tensor_is_in_one_part_of_the_report():
    given = {f"rnn.{name}": x for name, x in make_module("gru").state_dict().items()}
    config, _ = convert.from_torch(given, prefix="rnn.")
    given["head"] = given.pop("rnn.bias_hh_l0")
    given["rnn.bias_ih_l0"] = given["rnn.bias_ih_l0"][:4]
    report = convert.report_torch(given, config, prefix="rnn.")
    assert list(report.used) == ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert report.missing == {"rnn.bias_hh_l0": (15,)}
    assert report.left_over == {"head": (15,)}
    assert report.misshapen == {"rnn.bias_ih_l0": ((15,), (4,))}


def test_swapped_config_and_params_raise_one_sentence():
    config, params = convert.from_torch(make_module("gru").state_dict())
    with pytest.raises(
        ValueError, match="config must be a RecurrenceConfig, got a dict; it is the"
    ):
        convert.to_torch(params, config)  # pyright: ignore[reportArgumentType]


def test_projections_are_refused():
    module = make_module("lstm", proj_size=2)
    with pytest.raises(
        ValueError, match=r"proj_size must be 0, got .* \(weight_hr_l0\); vla_jax has"
    ):
        convert.from_torch(module.state_dict())


def test_omitting_nonzero_biases_raises(key):
    config = RecurrenceConfig("gru", hidden_size=H)
    params = recurrence.init(key, config, D)
    with pytest.raises(ValueError, match="needs biases of zero, got nonzero bias_ih_l0, bias_hh"):
        convert.to_torch(config, params, bias=False)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"cell": "min_gru"},
            r"must be one that PyTorch has \(rnn, gru, lstm\), got 'min_gru'",
        ),
        ({"cell": "layer_norm_lstm"}, "cell must be one that PyTorch has .* got 'layer_norm_lstm'"),
        ({"residual": True}, "residual must be False, got True: torch.nn.RNN"),
    ],
)
def test_cells_that_pytorch_does_not_have_raise_one_sentence(fields, sentence, key):
    config = RecurrenceConfig(hidden_size=H, **fields)
    with pytest.raises(ValueError, match=sentence):
        convert.to_torch(config, recurrence.init(key, config, D))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"num_layers": 2}, "params must be .* missing: layers_1/forward/input_b"),
        ({"cell": "gru"}, r"of another shape: layers_0/.*kernel \(expected \[3, 15\],"),
        ({"bidirectional": True}, "params must be .* missing: layers_0/backward/input_b"),
    ],
)
def test_params_of_another_config_raise_one_sentence(fields, sentence, key):
    params = recurrence.init(key, RecurrenceConfig(hidden_size=H), D)
    with pytest.raises(ValueError, match=sentence):
        convert.to_torch(RecurrenceConfig(**{"hidden_size": H, **fields}), params)


def test_more_params_than_the_config_has_raise_one_sentence(key):
    params = recurrence.init(key, RecurrenceConfig(hidden_size=H, num_layers=2), D)
    with pytest.raises(ValueError, match="left over: layers_1/forward/input_kernel, "):
        convert.to_torch(RecurrenceConfig(hidden_size=H), params)


def test_the_documented_example_runs():
    """docs: From torch.nn and Flax."""
    tokens = jnp.asarray(draw(0, B, T, D))
    module = make_module("lstm", num_layers=2)

    config, params = convert.from_torch(module.state_dict())
    carry, outputs = recurrence.apply(params, config, tokens)
    tensors = convert.to_torch(config, params)
    module.load_state_dict({name: torch.from_numpy(x) for name, x in tensors.items()})

    with torch.no_grad():
        expected, _ = module(torch.from_numpy(np.array(tokens)))
    assert_close(outputs, expected)
    assert carry["layers_1"]["forward"].cell.shape == (B, H)
