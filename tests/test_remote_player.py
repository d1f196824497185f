"""A policy behind a server is evaluated as in process, with and without sessions."""

import io
import pathlib

import fake_server
import jax
import numpy as np
import pytest
import running_server
import tiny_run
from rich.console import Console

from vla_jax import config as configs
from vla_jax.acting import agent as agents
from vla_jax.acting.rollout import SimulatorView, run_simulators
from vla_jax.envs.table.jax_simulator import JaxTable
from vla_jax.evaluate import EvaluateConfig, evaluate
from vla_jax.evaluation import players, results
from vla_jax.evaluation_setup import make_setup
from vla_jax.runs import Run
from vla_jax.serve import ServeConfig
from vla_jax.serving.remote_player import RemotePlayer
from vla_jax.types import make_observation

SESSIONS = {
    "features": ["session_id", "step"],
    "observation": {"proprio": {}, "environment_state": {}},
    "run": "tiny",
    "limits": {"sessions": 4},
}
PLAIN = {}
PARTS = {"observation/state": "proprio", "environment_state": "environment_state"}


@pytest.fixture(scope="module")
def served():
    """Answers as a server does: the agent for one robot, a state per session or connection."""
    agent = agents.make_agent(tiny_run.AGENT, tiny_run.norm_stats())
    params, step = tiny_run.params(10), jax.jit(agent.step)
    states, connections = {}, set()

    def answer(connection, request):
        connections.add(connection.id)
        name = request.get("session_id", connection.id)
        if request.get("endpoint") == "reset":
            return {"status": "reset successful"}
        known = {PARTS[key]: value[None] for key, value in request.items() if key in PARTS}
        words = agents.read_instruction(tiny_run.AGENT, request["prompt"])
        new = name not in states or request.get("step") == 0
        state, actions = step(
            params,
            agent.init(params, 1) if name not in states else states[name],
            make_observation(known, instruction=words[None]),
            np.array([new]),
        )
        states[name] = state
        return {"actions": np.asarray(actions)}

    answer.connections = connections
    return answer


def episodes(controller, num_simulators):
    """Outcomes and actions by seed."""
    played = run_simulators(
        controller, lambda: JaxTable(tiny_run.WORLD), range(7), num_simulators=num_simulators
    )
    return {episode.outcome.seed: episode for episode in played}


@pytest.mark.parametrize("metadata", [SESSIONS, PLAIN], ids=["sessions", "plain"])
def test_outcomes_and_actions_equal_those_in_process(served, metadata):
    local = players.make_player(tiny_run.AGENT, tiny_run.norm_stats(), tiny_run.params(10))
    expected = episodes(local.controller, 3)
    with fake_server.serving(served, metadata=metadata) as port:
        player = RemotePlayer(f"ws://127.0.0.1:{port}")
        found = episodes(player.controller, 3)
        player.disconnect()
    assert found.keys() == expected.keys()
    for seed, episode in expected.items():
        # a server does not say how many numbers it clipped
        assert found[seed].outcome == episode.outcome._replace(observations_clipped=None)
        np.testing.assert_allclose(found[seed].actions, episode.actions, atol=1e-5)


def test_a_plain_server_gets_a_connection_per_episode(served):
    served.connections.clear()
    with fake_server.serving(served, metadata=PLAIN) as port:
        player = RemotePlayer(f"ws://127.0.0.1:{port}")
        episodes(player.controller, 2)
        player.disconnect()
    assert len(served.connections) == 7


def test_rows_of_a_chunk_are_executed_before_the_server_is_asked_again():
    asked = []

    def answer(connection, request):
        asked.append(request)
        return {"actions": np.full((3, 7), len(asked)) + 0.1 * np.arange(3)[:, None]}

    world = JaxTable(tiny_run.WORLD)
    with fake_server.serving(answer) as port:
        player = RemotePlayer(f"ws://127.0.0.1:{port}", exec_horizon=2)
        state, sent = player.controller.init(1), []
        observation = world.reset(0)
        for step in range(4):
            view = SimulatorView(observation, world.instruction, step, 0, world)
            state, actions = player.controller.step(state, [view], np.array([step in (0, 3)]))
            sent.append(actions[0, 0])
        player.disconnect()
    np.testing.assert_allclose(sent, [1, 1.1, 2, 3])


def test_the_command_evaluates_a_server(served, tmp_path):
    folder = tiny_run.write(tmp_path / "run")
    config = EvaluateConfig(num_episodes=4, num_videos=1, num_simulators=2)
    quiet = Console(file=io.StringIO())
    local = evaluate(folder, config, console=quiet)
    with fake_server.serving(served, metadata=SESSIONS) as port:
        remote = EvaluateConfig(
            num_episodes=4, num_videos=1, num_simulators=2, remote=f"ws://127.0.0.1:{port}"
        )
        found = evaluate(folder, remote, console=quiet)
        assert evaluate(folder, remote, console=quiet).total == found.total  # nothing is repeated
        many = EvaluateConfig(num_simulators=5, remote=f"ws://127.0.0.1:{port}")
        with pytest.raises(ValueError, match="num_simulators must be at most 4, the sessions of"):
            evaluate(folder, many, console=quiet)
    assert found.total == local.total
    assert found.latency is not None
    places = [folder / "evaluation" / name for name in ("refresh-4", f"remote-127.0.0.1_{port}")]
    one, other = (
        [
            each._replace(observations_clipped=None)
            for each in sorted(results.read_outcomes(place / "episodes.jsonl"))
        ]
        for place in places
    )
    assert one == other
    assert (places[1] / "settings.json").read_text().count('"run": "tiny"') == 1


def test_images_of_a_size_that_nothing_names_get_a_warning(tmp_path):
    with fake_server.serving(lambda *_: {}) as port:
        options = EvaluateConfig(world="table_jax", remote=f"ws://127.0.0.1:{port}")
        with pytest.warns(UserWarning, match="does not name the size .* get 224 pixels"):
            setup = make_setup(tmp_path, options)
        setup.disconnect()
        configs.save(tiny_run.WORLD, tmp_path / "world.json")
        setup = make_setup(tmp_path, options)
        setup.disconnect()
    assert setup.world.image_size == tiny_run.WORLD.image_size


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mode": "persistent"}, "mode must be None with remote 'ws://h', whose server decides it"),
        ({"reference": "expert"}, "remote must be None with reference 'expert'"),
    ],
)
def test_options_that_the_server_decides_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        EvaluateConfig(remote="ws://h", **options)


def test_a_server_that_is_not_there_is_named_before_any_folder_is_made(tmp_path):
    with fake_server.serving(None) as port:
        pass
    with pytest.raises(ConnectionError, match="no answer from ws://127"):
        RemotePlayer(f"ws://127.0.0.1:{port}", patience=0.1)


def test_our_server_gives_the_outcomes_and_actions_in_process():
    local = players.make_player(tiny_run.AGENT, tiny_run.norm_stats(), tiny_run.params(10))
    expected = episodes(local.controller, 3)
    stats, params = tiny_run.norm_stats(), tiny_run.params(10)
    run = Run(pathlib.Path("tiny"), tiny_run.AGENT, stats, params, None, 10)
    with running_server.running(run, ServeConfig(sessions=3, max_batch=3)) as port:
        player = RemotePlayer(f"ws://127.0.0.1:{port}")
        assert player.image_size == 0
        found = episodes(player.controller, 3)
        player.disconnect()
    for seed, episode in expected.items():
        # a server does not say how many numbers it clipped
        assert found[seed].outcome == episode.outcome._replace(observations_clipped=None)
        np.testing.assert_allclose(found[seed].actions, episode.actions, atol=1e-5)
