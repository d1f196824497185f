"""RoboVLMs' heads to ours and back: the identity, and nothing is skipped in silence."""

import math
import re
from typing import get_args

import jax
import numpy as np
import pytest
import torch
from robovlms_heads import SIZES, assert_same, their_head, their_shapes

from vla_jax import convert, decoders
from vla_jax.convert.robovlms_names import places_of
from vla_jax.decoders import DecoderConfig

KINDS = get_args(decoders.Kind)
each_kind = pytest.mark.parametrize("kind", KINDS)


def sort(tensors):
    return dict(sorted(tensors.items()))


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


# --- there and back ---------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("latent", [1, 2])
@pytest.mark.parametrize(("layers", "chunk", "hidden"), [(1, 10, 6), (4, 1, 4), (11, 2, 4)])
def test_there_and_back_is_the_identity_and_the_sizes_are_read_off(
    kind, latent, layers, chunk, hidden
):
    theirs = their_head(kind, layers=layers, latent=latent, chunk=chunk, hidden=hidden)
    config, params = convert.from_robovlms(theirs, window_size=5, num_latents=latent, num_heads=2)
    assert_same(convert.to_robovlms(config, params), sort(theirs))
    expected = decoders.DecoderConfig(
        kind=kind,
        token_dim=6,
        num_tokens=0,
        window_size=5,
        action_horizon=chunk,
        hidden_size=hidden * latent,
        num_layers=1 if kind == "fc" else layers,
        num_heads=2,
        num_latents=latent,
        head_sizes=SIZES,
    )
    assert config == expected
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}


@each_kind
def test_the_params_are_what_the_decoder_expects(kind):
    config, params = convert.from_robovlms(their_head(kind, latent=2), num_latents=2, num_heads=2)
    tokens = np.random.default_rng(0).normal(size=(2, 3, 7, 6)).astype(np.float32)
    chunk = decoders.apply(params, config, tokens)
    assert chunk.arm.shape == (2, 3, 2, 6)
    assert chunk.gripper_logit.shape == (2, 3, 2)


def test_with_pooling_none_a_step_has_as_many_tokens_as_latents():
    theirs = their_head("lstm", latent=3)
    config, params = convert.from_robovlms(theirs, pooling="none", num_latents=3)
    assert (config.num_tokens, config.token_dim) == (3, 6)
    joined, _ = convert.from_robovlms(theirs, pooling="none", num_tokens=2)
    assert (joined.num_tokens, joined.token_dim) == (2, 9)
    tokens = np.random.default_rng(0).normal(size=(2, 3, 3, 6)).astype(np.float32)
    pooled = convert.from_robovlms(theirs, num_latents=3)  # over bins of one token each
    for one, other in zip(
        decoders.apply(params, config, tokens),
        decoders.apply(pooled[1], pooled[0], tokens),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_a_head_of_kosmos_size_has_as_many_tensors_and_parameters_as_theirs():
    sizes = {"in_features": 2048, "hidden": 1024, "layers": 4, "chunk": 10}
    shapes = their_shapes("lstm", **sizes, sizes=(1024, 512, 256))
    config = DecoderConfig(token_dim=2048, num_tokens=1)  # the other defaults are theirs
    places = places_of(config)
    assert {f"act_head.{name}": place.theirs for name, place in places.items()} == shapes
    params = jax.eval_shape(lambda key: decoders.init(key, config), jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == 41_210_950
    assert len(shapes) == 32


@pytest.mark.parametrize("order", ["", "act_head.", "model.act_head.", "module.model.act_head."])
@pytest.mark.parametrize("more", ["", "model.module."])
def test_prefixes_are_stripped_at_the_front(order, more):
    theirs = their_head("lstm")
    named = {more + order + name.removeprefix("act_head."): x for name, x in theirs.items()}
    assert_same(convert.to_robovlms(*convert.from_robovlms(named)), sort(theirs))


def test_torch_tensors_and_jax_arrays_go_in_as_they_are():
    theirs = their_head("gru")
    for make in (torch.from_numpy, jax.numpy.asarray):
        tensors = {name: make(tensor) for name, tensor in theirs.items()}
        assert_same(convert.to_robovlms(*convert.from_robovlms(tensors)), sort(theirs))


def test_params_do_not_share_memory_with_the_tensors():
    theirs = their_head("fc", in_features=64)
    config, params = convert.from_robovlms(theirs)
    before = convert.to_robovlms(config, params)
    for tensor in theirs.values():
        tensor[:] = 0
    assert_same(convert.to_robovlms(config, params), before)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_dtypes_become_float32_and_a_line_says_so(dtype):
    theirs = their_head("lstm")
    tensors = {name: torch.from_numpy(x).to(getattr(torch, dtype)) for name, x in theirs.items()}
    with pytest.warns(UserWarning, match=f"20 tensors became float32, from {dtype}"):
        config, params = convert.from_robovlms(tensors)
    expected = {name: tensor.to(torch.float32).numpy() for name, tensor in tensors.items()}
    assert_same(convert.to_robovlms(config, params), sort(expected))
    assert convert.report_robovlms(tensors, config).cast == dict.fromkeys(theirs, dtype)


# --- what does not fit ------------------------------------------------------------------------


def test_every_tensor_is_in_one_part_of_the_report():
    theirs = their_head("lstm") | {"model.vision.weight": np.zeros((2, 3)), "epoch": np.zeros(())}
    with pytest.warns(UserWarning, match="2 tensors beside the head are left over"):
        config, _ = convert.from_robovlms(theirs)
    theirs["act_head.rnn.extra"] = np.zeros(4)
    theirs["act_head.gripper.mlp.0.bias"] = np.zeros(3)
    report = convert.report_robovlms(without(theirs, "act_head.actions.mlp.0.bias"), config)
    assert report.missing == {"act_head.actions.mlp.0.bias": (16,)}
    assert report.misshapen == {"act_head.gripper.mlp.0.bias": ((16,), (3,))}
    assert report.left_over == {
        "model.vision.weight": (2, 3),
        "epoch": (),
        "act_head.rnn.extra": (4,),
    }
    assert set(theirs) == {*report.used, *report.missing, *report.misshapen, *report.left_over}
    assert len(report.used) == len(theirs) - 5


def expect(sentence, tensors, **options):
    with pytest.raises(ValueError, match=sentence) as caught:
        convert.from_robovlms(tensors, **options)
    assert "\n" not in str(caught.value)


@each_kind
def test_every_missing_tensor_is_told(kind):
    theirs = their_head(kind)
    for name in theirs:
        told = rf"{re.escape(name)} is missing|1 missing: {re.escape(name)};"
        expect(told, without(theirs, name), num_heads=2)


@each_kind
@pytest.mark.parametrize("start", [0, 1])
def test_half_of_a_head_is_refused(kind, start):
    theirs = their_head(kind)
    expect("missing", {name: theirs[name] for name in list(theirs)[start::2]})


@each_kind
def test_what_is_left_over_inside_the_head_is_refused(kind):
    for name in ("act_head.rnn.weight_ih_l0_reverse", "act_head.actions.module.bias", "act_head.x"):
        if kind in ("fc", "gpt") and "rnn" in name:
            continue
        expect(f"1 left over: {name}", their_head(kind) | {name: np.zeros(3)}, num_heads=2)


MISSHAPEN = {
    "a bias": ({"act_head.rnn.bias_hh_l1": (9,)}, r"bias_hh_l1 \(expected \[16\], got \[9\]\)"),
    "a chunk": ({"act_head.actions.mlp.4.weight": (13, 8)}, r"expected \[12, 8\], got \[13, 8\]"),
    "a rank": ({"act_head.rnn.weight_ih_l0": (16,)}, "weight_ih_l0 is missing, or not a matrix"),
    "gates": (
        {"act_head.rnn.weight_hh_l0": (20, 4)},
        r"1, 3 or 4 times as many rows as columns, got \[20, 4\]",
    ),
}


@pytest.mark.parametrize(("changes", "sentence"), MISSHAPEN.values(), ids=MISSHAPEN)
def test_a_tensor_of_another_shape_is_refused(changes, sentence):
    expect(
        sentence, their_head("lstm") | {name: np.zeros(shape) for name, shape in changes.items()}
    )


WRONG = {
    "no head": ({"model.vision.x": np.zeros(2)}, {}, r"must hold 'act_head\.…'.* got model.vision"),
    "nothing": ({}, {}, "must hold 'act_head.…', RoboVLMs' policy head, got none"),
    "no trunk": (
        {"act_head.actions.mlp.0.bias": np.zeros(2)},
        {},
        r"act_head must have rnn\., gpt\. or mlp\.",
    ),
    "twice": (
        their_head("fc") | {"model.act_head.mlp.0.bias": np.zeros(3)},
        {},
        "'act_head.mlp.0.bias' and 'model.act_head.mlp.0.bias' are the same",
    ),
    "integers": (
        their_head("fc") | {"act_head.mlp.0.bias": np.zeros(3, np.int8)},
        {},
        "act_head.mlp.0.bias must be floating point, got int8",
    ),
    "latents": (their_head("lstm"), {"num_latents": 4}, "num_latents must divide .* 6 inputs"),
    "pooling": (their_head("lstm"), {"pooling": "mean"}, "pooling must be 'max' or 'none'"),
    "window": (their_head("lstm"), {"window_size": 0}, "window_size must be at least 1, got 0"),
}


@pytest.mark.parametrize(("tensors", "options", "sentence"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_sentence(tensors, options, sentence):
    expect(sentence, tensors, **options)


@pytest.mark.parametrize(("part", "chunk"), [("gripper", 2), ("actions", 2)])
def test_what_may_be_missing_is_drawn_from_the_key(part, chunk):
    theirs = their_head("lstm", chunk=chunk)
    mlp = [name for name in theirs if part in name]
    rest = without(theirs, *mlp)
    expect("6 missing: act_head", rest)
    glob = (f"act_head.{part}.*",)
    config, params = convert.from_robovlms(rest, allow_missing=glob)
    assert (config.action_horizon, config.action_dim) == (2, 7)
    back = convert.to_robovlms(config, params)
    assert_same({name: back[name] for name in rest}, rest)
    again = convert.to_robovlms(*convert.from_robovlms(rest, allow_missing=glob))
    assert_same(again, back)
    other = convert.from_robovlms(rest, allow_missing=glob, key=jax.random.key(1))
    weights = [name for name in mlp if name.endswith("weight")]
    for name in weights:
        assert back[name].std() > 0
        assert (back[name] != convert.to_robovlms(*other)[name]).any()


def test_a_head_of_other_actions_is_read_off_too():
    theirs = their_head("lstm", chunk=3)
    theirs["act_head.actions.mlp.4.weight"] = np.zeros((27, 8), np.float32)
    theirs["act_head.actions.mlp.4.bias"] = np.zeros(27, np.float32)
    config, _ = convert.from_robovlms(theirs)
    assert (config.action_horizon, config.action_dim) == (3, 10)


def test_buffers_of_old_gpt_files_are_no_weights():
    theirs = their_head("gpt")
    buffers = {
        "act_head.gpt.h.0.attn.bias": np.ones((1, 1, 5, 5), bool),
        "act_head.gpt.h.1.attn.masked_bias": np.array(-1e4, np.float32),
    }
    config, params = convert.from_robovlms(theirs | buffers, num_heads=2)
    assert config.window_size == 5
    assert set(convert.report_robovlms(theirs | buffers, config).buffers) == set(buffers)
    assert_same(convert.to_robovlms(config, params), sort(theirs))
    expect("window_size must be the 5 positions of the GPT, got 8", theirs, window_size=8)


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_robovlms_has_no_other_pooling(pooling):
    config = DecoderConfig(token_dim=6, hidden_size=4, pooling=pooling)
    with pytest.raises(ValueError, match=f"pooling must be 'max' or 'none', got '{pooling}'"):
        convert.to_robovlms(config, {})


def test_params_of_another_config_are_refused():
    _, params = convert.from_robovlms(their_head("lstm"))
    config, _ = convert.from_robovlms(their_head("lstm", chunk=3))
    with pytest.raises(ValueError, match="params must be those of the config, got others at heads"):
        convert.to_robovlms(config, params)
