"""A ROS 2 node: camera and joint states in, actions out, at the rate of the training data.

rclpy.init()
with Client("ws://127.0.0.1:8000") as client:
    rclpy.spin(PolicyNode(client, "open the drawer"))
"""

import time

import numpy as np
from rclpy.node import Node
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float32MultiArray


class PolicyNode(Node):
    def __init__(self, client, prompt: str, hz: float = 10.0):
        super().__init__("policy")
        self.client, self.prompt, self.hz = client, prompt, hz
        self.image, self.joints, self.seen, self.felt = None, None, -np.inf, -np.inf
        self.create_subscription(Image, "camera/image_raw", self.see, 1)
        self.create_subscription(JointState, "joint_states", self.feel, 1)
        self.actions = self.create_publisher(Float32MultiArray, "policy/action", 1)
        client.reset()  # once per trial
        self.create_timer(1 / hz, self.act)  # not in `see`: a camera may be faster

    def see(self, message: Image):
        assert message.encoding in ("rgb8", "bgr8"), message.encoding
        self.seen = time.monotonic()
        rows = np.frombuffer(message.data, np.uint8).reshape(message.height, message.step)
        image = rows[:, : 3 * message.width].reshape(message.height, message.width, 3)
        self.image = image[..., ::-1].copy() if message.encoding == "bgr8" else image

    def feel(self, message: JointState):
        self.felt = time.monotonic()
        self.joints = np.array(message.position, np.float32)  # radians, in the order of `name`

    def act(self):
        if time.monotonic() - min(self.seen, self.felt) > 3 / self.hz:
            return  # a topic is silent: send nothing, so that the controller holds the robot
        observation = {"observation/image": self.image, "observation/state": self.joints}
        reply = self.client.infer(observation, prompt=self.prompt)
        self.actions.publish(Float32MultiArray(data=reply.actions[0].tolist()))
