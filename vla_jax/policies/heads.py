"""Registry of the action heads, by `DecoderConfig.head`, and functions of their predictions."""

import jax

from vla_jax.policies.autoregressive_head import AUTOREGRESSIVE
from vla_jax.policies.continuous_head import ACTION_CHUNK, CONTINUOUS
from vla_jax.policies.discrete_head import BIN_CHUNK, DISCRETE
from vla_jax.policies.flow_head import FLOW, FLOW_CHUNK
from vla_jax.policies.head import Head, PredictionKind
from vla_jax.types import ActionChunk, BinChunk, FlowChunk, Prediction

HEADS: dict[str, Head] = {
    "continuous": CONTINUOUS,
    "discrete": DISCRETE,
    "autoregressive": AUTOREGRESSIVE,
    "flow": FLOW,
}
PREDICTIONS: dict[type, PredictionKind] = {
    ActionChunk: ACTION_CHUNK,
    BinChunk: BIN_CHUNK,
    FlowChunk: FLOW_CHUNK,
}


def actions(prediction: Prediction) -> ActionChunk:
    """Returns the actions of a prediction.

    Args:
      prediction: of any head, `[..., K, ...]`.

    Returns:
      Arm `[..., K, A-1]` in [-1, 1], gripper logit `[..., K]`, float32.
    """
    return PREDICTIONS[type(prediction)].actions(prediction)


def errors(prediction: Prediction, target: jax.Array) -> dict[str, jax.Array]:
    """Returns the error terms of each action, before any mask or mean.

    Args:
      prediction: of any head, `[..., K, ...]`.
      target: ground-truth actions `[..., K, A]`, arm in [-1, 1], gripper +1 open / -1 closed.

    Returns:
      Arrays `[..., K, ...]` by name: terms of the loss (`arm`, `gripper`, `bins` or `flow`) and
      metrics (`acc_arm`).
    """
    return PREDICTIONS[type(prediction)].errors(prediction, target)
