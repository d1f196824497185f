"""Actions from chunks, compared with loops over stored chunks in NumPy."""

import dataclasses
import warnings

import jax
import numpy as np
import pytest

from vla_jax.actions import execution
from vla_jax.actions.execution import GRIPPER_RULES, ExecutionConfig
from vla_jax.types import ActionChunk

B, T, K, A = 2, 9, 3, 4
CONFIGS = {
    "first": ExecutionConfig(),
    "receding_horizon": ExecutionConfig(kind="receding_horizon", exec_horizon=2),
    "temporal_ensemble": ExecutionConfig(kind="temporal_ensemble", ensemble_decay=0.5),
}
each_kind = pytest.mark.parametrize("kind", CONFIGS)


def draw_chunks(seed=0):
    random = np.random.default_rng(seed)
    arm = random.uniform(-1, 1, (B, T, K, A - 1)).astype(np.float32)
    return ActionChunk(arm, random.normal(size=(B, T, K)).astype(np.float32))


def resets(*starts):
    """`[B, T]`; the second robot starts new episodes at these steps."""
    reset = np.zeros((B, T), bool)
    reset[1, list(starts)] = True
    return reset


def run(config, chunks, reset=None, step=execution.step):
    """Returns the actions `[B, T, A]`."""
    state = execution.init(config, B, K, A)
    actions = []
    for t in range(T):
        now = jax.tree.map(lambda leaf, t=t: leaf[:, t], chunks)
        state, action = step(config, state, now, reset=None if reset is None else reset[:, t])
        actions.append(action)
    return np.stack(actions, axis=1)


def action_in_numpy(config, chunks, row, t, start):
    """Arm and gripper logit of robot `row` at step `t` of an episode that began at `start`."""
    predicted = np.concatenate([chunks.arm[row], chunks.gripper_logit[row][..., None]], axis=-1)
    age = t - start
    if config.kind == "first":
        return predicted[t, 0]
    if config.kind == "receding_horizon":
        return predicted[t - age % config.exec_horizon, age % config.exec_horizon]
    oldest = min(K - 1, age)
    candidates = [predicted[t - ahead, ahead] for ahead in range(oldest, -1, -1)]
    return np.average(
        candidates, axis=0, weights=np.exp(-config.ensemble_decay * np.arange(len(candidates)))
    )


@each_kind
def test_actions_equal_those_in_numpy_and_episodes_are_independent(kind):
    config, chunks, starts = CONFIGS[kind], draw_chunks(), (4, 5)
    actions = run(config, chunks, resets(*starts))
    for row in range(B):
        for t in range(T):
            begun = max([0, *(s for s in starts if s <= t and row == 1)])
            expected = action_in_numpy(config, chunks, row, t, begun)
            np.testing.assert_allclose(actions[row, t, :-1], expected[:-1], atol=1e-6)
            assert actions[row, t, -1] == (1.0 if expected[-1] > 0 else -1.0)


@each_kind
def test_actions_are_bounded_and_the_gripper_is_either_open_or_closed(kind):
    chunks = jax.tree.map(lambda leaf: 3 * leaf, draw_chunks())
    actions = run(CONFIGS[kind], chunks)
    assert actions.shape == (B, T, A)
    assert np.abs(actions[..., :-1]).max() == 1.0
    assert set(np.unique(actions[..., -1])) == {-1.0, 1.0}


@each_kind
def test_jit_and_a_scan_change_nothing(kind):
    config, chunks, reset = CONFIGS[kind], draw_chunks(), resets(4)
    expected = run(config, chunks, reset)
    step = jax.jit(execution.step, static_argnums=0, donate_argnums=1)
    np.testing.assert_allclose(run(config, chunks, reset, step), expected, atol=1e-6)
    by_time = jax.tree.map(lambda leaf: np.swapaxes(leaf, 0, 1), (chunks, reset))
    _, actions = jax.lax.scan(
        lambda state, now: execution.step(config, state, now[0], reset=now[1]),
        execution.init(config, B, K, A),
        by_time,
    )
    np.testing.assert_allclose(np.swapaxes(actions, 0, 1), expected, atol=1e-6)


def test_an_ensemble_without_decay_is_the_mean_and_a_negative_decay_favours_new_chunks():
    chunks = draw_chunks()
    candidates = np.stack([chunks.arm[:, 4 - ahead, ahead] for ahead in (2, 1, 0)])
    plain, new = (
        run(ExecutionConfig(kind="temporal_ensemble", ensemble_decay=m), chunks)[:, 4, :-1]
        for m in (0.0, -20.0)
    )
    np.testing.assert_allclose(plain, candidates.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(new, candidates[-1], atol=1e-6)


def gripper_commands(config, logits, reset=None):
    """Gripper commands `[T]` of one robot with these logits."""
    state, commands = execution.init(config, 1, 1, A), []
    for t, logit in enumerate(logits):
        chunk = ActionChunk(np.zeros((1, 1, A - 1), np.float32), np.full((1, 1), logit, np.float32))
        now = None if reset is None else np.array([reset[t]])
        state, action = execution.step(config, state, chunk, reset=now)
        commands.append(float(action[0, -1]))
    return commands


def test_the_gripper_switches_at_its_threshold():
    assert gripper_commands(ExecutionConfig(), [-0.1, 0.1, 0.0, 0.1]) == [-1, 1, -1, 1]
    assert gripper_commands(ExecutionConfig(gripper_threshold=1.0), [0.9, 1.1, 0.9]) == [-1, 1, -1]


def test_hysteresis_holds_the_gripper_inside_the_band():
    config = ExecutionConfig(gripper_threshold=1.0, gripper_hysteresis=0.5)
    logits = [1.1, 0.6, 0.4, 1.4, 1.6, 0.6]
    assert gripper_commands(config, logits) == [1, 1, -1, -1, 1, 1]


def test_the_first_action_of_an_episode_has_no_previous_gripper_state():
    config = ExecutionConfig(gripper_hysteresis=0.5)
    assert gripper_commands(config, [1.0, -0.1, -0.1], [True, False, True]) == [1, 1, -1]


def as_logits(commands):
    return [float(command) for command in commands]


@pytest.mark.parametrize(
    ("gripper_steps", "sent"),
    [
        (1, [0, 0, 1, 0, -1, 1, 0, 0, -1]),
        (2, [0, 0, 1, 1, -1, -1, 0, 0, -1]),  # the prediction of step 5 is ignored
        (3, [0, 0, 1, 1, 1, 1, 1, 1, -1]),  # that of step 4 is ignored
    ],
)
def test_a_change_of_the_gripper_is_repeated_while_other_predictions_are_ignored(
    gripper_steps, sent
):
    config = ExecutionConfig(gripper_rule="repeat_change", gripper_steps=gripper_steps)
    assert gripper_commands(config, as_logits([-1, -1, 1, 1, -1, 1, 1, 1, -1])) == sent


@pytest.mark.parametrize(
    ("gripper_steps", "sent"),
    [(1, [1, -1, 1, 1, 1, -1]), (2, [-1, -1, -1, 1, 1, -1]), (3, [-1, -1, -1, -1, 1, -1])],
)
def test_open_late_opens_after_consecutive_predictions_and_closes_at_once(gripper_steps, sent):
    config = ExecutionConfig(gripper_rule="open_late", gripper_steps=gripper_steps)
    assert gripper_commands(config, as_logits([1, -1, 1, 1, 1, -1])) == sent


@pytest.mark.parametrize("rule", ["repeat_change", "open_late"])
def test_a_reset_clears_the_state_of_the_gripper_rule(rule):
    config = ExecutionConfig(gripper_rule=rule, gripper_steps=3)
    wishes, fresh = as_logits([-1, 1, 1, 1, 1, -1, 1]), as_logits([1, 1, -1, 1])
    reset = [False, False, False, True, False, False, False]
    assert gripper_commands(config, wishes, reset)[3:] == gripper_commands(config, fresh)
    assert gripper_commands(config, wishes)[3:] != gripper_commands(config, fresh)


def test_hysteresis_is_applied_before_the_gripper_rule():
    config = ExecutionConfig(
        gripper_rule="open_late", gripper_steps=2, gripper_hysteresis=0.5, gripper_threshold=1.0
    )
    assert gripper_commands(config, [1.6, 0.6, 0.4, 1.4, 1.6, 1.4]) == [-1, 1, -1, -1, -1, 1]


@pytest.mark.parametrize("rule", ["repeat_change", "open_late"])
def test_grippers_of_a_batch_are_independent(rule):
    config = ExecutionConfig(gripper_rule=rule, gripper_steps=2)
    chunks, reset = draw_chunks(3), resets(4, 7)
    together = run(config, chunks, reset, jax.jit(execution.step, static_argnums=0))[..., -1]
    for row in range(B):
        logits = chunks.gripper_logit[row, :, 0].tolist()
        assert together[row].tolist() == gripper_commands(config, logits, reset[row].tolist())


@each_kind
@pytest.mark.parametrize("rule", GRIPPER_RULES)
def test_one_number_of_the_newest_chunk_that_is_not_finite_makes_the_action_nan(kind, rule):
    config = dataclasses.replace(CONFIGS[kind], gripper_rule=rule)
    step = jax.jit(execution.step, static_argnums=0)
    chunks, start = draw_chunks(), execution.init(config, B, K, A)
    first, second = (jax.tree.map(lambda leaf, t=t: leaf[:, t], chunks) for t in (0, 1))
    begun, _ = step(config, start, first)
    for value in (np.nan, np.inf, -np.inf):
        for index in range(K * A):
            numbers = np.concatenate([second.arm, second.gripper_logit[..., None]], axis=-1)
            numbers[1].flat[index] = value
            for state in (start, begun):
                action = step(config, state, ActionChunk(numbers[..., :-1], numbers[..., -1]))[1]
                np.testing.assert_array_equal(np.isnan(action), np.repeat([[False], [True]], A, 1))


def test_noise_may_make_the_gripper_certain_but_nothing_else_infinite():
    state, arm = execution.init(ExecutionConfig(), 4, 1, A), np.zeros((4, A - 1), np.float32)
    arm[3, 1] = np.inf
    logit = np.array([np.inf, -np.inf, np.nan, 0.0], np.float32)
    action = execution.send(ExecutionConfig(), state, ActionChunk(arm, logit))[1]
    assert action[:2, -1].tolist() == [1, -1]
    assert np.isnan(action[2:]).all()


def test_a_decoder_with_memory_that_executes_several_actions_gives_a_warning():
    config = ExecutionConfig(kind="receding_horizon", exec_horizon=3)
    with pytest.warns(UserWarning, match=r"exec_horizon is 3, but .* memory .* every frame"):
        execution.warn_if_frames_skipped(config, has_memory=True)


@pytest.mark.parametrize(("exec_horizon", "has_memory"), [(3, False), (1, True)])
def test_no_warning_if_no_frame_can_be_skipped(exec_horizon, has_memory):
    config = ExecutionConfig(kind="receding_horizon", exec_horizon=exec_horizon)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        execution.warn_if_frames_skipped(config, has_memory=has_memory)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"kind": "frist"}, "unknown execution kind 'frist'; .* Did you mean 'first'"),
        ({"exec_horizon": 0}, "exec_horizon must be at least 1, got 0"),
        ({"exec_horizon": 2}, "exec_horizon must be 1 with kind='first', got 2"),
        ({"gripper_hysteresis": -1.0}, "gripper_hysteresis must be 0 or more logits, got -1.0"),
        ({"gripper_rule": "late"}, "unknown gripper_rule 'late'; .* Did you mean 'open_late'"),
        ({"gripper_steps": 0}, "gripper_steps must be at least 1, got 0"),
        ({"gripper_steps": 2}, "gripper_steps must be 1 with gripper_rule='target', got 2"),
    ],
)
def test_a_wrong_config_raises_one_sentence(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        ExecutionConfig(**fields)


def test_an_exec_horizon_longer_than_a_chunk_is_refused():
    config = ExecutionConfig(kind="receding_horizon", exec_horizon=4)
    with pytest.raises(ValueError, match="exec_horizon must be at most action_horizon = 3, got 4"):
        execution.init(config, B, K, A)


def test_a_chunk_of_another_batch_is_refused():
    chunk = ActionChunk(np.zeros((B + 1, K, A - 1)), np.zeros((B + 1, K)))
    with pytest.raises(AssertionError, match="assert_shape"):
        execution.step(ExecutionConfig(), execution.init(ExecutionConfig(), B, K, A), chunk)
