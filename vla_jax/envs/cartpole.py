"""CartPole-v1, balancing a pole on a cart, as pure JAX functions with Gymnasium's constants.

Units: metres, kilograms, seconds, radians; the angle is 0 where the pole is upright.

Source: Barto, Sutton and Anderson 1983, "Neuronlike Adaptive Elements That Can Solve Difficult
Learning Control Problems", in the version of Gymnasium's `CartPole-v1`.
"""

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.config import checked
from vla_jax.types import Array, DiscreteEnv, Key, Transition

_GRAVITY = 9.8
_POLE_MASS, _TOTAL_MASS = 0.1, 1.1
_HALF_LENGTH = 0.5  # of the pole
_FORCE = 10.0  # newton, in both directions
_TIMESTEP = 0.02
_MAX_POSITION, _MAX_ANGLE = 2.4, 12 * 2 * jnp.pi / 360
_START = 0.05  # each of the four state variables starts in [-0.05, 0.05]
_IMAGE_SIZE = (96, 160)  # height and width, pixels
_RAIL, _GROUND, _CART, _POLE = (48, 52, 59), (236, 238, 241), (0, 114, 178), (213, 94, 0)  # RGB


@dataclass(frozen=True)
@checked()
class CartPoleConfig:
    """The CartPole environment."""

    kind: Literal["cartpole"] = "cartpole"
    max_steps: int = 500  # environment steps until truncation

    def __post_init__(self):
        """Checks the number of steps."""
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be >= 1, got {self.max_steps}.")


class CartPoleState(NamedTuple):
    """State of one environment."""

    position: Array  # [] of the cart, m
    speed: Array  # [] of the cart, m/s
    angle: Array  # [] of the pole, rad
    angular_velocity: Array  # [] angular velocity of the pole, rad/s
    num_steps: Array  # [] int32


@functools.cache  # the same functions for the same config, so that jit compiles them once
def make(config: CartPoleConfig) -> DiscreteEnv:
    """Returns CartPole as a `DiscreteEnv`: reward 1 per step, action 0 pushes left, action 1 right.

    Observations `[4]` are position, speed, angle, angular_velocity of `CartPoleState`. An episode
    that reaches the time limit is a success.
    """
    return DiscreteEnv(
        reset=_reset,
        step=functools.partial(_step, config),
        draw=draw,
        observation_shape=(4,),
        velocities=(1, 3),
        num_actions=2,
        max_steps=config.max_steps,
    )


def draw(state: CartPoleState) -> Array:
    """Returns an image of the cart and the pole, `[h, w, 3]` uint8."""
    height, width = _IMAGE_SIZE
    y, x = jnp.indices(_IMAGE_SIZE)
    scale = width / (2 * _MAX_POSITION)  # pixels per metre
    rail, cart_x = 0.8 * height, width / 2 + scale * state.position
    along = jnp.stack([jnp.sin(state.angle), -jnp.cos(state.angle)])
    away = jnp.stack([x - cart_x, y - rail])
    reach = jnp.clip(jnp.einsum("i,ihw->hw", along, away), 0, 2 * _HALF_LENGTH * scale)
    to_pole = jnp.hypot(*(away - along[:, None, None] * reach[None]))
    image = jnp.where(jnp.abs(away[1]) < 0.8, 1, 0)
    image = jnp.where((jnp.abs(away[0]) < 9) & (jnp.abs(away[1]) < 5), 2, image)
    image = jnp.where(to_pole < 2.5, 3, image)
    return jnp.asarray([_GROUND, _RAIL, _CART, _POLE], jnp.uint8)[image]


def _reset(key: Key) -> tuple[CartPoleState, Array]:
    numbers = jax.random.uniform(key, (4,), minval=-_START, maxval=_START)
    return CartPoleState(*numbers, num_steps=jnp.zeros((), jnp.int32)), numbers


def _step(
    config: CartPoleConfig, state: CartPoleState, action: Array
) -> tuple[CartPoleState, Transition]:
    action = jnp.asarray(action)
    if action.shape != () or not jnp.issubdtype(action.dtype, jnp.integer):
        raise ValueError(
            "action must be one integer, 0 (left) or 1 (right), got "
            f"{action.dtype}{list(action.shape)}; vmap the step over environments."
        )
    position, speed, angle, angular_velocity, num_steps = state
    force = jnp.where(action > 0, _FORCE, -_FORCE)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    mass_length = _POLE_MASS * _HALF_LENGTH
    push = (force + mass_length * jnp.square(angular_velocity) * sin) / _TOTAL_MASS
    inertia = _HALF_LENGTH * (4.0 / 3.0 - _POLE_MASS * jnp.square(cos) / _TOTAL_MASS)
    angular_acceleration = (_GRAVITY * sin - cos * push) / inertia
    acceleration = push - mass_length * angular_acceleration * cos / _TOTAL_MASS
    state = CartPoleState(  # explicit Euler: positions use the speeds before the step
        position + _TIMESTEP * speed,
        speed + _TIMESTEP * acceleration,
        angle + _TIMESTEP * angular_velocity,
        angular_velocity + _TIMESTEP * angular_acceleration,
        num_steps + 1,
    )
    return state, _judge(config, state)


def _judge(config: CartPoleConfig, state: CartPoleState) -> Transition:
    fallen = (jnp.abs(state.position) > _MAX_POSITION) | (jnp.abs(state.angle) > _MAX_ANGLE)
    truncated = ~fallen & (state.num_steps >= config.max_steps)
    return Transition(
        observation=jnp.stack([state.position, state.speed, state.angle, state.angular_velocity]),
        reward=jnp.ones(()),
        terminated=fallen,
        truncated=truncated,
        success=truncated,
    )
