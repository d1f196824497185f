"""Exploration noise for a cloned policy: Gaussian on the arm, Bernoulli on the gripper.

    π(arm, gripper | s) = N(arm; μ(s), σ²) · Bernoulli(gripper; sigmoid(z(s) / τ))

μ and z are the policy's noise-free outputs, an `ActionChunk` of a single action: arm `[..., A-1]`
in [-1, 1], gripper logit `[...]`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from vla_jax.config import checked
from vla_jax.types import ActionChunk, Array, Key


@dataclass(frozen=True)
@checked()
class NoiseConfig:
    """Scale of the exploration noise."""

    arm_std: float = 0.15  # σ of the noise on each arm action, in the policy's units of [-1, 1]
    gripper_temperature: float = 1.5  # τ > 0 of the gripper's logit; higher = more random

    def __post_init__(self):
        """Checks the ranges."""
        for name in ("arm_std", "gripper_temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")


class NoisyAction(NamedTuple):
    """An action sampled from the noisy policy."""

    arm: Array  # [..., A-1], not clipped: the environment clips it
    gripper_open: Array  # [...] bool, True = open


def sample(mean: ActionChunk, config: NoiseConfig, *, key: Key) -> NoisyAction:
    """Returns an action sampled around the policy's outputs.

    Args:
      mean: μ `[..., A-1]` and z `[...]`.
      config: σ and τ.
      key: consumed.
    """
    arm_key, gripper_key = jax.random.split(key)
    noise = config.arm_std * jax.random.normal(arm_key, mean.arm.shape)
    probability = jax.nn.sigmoid(mean.gripper_logit / config.gripper_temperature)
    return NoisyAction(mean.arm + noise, jax.random.bernoulli(gripper_key, probability))


def to_chunk(action: NoisyAction) -> ActionChunk:
    """Returns the sampled action as an `ActionChunk`; the gripper logit is ±∞."""
    return ActionChunk(action.arm, jnp.where(action.gripper_open, jnp.inf, -jnp.inf))


def log_probability(mean: ActionChunk, action: NoisyAction, config: NoiseConfig) -> jax.Array:
    """Returns the log-probability density of sampled actions.

        log π = Σ_d [−(a_d − μ_d)² / 2σ² − log σ√(2π)] + log sigmoid(±z / τ)

    Args:
      mean: μ `[..., A-1]` and z `[...]`.
      action: a `[..., A-1]`, and the gripper `[...]`: +z where it opens, −z where it closes.
      config: σ and τ.

    Returns:
      `[...]` float32, in nats.
    """
    chex.assert_equal_shape([mean.arm, action.arm])
    chex.assert_equal_shape([mean.gripper_logit, action.gripper_open])
    logit = jnp.where(action.gripper_open, mean.gripper_logit, -mean.gripper_logit)
    arm = jax.scipy.stats.norm.logpdf(action.arm, mean.arm, config.arm_std)
    return jnp.sum(arm, axis=-1) + jax.nn.log_sigmoid(logit / config.gripper_temperature)


def kl_divergence(mean: ActionChunk, reference: ActionChunk, config: NoiseConfig) -> jax.Array:
    """Returns the KL divergence between two policies with the same noise.

        KL(π ‖ π₀) = |μ − μ₀|² / 2σ² + p log(p / p₀) + (1 − p) log((1 − p) / (1 − p₀))
        p = sigmoid(z / τ)

    Args:
      mean: μ `[..., A-1]` and z `[...]` of π.
      reference: μ₀ `[..., A-1]` and z₀ `[...]` of π₀.
      config: σ and τ of both.

    Returns:
      `[...]` float32, in nats; 0 where both policies agree.

    Source: Kullback and Leibler 1951, "On Information and Sufficiency".
    """
    chex.assert_trees_all_equal_shapes(mean, reference)
    arm = jnp.sum(jnp.square(mean.arm - reference.arm), axis=-1) / (2 * config.arm_std**2)
    logit, reference_logit = (
        chunk.gripper_logit / config.gripper_temperature for chunk in (mean, reference)
    )
    opened, closed = (
        jax.nn.sigmoid(sign * logit)
        * (jax.nn.log_sigmoid(sign * logit) - jax.nn.log_sigmoid(sign * reference_logit))
        for sign in (1.0, -1.0)
    )
    return arm + opened + closed
