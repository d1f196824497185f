"""The rows of a whole chunk: the first is the agent's action, the others its next predictions."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny_run

from vla_jax.acting import agent as agents
from vla_jax.acting import whole_chunks
from vla_jax.actions.execution import ExecutionConfig
from vla_jax.actions.reference_frames import ToolFrame
from vla_jax.data import normalize
from vla_jax.types import Observation

B, T, K = 2, 5, 2
GRIPPERS = {
    "target": ExecutionConfig(),
    "repeat_change": ExecutionConfig(gripper_rule="repeat_change", gripper_steps=2),
    "open_late": ExecutionConfig(gripper_rule="open_late", gripper_steps=2),
}


@pytest.mark.parametrize("rule", GRIPPERS)
def test_the_first_row_and_the_state_are_those_of_a_step(rule):
    config = dataclasses.replace(tiny_run.AGENT, execution=GRIPPERS[rule])
    stats, params, rng = tiny_run.norm_stats(), tiny_run.params(), np.random.default_rng(0)
    agent = agents.make_agent(config, stats)
    step = jax.jit(agent.step)
    step_chunk = jax.jit(functools.partial(whole_chunks.step, config, stats))
    predict = jax.jit(functools.partial(agents.predict, config, stats))
    one = whole = agent.init(params, B)
    for t in range(T):
        observation = Observation(
            proprio=rng.normal(size=(B, 8)).astype(np.float32),
            environment_state=rng.normal(size=(B, 22)).astype(np.float32),
            instruction=np.ones((B, 12), np.int32),
        )
        reset = np.array([t == 0, t in (0, 3)])
        chunk = predict(params, whole, observation, reset)[2]
        one, action = step(params, one, observation, reset)
        whole, actions = step_chunk(params, whole, observation, reset)
        assert actions.shape == (B, K, 7)
        np.testing.assert_array_equal(actions[:, 0], action)
        jax.tree.map(np.testing.assert_array_equal, whole, one)
        arm = np.pad(np.asarray(chunk.arm), ((0, 0), (0, 0), (0, 1)))
        arm = normalize.denormalize_action(arm, stats["action"], config.normalize)
        np.testing.assert_allclose(actions[..., :6], arm[..., :6], atol=1e-6)
        if rule == "target":
            expected = np.where(np.asarray(chunk.gripper_logit) > 0, 1.0, -1.0)
            np.testing.assert_array_equal(actions[..., 6], expected)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"execution": ExecutionConfig(kind="temporal_ensemble")}, "exec_kind 'temporal_ensemble'"),
        ({"tool_frame": ToolFrame()}, "a tool_frame"),
    ],
)
def test_actions_that_depend_on_more_than_the_chunk_are_refused(fields, found):
    config = dataclasses.replace(tiny_run.AGENT, **fields)
    with pytest.raises(ValueError, match=f"must be 'first' for a policy with {found}, got 'chunk'"):
        whole_chunks.check(config)
