"""The flow-matching head: denoises the K actions of a chunk together, in a few Euler steps.

An MLP v predicts the velocity of a chunk x on its way from noise ε to the actions a, given the
trunk's features f of the step. τ = 0 is noise and τ = 1 the actions:

    x(τ) = τ a + (1 − τ) ε,   ε ~ N(0, I)        loss = ‖v(x(τ), τ, f) − (a − ε)‖²
    acting: x(0) = ε,   x(τ + 1/n) = x(τ) + v(x(τ), τ, f) / n,   n = `flow_steps`

In training τ = 0.999 (1 − u^⅔) with u uniform, which draws noisy chunks more often: there the
choice between several good actions is made. The mean of two good actions may be a bad one; a sample
is one of them. The gripper (±1) is the last of the A numbers of the flow rather than a logit of its
own, so that it belongs to the same choice as the arm.

Acting has no key: the noise of an episode's n-th step is `fold_in(key(noise_seed), n)`. A robot's
actions thus depend on the seed and its own steps only, not on its batch or on earlier episodes, and
an episode can be repeated. Robots in one batch draw the same noise at the same step.

Source: Lipman et al. 2023, "Flow Matching for Generative Modeling" (arXiv:2210.02747); Black et al.
2024, π0 (arXiv:2410.24164), for chunks of actions, the direction of τ and its distribution.
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from vla_jax.nn.layers import MLP_SHARDING, SPLIT_INPUTS, apply_mlp, init_mlp
from vla_jax.policies import continuous_head
from vla_jax.policies.decoder_fields import DecoderFields
from vla_jax.policies.head import Head, PredictionKind, TeacherForcing
from vla_jax.policies.trunk import Mode, StepFeatures, acting_features
from vla_jax.types import ActionChunk, Array, FlowChunk, Key, Params

_TIME_SIZE = 32  # features of τ
_MIN_PERIOD, _MAX_PERIOD = 4e-3, 4.0  # of the sinusoids of τ, as in π0
_MAX_TIME = 0.999  # greatest τ in training, as in π0: at τ = 1 nothing is left to predict
_MAX_GRIPPER = 0.999  # of a denoised gripper, so that its logit is finite


class FlowState(NamedTuple):
    """Streaming state: which noise comes next."""

    num_steps: jax.Array  # [B] int32, steps since the episode began


def init(key: Key, config: DecoderFields) -> Params:
    """Returns `{"velocity": mlp}`; `key` is consumed."""
    size = config.action_horizon * config.action_dim
    sizes = (config.hidden_size + size + _TIME_SIZE, *config.head_sizes, size)
    return {"velocity": init_mlp(key, sizes)}


def apply(
    params: Params,
    config: DecoderFields,
    features: Array,
    *,
    timestep_mask: Array | None = None,
    reset: Array | None = None,
    targets: TeacherForcing | None = None,
    key: Key | None = None,
) -> FlowChunk | ActionChunk:
    """Returns a velocity to train on, or without targets the denoised next K actions.

    Args:
      params: from `init`.
      config: of the decoder.
      features: `[B, W, H]`.
      timestep_mask: `[B, W]`, True where the step is real; None means everywhere.
      reset: `[B, W]`, True where a new episode starts; None means nowhere.
      targets: ground-truth actions, to which noise is added; those that do not exist count as 0.
        None denoises.
      key: consumed. With targets it draws ε and τ; without, independent noise for every step. None
        takes the noise of acting for a robot whose episode begins with the window or at a reset.

    Returns:
      With targets a `FlowChunk`, leaves `[B, W, K, A]`; else arm `[B, W, K, A-1]` in [-1, 1],
      gripper logit `[B, W, K]`; float32.

    Raises:
      ValueError: there are targets, but no key.
    """
    shape = (*features.shape[:-1], config.action_horizon, config.action_dim)
    if targets is not None:
        if key is None:
            raise ValueError(
                "key must be given with targets for head 'flow', which adds noise to them, got "
                "None; give a key, or leave out the targets."
            )
        noise_key, time_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, shape)
        uniform = jax.random.uniform(time_key, shape[:-2])
        time = _MAX_TIME * (1.0 - uniform ** (2 / 3))
        return predict_velocity(params, config, features, targets, noise, time)
    if key is not None:
        return denoise(params, config, features, jax.random.normal(key, shape))
    steps = _steps_of_episodes(features, timestep_mask, reset)
    return denoise(params, config, features, draw_noise(config, steps))


def predict_velocity(
    params: Params,
    config: DecoderFields,
    features: Array,
    targets: TeacherForcing,
    noise: Array,
    time: Array,
) -> FlowChunk:
    """Returns the velocity at one time of the way from noise to actions.

    Args:
      params: from `init`.
      config: of the decoder.
      features: `[..., H]`.
      targets: actions `[..., K, A]`; their mask `[..., K]`.
      noise: ε `[..., K, A]`.
      time: τ `[...]` in [0, 1).
    """
    # Replaced by 0: missing targets may be NaN, which would make the gradient NaN.
    action = jnp.where(jnp.asarray(targets.action_mask)[..., None], targets.action, 0.0)
    chex.assert_equal_shape([action, noise])
    part = jnp.asarray(time)[..., None, None]
    chunk = part * action + (1.0 - part) * noise
    velocity = _velocity(params, config, features, chunk, time)
    return FlowChunk(velocity, noise, chunk + (1.0 - part) * velocity)


def denoise(params: Params, config: DecoderFields, features: Array, noise: Array) -> ActionChunk:
    """Returns the chunks that Euler's method reaches from noise.

    Args:
      params: from `init`.
      config: of the decoder.
      features: `[..., H]`.
      noise: `[..., K, A]`, float32.

    Returns:
      Arm `[..., K, A-1]` in [-1, 1], gripper logit `[..., K]`, float32.
    """

    def euler(chunk: jax.Array, time: jax.Array) -> tuple[jax.Array, None]:
        times = jnp.full(chunk.shape[:-2], time)
        velocity = _velocity(params, config, features, chunk, times)
        return chunk + velocity / config.flow_steps, None

    times = jnp.arange(config.flow_steps, dtype=jnp.float32) / config.flow_steps
    chunk, _ = jax.lax.scan(euler, jnp.asarray(noise), times)
    return _decode(chunk)


def draw_noise(config: DecoderFields, steps: Array) -> jax.Array:
    """Returns the noise of acting `[..., K, A]`.

    Args:
      config: of the decoder.
      steps: `[...]` int32, steps since the episodes began.
    """
    key = jax.random.key(config.noise_seed)  # a constant of the program
    shape = (config.action_horizon, config.action_dim)

    def draw(step: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, step), shape)

    steps = jnp.asarray(steps)
    return jax.vmap(draw)(steps.reshape(-1)).reshape(*steps.shape, *shape)


def _velocity(
    params: Params, config: DecoderFields, features: Array, chunk: jax.Array, time: Array
) -> jax.Array:
    flat = chunk.reshape(*chunk.shape[:-2], -1)
    inputs = [jnp.asarray(features, jnp.float32), flat, _time_features(time)]
    velocity = apply_mlp(params["velocity"], jnp.concatenate(inputs, axis=-1), dtype=config.dtype)
    return velocity.reshape(chunk.shape)


def _time_features(time: Array) -> jax.Array:
    """Returns sines and cosines `[..., E]` of τ `[...]`, with periods in geometric sequence."""
    fraction = jnp.linspace(0.0, 1.0, _TIME_SIZE // 2)
    period = _MIN_PERIOD * (_MAX_PERIOD / _MIN_PERIOD) ** fraction
    angle = jnp.asarray(time)[..., None] * jnp.broadcast_to(
        2.0 * math.pi / period, (*time.shape, _TIME_SIZE // 2)
    )
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def _steps_of_episodes(
    features: Array, timestep_mask: Array | None, reset: Array | None
) -> jax.Array:
    """Returns how many real steps of its episode precede each step of a window, `[B, W]` int32."""
    shape = features.shape[:2]
    real = jnp.ones(shape, bool) if timestep_mask is None else jnp.asarray(timestep_mask)
    starts = jnp.zeros(shape, bool) if reset is None else jnp.asarray(reset)
    before = jnp.cumsum(real, axis=1, dtype=jnp.int32) - real
    return before - jax.lax.cummax(jnp.where(starts, before, 0), axis=1)


def _decode(chunk: jax.Array) -> ActionChunk:
    """Returns the arm, and the logit of the gripper g: log((1 + g) / (1 − g)).

    Infinity is NaN: clipped it would be a valid action.
    """
    chunk = jnp.where(jnp.isinf(chunk), jnp.nan, chunk)
    gripper = jnp.clip(chunk[..., -1], -_MAX_GRIPPER, _MAX_GRIPPER)
    return ActionChunk(jnp.clip(chunk[..., :-1], -1.0, 1.0), 2.0 * jnp.arctanh(gripper))


def _init_stream(
    config: DecoderFields, batch_size: int, num_memories: int, mode: Mode, window_size: int
) -> FlowState:
    del config, num_memories, mode, window_size
    return FlowState(jnp.zeros(batch_size, jnp.int32))


def _step(
    params: Params,
    config: DecoderFields,
    state: FlowState,
    step_features: StepFeatures,
    reset: Array,
) -> tuple[FlowState, ActionChunk]:
    steps = jnp.where(reset, 0, state.num_steps)
    noise = draw_noise(config, steps)
    chunk = denoise(params, config, acting_features(step_features), noise)
    return FlowState(steps + 1), chunk


def _errors(chunk: FlowChunk, target: jax.Array) -> dict[str, jax.Array]:
    chex.assert_equal_shape([*chunk, target])
    return {"flow": jnp.square(chunk.velocity - (target - chunk.noise))}


FLOW = Head(
    takes_targets=True,
    draws_noise=True,
    is_bounded=True,
    check=continuous_head.check,
    init=init,
    apply=apply,
    init_stream=_init_stream,
    step=_step,
    # The first layer's inputs are features, actions and time: seldom a number that divides.
    sharding_rules=(("*/layers_0/kernel", SPLIT_INPUTS), *MLP_SHARDING),
)
FLOW_CHUNK = PredictionKind(actions=lambda chunk: _decode(chunk.estimate), errors=_errors)
