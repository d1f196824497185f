"""The encoder-decoder as a policy: by hand, and the laws of a window."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.policies import autoregressive_head, decoders
from vla_jax.policies.autoregressive_head import Told
from vla_jax.policies.decoders import DecoderConfig
from vla_jax.training import losses

B, W, N, D, K, H, A = 3, 6, 2, 3, 3, 5, 4
CONFIG = DecoderConfig(
    kind="lstm",
    token_dim=D,
    num_tokens=N,
    window_size=4,  # less than the steps below
    action_horizon=K,
    action_dim=A,
    hidden_size=H,
    num_layers=1,
    head="autoregressive",
)
CONFIGS = {
    "lstm-general": CONFIG,
    "gru-additive": dataclasses.replace(CONFIG, kind="gru", score="additive"),
    "rnn-none": dataclasses.replace(CONFIG, kind="rnn", score="none"),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)

apply = jax.jit(decoders.apply, static_argnames="config")


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def setup(config=CONFIG):
    return decoders.init(jax.random.key(0), config), draw(0, B, W, N, D)


def told(action, rate=None):
    return Told(action, np.ones(action.shape[:3], bool), rate)


def draw_action(seed=1):
    action = np.tanh(draw(seed, B, W, K, A))
    action[..., -1] = np.sign(action[..., -1])
    return action


def assert_close(one, other, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), one, other)


def at(steps, chunk):
    return jax.tree.map(lambda leaf: leaf[:, steps], chunk)


# --- by hand ----------------------------------------------------------------------------------


def affine(p, inputs):
    return inputs @ np.asarray(p["kernel"], np.float64) + np.asarray(p["bias"], np.float64)


def write_by_hand(p, feature, seen):
    """Outputs `[K, A]` of a plain RNN at one step, that looks at `seen [S, H]`."""
    cell = {name: np.asarray(leaf, np.float64) for name, leaf in p["decoder"].items()}
    hidden, inputs = np.tanh(affine(p["bridge"]["hidden"], feature)), np.asarray(p["start"])
    outputs = []
    for _ in range(K):
        products = inputs @ cell["input_kernel"] + hidden @ cell["recurrent_kernel"]
        hidden = np.tanh(products + cell["input_bias"] + cell["recurrent_bias"])
        scores = (seen @ np.asarray(p["attention"]["key_kernel"], np.float64)) @ hidden
        weights = np.exp(scores) / np.exp(scores).sum()
        both = np.concatenate([hidden, weights @ seen])
        output = affine(p["output"], np.tanh(affine(p["combine"], both)))
        action = np.append(np.tanh(output[:-1]), 1.0 if output[-1] > 0 else -1.0)
        inputs = affine(p["target"], action)
        outputs.append(output)
    return np.array(outputs)


def test_each_step_writes_what_the_equations_say_from_its_own_past():
    config = dataclasses.replace(CONFIG, kind="rnn")
    params, tokens = setup(config)
    reset, mask = np.zeros((B, W), bool), np.ones((B, W), bool)
    reset[1, 2], mask[2, :2] = True, False
    flags = {"timestep_mask": mask, "reset": reset}
    chunk = apply(params, config, tokens, **flags)
    _, features = decoders.features(params, config, tokens, **flags)
    p = {**params["heads"], "decoder": params["heads"]["decoder"]["layers_0"]["forward"]}
    for row, first in enumerate((0, 2, 2)):  # first step of the last episode that is real
        for t in range(first, W):
            seen = np.asarray(features[row, max(first, t - 3) : t + 1], np.float64)
            outputs = write_by_hand(p, seen[-1], seen)
            assert_close(chunk.arm[row, t], np.tanh(outputs[:, :-1]))
            assert_close(chunk.gripper_logit[row, t], outputs[:, -1])


def test_the_next_action_is_told_the_gripper_as_it_is_sent():
    sent = autoregressive_head.sent(np.float32([[0.5, -2.0, 0.3], [0.0, 1.0, -0.3]]))
    assert_close(sent, [[np.tanh(0.5), np.tanh(-2.0), 1.0], [0.0, np.tanh(1.0), -1.0]])


# --- being told -------------------------------------------------------------------------------


@each_config
def test_told_its_own_actions_a_writer_does_what_it_does_alone(config):
    params, tokens = setup(config)
    alone = apply(params, config, tokens)
    own = np.concatenate([alone.arm, np.sign(alone.gripper_logit)[..., None]], axis=-1)
    assert_close(apply(params, config, tokens, told=told(own)), alone)


def test_an_action_depends_on_the_told_ones_before_it_alone():
    params, tokens = setup()
    action = draw_action()
    other = action.copy()
    other[:, :, 1] *= -1
    one, two = (apply(params, CONFIG, tokens, told=told(x)).arm for x in (action, other))
    assert_close(one[:, :, :2], two[:, :, :2], 0)
    assert np.abs(one[:, :, 2] - two[:, :, 2]).max() > 1e-3


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_rate_of_0_is_alone_and_of_1_is_told(rate, key):
    params, tokens = setup()
    action = draw_action()
    sampled = apply(params, CONFIG, tokens, told=told(action, rate), key=key)
    whole = told(action) if rate else None
    assert_close(sampled, apply(params, CONFIG, tokens, told=whole))


@pytest.mark.parametrize("rate", [None, 0.5])
@each_config
def test_every_param_learns_and_stays_finite_whatever_the_unreal_actions_are(config, rate, key):
    config = dataclasses.replace(config, pooling="none")
    params, tokens = setup(config)
    action, mask = draw_action(), np.ones((B, W, K), bool)
    mask[0], mask[1, :, 1:] = False, False
    action[~mask] = np.nan

    def loss_fn(params):
        known = Told(action, mask, rate)
        chunk = decoders.apply(params, config, tokens, told=known, key=key)
        return losses.action_loss(chunk, action, mask)[0]

    gradient = jax.jit(jax.grad(loss_fn))(params)
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(gradient))


# --- windows ----------------------------------------------------------------------------------


@each_config
def test_a_padded_window_is_a_cut_one_and_a_reset_is_a_new_episode(config):
    params, tokens = setup(config)
    cut = apply(params, config, tokens[:, 2:])
    mask, reset = np.tile(np.arange(W) >= 2, (B, 1)), np.tile(np.arange(W) == 2, (B, 1))
    padded = apply(params, config, tokens, timestep_mask=mask)
    assert_close(at(slice(2, None), padded), cut)
    assert_close(at(slice(2, None), apply(params, config, tokens, reset=reset)), cut)
    behind = apply(params, config, tokens, timestep_mask=np.tile(np.arange(W) < 4, (B, 1)))
    assert_close(at(slice(4), behind), apply(params, config, tokens[:, :4]))


def test_a_later_frame_changes_nothing_earlier():
    params, tokens = setup()
    other = tokens.copy()
    other[:, 3] *= -1
    one, two = (apply(params, CONFIG, x, told=told(draw_action())) for x in (tokens, other))
    assert_close(at(slice(3), one), at(slice(3), two), 0)
    assert (np.abs(one.arm - two.arm).max(axis=(0, 2, 3))[3:] > 1e-4).all()


def looked(features, seen, visible, **options):
    params, config = setup()[0], decoders.writer_config(CONFIG)
    return autoregressive_head.apply(params["heads"], config, features, seen, visible, K, **options)


def test_weights_sum_to_1_over_what_is_visible_and_what_is_not_may_be_nan():
    visible = np.random.default_rng(0).random((B, 2, W)) < 0.5
    visible[0, 0], visible[:, 1, 0] = False, True
    seen, features = draw(1, B, W, H), draw(2, B, 2, H)
    chunk, weights = looked(features, seen, visible)
    assert weights.shape == (B, 2, K, W)
    assert_close(weights.sum(axis=-1), np.tile(visible.any(axis=-1)[..., None], K).astype(float))
    assert not weights[np.broadcast_to(~visible[:, :, None], weights.shape)].any()
    unseen = ~visible.any(axis=1)
    assert unseen.any()
    dirty = np.where(unseen[..., None], np.nan, seen)
    assert_close(looked(features, dirty, visible)[0], chunk)


def test_an_action_is_found_in_a_step_that_only_attention_reaches():
    """The step's own features, and so the first carry, stay as they are."""
    seen, features, visible = draw(1, B, W, H), draw(2, B, 2, H), np.ones((B, 2, W), bool)
    one, two = (looked(features, x, visible)[0].arm for x in (seen, -seen))
    assert np.abs(one - two).max() > 1e-2
    params = decoders.init(jax.random.key(0), CONFIGS["rnn-none"])["heads"]
    assert not {"attention", "combine"} & params.keys()


# --- the rest ---------------------------------------------------------------------------------


def test_vmap_and_no_jit_change_nothing_and_bfloat16_little():
    params, tokens = setup()
    expected = apply(params, CONFIG, tokens)
    assert_close(decoders.apply(params, CONFIG, tokens), expected)
    mapped = jax.vmap(lambda t: decoders.apply(params, CONFIG, t[None]))(tokens)
    assert_close(at(0, mapped), expected)
    half = apply(params, dataclasses.replace(CONFIG, dtype="bfloat16"), tokens)
    assert_close(half.gripper_logit, expected.gripper_logit, 0.1)
    assert {leaf.dtype for leaf in half} == {jnp.dtype("float32")}


def test_dropout_needs_a_key(key):
    params, tokens = setup()
    config = dataclasses.replace(CONFIG, dropout=0.5)
    for known in (None, told(draw_action())):
        plain = apply(params, CONFIG, tokens, told=known)
        assert_close(apply(params, config, tokens, told=known), plain, 0)
        dropped = apply(params, config, tokens, told=known, key=key)
        assert np.abs(dropped.arm - plain.arm).max() > 1e-4


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"kind": "gpt"},
            "kind must be one of rnn, lstm, gru, .* with head 'autoregressive', .* 'gpt'",
        ),
        ({"kind": "fc"}, "kind must be one of rnn, lstm, .* got 'fc'; choose"),
        ({"score": "genral"}, "unknown score 'genral'; .* Did you mean 'general'"),
    ],
)
def test_a_wrong_config_is_one_sentence(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(CONFIG, **fields)


def test_another_head_is_not_told_in_vain(key):
    config = dataclasses.replace(CONFIG, head="continuous", head_sizes=(4,))
    params = decoders.init(key, config)
    with pytest.raises(ValueError, match=r"told must be None for head 'cont.* got actions"):
        decoders.apply(params, config, draw(0, B, W, N, D), told=told(draw_action()))


def test_a_rate_without_a_key_is_one_sentence():
    params, tokens = setup()
    with pytest.raises(ValueError, match=r"key must be given where told.rate is, got None"):
        decoders.apply(params, CONFIG, tokens, told=told(draw_action(), 0.5))


def test_a_chunk_of_another_length_is_refused_at_the_door():
    params, tokens = setup()
    with pytest.raises(AssertionError, match="assert_axis_dimension"):
        decoders.apply(params, CONFIG, tokens, told=told(draw_action()[:, :, 1:]))
