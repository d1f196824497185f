"""Rules shared by the MuJoCo table and the JAX table: instructions, sizes, layouts and tasks.

Positions are in metres from the table's centre: x away from the arm, y to its left, z up.
"""

from typing import NamedTuple

COLOURS = ("red", "green", "blue", "yellow")
TASKS = ("touch", "lift", "place")
SENTENCES = {
    "touch": "touch the {} block",
    "lift": "lift the {} block",
    "place": "put the {} block on the plate",
}


class Instruction(NamedTuple):
    """One of the twelve instructions."""

    task: str  # one of TASKS
    colour: int  # index into COLOURS
    text: str


INSTRUCTIONS = tuple(
    Instruction(task, colour, SENTENCES[task].format(name))
    for task in TASKS
    for colour, name in enumerate(COLOURS)
)

CONTROL_HZ = 10.0
BLOCK_HALF_SIZE = (0.035, 0.0175, 0.02)  # m; long axis x: at yaw 0 the fingers close along y
PLATE_RADIUS, PLATE_HEIGHT = 0.06, 0.008  # m
MAX_OPENING = 0.065  # m between the fingers
PALM_HALF_SIZE = (0.018, 0.065, 0.022)  # m
TABLE_HALF_SIZE = 0.30  # m
FINGER_HALF_THICKNESS, FINGER_HALF_WIDTH = 0.007, 0.010  # m, along and across the opening
LAYOUT_HALF_SIZE = 0.16  # m, of the square of block centres
LAYOUT_SPACING = 0.09  # m, least distance between block centres
PLATE_SPACING = 0.11  # m, least distance of a block's centre from the plate's
MAX_YAW = 1.05  # rad, of a rotated block; the pose at +90° is the same as at -90°
LIFT_HEIGHT = 0.05  # m of free space below a lifted block
PLACE_DISTANCE = 0.05  # m, greatest distance of a placed block's centre from the plate's
WORKSPACE_LOW = (-0.22, -0.22, 0.012)  # m, limits of the tool's centre
WORKSPACE_HIGH = (0.22, 0.22, 0.25)
MAX_TILT, MAX_TOOL_YAW = 0.5, 1.6  # rad
# Pose of the primary camera: position (m, from the table's centre), right and up of the image.
PRIMARY_CAMERA = ((0.42, 0.0, 0.50), (0.0, 1.0, 0.0), (-0.785, 0.0, 0.62))
PRIMARY_FOVY, WRIST_FOVY = 38.0, 75.0  # vertical fields of view, degrees
NUM_BLOCKS = len(COLOURS)
STATE_SIZE = NUM_BLOCKS * 5 + 2  # per block x y z sin 2yaw cos 2yaw, then the plate's x y
PROPRIO_SIZE = 8  # tool x y z, sin yaw, cos yaw, roll, pitch, opening in [0, 1]
STATE_NAMES = (
    *(f"{c}.{n}" for c in COLOURS for n in ("x", "y", "z", "sin_2yaw", "cos_2yaw")),
    "plate.x",
    "plate.y",
)
PROPRIO_NAMES = ("x", "y", "z", "sin_yaw", "cos_yaw", "roll", "pitch", "opening")
ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
NAMES = {"action": ACTION_NAMES, "proprio": PROPRIO_NAMES, "environment_state": STATE_NAMES}
