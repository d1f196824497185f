"""MJCF model of the MuJoCo table: an arm of capsules, four blocks, a plate and cameras.

It consists of primitives, so no assets are needed. The floor is a box, since MuJoCo tessellates an
infinite plane so finely that it would take 8/9 of the rendering time. Joint frames and limits are
those of the Franka Emika Panda. Units: metres, radians, seconds.

Source: Franka Control Interface documentation, "Denavit–Hartenberg parameters".
"""

from collections.abc import Iterable

from vla_jax.envs.table import rules

COLOURS = {
    "red": "0.86 0.15 0.15 1",
    "green": "0.13 0.62 0.22 1",
    "blue": "0.15 0.32 0.88 1",
    "yellow": "0.95 0.78 0.10 1",
}
TABLE_CENTRE = (0.5, 0.0, 0.0)  # of the reachable square, in the arm's base frame
FINGER_TRAVEL = rules.MAX_OPENING / 2  # of each finger
HOME = (0.0, 0.1, 0.0, -2.2, 0.0, 2.3, 0.785)  # joint angles, tool above the table's centre
SUBSTEPS, TIMESTEP = 20, 0.005  # one control step is 0.1 s


def _numbers(values: Iterable[float]) -> str:
    return " ".join(map(str, values))


def _link(joint: str, pos: str, quat: str, limits: str, geoms: str, inside: str) -> str:
    return f"""
    <body pos="{pos}" quat="{quat}" gravcomp="1">
      <inertial mass="1" pos="0 0 0" diaginertia="0.01 0.01 0.01"/>
      <joint name="{joint}" range="{limits}"/>
      {geoms}
      {inside}
    </body>"""


def _capsule(ends: str, radius: float, shade: str = "0.92 0.92 0.94 1") -> str:
    return f'<geom class="arm" type="capsule" fromto="{ends}" size="{radius}" rgba="{shade}"/>'


def _finger(name: str, quat: str) -> str:
    return f"""
    <body name="{name}" pos="0 0 0.0584" quat="{quat}" gravcomp="1">
      <inertial mass="0.05" pos="0 0 0.02" diaginertia="1e-4 1e-4 1e-4"/>
      <joint name="{name}" type="slide" axis="0 1 0" range="0 {FINGER_TRAVEL}" damping="4"
        armature="0.1"/>
      <geom class="hand" name="{name}" type="box" pos="0 0.007 0.027" size="0.010 0.007 0.027"
        rgba="0.2 0.2 0.22 1"/>
    </body>"""


def _arm() -> str:
    hand = f"""
    <body name="hand" pos="0 0 0.107" quat="0.9238795 0 0 -0.3826834" gravcomp="1">
      <inertial mass="0.5" pos="0 0 0.03" diaginertia="0.002 0.002 0.002"/>
      <geom class="hand" name="palm" type="box" pos="0 0 0.03"
        size="{_numbers(rules.PALM_HALF_SIZE)}" rgba="0.35 0.36 0.4 1"/>
      <camera name="wrist" pos="0.07 0 0.005" xyaxes="0 1 0 0.97 0 0.22"
        fovy="{rules.WRIST_FOVY}"/>
      <site name="tool" pos="0 0 0.1034" group="4"/>
      {_finger("left_finger", "1 0 0 0")}
      {_finger("right_finger", "0 0 0 1")}
    </body>"""
    dark = "0.55 0.57 0.62 1"
    chain = [  # joint, position, orientation, limits, geoms
        ("joint7", "0.088 0 0", "1 1 0 0", "-2.8973 2.8973", _capsule("0 0 0 0 0 0.09", 0.035)),
        ("joint6", "0 0 0", "1 1 0 0", "-0.0175 3.7525", _capsule("0 0 0 0.088 0 0", 0.045, dark)),
        ("joint5", "-0.0825 0.384 0", "1 -1 0 0", "-2.8973 2.8973",
         _capsule("0 0 -0.25 0 0.02 -0.02", 0.045)),
        ("joint4", "0.0825 0 0", "1 1 0 0", "-3.0718 -0.0698",
         _capsule("0 0 0 -0.0825 0.09 0", 0.05, dark)),
        ("joint3", "0 -0.316 0", "1 1 0 0", "-2.8973 2.8973",
         _capsule("0 0 -0.1 0 0 -0.02", 0.055)),
        ("joint2", "0 0 0", "1 -1 0 0", "-1.7628 1.7628",
         _capsule("0 0 0 0 -0.18 0", 0.058, dark)),
        ("joint1", "0 0 0.333", "1 0 0 0", "-2.8973 2.8973", _capsule("0 0 -0.25 0 0 0", 0.06)),
    ]  # fmt: skip
    inside = hand
    for joint, pos, quat, limits, geoms in chain:
        inside = _link(joint, pos, quat, limits, geoms, inside)
    return inside


def _block(colour: str, rgba: str) -> str:
    half = " ".join(map(str, rules.BLOCK_HALF_SIZE))
    return f"""
    <body name="{colour}" pos="0 0 0.02"><freejoint name="{colour}"/>
      <geom name="{colour}" class="block" size="{half}" rgba="{rgba}"/>
    </body>"""


def mjcf(further: str = "") -> str:
    """Returns the scene's XML, for `mujoco.MjModel.from_xml_string`.

    Args:
      further: MJCF of further bodies.
    """
    x, y, _ = TABLE_CENTRE
    (eye, right, up), half = rules.PRIMARY_CAMERA, rules.TABLE_HALF_SIZE
    arm_servos = "".join(
        f'<position joint="joint{i}" kp="{kp}" kv="{kv}"/>'
        for i, (kp, kv) in enumerate([(4500, 450)] * 2 + [(3500, 350)] * 2 + [(2000, 200)] * 3, 1)
    )
    finger_servos = "".join(
        f'<position joint="{side}_finger" kp="1500" kv="40" forcerange="-25 25"/>'
        for side in ("left", "right")
    )
    blocks = "".join(_block(colour, rgba) for colour, rgba in COLOURS.items())
    return f"""
<mujoco model="table">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="{TIMESTEP}" integrator="implicitfast" cone="elliptic" impratio="10"
    iterations="20"/>
  <statistic extent="1" center="{x} {y} 0.1"/>
  <visual>
    <headlight ambient="0.45 0.45 0.45" diffuse="0.45 0.45 0.45" specular="0 0 0"/>
    <quality shadowsize="2048" offsamples="0" numslices="16" numstacks="8"/>
    <global offwidth="640" offheight="640"/>
    <map znear="0.02" zfar="20"/>
  </visual>
  <asset>
    <texture type="skybox" builtin="gradient" rgb1="0.93 0.95 0.97" rgb2="0.80 0.83 0.87"
      width="64" height="64"/>
  </asset>
  <default>
    <default class="arm"><geom contype="0" conaffinity="0" mass="0"/></default>
    <default class="hand"><geom contype="1" conaffinity="2" mass="0" friction="1.6 0.02 0.001"
      condim="4"/></default>
    <default class="block"><geom type="box" contype="2" conaffinity="7" mass="0.05"
      friction="1.2 0.02 0.001" condim="4"/></default>
    <joint armature="0.1" damping="2"/>
  </default>
  <worldbody>
    <light pos="{x + 0.4} 0.5 1.5" dir="-0.2 -0.3 -1" diffuse="0.5 0.5 0.5" specular="0 0 0"/>
    <camera name="primary" pos="{x + eye[0]} {y + eye[1]} {eye[2]}"
      xyaxes="{_numbers(right + up)}" fovy="{rules.PRIMARY_FOVY}"/>
    <camera name="video" pos="{x + 0.75} {y - 0.75} 0.70" xyaxes="0.65 0.76 0 -0.38 0.33 0.86"
      fovy="42"/>
    <geom name="floor" type="box" pos="{x} {y} -0.03" size="8 8 0.01" rgba="0.75 0.77 0.80 1"
      contype="0" conaffinity="0"/>
    <geom name="table" type="box" pos="{x} {y} -0.01" size="{half} {half} 0.01"
      rgba="0.63 0.55 0.47 1" contype="4" conaffinity="3" friction="1 0.02 0.001"/>
    <body name="plate" pos="{x} {y} 0">
      <geom name="plate" type="cylinder" pos="0 0 {rules.PLATE_HEIGHT / 2}"
        size="{rules.PLATE_RADIUS} {rules.PLATE_HEIGHT / 2}" rgba="0.97 0.97 0.97 1" contype="4"
        conaffinity="2" friction="1 0.02 0.001"/>
    </body>
    <body name="base"><geom class="arm" type="cylinder" pos="0 0 0.04" size="0.09 0.04"
      rgba="0.55 0.57 0.62 1"/>{_arm()}</body>
    {blocks}{further}
  </worldbody>
  <contact>
    <exclude body1="left_finger" body2="right_finger"/>
  </contact>
  <actuator>{arm_servos}{finger_servos}</actuator>
</mujoco>"""
