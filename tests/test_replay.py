"""Mode "refresh": the memory of a session is what a replay of its last W observations gives."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_run

from vla_jax.acting.agent import make_agent, read_instruction
from vla_jax.policies import policy
from vla_jax.types import Observation

W, T, MORE = tiny_run.DECODER.window_size, 7, 5


def frame(seen, t, words):
    return Observation(**{name: x[t] for name, x in seen.items()}, instruction=words[None])


@pytest.mark.parametrize("kind", ["lstm", pytest.param("gpt", marks=pytest.mark.slow)])
@pytest.mark.parametrize("instruction_steps", [1, pytest.param(-1, marks=pytest.mark.slow)])
def test_a_replay_of_the_last_steps_gives_the_same_actions(kind, instruction_steps):
    """Steps whose instruction was hidden are replayed, and followed, with an empty one."""
    decoder = dataclasses.replace(tiny_run.DECODER, kind=kind)
    parts = policy.connect(tiny_run.AGENT.policy.backbone, decoder)
    config = dataclasses.replace(tiny_run.AGENT, policy=parts, instruction_steps=instruction_steps)
    rng = np.random.default_rng(0)
    sizes = {"proprio": 8, "environment_state": 22}
    seen = {n: rng.normal(size=(T + MORE, 1, s)).astype(np.float32) for n, s in sizes.items()}
    words = read_instruction(config, "lift the red block")
    hidden = words if instruction_steps == -1 else read_instruction(config, "")
    params = policy.init(jax.random.key(0), parts)
    agent = make_agent(config, tiny_run.norm_stats())
    step, state, replayed = jax.jit(agent.step), agent.init(params, 1), agent.init(params, 1)
    for t in range(T):
        state, _ = step(params, state, frame(seen, t, words), np.array([t == 0]))
    for t in range(T - W, T):
        replayed, _ = step(params, replayed, frame(seen, t, hidden), np.array([t == T - W]))
    for t in range(T, T + MORE):
        state, expected = step(params, state, frame(seen, t, words), np.array([False]))
        replayed, action = step(params, replayed, frame(seen, t, hidden), np.array([False]))
        np.testing.assert_allclose(action, expected, atol=1e-6)
