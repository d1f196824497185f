"""openpi's own server (PyPI openpi-server 0.1.0) around a run's policy, as a peer to measure.

    PYTHONPATH=FOLDER_WITH_OPENPI_SERVER python -m tests.campaigns.openpi_peer RUN_DIR --port 8001

It has no sessions: all connections share one memory, so it serves one robot.
"""

import argparse

import jax
import numpy as np

from vla_jax.acting.agent import make_agent, read_instruction
from vla_jax.runs import load_run
from vla_jax.types import make_observation

PARTS = {"observation/image": "image_primary", "observation/wrist_image": "image_wrist"}
PARTS |= {"observation/state": "proprio", "environment_state": "environment_state"}


class SharedPolicy:
    """The agent for one robot, with the interface that openpi's server calls."""

    def __init__(self, run_dir: str) -> None:
        """Loads the run and compiles its step."""
        run = load_run(run_dir)
        agent = make_agent(run.agent, run.norm_stats)
        self._config, self._step = run.agent, jax.jit(agent.step)
        self._params = agent.prepare(jax.device_put(run.params), 1)
        self._state = agent.init(run.params, 1)

    def infer(self, request: dict) -> dict:
        """Returns the actions for an observation."""
        parts = {PARTS[k]: np.asarray(v)[None] for k, v in request.items() if k in PARTS}
        words = read_instruction(self._config, request["prompt"])
        observation = make_observation(parts, instruction=words[None])
        self._state, actions = self._step(self._params, self._state, observation, np.zeros(1, bool))
        return {"actions": np.asarray(actions)}


def main() -> None:
    """Serves until it is ended."""
    from openpi_server import WebsocketPolicyServer

    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir")
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    policy = SharedPolicy(arguments.run_dir)
    WebsocketPolicyServer(policy, host="127.0.0.1", port=arguments.port).serve_forever()


if __name__ == "__main__":
    main()
