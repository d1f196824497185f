"""Steps of an agent that give all actions of the predicted chunk, not the one for now alone.

For clients that ask every few steps and send the rows of the reply one after the other.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vla_jax.acting import agent
from vla_jax.acting.agent import AgentConfig, AgentState
from vla_jax.actions import execution
from vla_jax.data.normalize import NormStats
from vla_jax.types import ActionChunk, Array, Observation, Params


def step(
    config: AgentConfig,
    norm_stats: Mapping[str, NormStats],
    params: Params,
    state: AgentState,
    observation: Observation,
    reset: Array,
) -> tuple[AgentState, Array]:
    """Returns the state after a step, and the actions of the chunk in the robot's units.

    Args:
      config: of the agent, accepted by `check`.
      norm_stats: of the training data.
      params: of the policy.
      state: of the agent.
      observation: `[B, ...]`, raw.
      reset: `[B]`, True where an episode starts.

    Returns:
      The state, which is that of `Agent.step`, and actions `[B, K, A]`, whose first row is the
      action of `Agent.step`. Gripper rules go on along the rows.
    """
    state, _, chunk = agent.predict(config, norm_stats, params, state, observation, reset)
    executed, _ = execution.plan(config.execution, state.execution, chunk, reset=reset)

    def send(state: AgentState, planned: ActionChunk) -> tuple[AgentState, tuple]:
        state, action = agent.send(config, norm_stats, state, observation, planned)
        return state, (state.execution, action)

    rows = jax.tree.map(lambda part: jnp.moveaxis(part, 1, 0), chunk)
    state = state._replace(execution=executed)
    _, (states, actions) = jax.lax.scan(send, state, rows)
    after_first = jax.tree.map(lambda leaf: leaf[0], states)  # the later rows may never be sent
    return state._replace(execution=after_first), jnp.moveaxis(actions, 0, 1)


def check(config: AgentConfig) -> None:
    """Raises a ValueError if an action of a chunk depends on more than the chunk."""
    kind, tool_frame = config.execution.kind, config.tool_frame
    if kind != "first" or tool_frame is not None:
        found = f"exec_kind '{kind}'" if kind != "first" else "a tool_frame"
        raise ValueError(
            f"actions must be 'first' for a policy with {found}, got 'chunk': later actions are not"
            " known when the chunk is predicted."
        )
