"""Observations of the recorded clients, in the forms that published scripts send.

The values follow from the index of the step, without random numbers, in every version of NumPy.
"""

import numpy as np

SIZE = 16  # pixels along each side
PROMPT = "lift the red block"


def image(step: int, camera: int = 0) -> np.ndarray:
    """Returns an image `[16, 16, 3]` uint8."""
    pixels = np.arange(SIZE * SIZE * 3) * (7 + camera) + 31 * step
    return (pixels % 256).astype(np.uint8).reshape(SIZE, SIZE, 3)


def numbers(step: int, size: int) -> np.ndarray:
    """Returns numbers `[size]` float64 in [-1, 1]."""
    return np.sin(np.arange(size) + 0.5 * step)


def libero(step: int) -> dict:
    """Returns an observation as openpi's LIBERO script sends it, with a state of the table."""
    return {
        "observation/image": image(step),
        "observation/wrist_image": image(step, 1),
        "observation/state": numbers(step, 8),
        "environment_state": numbers(step, 22).astype(np.float32),
        "prompt": PROMPT,
    }


def droid(step: int) -> dict:
    """Returns an observation as openpi's DROID script sends it."""
    return {
        "observation/exterior_image_1_left": image(step),
        "observation/wrist_image_left": image(step, 1),
        "observation/joint_position": numbers(step, 7),
        "observation/gripper_position": numbers(step, 1),
        "prompt": PROMPT,
    }


def aloha(step: int) -> dict:
    """Returns an observation as openpi's ALOHA script sends it: images with the colours first."""
    return {
        "state": numbers(step, 14),
        "images": {"cam_high": np.transpose(image(step), (2, 0, 1))},
        "prompt": PROMPT,
    }


def vla_eval(step: int) -> dict:
    """Returns an observation by the convention of AI2's harness."""
    return {
        "images": {"agentview": image(step), "wrist": image(step, 1)},
        "states": numbers(step, 8).astype(np.float32),
        "environment_state": numbers(step, 22).astype(np.float32),
        "task_description": PROMPT,
    }


EPISODES = {
    form.__name__: [form(step) for step in range(3)] for form in (libero, droid, aloha, vla_eval)
}
