"""Every dialect of the server steps the memory over every frame, as in process."""

import http.client
import pathlib

import jax
import msgpack
import numpy as np
import pytest
import running_server
import tiny_run
from test_dialects import lists, observations, recorded
from websockets.sync.client import connect

from vla_jax.acting.agent import AgentConfig, make_agent, read_instruction
from vla_jax.backbones.perceiver import PerceiverConfig
from vla_jax.policies import policy
from vla_jax.runs import Run
from vla_jax.serve import ServeConfig
from vla_jax.serving import messages, vla_eval
from vla_jax.serving.client import Client
from vla_jax.types import make_observation

BACKBONE = PerceiverConfig(
    image_size=16, patch_size=8, width=8, num_heads=2, num_latents=2, token_dim=8, vocab_size=256
)
AGENT = AgentConfig(
    policy=policy.connect(BACKBONE, tiny_run.DECODER), missing_parts=("image_wrist",)
)
PROMPT = observations.PROMPT


@pytest.fixture(scope="module")
def run():
    stats = {name: tiny_run.norm_stats()[name] for name in ("action", "proprio")}
    params = policy.init(jax.random.key(0), AGENT.policy)
    return Run(pathlib.Path("tiny"), AGENT, stats, params, None, 3)


@pytest.fixture(scope="module")
def port(run):
    with running_server.running(run, ServeConfig(sessions=4, max_batch=1)) as port:
        yield port


@pytest.fixture(scope="module")
def act(run):
    """Returns a function of images and states of an episode to its actions `[T, A]`."""
    agent = make_agent(run.agent, run.norm_stats)
    params, step = agent.prepare(run.params, 1), jax.jit(agent.step)
    words = read_instruction(run.agent, PROMPT)[None]

    def episode(frames):
        state, actions = agent.init(run.params, 1), []
        for t, (image, proprio) in enumerate(frames):
            parts = {"image_primary": image[None], "proprio": np.float32(proprio)[None]}
            now = make_observation(parts, instruction=words)
            state, action = step(params, state, now, np.array([t == 0]))
            actions.append(np.asarray(action[0]))
        return np.stack(actions)

    return episode


@pytest.fixture
def ask(port):
    """Returns a function that sends a message on one connection and returns the answer."""
    with connect(f"ws://127.0.0.1:{port}", compression=None, proxy=None) as socket:
        socket.recv()

        def send(message):
            socket.send(message if isinstance(message, bytes) else messages.pack(message))
            answer = socket.recv(timeout=30)
            return answer if isinstance(answer, str) else messages.unpack(answer)

        yield send


def frame(step):
    return observations.image(step), observations.numbers(step, 8)


def named(step):
    image, state = frame(step)
    return {"observation/image": image, "observation/state": state}


def close_to(found, expected):
    np.testing.assert_allclose(np.stack(found), expected, atol=1e-5)


def test_a_list_of_frames_steps_over_each_of_them(port, act):
    expected = act([frame(step) for step in range(7)])
    with Client(f"ws://127.0.0.1:{port}") as client:
        shown = [named(step) for step in range(4)]
        first = client.infer(named(4), prompt=PROMPT, earlier=shown)
        second = client.infer(named(6), earlier=[named(5)])
    assert (first.step, second.step) == (4, 6)
    close_to([first.actions[0], second.actions[0]], expected[[4, 6]])


@pytest.mark.parametrize("client", ["openpi-client_0.1.1", "openpi-client_0.1.2"])
def test_the_bytes_of_the_real_openpi_client_get_the_actions_in_process(ask, act, client):
    answers = [ask(data)["actions"][0] for data in recorded(client)[:3]]
    close_to(answers, act([frame(step) for step in range(3)]))


def test_the_buffer_of_robomme_is_stepped_before_the_present_frame(ask, act):
    expected = act([frame(step) for step in range(9)])
    assert ask({"reset": True})["reset_finished"] is True
    found = []
    for start, stop in ((0, 5), (5, 7), (7, 9)):  # the last frame of each is the present one
        images, states = zip(*map(frame, range(start, stop)), strict=True)
        buffer = {"images": np.stack(images)[:, None], "state": np.float32(states)}
        answer = ask({"add_buffer": True, **buffer, "exec_start_idx": 4})
        assert answer["add_buffer_finished"] is True
        found.append(ask({**named(stop - 1), "prompt": PROMPT})["actions"][0])
    close_to(found, expected[[4, 6, 8]])


def test_a_refused_observation_keeps_the_buffer(ask, act):
    images, states = zip(*map(frame, range(3)), strict=True)
    ask({"add_buffer": True, "images": np.stack(images)[:, None], "state": np.float32(states)})
    assert "finite" in ask({**named(3), "prompt": PROMPT, "observation/state": np.full(8, np.nan)})
    found = ask({**named(3), "prompt": PROMPT})["actions"]
    close_to(found, act([frame(step) for step in range(4)])[3:])


def test_the_lists_of_the_challenge_are_stepped_one_by_one(ask, act):
    message = {**lists(5), "task_goal": [PROMPT]}
    frames = [
        (observations.image(t), np.append(observations.numbers(t, 7), 0.1 * t)) for t in range(5)
    ]
    columns = [key for key in message if key.endswith("_list")]
    first = {**message, **{key: message[key][:3] for key in columns}}
    second = {**message, "is_first_step": False, **{key: message[key][3:] for key in columns}}
    found = [ask(each)["actions"][0] for each in (first, second)]
    close_to(found, act(frames)[[2, 4]])


def harness(socket, data):
    socket.send(data)
    return vla_eval.read_envelope(socket.recv(timeout=30))


def test_the_bytes_of_the_real_harness_get_the_actions_in_process(port, act):
    expected = act([frame(step) for step in range(3)])
    hello, *episodes = recorded("vla-eval_0.8.0")
    url = f"ws://127.0.0.1:{port}/vla-eval"
    with connect(url, compression=None, proxy=None) as socket:
        answer = harness(socket, hello)
        assert (answer.kind, answer.seq) == ("hello", 1)
        assert answer.payload["observation_params"]["send_state"] is True
        for episode in (episodes[:5], episodes[5:]):
            start, *steps, end = episode
            socket.send(start)
            answers = [harness(socket, data) for data in steps]
            socket.send(end)
            seqs = [msgpack.unpackb(data)["seq"] for data in steps]
            assert [answer.seq for answer in answers] == seqs
            close_to([answer.payload["actions"] for answer in answers], expected)


def test_the_harness_gets_an_error_outside_of_an_episode_and_goes_on(port, act):
    _, start, step, *_ = recorded("vla-eval_0.8.0")
    with connect(f"ws://127.0.0.1:{port}/vla-eval", compression=None, proxy=None) as socket:
        answer = harness(socket, step)
        assert answer.kind == "error"
        assert answer.payload["error"].startswith("observation must come after episode_start")
        socket.send(start)
        bad = messages.pack(
            {"type": "observation", "payload": {"images": {}}, "seq": 2, "timestamp": 0}
        )
        assert harness(socket, bad).kind == "error"  # refused: the next one is still the first
        close_to([harness(socket, step).payload["actions"]], act([frame(0)]))


def test_the_shown_video_of_the_harness_needs_states_if_the_policy_takes_them(port):
    payload = {
        "images": {"agentview": observations.image(1)},
        "states": observations.numbers(1, 8),
        "video_history": [observations.image(0)],
        "task_description": PROMPT,
    }
    start = messages.pack({"type": "episode_start", "payload": {}, "seq": 1})
    with connect(f"ws://127.0.0.1:{port}/vla-eval", compression=None, proxy=None) as socket:
        socket.send(start)
        shown = {"type": "observation", "payload": payload, "seq": 2}
        answer = harness(socket, messages.pack(shown))
        assert answer.payload["error"].startswith("proprio must be in the observation")
        payload["states_history"] = [observations.numbers(0, 8)]
        assert harness(socket, messages.pack(shown)).kind == "action"


def test_the_health_of_the_harness_is_answered(port):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    connection.close()
