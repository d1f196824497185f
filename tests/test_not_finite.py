"""What is not finite in params or observation gives no valid action, with any head and trunk."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from vla_jax import trees
from vla_jax.acting.agent import make_agent
from vla_jax.actions.execution import CHUNK_RULES, ExecutionConfig
from vla_jax.policies import policy, trunks
from vla_jax.policies.heads import HEADS
from vla_jax.types import Observation

B, K, A, V = 2, 2, 7, 8
VALUES = (np.nan, np.inf, -np.inf)
EXECUTIONS = {
    kind: ExecutionConfig(kind=kind, exec_horizon=2 if rule.holds_chunks else 1)
    for kind, rule in CHUNK_RULES.items()
}
# head -> the last bias that the gripper depends on, its shape, and the gripper's part of it
GRIPPER = {
    "continuous": ("*/gripper/layers_1/bias", (K,), ...),
    "discrete": ("*/bins/layers_1/bias", (K, A, V), np.s_[:, -1]),
    "autoregressive": ("*/heads/output/bias", (A,), np.s_[-1]),
    "flow": ("*/velocity/layers_1/bias", (K, A), np.s_[:, -1]),
}
CASES = [
    *(("lstm", head, kind) for head in HEADS for kind in EXECUTIONS),
    *((kind, "discrete", "first") for kind in trunks.names()),
]


def observe(value=0.5):
    """An observation of B robots; one number of the last robot's proprio has this value."""
    proprio = np.full((B, 8), 0.1, np.float32)
    proprio[-1, 3] = value
    state = np.full((B, 22), 0.1, np.float32)
    return Observation(
        proprio=proprio, environment_state=state, instruction=np.zeros((B, 12), np.int32)
    )


def break_gripper(head, params, value):
    glob, shape, part = GRIPPER[head]

    def change(path, leaf):
        if not trees.matches(path, [glob]):
            return leaf
        return jnp.asarray(leaf).reshape(shape).at[part].set(value).reshape(-1)

    trees.check_globs([glob], params, name="glob")
    return jax.tree.map(change, trees.map_paths(str, params), params)


@pytest.mark.filterwarnings("ignore:exec_horizon is 2")  # the test steps on every frame
@pytest.mark.sampled
@pytest.mark.parametrize(("kind", "head", "execution"), CASES)
def test_an_action_from_what_is_not_finite_is_not_finite(kind, head, execution, key):
    mode = trunks.get(kind).modes[0]
    decoder = dataclasses.replace(
        tiny_run.DECODER, kind=kind, head=head, num_bins=V, num_heads=2, segment_size=2
    )
    config = dataclasses.replace(
        tiny_run.AGENT, policy=policy.connect(tiny_run.AGENT.policy.backbone, decoder),
        mode=mode, execution=EXECUTIONS[execution],
    )  # fmt: skip
    agent, params = make_agent(config, tiny_run.norm_stats()), policy.init(key, config.policy)
    step = jax.jit(agent.step)
    start = agent.init(params, B)
    begun, action = step(params, start, observe(), np.ones(B, bool))
    assert np.isfinite(action).all()
    # In the second step "receding_horizon" sends an action of the first chunk.
    for state, reset in ((start, np.ones(B, bool)), (begun, np.zeros(B, bool))):
        for value in VALUES:
            everywhere = jax.tree.map(lambda leaf, value=value: leaf * 0 + value, params)
            for broken in (everywhere, break_gripper(head, params, value)):
                action = step(broken, state, observe(), reset)[1]
                assert not np.isfinite(action).all(axis=-1).any()
            action = step(params, state, observe(value), reset)[1]
            np.testing.assert_array_equal(np.isfinite(action).all(axis=-1), [True, False])
