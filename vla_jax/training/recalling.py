"""A loss that trains memory directly: what must be remembered is predicted at every step.

    params = init(key, feature_size, recall)
    loss(params, policy.outputs(...).features, recall, batch.timestep_mask)

A policy that clones actions learns to remember something only as far as it changes an action, which
may be long after and at few steps. The linear layer here asks the features for it at every step,
also while the robot only watches. It is for training alone, since no robot knows the answers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vla_jax.nn.layers import dense, init_dense
from vla_jax.training.losses import masked_mean
from vla_jax.types import Array, Key, Metrics, Params, Recall


def init(key: Key, feature_size: int, recall: Recall) -> Params:
    """Returns the params of the layer.

    Args:
      key: consumed.
      feature_size: H, the trunk's features per step.
      recall: of one step or many; only its sizes are used.
    """
    return init_dense(key, feature_size, sum(_sizes(recall)))


def loss(params: Params, features: Array, recall: Recall, mask: Array) -> tuple[jax.Array, Metrics]:
    """Returns the mean over steps of the numbers' squared error and the choices' cross-entropy.

    Args:
      params: from `init`.
      features: `[B, W, H]`; they and `recall` may be NaN where the mask is False.
      recall: `[B, W, ...]`.
      mask: `[B, W]` bool, steps that count.

    Returns:
      Loss `[]` float32, with the same weight for every number and every choice; and the metric
      `recall_accuracy`, the share of right choices, if there are choices.
    """
    # The selection comes before the loss: the gradient through a NaN would be NaN.
    features, recall = jax.tree.map(
        lambda part: jnp.where(mask[..., None], part, 0.0), (features, recall)
    )
    ends = np.cumsum(_sizes(recall))[:-1]
    numbers, *logits = jnp.split(dense(features, **params), ends, axis=-1)
    errors, right, asked = [jnp.square(numbers - recall.numbers)], [], []
    for scores, choice in zip(logits, map(jnp.asarray, recall.choices), strict=True):
        errors.append(optax.softmax_cross_entropy(scores, choice)[..., None])
        right.append(jnp.argmax(scores, axis=-1) == jnp.argmax(choice, axis=-1))
        asked.append(jnp.any(choice > 0, axis=-1))
    mean = masked_mean(jnp.mean(jnp.concatenate(errors, axis=-1), axis=-1), mask)
    if not right:
        return mean, {}
    return mean, {"recall_accuracy": masked_mean(jnp.stack(right), jnp.stack(asked))}


def _sizes(recall: Recall) -> list[int]:
    return [part.shape[-1] for part in (recall.numbers, *recall.choices)]
