"""A world from outside the library is evaluated, as a simulator and as JAX functions."""

import dataclasses
import io
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from rich.console import Console

from vla_jax.envs import worlds
from vla_jax.envs.demonstrations import collect
from vla_jax.envs.simulate import EnvSimulator
from vla_jax.evaluate import EvaluateConfig, evaluate
from vla_jax.evaluation import results
from vla_jax.runs import read_world
from vla_jax.types import Env, Observation, Transition

CONFIG = EvaluateConfig(num_episodes=6, num_videos=0, num_simulators=2)


@dataclasses.dataclass(frozen=True)
class CountdownConfig:
    """An environment whose episodes end after `num_steps`; those of task "win" succeed."""

    kind: Literal["countdown"] = "countdown"
    image_size: int = 0
    num_steps: int = 3


def make_env(config):
    def observe(state):
        return Observation(proprio=jnp.full(8, state[1]), environment_state=jnp.full(22, state[0]))

    def reset(key):
        state = jax.random.randint(key, (), 0, 2), jnp.zeros((), jnp.int32)
        return state, observe(state)

    def step(state, action):
        state = state[0], state[1] + 1
        done = state[1] >= config.num_steps
        success = done & (state[0] == 1)
        return state, Transition(observe(state), jnp.float32(success), done, ~done & False, success)

    return Env(
        reset=reset,
        step=step,
        instructions=("touch the red block", "lift the red block"),
        tasks=("lose", "win"),
        instruction_index=lambda state: state[0],
        max_steps=config.num_steps + 1,
    )


class Countdown(EnvSimulator):
    """The environment as a simulator, with references."""

    action_dim = 7

    def __init__(self, config):
        super().__init__(make_env(config), control_hz=5.0)


@pytest.fixture(params=["simulator", "env"])
def folder(request, tmp_path, monkeypatch):
    """Returns a run folder in the new world, which has pure functions in one of two cases."""
    member = worlds.SimulatedWorld(
        config=CountdownConfig,
        make_simulator=Countdown,
        make_env=make_env if request.param == "env" else None,
        references={"random": worlds.random_action},
    )
    monkeypatch.setitem(worlds.WORLDS, "countdown", member)
    tiny_run.write(tmp_path)
    (tmp_path / "world.json").write_text('{"kind": "countdown", "image_size": 0, "num_steps": 4}')
    return tmp_path


@pytest.mark.parametrize("reference", [None, "random"])
def test_a_policy_and_a_reference_are_evaluated_in_a_new_world(folder, reference):
    assert read_world(folder) == CountdownConfig(num_steps=4)
    config = dataclasses.replace(CONFIG, reference=reference)
    summary = evaluate(folder, config, console=Console(file=io.StringIO()))
    (file,) = folder.glob("evaluation/*/episodes.jsonl")
    outcomes = results.read_outcomes(file)
    assert {outcome.num_steps for outcome in outcomes} == {4}
    expected = [int(jax.random.randint(jax.random.key(o.seed), (), 0, 2)) for o in outcomes]
    assert [outcome.success for outcome in outcomes] == [bool(index) for index in expected]
    assert {o.task for o in outcomes} <= {"win", "lose"}
    assert summary.total.episodes == 6


def test_a_reference_that_the_world_lacks_is_refused(folder):
    with pytest.raises(ValueError, match=r"countdown provides \(random\), got 'expert'"):
        evaluate(folder, dataclasses.replace(CONFIG, reference="expert"))


def test_an_unknown_world_is_refused_with_a_suggestion(folder):
    with pytest.raises(ValueError, match=r"unknown world 'countdwn'; .*countdown"):
        evaluate(folder, dataclasses.replace(CONFIG, world="countdwn"))


def test_without_an_expert_there_are_no_demonstrations():
    env = make_env(CountdownConfig())
    with pytest.raises(ValueError, match="env must have an expert"):
        collect(env, jax.random.key(0), 2)
    simulator = Countdown(CountdownConfig())
    simulator.reset(0)
    with pytest.raises(ValueError, match="env must have an expert, got None"):
        simulator.expert()
    assert np.all(simulator.step(np.zeros(7)).observation["proprio"] == 1)
