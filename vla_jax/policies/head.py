"""Interface of an action head: features of the trunk in, a prediction of K actions out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.policies.decoder_fields import DecoderFields
from vla_jax.policies.trunk import Mode, StepFeatures, acting_features
from vla_jax.types import ActionChunk, Array, Key, Params, Prediction, ShardingRules


class TeacherForcing(NamedTuple):
    """Ground-truth actions for the training of a head that has actions as input."""

    action: Array  # [B, W, K, A], arm in [-1, 1], gripper +1 open / -1 closed
    action_mask: Array  # [B, W, K] bool, True where the action exists; others may be NaN
    # [] probability of feeding the true action to the autoregressive head; None = always
    rate: Array | None = None


class Head(NamedTuple):
    """Member of the family of heads."""

    takes_targets: bool  # True if `apply` uses ground-truth actions (teacher forcing, noise)
    draws_noise: bool  # True if acting starts from noise, as the config's `noise_seed` says
    is_bounded: bool  # True if the arm's actions are in [-1, 1] whatever the params
    check: Callable[[DecoderFields], None]  # raises a ValueError for an unsupported config
    init: Callable[[Key, DecoderFields], Params]
    # (params of the head, config, features [B, W, H], *, timestep_mask, reset, targets, key)
    apply: Callable[..., Prediction]
    # (config, batch_size, num_memories C, mode, window_size) -> state, leaves [B, ...]
    init_stream: Callable[[DecoderFields, int, int, Mode, int], Any]
    # (params of the head, config, state, features of one step, reset [B]) -> (state, prediction
    # [B, K, ...])
    step: Callable[[Params, DecoderFields, Any, StepFeatures, Array], tuple[Any, Prediction]]
    sharding_rules: ShardingRules = ()  # by globs of paths in the head's params; () = replicated


class PredictionKind(NamedTuple):
    """Functions on one type of prediction, for losses and for acting."""

    # decodes a prediction; an action of which a number was not finite has one that is not finite
    actions: Callable[[Any], ActionChunk]
    # (prediction, ground truth [..., K, A]) -> error terms and metrics [..., K, ...] by name
    errors: Callable[[Any, jax.Array], dict[str, jax.Array]]


def bound_arm(outputs: Array) -> jax.Array:
    """Returns tanh of a head's outputs, NaN where they are infinite.

    The tanh of infinity is a valid action, which an agent would not refuse.
    """
    return jnp.where(jnp.isinf(outputs), jnp.nan, jnp.tanh(outputs))


def no_stream(
    config: DecoderFields, batch_size: int, num_memories: int, mode: Mode, window_size: int
) -> tuple:
    """Returns an empty state: the `Head.init_stream` of a head without memory."""
    del config, batch_size, num_memories, mode, window_size
    return ()


def make_step(apply: Callable[..., Prediction]) -> Callable[..., tuple[tuple, Prediction]]:
    """Returns the `Head.step` of a head that uses the features of the current step only."""

    def step(
        params: Params,
        config: DecoderFields,
        state: tuple,
        step_features: StepFeatures,
        reset: Array,
    ) -> tuple[tuple, Prediction]:
        del reset
        return state, apply(params, config, acting_features(step_features))

    return step
