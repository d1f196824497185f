"""One episode on a `Robot` of LeRobot; numbers in the order of its features, as in its data sets.

from lerobot.robots.so_follower import SO101Follower, SO101FollowerConfig

robot = SO101Follower(SO101FollowerConfig(port="/dev/ttyACM0", cameras={"front": camera}))
robot.connect()
with Client("ws://127.0.0.1:8000") as client:
    run(robot, client, "put the cup on the plate", num_steps=600)
"""

import time

import numpy as np

from vla_jax.serving.client import Client


def run(robot, client: Client, prompt: str, *, num_steps: int, hz: float = 30.0, opened=100.0):
    joints = [name for name, kind in robot.observation_features.items() if kind is float]
    client.reset()
    for _ in range(num_steps):
        start = time.monotonic()
        seen = robot.get_observation()  # images are uint8 RGB [h, w, 3]
        observation = {
            "observation/image": seen["front"],
            "observation/state": np.array([seen[name] for name in joints], np.float32),
        }
        action = client.infer(observation, prompt=prompt).actions[0].tolist()
        action[-1] = opened if action[-1] > 0 else 0.0  # LeRobot's grippers: 0 closed … 100 open
        robot.send_action(dict(zip(robot.action_features, action, strict=True)))
        time.sleep(max(0.0, 1 / hz - (time.monotonic() - start)))
