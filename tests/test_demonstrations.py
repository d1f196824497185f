"""Demonstrations of JAX environments: what the robot executes, and what is recorded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.envs.demonstrations import collect
from vla_jax.envs.table import expert, jax_env, rules

CONFIG = jax_env.JaxTableConfig(max_steps=8)
STEPS = 4  # the hand starts above all objects and can move freely in so many steps


def test_a_motion_of_random_length_replaces_the_expert_at_the_start_but_not_in_the_record():
    demos = collect(jax_env.make(CONFIG), jax.random.key(0), 64, noise=0.0, wander_steps=3)
    tool = np.asarray(demos.observation.proprio)[..., :3]
    moved = np.diff(tool[:, : STEPS + 1], axis=1) / CONFIG.step_size
    recorded = np.asarray(demos.action)[:, :STEPS, :3]
    low, high = np.array(rules.WORKSPACE_LOW), np.array(rules.WORKSPACE_HIGH)
    inside = np.all((tool > low + 1e-4) & (tool < high - 1e-4), axis=(1, 2))
    follows = np.all(np.abs(moved - recorded) < 1e-4, axis=-1)[inside]
    num_wandering = np.sum(~follows, axis=1)
    assert set(num_wandering) == {0, 1, 2, 3}
    for motion, count in zip(moved[inside], num_wandering, strict=True):
        assert np.all(follows[:, 3])
        np.testing.assert_allclose(motion[:count], motion[:1].repeat(count, 0), atol=1e-4)


@pytest.mark.slow
def test_what_is_recorded_is_the_action_of_the_expert_in_each_state():
    demos = collect(jax_env.make(CONFIG), jax.random.key(0), 8, wander_steps=3)
    task, target = jnp.divmod(demos.instruction, rules.NUM_BLOCKS)
    act = jax.vmap(
        jax.vmap(
            lambda *parts: expert.act(
                *parts, step_size=CONFIG.step_size, turn_size=CONFIG.turn_size
            )
        )
    )
    expected = act(demos.observation.environment_state, demos.observation.proprio, task, target)
    np.testing.assert_allclose(demos.action, expected, atol=1e-5)
