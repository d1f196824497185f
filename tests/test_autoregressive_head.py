"""The autoregressive head compared with NumPy, and the laws of a window."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.policies import autoregressive_head, decoders
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.policies.head import TeacherForcing
from vla_jax.training import losses

B, W, N, D, K, H, A = 3, 6, 2, 3, 3, 5, 4
CONFIG = DecoderConfig(
    kind="lstm",
    token_dim=D,
    num_tokens=N,
    window_size=4,  # fewer than the steps below
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


def prepare(config=CONFIG):
    return decoders.init(jax.random.key(0), config), draw(0, B, W, N, D)


def teacher_forcing(action, rate=None):
    return TeacherForcing(action, np.ones(action.shape[:3], bool), rate)


def draw_action(seed=1):
    action = np.tanh(draw(seed, B, W, K, A))
    action[..., -1] = np.sign(action[..., -1])
    return action


def assert_close(one, other, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), one, other)


def at(steps, chunk):
    return jax.tree.map(lambda leaf: leaf[:, steps], chunk)


# --- NumPy reference --------------------------------------------------------------------------


def affine(p, inputs):
    return inputs @ np.asarray(p["kernel"], np.float64) + np.asarray(p["bias"], np.float64)


def reference_decode(p, feature, source):
    """Outputs `[K, A]` of a plain RNN at one step, which attends to `source [S, H]`."""
    cell = {name: np.asarray(leaf, np.float64) for name, leaf in p["decoder"].items()}
    hidden, inputs = np.tanh(affine(p["bridge"]["hidden"], feature)), np.asarray(p["start"])
    outputs = []
    for _ in range(K):
        products = inputs @ cell["input_kernel"] + hidden @ cell["recurrent_kernel"]
        hidden = np.tanh(products + cell["input_bias"] + cell["recurrent_bias"])
        scores = (source @ np.asarray(p["attention"]["key_kernel"], np.float64)) @ hidden
        weights = np.exp(scores) / np.exp(scores).sum()
        both = np.concatenate([hidden, weights @ source])
        output = affine(p["output"], np.tanh(affine(p["combine"], both)))
        action = np.append(np.tanh(output[:-1]), 1.0 if output[-1] > 0 else -1.0)
        inputs = affine(p["target"], action)
        outputs.append(output)
    return np.array(outputs)


@pytest.mark.slow
def test_every_step_follows_the_equations_over_its_past_features():
    config = dataclasses.replace(CONFIG, kind="rnn")
    params, tokens = prepare(config)
    reset, mask = np.zeros((B, W), bool), np.ones((B, W), bool)
    reset[1, 2], mask[2, :2] = True, False
    flags = {"timestep_mask": mask, "reset": reset}
    chunk = apply(params, config, tokens, **flags)
    _, features = decoders.run_trunk(params, config, tokens, **flags)
    p = {**params["heads"], "decoder": params["heads"]["decoder"]["layers_0"]["forward"]}
    for row, first in enumerate((0, 2, 2)):  # first real step of the last episode
        for t in range(first, W):
            source = np.asarray(features[row, max(first, t - 3) : t + 1], np.float64)
            outputs = reference_decode(p, source[-1], source)
            assert_close(chunk.arm[row, t], np.tanh(outputs[:, :-1]))
            assert_close(chunk.gripper_logit[row, t], outputs[:, -1])


def test_the_gripper_is_fed_back_as_plus_or_minus_one():
    fed_back = autoregressive_head.to_actions(np.float32([[0.5, -2.0, 0.3], [0.0, 1.0, -0.3]]))
    assert_close(fed_back, [[np.tanh(0.5), np.tanh(-2.0), 1.0], [0.0, np.tanh(1.0), -1.0]])


# --- teacher forcing --------------------------------------------------------------------------


@each_config
def test_teacher_forcing_with_the_heads_outputs_is_free_running(config):
    params, tokens = prepare(config)
    free_running = apply(params, config, tokens)
    predicted_actions = np.concatenate(
        [free_running.arm, np.sign(free_running.gripper_logit)[..., None]], axis=-1
    )
    assert_close(
        apply(params, config, tokens, targets=teacher_forcing(predicted_actions)), free_running
    )


def test_an_action_depends_on_earlier_targets_only():
    params, tokens = prepare()
    action = draw_action()
    other = action.copy()
    other[:, :, 1] *= -1
    one, two = (
        apply(params, CONFIG, tokens, targets=teacher_forcing(x)).arm for x in (action, other)
    )
    assert_close(one[:, :, :2], two[:, :, :2], 0)
    assert np.abs(one[:, :, 2] - two[:, :, 2]).max() > 1e-3


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_rate_of_0_is_free_running_and_of_1_is_teacher_forcing(rate, key):
    params, tokens = prepare()
    action = draw_action()
    sampled = apply(params, CONFIG, tokens, targets=teacher_forcing(action, rate), key=key)
    targets = teacher_forcing(action) if rate else None
    assert_close(sampled, apply(params, CONFIG, tokens, targets=targets))


@pytest.mark.sampled
@pytest.mark.parametrize("rate", [None, 0.5])
@each_config
def test_every_param_gets_a_finite_gradient_whatever_masked_targets_contain(config, rate, key):
    config = dataclasses.replace(config, pooling="none")
    params, tokens = prepare(config)
    action, mask = draw_action(), np.ones((B, W, K), bool)
    mask[0], mask[1, :, 1:] = False, False
    action[~mask] = np.nan

    def loss_fn(params):
        targets = TeacherForcing(action, mask, rate)
        chunk = decoders.apply(params, config, tokens, targets=targets, key=key)
        return losses.action_loss(chunk, action, mask)[0]

    gradient = jax.jit(jax.grad(loss_fn))(params)
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(gradient))


# --- windows ----------------------------------------------------------------------------------


@each_config
def test_padding_equals_truncation_and_a_reset_starts_a_new_episode(config):
    params, tokens = prepare(config)
    truncated = apply(params, config, tokens[:, 2:])
    mask, reset = np.tile(np.arange(W) >= 2, (B, 1)), np.tile(np.arange(W) == 2, (B, 1))
    padded = apply(params, config, tokens, timestep_mask=mask)
    assert_close(at(slice(2, None), padded), truncated)
    assert_close(at(slice(2, None), apply(params, config, tokens, reset=reset)), truncated)
    right_padded = apply(params, config, tokens, timestep_mask=np.tile(np.arange(W) < 4, (B, 1)))
    assert_close(at(slice(4), right_padded), apply(params, config, tokens[:, :4]))


def test_a_frame_does_not_change_earlier_outputs():
    params, tokens = prepare()
    other = tokens.copy()
    other[:, 3] *= -1
    one, two = (
        apply(params, CONFIG, x, targets=teacher_forcing(draw_action())) for x in (tokens, other)
    )
    assert_close(at(slice(3), one), at(slice(3), two), 0)
    assert (np.abs(one.arm - two.arm).max(axis=(0, 2, 3))[3:] > 1e-4).all()


def decode(features, source, visible):
    return autoregressive_head.decode(prepare()[0]["heads"], CONFIG, features, source, visible)


def test_weights_sum_to_1_over_visible_positions_and_invisible_ones_may_be_nan():
    visible = np.random.default_rng(0).random((B, 2, W)) < 0.5
    visible[0, 0], visible[:, 1, 0] = False, True
    source, features = draw(1, B, W, H), draw(2, B, 2, H)
    chunk, weights = decode(features, source, visible)
    assert weights.shape == (B, 2, K, W)
    assert_close(weights.sum(axis=-1), np.tile(visible.any(axis=-1)[..., None], K).astype(float))
    assert not weights[np.broadcast_to(~visible[:, :, None], weights.shape)].any()
    invisible = ~visible.any(axis=1)
    assert invisible.any()
    with_nan = np.where(invisible[..., None], np.nan, source)
    assert_close(decode(features, with_nan, visible)[0], chunk)


def test_attention_uses_features_of_other_steps():
    """The step's own features, and so the initial carry, are unchanged."""
    source, features, visible = draw(1, B, W, H), draw(2, B, 2, H), np.ones((B, 2, W), bool)
    one, two = (decode(features, x, visible)[0].arm for x in (source, -source))
    assert np.abs(one - two).max() > 1e-2
    params = decoders.init(jax.random.key(0), CONFIGS["rnn-none"])["heads"]
    assert not {"attention", "combine"} & params.keys()


# --- other laws -------------------------------------------------------------------------------


@pytest.mark.slow
def test_vmap_and_jit_do_not_change_results_and_bfloat16_changes_them_little():
    params, tokens = prepare()
    expected = apply(params, CONFIG, tokens)
    assert_close(decoders.apply(params, CONFIG, tokens), expected)
    mapped = jax.vmap(lambda t: decoders.apply(params, CONFIG, t[None]))(tokens)
    assert_close(at(0, mapped), expected)
    half = apply(params, dataclasses.replace(CONFIG, dtype="bfloat16"), tokens)
    assert_close(half.gripper_logit, expected.gripper_logit, 0.1)
    assert {leaf.dtype for leaf in half} == {jnp.dtype("float32")}


def test_dropout_needs_a_key(key):
    params, tokens = prepare()
    config = dataclasses.replace(CONFIG, dropout=0.5)
    for targets in (None, teacher_forcing(draw_action())):
        plain = apply(params, CONFIG, tokens, targets=targets)
        assert_close(apply(params, config, tokens, targets=targets), plain, 0)
        dropped = apply(params, config, tokens, targets=targets, key=key)
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
def test_a_wrong_config_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(CONFIG, **fields)


def test_targets_for_another_head_are_refused(key):
    config = dataclasses.replace(CONFIG, head="continuous", head_sizes=(4,))
    params = decoders.init(key, config)
    with pytest.raises(ValueError, match=r"targets must be None for head 'cont.* got actions"):
        decoders.apply(params, config, draw(0, B, W, N, D), targets=teacher_forcing(draw_action()))


def test_a_teacher_forcing_rate_without_a_key_is_refused():
    params, tokens = prepare()
    with pytest.raises(ValueError, match=r"key must be given with targets.rate, got None"):
        decoders.apply(params, CONFIG, tokens, targets=teacher_forcing(draw_action(), 0.5))


def test_targets_of_another_length_are_refused():
    params, tokens = prepare()
    with pytest.raises(AssertionError, match="assert_axis_dimension"):
        decoders.apply(params, CONFIG, tokens, targets=teacher_forcing(draw_action()[:, :, 1:]))
