"""One episode on a robot through openpi-client: every frame is sent, and its first one resets."""

import time

from openpi_client.websocket_client_policy import WebsocketClientPolicy


def run(robot, prompt, *, num_steps, hz=10.0, host="127.0.0.1", port=8000):
    policy = WebsocketClientPolicy(host, port)  # one connection per robot
    for t in range(num_steps):
        start = time.monotonic()
        image, wrist_image, state = robot.read()  # uint8 RGB [h, w, 3], twice; float32 [P]
        observation = {
            "observation/image": image,
            "observation/wrist_image": wrist_image,
            "observation/state": state,
            "prompt": prompt,
            "reset": t == 0,
        }
        reply = policy.infer(observation)
        robot.send(reply["actions"][0])  # [A] in the robot's units, gripper +1 open, -1 closed
        time.sleep(max(0.0, 1 / hz - (time.monotonic() - start)))
