"""RoboVLMs' heads: a round trip is the identity, and every tensor is reported."""

import math
import re

import jax
import numpy as np
import pytest
import torch
from robovlms_heads import SIZES, assert_same, robovlms_head, robovlms_shapes

from vla_jax import convert
from vla_jax.convert.robovlms.key_names import head_tensors
from vla_jax.policies import decoders
from vla_jax.policies.decoder_config import DecoderConfig

KINDS = ("rnn", "lstm", "gru", "fc", "gpt")  # kinds that RoboVLMs' names can express
pytestmark = pytest.mark.filterwarnings("ignore:assuming window_size 8")
each_kind = pytest.mark.parametrize("kind", KINDS)


def sort(tensors):
    return dict(sorted(tensors.items()))


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


# --- round trip -----------------------------------------------------------------------------


@pytest.mark.sampled
@each_kind
@pytest.mark.parametrize("latent", [1, 2])
@pytest.mark.parametrize(("layers", "chunk", "hidden"), [(1, 10, 6), (4, 1, 4), (11, 2, 4)])
def test_a_round_trip_is_the_identity_and_sizes_are_inferred(kind, latent, layers, chunk, hidden):
    theirs = robovlms_head(kind, layers=layers, latent=latent, chunk=chunk, hidden=hidden)
    config, params = convert.from_robovlms(theirs, window_size=5, num_latents=latent, num_heads=2)
    assert_same(convert.to_robovlms(config, params), sort(theirs))
    expected = DecoderConfig(
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


@pytest.mark.sampled
@each_kind
def test_the_decoder_accepts_the_params(kind):
    config, params = convert.from_robovlms(
        robovlms_head(kind, latent=2), num_latents=2, num_heads=2
    )
    tokens = np.random.default_rng(0).normal(size=(2, 3, 7, 6)).astype(np.float32)
    chunk = decoders.apply(params, config, tokens)
    assert chunk.arm.shape == (2, 3, 2, 6)
    assert chunk.gripper_logit.shape == (2, 3, 2)


def test_without_pooling_a_step_has_num_latents_tokens():
    theirs = robovlms_head("lstm", latent=3)
    config, params = convert.from_robovlms(theirs, pooling="none", num_latents=3)
    assert (config.num_tokens, config.token_dim) == (3, 6)
    joined, _ = convert.from_robovlms(theirs, pooling="none", num_tokens=2)
    assert (joined.num_tokens, joined.token_dim) == (2, 9)
    tokens = np.random.default_rng(0).normal(size=(2, 3, 3, 6)).astype(np.float32)
    pooled = convert.from_robovlms(theirs, num_latents=3)  # pooling over bins of one token each
    for one, other in zip(
        decoders.apply(params, config, tokens),
        decoders.apply(pooled[1], pooled[0], tokens),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_a_head_of_kosmos_size_has_the_tensors_and_parameters_of_robovlms():
    sizes = {"in_features": 2048, "hidden": 1024, "layers": 4, "chunk": 10}
    shapes = robovlms_shapes("lstm", **sizes, sizes=(1024, 512, 256))
    config = DecoderConfig(token_dim=2048, num_tokens=1)  # the other defaults equal RoboVLMs'
    tensors = head_tensors(config)
    assert {f"act_head.{name}": x.their_shape for name, x in tensors.items()} == shapes
    params = jax.eval_shape(lambda key: decoders.init(key, config), jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == 41_210_950
    assert len(shapes) == 32


@pytest.mark.parametrize("order", ["", "act_head.", "model.act_head.", "module.model.act_head."])
@pytest.mark.parametrize("more", ["", "model.module."])
def test_prefixes_are_stripped(order, more):
    theirs = robovlms_head("lstm")
    named = {more + order + name.removeprefix("act_head."): x for name, x in theirs.items()}
    assert_same(convert.to_robovlms(*convert.from_robovlms(named)), sort(theirs))


def test_torch_tensors_and_jax_arrays_are_accepted():
    theirs = robovlms_head("gru")
    for make in (torch.from_numpy, jax.numpy.asarray):
        tensors = {name: make(tensor) for name, tensor in theirs.items()}
        assert_same(convert.to_robovlms(*convert.from_robovlms(tensors)), sort(theirs))


def test_params_do_not_share_memory_with_the_tensors():
    theirs = robovlms_head("fc", in_features=64)
    config, params = convert.from_robovlms(theirs)
    before = convert.to_robovlms(config, params)
    for tensor in theirs.values():
        tensor[:] = 0
    assert_same(convert.to_robovlms(config, params), before)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_dtypes_become_float32_with_one_warning(dtype):
    theirs = robovlms_head("lstm")
    tensors = {name: torch.from_numpy(x).to(getattr(torch, dtype)) for name, x in theirs.items()}
    with pytest.warns(UserWarning, match=f"20 tensors cast from {dtype} to float32"):
        config, params = convert.from_robovlms(tensors)
    expected = {name: tensor.to(torch.float32).numpy() for name, tensor in tensors.items()}
    assert_same(convert.to_robovlms(config, params), sort(expected))
    assert convert.report_robovlms(tensors, config).cast == dict.fromkeys(theirs, dtype)


def test_an_undetermined_window_size_is_assumed_with_a_warning():
    with pytest.warns(UserWarning, match="assuming window_size 8, .* give window_size"):
        config, _ = convert.from_robovlms(robovlms_head("lstm"))
    assert config.window_size == 8


@pytest.mark.filterwarnings("error")
@each_kind
def test_a_determined_window_size_causes_no_warning(kind):
    size = {} if kind == "gpt" else {"window_size": 8}
    convert.from_robovlms(robovlms_head(kind, window_size=8), num_heads=2, **size)


# --- errors ------------------------------------------------------------------------


def test_every_tensor_is_in_one_part_of_the_report():
    theirs = robovlms_head("lstm") | {
        "model.vision.weight": np.zeros((2, 3)),
        "epoch": np.zeros(()),
    }
    with pytest.warns(UserWarning, match="2 tensors outside the head are left over"):
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
def test_every_missing_tensor_is_named(kind):
    theirs = robovlms_head(kind)
    for name in theirs:
        sentence = rf"missing( or have another number of axes)?: {re.escape(name)};"
        expect(sentence, without(theirs, name), num_heads=2)


HALVES = {
    "first": lambda names: names[: len(names) // 2],
    "last": lambda names: names[len(names) // 2 :],
    "even": lambda names: names[::2],
    "odd": lambda names: names[1::2],
}


@each_kind
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("order", [list, sorted])
def test_half_of_a_head_is_refused_and_all_missing_tensors_are_named(kind, half, order):
    theirs = robovlms_head(kind, layers=1, in_features=4)
    kept = HALVES[half](order(theirs))
    with pytest.raises(ValueError, match="missing") as caught:
        convert.from_robovlms({name: theirs[name] for name in kept}, num_heads=2)
    message = str(caught.value)
    assert "\n" not in message
    trunk = ("act_head.rnn.", "act_head.gpt.", "act_head.mlp.")
    if not any(name.startswith(trunk) for name in kept):  # the prefix follows from the kind
        assert "kind" in message
        assert "act_head.rnn., gpt. or mlp." in message
        theirs = {name: x for name, x in theirs.items() if not name.startswith(trunk)}
    if not any(name.startswith(("act_head.actions.", "act_head.gripper.")) for name in kept):
        theirs = {name: x for name, x in theirs.items() if ".mlp.4." not in name}  # gives the depth
    assert [name for name in theirs if name not in kept and name not in message] == []
    assert [name for name in kept if re.search(rf"{re.escape(name)}[,;]", message)] == []


SUFFICIENT = {  # kind -> tensors that determine all sizes
    "lstm": r"rnn\.weight_ih_l\d|rnn\.bias_hh_l1|(actions|gripper)\.mlp\.\d\.weight",
    "gru": r"rnn\.weight_ih_l0|rnn\.bias_hh_l1|(actions|gripper)\.mlp\.\d\.weight",
    "gpt": r"gpt\.h\.[01]\.ln_2\.bias|gpt\.wpe\.weight|fc\.weight|gripper\.mlp\.\d\.weight",
    "fc": r"mlp\.0\.weight|mlp\.2\.bias|actions\.mlp\.\d\.bias|gripper\.mlp\.4\.weight",
}


@pytest.mark.parametrize("kind", SUFFICIENT)
def test_sizes_are_inferred_from_the_tensors_that_are_present(kind):
    whole = robovlms_head(kind, chunk=3)
    kept = re.compile(rf"act_head\.(?:{SUFFICIENT[kind]})")
    theirs = {name: x for name, x in whole.items() if kept.fullmatch(name)}
    expected, _ = convert.from_robovlms(whole, num_heads=2)
    expect(f"{len(whole) - len(theirs)} missing: act_head", theirs, num_heads=2)
    with pytest.warns(UserWarning, match="missing, randomly initialised"):
        config, params = convert.from_robovlms(theirs, num_heads=2, allow_missing="*")
    assert config == expected
    back = convert.to_robovlms(config, params)
    assert list(back) == sorted(whole)
    assert_same({name: back[name] for name in theirs}, theirs)


@pytest.mark.parametrize(
    ("lacking", "unknown"),
    [
        (r"rnn\.weight_ih_l0", "number of inputs"),
        (r"rnn\.weight.*|\w+\.mlp\.0\.weight", "number of inputs and hidden_size"),
        (r"\w+\.mlp\..*", "head_sizes and action_horizon"),
        (r"\w+\.mlp\.4\..*", "action_horizon"),
        (r"\w+\.mlp\.0\..*|\w+\.mlp\.2\.weight", "head_sizes"),
    ],
)
def test_a_size_that_no_tensor_determines_is_refused(lacking, unknown):
    theirs = robovlms_head("lstm")
    gone = [name for name in theirs if re.fullmatch(rf"act_head\.(?:{lacking})", name)]
    with pytest.raises(ValueError, match=f"^{unknown} cannot be inferred .* missing") as caught:
        convert.from_robovlms(without(theirs, *gone), allow_missing="*")
    message = str(caught.value)
    if lacking == r"\w+\.mlp\..*":  # the depth is not determined
        gone = [name for name in gone if ".mlp.4." not in name]
    assert [name for name in gone if name not in message] == []
    assert "\n" not in message


@each_kind
def test_left_over_tensors_of_the_head_are_refused(kind):
    for name in ("act_head.rnn.weight_ih_l0_reverse", "act_head.actions.module.bias", "act_head.x"):
        if kind in ("fc", "gpt") and "rnn" in name:
            continue
        expect(f"1 left over: {name}", robovlms_head(kind) | {name: np.zeros(3)}, num_heads=2)


MISSHAPEN = {
    "a bias": ({"act_head.rnn.bias_hh_l1": (9,)}, r"bias_hh_l1 \(expected \[16\], got \[9\]\)"),
    "a chunk": ({"act_head.actions.mlp.4.weight": (13, 8)}, r"expected \[12, 8\], got \[13, 8\]"),
    "a rank": (
        {"act_head.rnn.weight_ih_l0": (16,)},
        "missing or have another number of axes: .*weight_ih_l0;",
    ),
    "gates": (
        {"act_head.rnn.weight_hh_l0": (20, 4)},
        r"1, 3 or 4 times as many rows as columns .*, got \[20, 4\]",
    ),
}


@pytest.mark.parametrize(("changes", "sentence"), MISSHAPEN.values(), ids=MISSHAPEN)
def test_a_tensor_of_another_shape_is_refused(changes, sentence):
    expect(
        sentence, robovlms_head("lstm") | {name: np.zeros(shape) for name, shape in changes.items()}
    )


WRONG = {
    "no head": ({"model.vision.x": np.zeros(2)}, {}, r"must hold 'act_head\.…'.* got model.vision"),
    "nothing": ({}, {}, "must hold 'act_head.…', RoboVLMs' policy head, got none"),
    "no trunk": (
        {"act_head.actions.mlp.0.bias": np.zeros(2)},
        {},
        r"kind and .* missing .* act_head\.rnn\., gpt\. or mlp\.",
    ),
    "twice": (
        robovlms_head("fc") | {"model.act_head.mlp.0.bias": np.zeros(3)},
        {},
        "'act_head.mlp.0.bias' and 'model.act_head.mlp.0.bias' name the same tensor",
    ),
    "integers": (
        robovlms_head("fc") | {"act_head.mlp.0.bias": np.zeros(3, np.int8)},
        {},
        "act_head.mlp.0.bias must be floating point of 32 or 16 bits, got int8",
    ),
    "doubles": (
        robovlms_head("fc") | {"act_head.mlp.0.bias": np.zeros(3)},
        {},
        r"mlp.0.bias must be .* got float64; save it as float32 \(`module.float\(\)`",
    ),
    "latents": (robovlms_head("lstm"), {"num_latents": 4}, "num_latents must divide .* 6 inputs"),
    "pooling": (robovlms_head("lstm"), {"pooling": "mean"}, "pooling must be 'max' or 'none'"),
    "window": (robovlms_head("lstm"), {"window_size": 0}, "window_size must be at least 1, got 0"),
}


@pytest.mark.parametrize(("tensors", "options", "sentence"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_refused(tensors, options, sentence):
    expect(sentence, tensors, **options)


@pytest.mark.parametrize(("part", "chunk"), [("gripper", 2), ("actions", 2)])
def test_missing_tensors_are_initialised_from_the_key(part, chunk):
    theirs = robovlms_head("lstm", chunk=chunk)
    mlp = [name for name in theirs if part in name]
    rest = without(theirs, *mlp)
    expect("6 missing: act_head", rest)
    message = ", ".join(sorted(mlp))
    options: list[dict] = [{"allow_missing": g} for g in (f"act_head.{part}.*", [f"*{part}*"])]
    options.append(options[0] | {"key": jax.random.key(1)})
    converted = []
    for option in options:
        with pytest.warns(UserWarning, match="randomly initialised") as caught:
            converted.append(convert.from_robovlms(rest, window_size=8, **option))
        (warning,) = caught
        assert str(warning.message) == f"6 tensors missing, randomly initialised: {message}"
    config = converted[0][0]
    assert (config.action_horizon, config.action_dim) == (2, 7)
    back, again, other = (convert.to_robovlms(*each) for each in converted)
    assert_same({name: back[name] for name in rest}, rest)
    assert_same(again, back)
    weights = [name for name in mlp if name.endswith("weight")]
    for name in weights:
        assert back[name].std() > 0
        assert (back[name] != other[name]).any()


def test_a_string_is_a_single_glob():
    rest = {name: x for name, x in robovlms_head("lstm").items() if "gripper" not in name}
    expect("6 missing: act_head.gripper.mlp.0.bias, ", rest, allow_missing="act_head.actions.*")


def test_another_action_dim_is_inferred():
    theirs = robovlms_head("lstm", chunk=3)
    theirs["act_head.actions.mlp.4.weight"] = np.zeros((27, 8), np.float32)
    theirs["act_head.actions.mlp.4.bias"] = np.zeros(27, np.float32)
    config, _ = convert.from_robovlms(theirs)
    assert (config.action_horizon, config.action_dim) == (3, 10)


def test_buffers_of_old_gpt_files_are_not_weights():
    theirs = robovlms_head("gpt")
    buffers = {
        "act_head.gpt.h.0.attn.bias": np.ones((1, 1, 5, 5), bool),
        "act_head.gpt.h.1.attn.masked_bias": np.array(-1e4, np.float32),
    }
    config, params = convert.from_robovlms(theirs | buffers, num_heads=2)
    assert config.window_size == 5
    assert set(convert.report_robovlms(theirs | buffers, config).buffers) == set(buffers)
    assert_same(convert.to_robovlms(config, params), sort(theirs))
    expect(
        "window_size must be 5, the number of positions of the GPT, got 8", theirs, window_size=8
    )


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_robovlms_has_no_other_pooling(pooling):
    config = DecoderConfig(token_dim=6, hidden_size=4, pooling=pooling)
    with pytest.raises(ValueError, match=f"pooling must be 'max' or 'none', got '{pooling}'"):
        convert.to_robovlms(config, {})


@pytest.mark.parametrize("kind", ["layer_norm_lstm", "min_gru", "rg_lru", "s_lstm"])
def test_robovlms_has_no_other_cell(kind):
    config = DecoderConfig(kind, token_dim=6, hidden_size=4)
    with pytest.raises(ValueError, match=f"kind must be one that RoboVLMs has .* got '{kind}'"):
        convert.to_robovlms(config, {})


def test_robovlms_has_no_residual_blocks():
    config = DecoderConfig("lstm", token_dim=6, hidden_size=4, block="mlp")
    with pytest.raises(ValueError, match="block must be 'none', got 'mlp': RoboVLMs has no"):
        convert.to_robovlms(config, {})


def test_params_of_another_config_are_refused():
    _, params = convert.from_robovlms(robovlms_head("lstm"))
    config, _ = convert.from_robovlms(robovlms_head("lstm", chunk=3))
    with pytest.raises(
        ValueError, match=r"must be those of the config, got 4 of another shape: heads"
    ):
        convert.to_robovlms(config, params)


def test_swapped_config_and_params_are_refused():
    config, params = convert.from_robovlms(robovlms_head("lstm"))
    with pytest.raises(ValueError, match="config must be a DecoderConfig, got a dict; it is the"):
        convert.to_robovlms(params, config)  # pyright: ignore[reportArgumentType]
