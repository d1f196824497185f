"""A cloned policy that tries things: Gaussian noise on the arm, a coin thrown for the gripper.

    π(arm, gripper | s) = N(arm; μ(s), σ²) · Bernoulli(gripper; sigmoid(z(s) / τ))

μ and z are what the policy would do, `ActionChunk`s of one action: arm `[..., A-1]` in its own
units, gripper logit `[...]`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from vla_jax.types import ActionChunk, Array, Key


@dataclass(frozen=True)
class NoiseConfig:
    """How far trials stray."""

    arm_std: float = 0.15  # σ on each of the arm's numbers, in the policy's units of [-1, 1]
    gripper_temperature: float = 1.5  # τ; the higher, the more often the gripper errs

    def __post_init__(self):
        """Checks the sizes."""
        for name in ("arm_std", "gripper_temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")


class Trial(NamedTuple):
    """What was tried."""

    arm: Array  # [..., A-1], not clipped: clipping is what the world makes of it
    opens: Array  # [...] bool, of the gripper


def sample(key: Key, mean: ActionChunk, config: NoiseConfig) -> Trial:
    """Returns a trial around what the policy would do; `key` is consumed."""
    arm_key, gripper_key = jax.random.split(key)
    noise = config.arm_std * jax.random.normal(arm_key, mean.arm.shape)
    probability = jax.nn.sigmoid(mean.gripper_logit / config.gripper_temperature)
    return Trial(mean.arm + noise, jax.random.bernoulli(gripper_key, probability))


def certain(trial: Trial) -> ActionChunk:
    """Returns the action that does what the trial says: its gripper logit is ±∞."""
    return ActionChunk(trial.arm, jnp.where(trial.opens, jnp.inf, -jnp.inf))


def log_probability(mean: ActionChunk, trial: Trial, config: NoiseConfig) -> jax.Array:
    """Returns how probable a trial was.

        log π = Σ_d [−(a_d − μ_d)² / 2σ² − log σ√(2π)] + log sigmoid(±z / τ)

    Args:
      mean: μ `[..., A-1]` and z `[...]`.
      trial: a `[..., A-1]` and the gripper `[...]`, + where it opens.
      config: σ and τ.

    Returns:
      `[...]` float32, in nats.
    """
    chex.assert_equal_shape([mean.arm, trial.arm])
    chex.assert_equal_shape([mean.gripper_logit, trial.opens])
    logit = jnp.where(trial.opens, mean.gripper_logit, -mean.gripper_logit)
    arm = jax.scipy.stats.norm.logpdf(trial.arm, mean.arm, config.arm_std)
    return jnp.sum(arm, axis=-1) + jax.nn.log_sigmoid(logit / config.gripper_temperature)


def kl_divergence(mean: ActionChunk, reference: ActionChunk, config: NoiseConfig) -> jax.Array:
    """Returns how far a policy has gone from another.

        KL(π ‖ π₀) = |μ − μ₀|² / 2σ² + p log(p / p₀) + (1 − p) log((1 − p) / (1 − p₀))
        p = sigmoid(z / τ)

    Args:
      mean: μ `[..., A-1]` and z `[...]` of π.
      reference: μ₀ and z₀ of π₀, likewise.
      config: σ and τ of both.

    Returns:
      `[...]` float32, in nats, 0 where they are the same.

    Source: Kullback and Leibler 1951, "On Information and Sufficiency".
    """
    chex.assert_trees_all_equal_shapes(mean, reference)
    arm = jnp.sum(jnp.square(mean.arm - reference.arm), axis=-1) / (2 * config.arm_std**2)
    ours, theirs = (m.gripper_logit / config.gripper_temperature for m in (mean, reference))
    sides = [
        jax.nn.sigmoid(sign * ours)
        * (jax.nn.log_sigmoid(sign * ours) - jax.nn.log_sigmoid(sign * theirs))
        for sign in (1.0, -1.0)
    ]
    return arm + sides[0] + sides[1]
