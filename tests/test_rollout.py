"""Every seed is played once, despite crashes; simulators and a scan give the same outcomes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.acting.agent import Agent, AgentState
from vla_jax.acting.rollout import Controller, Outcome, run_env, run_simulators
from vla_jax.envs import simulate
from vla_jax.envs.table import expert, jax_env, rules
from vla_jax.types import Env, Observation, SimulatorStep, Transition

WORLD = jax_env.JaxTableConfig(image_size=0, max_steps=20)


class Countdown:
    """Ends after `seed % 4 + 1` steps, with success if the last action was the seed; may raise."""

    control_hz, max_steps, success_rule = 10.0, 4, "at_end"
    made, closed = 0, 0

    def __init__(self, raises=()):
        self.raises, self.instruction, self.task = raises, "", ""
        Countdown.made += 1

    def reset(self, seed):
        if (seed, "reset") in self.raises:
            raise RuntimeError("no table\nsecond line")
        self.seed, self.left = seed, seed % 4 + 1
        self.instruction, self.task = f"say {seed}", f"task {seed % 2}"
        return {"proprio": np.array([seed, self.left])}

    def step(self, action):
        if (self.seed, "step") in self.raises and self.left == 1:
            raise ValueError("arm broke")
        self.left -= 1
        over = self.left == 0
        observation = {"proprio": np.array([self.seed, self.left])}
        return SimulatorStep(observation, 0.0, over, False, over and action[0] == self.seed)

    def draw(self, size=256):
        return np.full((size, size, 3), self.left, np.uint8)

    def close(self):
        Countdown.closed += 1


def empty_state(size):
    return AgentState(None, None, *jnp.zeros((2, size), jnp.int32), None)


@pytest.fixture(autouse=True)
def _counts(monkeypatch):
    monkeypatch.setattr(Countdown, "made", 0)
    monkeypatch.setattr(Countdown, "closed", 0)


def act_with_seed(views):
    return np.stack([view.observation["proprio"] for view in views])


def stateless(act):
    return Controller(lambda num_simulators: None, lambda state, views, reset: (state, act(views)))


def play(seeds, *, act=act_with_seed, raises=(), **options):
    return list(run_simulators(stateless(act), lambda: Countdown(raises), seeds, **options))


@pytest.mark.parametrize("num_simulators", [1, 3, 16])
def test_every_seed_is_played_once_with_outcomes_independent_of_the_batch(num_simulators):
    played = play(range(9), num_simulators=num_simulators)
    expected = [
        Outcome(seed, f"task {seed % 2}", f"say {seed}", True, seed % 4 + 1, "")
        for seed in range(9)
    ]
    outcomes = sorted(episode.outcome for episode in played)
    assert [outcome._replace(clipped=None) for outcome in outcomes] == expected
    assert Countdown.made == Countdown.closed == min(num_simulators, 9)
    for episode in played:
        assert episode.actions.shape == (episode.outcome.num_steps, 2)


def test_the_policy_always_gets_one_view_per_simulator_in_a_fixed_row():
    owners, ages, starts = [], [-1] * 3, []

    def act(views):
        owners.extend(view.simulator for view in views[len(owners) :])
        for row, view in enumerate(views):
            if view.simulator is owners[row]:  # else no episode is left: another view repeated
                ages[row] = 0 if view.step == 0 else ages[row] + 1
                assert view.step == ages[row]
                starts.extend([view.seed] if view.step == 0 else [])
        assert len(views) == len(set(owners)) == 3
        return act_with_seed(views)

    play(range(7), act=act, num_simulators=3)
    assert sorted(starts) == list(range(7))


def test_a_crash_is_recorded_and_the_evaluation_continues():
    raises = {(2, "step"), (4, "reset")}
    played = {w.outcome.seed: w.outcome for w in play(range(6), raises=raises, num_simulators=2)}
    broken = played[2]._replace(clipped=None)
    assert broken == Outcome(2, "task 0", "say 2", False, 2, "ValueError: arm broke")
    assert played[4] == Outcome(4, "", "", False, 0, "RuntimeError: no table", 0.0)
    assert [played[seed].success for seed in (0, 1, 3, 5)] == [True] * 4
    assert Countdown.made == Countdown.closed == 4


def test_a_world_that_always_crashes_yields_all_outcomes():
    raises = {(seed, "reset") for seed in range(5)}
    played = play(range(5), raises=raises, num_simulators=2)
    assert sorted(episode.outcome.seed for episode in played) == list(range(5))
    assert all(episode.outcome.error for episode in played)


def test_simulators_without_an_episode_after_early_crashes_do_no_harm():
    raises = {(seed, "reset") for seed in range(4)}
    played = play(range(5), raises=raises, num_simulators=5)
    assert sorted(w.outcome.success for w in played) == [False] * 4 + [True]


def test_only_the_requested_episodes_are_recorded_from_first_to_last_view():
    played = play(range(6), video_seeds=(3, 5), draw=lambda s: s.draw(4), num_simulators=4)
    for episode in played:
        seed = episode.outcome.seed
        recorded = [int(picture[0, 0, 0]) for picture in episode.video]
        assert recorded == (list(range(seed % 4 + 1, -1, -1)) if seed in (3, 5) else [])


def test_closing_the_generator_early_closes_all_simulators():
    episodes = run_simulators(stateless(act_with_seed), Countdown, range(9), num_simulators=3)
    next(episodes)
    episodes.close()
    assert Countdown.made == Countdown.closed == 3


def make_expert_agent(choose):
    """An agent that gets the index i of the instruction and acts as the expert for choose(i)."""

    def step(params, state, observation, reset):
        def one(environment_state, proprio, instruction):
            task, target = jnp.divmod(choose(instruction[0]), rules.NUM_BLOCKS)
            return expert.act(
                environment_state,
                proprio,
                task,
                target,
                step_size=WORLD.step_size,
                turn_size=WORLD.turn_size,
            )

        parts = (observation.environment_state, observation.proprio, observation.instruction)
        age = jnp.where(reset, 0, state.age) + 1
        return state._replace(age=age), jax.vmap(one)(*parts)

    return Agent(
        init=lambda params, batch_size: empty_state(batch_size),
        prepare=lambda params, batch_size: params,
        step=step,
    )


@jax.jit
def sometimes_wrong(index):
    return jnp.where(index % 2 == 0, index, index // 4 * 4 + (index + 1) % 4)


@pytest.mark.slow
def test_a_scan_over_a_jax_world_equals_its_simulator():
    env, agent, seeds = jax_env.make(WORLD), make_expert_agent(sometimes_wrong), range(30, 42)
    ids = jnp.arange(len(env.instructions))[:, None]
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    scanned = jax.jit(lambda keys: run_env(agent, {}, env, ids, keys))(keys)
    step = jax.jit(agent.step)

    def act(state, views, reset):
        parts = {n: np.stack([v.observation[n] for v in views]) for n in views[0].observation}
        words = [[env.instructions.index(v.instruction)] for v in views]
        observation = Observation(**parts, instruction=np.array(words))
        state, actions = step({}, state, observation, reset)
        return state, np.asarray(actions)

    controller = Controller(lambda num_simulators: agent.init({}, num_simulators), act)
    played = run_simulators(controller, lambda: simulate.EnvSimulator(env), seeds, num_simulators=4)
    outcomes = sorted(episode.outcome for episode in played)
    assert [o.success for o in outcomes] == scanned.success.tolist()
    assert [o.num_steps for o in outcomes] == scanned.num_steps.tolist()
    sentences = [env.instructions[index] for index in scanned.instruction_index]
    assert [o.instruction for o in outcomes] == sentences
    assert 0 < scanned.success.sum() < len(seeds)  # both outcomes occur


@pytest.mark.slow
def test_steps_after_the_end_of_an_episode_do_not_count():
    env, right, wrong = (
        jax_env.make(WORLD),
        make_expert_agent(lambda i: i),
        make_expert_agent(lambda i: i ^ 1),
    )
    ids = jnp.arange(len(env.instructions))[:, None]
    keys = jax.random.split(jax.random.key(3), 16)
    good, bad = (
        jax.jit(lambda keys, a=agent: run_env(a, {}, env, ids, keys))(keys)
        for agent in (right, wrong)
    )
    ended = good.num_steps < WORLD.max_steps
    assert ended.sum() > 8
    assert good.success[ended].all()
    assert not bad.success[bad.num_steps < WORLD.max_steps].any()


class Passing(Countdown):
    """A world that reports success at the second of four steps only, and goes on."""

    def __init__(self, success_rule):
        super().__init__()
        self.success_rule = success_rule

    def reset(self, seed):
        self.step_number = 0
        return {"proprio": np.zeros(2)}

    def step(self, action):
        self.step_number += 1
        over, success = self.step_number == 4, self.step_number == 2
        return SimulatorStep({"proprio": np.zeros(2)}, 0.0, False, over, success)


def passing_env(success_rule):
    """The same world as pure functions; the action is the one number of proprio, 0."""

    def step(state, action):
        state = state + 1
        flags = jnp.zeros((), bool), state == 4, state == 2
        return state, Transition(Observation(proprio=action), jnp.zeros(()), *flags)

    return Env(
        reset=lambda key: (jnp.zeros((), jnp.int32), Observation(proprio=jnp.zeros(2))),
        step=step, instructions=("",), tasks=("",), max_steps=6, success_rule=success_rule,
        instruction_index=lambda state: jnp.zeros((), jnp.int32),
    )  # fmt: skip


def echo_agent(at_step=-1, value=0.0):
    """Returns an agent whose actions are zeros, but `value` at one step of the odd rows."""

    def step(params, state, observation, reset):
        age = jnp.where(reset, 0, state.age)
        odd = (jnp.arange(len(age)) % 2 == 1) & (age == at_step)
        # Four numbers of every observation count as clipped.
        state = state._replace(age=age + 1, num_clipped=4 * (age + 1))
        return state, jnp.where(odd[:, None], value, jnp.zeros_like(observation.proprio))

    return Agent(lambda params, size: empty_state(size), lambda params, size: params, step)


def run(env, agent, num_episodes=2):
    ids, keys = jnp.zeros((1, 1), jnp.int32), jax.random.split(jax.random.key(0), num_episodes)
    return jax.device_get(jax.jit(lambda: run_env(agent, {}, env, ids, keys))())


@pytest.mark.parametrize(("rule", "expected"), [("once", True), ("at_end", False)])
def test_the_rule_of_the_world_decides_about_a_success_in_mid_episode(rule, expected):
    controller = stateless(lambda views: np.zeros((len(views), 2)))
    played = list(run_simulators(controller, lambda: Passing(rule), range(2), num_simulators=2))
    assert [episode.outcome.success for episode in played] == [expected] * 2
    scanned = run(passing_env(rule), echo_agent())
    assert scanned.success.tolist() == [expected] * 2
    assert scanned.num_steps.tolist() == [4, 4]


def test_an_action_that_is_not_finite_is_not_sent_and_the_episode_counts_as_crashed():
    def act(views):
        bad = [view.step == 2 and view.seed == 3 for view in views]
        return np.where(np.array(bad)[:, None], np.nan, np.zeros((len(views), 2)))

    made = functools.partial(Passing, "once")
    played = {
        episode.outcome.seed: episode
        for episode in run_simulators(stateless(act), made, range(2, 4), num_simulators=2)
    }
    assert played[2].outcome.success
    assert played[3].outcome.error.startswith("ValueError: action must be finite numbers, got")
    assert not played[3].outcome.success
    assert np.isfinite(played[3].actions).all()
    assert len(played[3].actions) == 2


def test_a_scan_ends_an_episode_whose_action_is_not_finite_and_counts_clipped_ones():
    scanned = run(passing_env("once"), echo_agent(at_step=3, value=jnp.inf))
    assert scanned.refused.tolist() == [False, True]
    assert scanned.success.tolist() == [True, False]
    assert scanned.num_steps.tolist() == [4, 3]
    clipped = run(passing_env("once"), echo_agent(at_step=1, value=2.0))
    assert clipped.num_clipped.tolist() == [0, 1]
    assert not clipped.refused.any()
    assert clipped.observations_clipped.tolist() == [16, 16]  # of four steps
    assert scanned.observations_clipped.tolist() == [16, 16]


def test_an_outcome_counts_the_clipped_numbers_of_its_own_observations():
    def step(state, views, reset):
        state = np.where(reset, 0, state) + 1
        return state, np.zeros((len(views), 2))

    controller = Controller(lambda size: np.zeros(size, int), step, lambda state: 3 * state)
    played = run_simulators(controller, Countdown, range(7), num_simulators=3)
    for episode in played:
        assert episode.outcome.observations_clipped == 3 * episode.outcome.num_steps
