"""Rows of agent state: a session in a table acts as it does alone, in every mode and kind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from vla_jax.acting import agent as agents
from vla_jax.acting.rows import gather_rows, reset_rows, scatter_rows
from vla_jax.actions.execution import ExecutionConfig
from vla_jax.policies import heads, policy, trunks
from vla_jax.types import Observation

TABLE = 5  # rows of the table of sessions
MODES = ("refresh", "periodic", "persistent")
EXECUTIONS = {
    "first": ExecutionConfig(),
    "receding_horizon": ExecutionConfig(kind="receding_horizon", exec_horizon=2),
    "temporal_ensemble": ExecutionConfig(kind="temporal_ensemble"),
}
# every kind in every mode, every head in every mode, every execution
CASES = [
    *((kind, "continuous", mode, "first") for kind in trunks.names() for mode in MODES),
    *(
        ("lstm", head, mode, "first")
        for head in heads.HEADS
        for mode in MODES
        if head != "continuous"
    ),
    *(("lstm", "continuous", "refresh", execution) for execution in list(EXECUTIONS)[1:]),
]
CASES = [case for case in CASES if case[0] != "gpt" or case[2] != "persistent"]


def make(kind, head, mode, execution):
    decoder = dataclasses.replace(
        tiny_run.DECODER, kind=kind, head=head, num_heads=2, num_bins=16, window_size=3
    )
    parts = policy.connect(tiny_run.AGENT.policy.backbone, decoder)
    config = dataclasses.replace(
        tiny_run.AGENT, policy=parts, mode=mode, execution=EXECUTIONS[execution]
    )
    agent = agents.make_agent(config, tiny_run.norm_stats())
    return agent, policy.init(jax.random.key(0), parts)


def observe(rng, batch_size):
    return Observation(
        proprio=rng.normal(size=(batch_size, 8)).astype(np.float32),
        environment_state=rng.normal(size=(batch_size, 22)).astype(np.float32),
        instruction=rng.integers(1, 256, (batch_size, 12)).astype(np.int32),
    )


def assert_equal(one, other, atol=0.0):
    """Compares trees; the tolerance is relative for numbers above 1, as in matrices of a carry."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2 * atol, atol=atol), one, other
    )


@pytest.mark.sampled
@pytest.mark.filterwarnings("ignore:exec_horizon is")
@pytest.mark.parametrize(("kind", "head", "mode", "execution"), CASES)
def test_a_session_in_a_table_equals_the_session_alone(kind, head, mode, execution):
    agent, params = make(kind, head, mode, execution)
    step, rng = jax.jit(agent.step), np.random.default_rng(0)
    table, alone = agent.init(params, TABLE), agent.init(params, 1)
    leaves = jax.tree.leaves(table)
    assert leaves
    assert all(leaf.shape[0] == TABLE for leaf in leaves)
    for t in range(5):
        others = rng.permutation([0, 1, 3, 4])[:2]
        index = np.array([others[0], 2, others[1]])  # the session is in row 2 of the table
        observation, reset = observe(rng, 3), np.array([False, t == 0, True])
        rows, actions = step(params, gather_rows(table, index), observation, reset)
        table = scatter_rows(table, index, rows)
        own = jax.tree.map(lambda part: part[1:2], observation)
        alone, action = step(params, alone, own, reset[1:2])
        np.testing.assert_allclose(actions[1:2], action, atol=1e-6)
    assert_equal(gather_rows(table, np.array([2])), alone, atol=1e-6)
    table = reset_rows(table, np.array([2, 4]), agent.init(params, 1))
    assert_equal(gather_rows(table, np.array([2, 4])), agent.init(params, 2))


def test_gather_after_scatter_returns_the_rows_and_the_others_are_unchanged():
    table = {"a": jnp.arange(10.0).reshape(5, 2), "b": (jnp.arange(5),)}
    rows = {"a": -jnp.ones((2, 2)), "b": (jnp.array([7, 8]),)}
    index, rest = np.array([3, 0]), np.array([1, 2, 4])
    written = jax.jit(scatter_rows)(table, index, rows)
    assert_equal(gather_rows(written, index), rows)
    assert_equal(gather_rows(written, rest), gather_rows(table, rest))
    assert_equal(scatter_rows(table, index, gather_rows(table, index)), table)
    filled = np.array([3, 0, 5, 5])  # 5 is no row: it fills up the batch
    padded = jax.tree.map(lambda row: jnp.concatenate([row, row]), rows)
    assert_equal(jax.jit(scatter_rows)(table, filled, padded), written)
    assert_equal(jax.tree.map(lambda row: row[:2], gather_rows(written, filled)), rows)
