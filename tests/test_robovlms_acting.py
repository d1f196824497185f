"""The agent sends the same commands as RoboVLMs' wrappers, re-implemented in NumPy."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vla_jax import config as configs
from vla_jax.acting.agent import AgentConfig, make_agent
from vla_jax.actions import action_layout, reference_frames
from vla_jax.backbones.state import StateConfig
from vla_jax.convert.robovlms import acting_presets
from vla_jax.data import normalize
from vla_jax.data.normalize import NormalizeConfig
from vla_jax.data.windows import ALWAYS
from vla_jax.policies import policy as policies
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.types import Observation

B, T, W, K = 2, 40, 4, 3
ROBOTS = ["google_robot", "widowx"]
POLICY = policies.connect(
    StateConfig(state_dim=4, proprio_dim=15, token_dim=16, vocab_size=64, max_words=3),
    DecoderConfig(window_size=W, action_horizon=K, hidden_size=16, num_layers=2, head_sizes=(16,)),
)
IDENTITY = {"proprio": normalize.fixed_bounds(-1, 1, 15)}  # (x - 0) / 1
IDENTITY["environment_state"] = normalize.fixed_bounds(-1, 1, 4)
RESET = np.zeros((B, T), bool)
RESET[:, 0] = RESET[1, 17] = True
OXE = {  # as in configs/data/oxe_dataset_stats; all values differ
    "action": {
        "mean": [0.007, 0.006, -0.013, 0.04, -0.006, 0.001, 0.54],
        "std": [0.069, 0.06, 0.074, 0.156, 0.131, 0.146, 0.49],
        "min": [-2.02, -5.5, -2.03, -1.57, -1.57, -1.57, 0.0],
        "max": [3.0, 22.1, 2.75, 1.57, 1.53, 1.69, 1.0],
        "q01": [-0.224, -0.148, -0.231, -0.352, -0.419, -0.436, 0.0],
        "q99": [0.178, 0.149, 0.218, 0.589, 0.352, 0.449, 1.0],
    },
    "num_transitions": 3786400,
}


@pytest.fixture(scope="module")
def observation():
    """Observations `[B, T, …]`; the arm points down, so that its roll is near ±π."""
    random = np.random.default_rng(0)
    proprio = random.normal(size=(B, T, 15)).astype(np.float32)
    proprio[..., 3] = np.where(proprio[..., 3] > 0, 1, -1) * (math.pi - 0.01)
    proprio[..., 4] = np.clip(proprio[..., 4], -0.3, 0.3)  # far from the pole
    state = 3 * random.normal(size=(B, T, 4)).astype(np.float32)
    return Observation(None, None, proprio, state, np.full((B, T, 3), 5, np.int32))


@pytest.fixture(scope="module")
def params():
    """Random params, large enough for the gripper prediction to change often."""
    return jax.tree.map(lambda leaf: 3 * leaf, policies.init(jax.random.key(3), POLICY))


@pytest.fixture(scope="module")
def chunks(params, observation):
    """Outputs of the head at every step, `[B, T, K, …]`, in float64."""
    step = jax.jit(policies.step, static_argnums=1)
    state, outputs = policies.init_stream(params, POLICY, B), []
    for t in range(T):
        now = jax.tree.map(lambda leaf, t=t: leaf[:, t], observation)
        state, chunk = step(params, POLICY, state, now, reset=RESET[:, t])
        outputs.append(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), chunk))
    outputs = jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *outputs)
    opens = outputs.gripper_logit[..., 0] > 0
    assert (opens[:, 1:] != opens[:, :-1]).sum(axis=1).min() >= 8
    assert np.abs(outputs.arm[:, :, 0]).max() > 0.6
    return outputs


def ours(config, action_stats, params, observation):
    """Returns the actions `[B, T, 7]` of our agent."""
    agent = make_agent(config, {**IDENTITY, "action": action_stats})
    step, state, actions = jax.jit(agent.step), agent.init(params, B), []
    for t in range(T):
        now = jax.tree.map(lambda leaf, t=t: leaf[:, t], observation)
        state, action = step(params, state, now, RESET[:, t])
        actions.append(action)
    return np.stack(actions, axis=1)


def their_action(arm, gripper_logit, *, limit=0.65, mu=0.0):
    """Returns the wrapper's action `[7]` for a chunk; the gripper is scaled too, not yet binary."""
    opens = 1 / (1 + np.exp(-gripper_logit)) > 0.5
    action = np.concatenate([arm, opens[:, None].astype(float)], axis=1)[0]
    if mu:
        gripper = action[-1]
        action = np.sign(action) * np.expm1(np.abs(action) * np.log1p(mu)) / mu
        action[-1] = gripper
    return 0.5 * (action + 1) * (limit - -limit) + -limit


def their_calvin(chunk, robot_obs=None, **options):
    """Returns one command; with `robot_obs` the action is in the tool frame, in m and rad."""
    action = their_action(*chunk, **options)
    if robot_obs is not None:
        tool = Rotation.from_euler("xyz", robot_obs[3:6])
        after = (tool * Rotation.from_euler("xyz", action[3:6])).as_euler("xyz")
        action[:3] = tool.apply(action[:3]) * 50
        action[3:6] = (after - robot_obs[3:6]) * 20
    gripper = (action[-1] - 0.5) * 2
    action[-1] = 1 if gripper > 0 else -1
    return action


class TheirSimpler:
    """RoboVLMs' wrapper for SIMPLER, for one robot."""

    def __init__(self, robot, steps, *, twice=True):
        self.robot, self.steps, self.twice = robot, steps, twice
        self.reset()

    def reset(self):
        self.before = None
        self.sticky, self.repeats, self.held, self.opens = False, 0, 0.0, 0

    def step(self, chunk):
        base = their_calvin(chunk, limit=0.65 if self.twice else 1.0)
        low, high = np.array(OXE["action"]["q01"]), np.array(OXE["action"]["q99"])
        action = 0.5 * (base + 1) * (high - low) + low
        turn = Rotation.from_euler("xyz", action[3:6]).as_rotvec()
        now = 2.0 * (action[6] > 0.5) - 1.0
        gripper = self.relative(now) if self.robot == "google_robot" else self.late(now)
        return np.concatenate([action[:3], turn, [gripper]])

    def relative(self, now):
        gripper = 0.0 if self.before is None else self.before - now
        self.before = now
        if abs(gripper) > 0.5 and not self.sticky:
            self.sticky, self.held = True, gripper
        if self.sticky:
            self.repeats += 1
            gripper = self.held
        if self.repeats == self.steps:
            self.sticky, self.repeats, self.held = False, 0, 0.0
        return gripper

    def late(self, now):
        self.opens = self.opens + 1 if now > 0 else 0
        return 1.0 if self.opens >= self.steps else -1.0


def at(chunks, row, t):
    return chunks.arm[row, t], chunks.gripper_logit[row, t]


def every_step(command):
    """Returns `[B, T, 7]` of a function of row and step."""
    return np.array([[command(row, t) for t in range(T)] for row in range(B)])


@pytest.mark.slow
@pytest.mark.parametrize("mu", [0.0, 255.0])
def test_commands_on_calvin_equal_the_wrappers(mu, params, observation, chunks):
    config = acting_presets.calvin(POLICY, mu=mu)
    sent = ours(config, acting_presets.calvin_stats(), params, observation)
    theirs = every_step(lambda row, t: their_calvin(at(chunks, row, t), mu=mu))
    np.testing.assert_allclose(sent, theirs, atol=1e-6)


def test_commands_on_calvin_in_the_tool_frame_equal_the_wrappers(params, observation, chunks):
    config, units = (
        acting_presets.calvin(POLICY, tool_frame=True),
        np.array([50] * 3 + [20] * 3 + [1]),
    )
    sent = ours(config, acting_presets.calvin_tool_stats(), params, observation) / units
    obs = observation.proprio.astype(np.float64)
    theirs = every_step(lambda row, t: their_calvin(at(chunks, row, t), obs[row, t])) / units
    # The wrapper's angles jump by 2π where they cross ±π; ours do not.
    jumps = np.round((theirs - sent) / (2 * np.pi)) * (units == 20)
    np.testing.assert_allclose(sent[..., :3], theirs[..., :3], atol=1e-6)
    np.testing.assert_allclose((sent + 2 * np.pi * jumps)[..., 3:6], theirs[..., 3:6], atol=1e-5)
    np.testing.assert_array_equal(sent[..., 6], theirs[..., 6])
    assert np.abs(sent[..., 3:6]).max() <= np.pi
    assert (np.abs(theirs[..., 3]) > np.pi).mean() > 0.1


@pytest.mark.sampled
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("robot", ROBOTS)
def test_commands_on_simpler_equal_the_wrappers(robot, steps, params, observation, chunks):
    """With the statistics that the released checkpoints need."""
    config = acting_presets.simpler(POLICY, robot, gripper_steps=steps)
    stats = acting_presets.released_oxe_stats(acting_presets.oxe_stats(OXE))
    sent = acting_presets.simpler_command(ours(config, stats, params, observation), robot)
    wrappers, theirs = [TheirSimpler(robot, steps) for _ in range(B)], np.zeros((B, T, 7))
    for row, t in np.ndindex(B, T):
        if RESET[row, t]:
            wrappers[row].reset()
        theirs[row, t] = wrappers[row].step(at(chunks, row, t))
    np.testing.assert_allclose(sent[..., :3], theirs[..., :3], atol=1e-6)
    np.testing.assert_allclose(sent[..., 3:6], theirs[..., 3:6], atol=1e-5)
    np.testing.assert_array_equal(sent[..., 6], theirs[..., 6])
    values = {-2, 0, 2} if robot == "google_robot" else {-1, 1}
    assert set(np.unique(theirs[..., 6])) == values


@pytest.mark.parametrize("robot", ROBOTS)
def test_without_the_second_normalisation_the_whole_range_is_reached(
    robot, params, observation, chunks
):
    config, stats = acting_presets.simpler(POLICY, robot), acting_presets.oxe_stats(OXE)
    sent = ours(config, stats, params, observation)
    low, high = stats.q01[:6], stats.q99[:6]
    np.testing.assert_allclose(
        sent[..., :6], low + (chunks.arm[:, :, 0] + 1) / 2 * (high - low), atol=1e-6
    )
    twice = ours(config, acting_presets.released_oxe_stats(stats), params, observation)
    middle = (low + high) / 2
    np.testing.assert_allclose(twice[..., :6] - middle, 0.65 * (sent[..., :6] - middle), atol=1e-6)


def normalized(action, stats, config):
    return np.asarray(normalize.normalize_action(action, stats, config.normalize))


def test_training_targets_on_calvin_equal_robovlms():
    random = np.random.default_rng(2)
    calvin = random.uniform(-1, 1, (100, 7)).astype(np.float32)
    calvin[:, 6] = np.sign(calvin[:, 6])
    theirs = 2 * (np.clip(calvin, -0.65, 0.65) + 0.65) / 1.3 - 1
    label = normalized(calvin, acting_presets.calvin_stats(), acting_presets.calvin(POLICY))
    np.testing.assert_allclose(label[:, :6], theirs[:, :6], atol=1e-6)
    np.testing.assert_array_equal(label[:, 6] > 0, (calvin[:, 6] + 1) // 2)


def test_the_released_statistics_combine_both_normalisations():
    stats, random = acting_presets.oxe_stats(OXE), np.random.default_rng(3)
    action = random.uniform(stats.q01 * 1.2, stats.q99 * 1.2, (200, 7)).astype(np.float32)
    action[:, 6] = random.integers(0, 2, 200)
    once = np.clip(2 * (action - stats.q01) / (stats.q99 - stats.q01 + 1e-8) - 1, -1, 1)
    twice = 2 * (np.clip(once, -0.65, 0.65) + 0.65) / 1.3 - 1
    layout = action_layout.make_layout(7, [-1], (-1.0, 1.0), only_open=True)
    ours = action_layout.from_robot(action, layout)
    config = acting_presets.simpler(POLICY, "widowx")
    label = normalized(ours, acting_presets.released_oxe_stats(stats), config)
    np.testing.assert_allclose(label[:, :6], twice[:, :6], atol=2e-6)
    np.testing.assert_array_equal(label[:, 6] > 0, action[:, 6] == 1)
    by_default = normalized(ours, stats, config)
    np.testing.assert_allclose(by_default[:, :6], once[:, :6], atol=2e-6)
    assert (np.abs(twice[:, :6]) == 1).mean() > (np.abs(by_default[:, :6]) == 1).mean() + 0.2


def test_with_narrow_bounds_only_the_wrappers_gripper_stays_closed(params, observation, chunks):
    config, stats = acting_presets.calvin(POLICY), acting_presets.calvin_stats(0.5)
    sent = ours(config, stats, params, observation)
    theirs = every_step(lambda row, t: their_calvin(at(chunks, row, t), limit=0.5))
    np.testing.assert_allclose(sent[..., :6], theirs[..., :6], atol=1e-6)
    assert (theirs[..., 6] == -1).all()
    np.testing.assert_array_equal(sent[..., 6], np.sign(chunks.gripper_logit[..., 0]))


def test_robovlms_mu_law_skips_the_last_step_of_a_window_and_ours_the_gripper():
    window = np.random.default_rng(4).uniform(-1, 1, (5, 7)).astype(np.float32)
    theirs = np.sign(window) * np.log1p(255 * np.abs(window)) / np.log1p(255)
    theirs[-1] = window[-1]
    config = NormalizeConfig(action_mu=255.0)
    label = np.asarray(normalize.normalize_action(window, normalize.fixed_bounds(-1, 1, 7), config))
    np.testing.assert_allclose(label[:-1, :6], theirs[:-1, :6], atol=1e-6)
    assert np.abs(label[-1, :6] - theirs[-1, :6]).max() > 0.1
    assert np.abs(label[:-1, 6] - theirs[:-1, 6]).max() > 0.1
    np.testing.assert_array_equal(label[:, 6], window[:, 6])


def test_an_agent_in_the_tool_frame_needs_the_orientation_in_proprio(params, observation):
    config = acting_presets.calvin(POLICY, tool_frame=True)
    beyond = dataclasses.replace(config.tool_frame, orientation=(13, 14, 15))
    config = dataclasses.replace(config, tool_frame=beyond)
    with pytest.raises(ValueError, match=r"orientation in columns \(13, 14, 15\), got 15"):
        ours(config, acting_presets.calvin_tool_stats(0.1), params, observation)


def test_actions_in_the_tool_frame_are_sent_in_the_world_frame(params, observation, chunks):
    """An expert's action, converted to a target and back, is unchanged."""
    config, stats = (
        acting_presets.calvin(POLICY, tool_frame=True),
        acting_presets.calvin_tool_stats(0.1),
    )
    expert = np.random.default_rng(5).uniform(-0.5, 0.5, (T, 7)).astype(np.float32)
    expert[:, 6] = np.sign(expert[:, 6])
    orientation = observation.proprio[0, :, 3:6]
    frame = config.tool_frame
    label = normalized(reference_frames.to_tool_frame(expert, orientation, frame), stats, config)
    back = normalize.denormalize_action(label, stats, config.normalize)
    np.testing.assert_allclose(
        reference_frames.to_world_frame(back, orientation, frame), expert, atol=1e-4
    )


def test_every_preset_survives_json_and_feeds_the_instruction_at_every_step():
    presets = [
        acting_presets.calvin(POLICY, tool_frame=True, mu=255.0),
        acting_presets.calvin(POLICY),
    ]
    presets += [acting_presets.simpler(POLICY, robot) for robot in ROBOTS]
    for preset in presets:
        assert configs.from_dict(AgentConfig, configs.to_dict(preset)) == preset
        assert preset.mode == "refresh"
        assert preset.instruction_steps == ALWAYS
    assert presets[1].tool_frame is None


def test_simpler_commands_have_rotation_vectors():
    action = np.array([1, 2, 3, 0, 0, 0.5, 1], np.float32)
    expected = [1, 2, 3, 0, 0, 0.5]
    np.testing.assert_allclose(acting_presets.simpler_command(action, "widowx"), [*expected, 1])
    np.testing.assert_allclose(
        acting_presets.simpler_command(action, "google_robot"), [*expected, -2]
    )


def test_wrong_robots_and_statistics_are_refused():
    with pytest.raises(ValueError, match=r"unknown robot 'widow'; .* Did you mean 'widowx'"):
        acting_presets.simpler(POLICY, "widow")
    with pytest.raises(ValueError, match="unknown robot 'octo'"):
        acting_presets.simpler_command(np.zeros(7), "octo")
    with pytest.raises(ValueError, match=r"action must have the statistics .*'q99'\] missing"):
        acting_presets.oxe_stats({"action": {k: v for k, v in OXE["action"].items() if k != "q99"}})
    masked = {"action": {**OXE["action"], "mask": [True] * 5 + [False, False]}}
    with pytest.raises(ValueError, match="mask must be true for every arm dimension"):
        acting_presets.oxe_stats(masked)
    masked["action"]["mask"][5] = True
    assert acting_presets.oxe_stats(masked).count == 0
    assert acting_presets.oxe_stats(OXE).count == 3786400


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"q01": [None, *OXE["action"]["q01"][1:]]}, r"q01\[0\] must be a number"),
        ({"q99": 1.0}, "q99 must be a list of numbers"),
        ({"q99": [1.0] * 6}, "must be lists of one length"),
        ({"std": [-1.0] * 7}, r"std\[0\] must be 0 or more"),
        ({"mask": []}, r"mask must be true for every arm dimension of 7 .* got \[\]"),
        ({"mask": ["no"] * 7}, "mask must be true"),
        ({"mask": None}, "mask must be true"),
    ],
)
def test_statistics_of_a_foreign_file_are_checked_like_ours(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        acting_presets.oxe_stats({"action": {**OXE["action"], **change}, "num_transitions": 3})
