"""An agent equals its policy between normalisation of inputs and denormalisation of actions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from vla_jax.acting import agent as agents
from vla_jax.acting.agent import AgentConfig
from vla_jax.actions.execution import ExecutionConfig
from vla_jax.data import normalize
from vla_jax.data.windows import ALWAYS
from vla_jax.policies import policy
from vla_jax.types import Observation

B, T = 2, 4  # T = window_size: a streamed step sees what a window sees


@pytest.fixture(scope="module")
def raw():
    """Observations `[B, T]` in the robot's units."""
    rng = np.random.default_rng(1)
    return Observation(
        proprio=rng.normal(size=(B, T, 8)).astype(np.float32),
        environment_state=rng.normal(size=(B, T, 22)).astype(np.float32),
        instruction=np.repeat(rng.integers(1, 256, (B, 1, 12)).astype(np.int32), T, axis=1),
    )


def at(observation, t):
    return jax.tree.map(lambda x: x[:, t], observation)


def play(config, raw, *, norm_stats=None, resets=(0,), params=None):
    """Returns the actions `[B, T, 7]` of the agent; episodes begin at the steps in `resets`."""
    params = tiny_run.params() if params is None else params
    agent = agents.make_agent(config, norm_stats or tiny_run.norm_stats())
    step, state, actions = jax.jit(agent.step), agent.init(params, B), []
    for t in range(T):
        state, action = step(params, state, at(raw, t), np.full(B, t in resets))
        actions.append(action)
    return np.stack(actions, axis=1)


def expected_actions(raw, visible):
    """The same actions from one window of the policy, with statistics applied in NumPy."""
    stats = tiny_run.norm_stats()
    inputs = {
        name: (getattr(raw, name) - stats[name].mean) / stats[name].std
        for name in ("proprio", "environment_state")
    }
    inputs["column_mask"] = raw.column_mask
    inputs["instruction"] = np.where(np.array(visible)[None, :, None], raw.instruction, 0)
    chunk = policy.apply(tiny_run.params(), tiny_run.AGENT.policy, Observation(**inputs))
    low, high = stats["action"].min[:6], stats["action"].max[:6]
    arm = (low + high) / 2 + (high - low) / 2 * np.asarray(chunk.arm)[:, :, 0]
    gripper = np.where(np.asarray(chunk.gripper_logit)[:, :, :1] > 0, 1, -1)
    return np.concatenate([arm, gripper], axis=-1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("instruction_steps", "visible"),
    [(1, [1, 0, 0, 0]), (2, [1, 1, 0, 0]), (ALWAYS, [1, 1, 1, 1])],
)
def test_an_agent_normalises_observations_and_denormalises_actions_of_its_policy(
    raw, instruction_steps, visible
):
    config = dataclasses.replace(tiny_run.AGENT, instruction_steps=instruction_steps)
    expected = expected_actions(raw, np.array(visible, bool))
    np.testing.assert_allclose(play(config, raw), expected, rtol=1e-4, atol=1e-5)


def test_an_instruction_reaches_the_policy_only_at_its_first_step(raw):
    first = play(tiny_run.AGENT, raw)
    other = raw._replace(instruction=raw.instruction.copy())
    other.instruction[:, 2:] = 7
    second = play(tiny_run.AGENT, other)
    expected = expected_actions(other, np.array([1, 0, 1, 0], bool))
    np.testing.assert_allclose(second, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(first[:, :2], second[:, :2])
    assert (first[:, 2] != second[:, 2]).any()


@pytest.mark.parametrize("mode", ["refresh", "periodic", "persistent"])
def test_a_reset_starts_a_new_episode(raw, mode):
    config = dataclasses.replace(tiny_run.AGENT, mode=mode)
    later = jax.tree.map(lambda x: np.roll(x, -2, axis=1), raw)
    again = play(config, raw, resets=(0, 2))[:, 2:]
    np.testing.assert_allclose(again, play(config, later)[:, :2], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["refresh", "periodic"])
def test_a_reset_starts_a_new_episode_of_a_gpt(raw, mode):
    decoder = dataclasses.replace(tiny_run.DECODER, kind="gpt", window_size=2)
    parts = policy.connect(tiny_run.AGENT.policy.backbone, decoder)
    config = dataclasses.replace(tiny_run.AGENT, policy=parts, mode=mode)
    params = policy.init(jax.random.key(0), parts)
    later = jax.tree.map(lambda x: np.roll(x, -3, axis=1), raw)
    again = play(config, raw, resets=(0, 3), params=params)[:, 3:]  # one step after a full window
    np.testing.assert_allclose(again, play(config, later, params=params)[:, :1], atol=1e-6)


@pytest.mark.slow
def test_each_robot_of_a_batch_is_reset_independently(raw):
    agent = agents.make_agent(tiny_run.AGENT, tiny_run.norm_stats())
    params, state = tiny_run.params(), None
    state = agent.init(params, B)
    for t in range(3):
        reset = np.array([t == 0, t in (0, 2)])
        state, action = agent.step(params, state, at(raw, t), reset)
    assert state.age.tolist() == [3, 1]
    whole = play(tiny_run.AGENT, raw)[0, 2]
    np.testing.assert_allclose(action[0], whole, atol=1e-6)


def test_gripper_commands_are_plus_or_minus_one(raw):
    assert set(np.unique(play(tiny_run.AGENT, raw)[..., -1])) <= {-1.0, 1.0}


def test_an_input_without_statistics_is_not_passed_to_the_policy(raw):
    stats = tiny_run.norm_stats()
    del stats["proprio"]
    with pytest.raises(ValueError, match=r"observation\.proprio is missing"):
        play(tiny_run.AGENT, raw, norm_stats=stats)


def test_a_mode_that_the_decoder_does_not_support_is_refused_in_the_config():
    decoder = dataclasses.replace(tiny_run.DECODER, kind="gpt", num_heads=2)
    parts = policy.connect(tiny_run.AGENT.policy.backbone, decoder)
    with pytest.raises(
        ValueError, match=r"mode must be 'refresh' or 'periodic' .* got 'persistent'; choose"
    ):
        dataclasses.replace(tiny_run.AGENT, policy=parts, mode="persistent")
    with pytest.raises(ValueError, match=r"unknown mode 'persistant'; .* Did you mean 'persist"):
        dataclasses.replace(tiny_run.AGENT, mode="persistant")


def test_an_agent_without_action_statistics_is_refused():
    stats = {"proprio": normalize.compute(np.zeros((2, 8)))}
    with pytest.raises(ValueError, match=r"norm_stats must have 'action', got \['proprio'\]"):
        agents.make_agent(tiny_run.AGENT, stats)


def test_states_that_do_not_fit_the_memory_are_refused():
    agent = agents.make_agent(tiny_run.AGENT, tiny_run.norm_stats(), window_size=10**9)
    with pytest.raises(ValueError, match=r"window_size must be smaller, got 1000000000: .* GB"):
        agent.init(tiny_run.params(), 64)


@pytest.mark.slow
def test_the_window_size_can_differ_from_training(raw):
    params = tiny_run.params()
    agent = agents.make_agent(tiny_run.AGENT, tiny_run.norm_stats(), window_size=1)
    state = agent.init(params, B)
    for t in range(T):
        state, short = agent.step(params, state, at(raw, t), np.full(B, t == 0))
    alone = expected_actions(jax.tree.map(lambda x: x[:, -1:], raw), np.array([False]))
    np.testing.assert_allclose(short, alone[:, 0], rtol=1e-4, atol=1e-5)


def test_an_instruction_becomes_the_token_ids_that_the_backbone_expects():
    ids = agents.read_instruction(tiny_run.AGENT, "lift the red block")
    assert ids.shape == (12,)
    assert (ids > 0).sum() == 4
    assert ids.max() < 256
    assert jnp.all(ids == agents.read_instruction(tiny_run.AGENT, "Lift the RED block!"))


def test_a_policy_of_a_mixture_acts_on_a_robot_with_fewer_numbers(raw):
    """The statistics of one robot have fewer numbers than the policy: its inputs are padded."""
    stats = tiny_run.norm_stats()
    own = dict(stats)
    own["action"] = jax.tree.map(lambda x: x[[0, 1, 2, 6]] if np.ndim(x) else x, stats["action"])
    own["proprio"] = jax.tree.map(lambda x: x[:5] if np.ndim(x) else x, stats["proprio"])
    small = raw._replace(proprio=raw.proprio[..., :5])
    padded = raw.proprio.copy()
    padded[..., 5:] = stats["proprio"].mean[5:]  # zero after normalisation
    whole = play(tiny_run.AGENT, raw._replace(proprio=padded))
    actions = play(tiny_run.AGENT, small, norm_stats=own)
    np.testing.assert_allclose(actions, whole[..., [0, 1, 2, 6]], rtol=1e-5, atol=1e-6)


def test_a_robot_without_proprio_acts_as_the_window_with_its_proprio_masked(raw):
    stats = {name: each for name, each in tiny_run.norm_stats().items() if name != "proprio"}
    config = dataclasses.replace(tiny_run.AGENT, missing_parts=("proprio",))
    actions = play(config, raw._replace(proprio=None), norm_stats=stats)
    nothing = {"proprio": np.zeros(raw.proprio.shape, bool)}
    masked = raw._replace(proprio=np.full_like(raw.proprio, np.nan), column_mask=nothing)
    visible = [True, *[False] * (T - 1)]
    np.testing.assert_allclose(actions, expected_actions(masked, visible), rtol=1e-4, atol=1e-5)
    assert np.abs(actions - play(tiny_run.AGENT, raw)).max() > 1e-3


def test_a_normalisation_that_the_head_cannot_represent_is_refused_and_old_runs_warn():
    config = AgentConfig(normalize=normalize.NormalizeConfig(action="mean_std"))
    with pytest.raises(ValueError, match=r"head 'continuous', whose outputs are in \[-1, 1\]"):
        agents.check_representable(config)
    agents.check_representable(AgentConfig())
    stats = {"action": normalize.compute(np.eye(7, dtype=np.float32))}
    with pytest.warns(UserWarning, match="use --action bounds"):
        agents.make_agent(config, stats)


def test_longer_execution_than_prediction_is_refused_when_the_config_is_made():
    execution = ExecutionConfig(kind="receding_horizon", exec_horizon=100)
    with pytest.raises(ValueError, match="exec_horizon must be at most action_horizon"):
        AgentConfig(execution=execution)


def test_an_action_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match=r"finite numbers, got \[.*nan.*\], which was not sent"):
        agents.robot_action(AgentConfig(), np.array([0.0, np.nan, 1.0]))


def test_missing_parts_must_be_parts_of_an_observation():
    with pytest.raises(ValueError, match=r"missing_parts must be cameras.*got 'propio'"):
        dataclasses.replace(tiny_run.AGENT, missing_parts=("propio",))
