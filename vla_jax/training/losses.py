"""Losses over the real targets of a batch; none is NaN where there are none.

With `axis_name` (inside `pmap` or `shard_map`) sums and counts are added up over the devices
before they are divided, so that the value is that of the whole batch; under `jit` a sharded
batch needs nothing.
"""

import chex
import jax
import jax.numpy as jnp
import optax

from vla_jax.actions import bins
from vla_jax.policies import heads
from vla_jax.training.loss_terms import TERMS, LossWeights, total
from vla_jax.types import ActionChunk, Array, Metrics, Prediction


def masked_mean(values: Array, mask: Array, *, axis_name: str | None = None) -> jax.Array:
    """Returns the mean of the values that are kept; 0 with zero gradient if none is.

        Σ values[mask] / max(1, |mask|)

    Args:
      values: `[..., any trailing axes]`; what is not kept may be NaN.
      mask: `[...]`, True where the values are kept.
      axis_name: mapped axis to sum over; None means that the batch is whole.

    Returns:
      `[]` float32.
    """
    chex.assert_tree_shape_prefix(values, mask.shape)
    trailing = (1,) * (values.ndim - mask.ndim)
    kept = jnp.broadcast_to(jnp.reshape(mask, mask.shape + trailing), values.shape)
    total = jnp.sum(jnp.where(kept, values, 0.0), dtype=jnp.float32)
    count = jnp.sum(kept, dtype=jnp.float32)
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    return total / jnp.maximum(count, 1.0)


def action_loss(
    prediction: Prediction,
    action: Array,
    action_mask: Array,
    *,
    gripper_weight: float = LossWeights.gripper,
    axis_name: str | None = None,
) -> tuple[jax.Array, Metrics]:
    """Returns the loss of behaviour cloning and its parts.

        loss = Huber₁(arm) + gripper_weight · BCE(gripper_logit, gripper > 0)

    Of bins it is the cross-entropy with the bin that each of the A numbers lies in, all of the
    same weight, the gripper's included.

        loss = −log softmax(logits)[encode(action)]

    Args:
      prediction: arm `[..., K, A-1]`, gripper logit `[..., K]`; or logits `[..., K, A, V]`.
      action: targets `[..., K, A]`, arm in [-1, 1], gripper +1 open / -1 closed.
      action_mask: `[..., K]`, True where the target exists; the others may hold anything.
      gripper_weight: factor of the gripper's term; bins have no such term.
      axis_name: mapped axis to sum over; None means that the batch is whole.

    Returns:
      Loss `[]` float32, and metrics. Of both: `acc_gripper` in [0, 1] (open or closed)
      and `arm_l1` (mean absolute error of the decoded arm, in its normalised units). Of numbers:
      `loss_arm`, `loss_gripper` (without its weight). Of bins: `loss_bins`, `acc_arm` in [0, 1]
      (the argmax bin is correct).

    Source: Li et al. 2024, RoboVLMs (arXiv:2412.14058), with its weight 0.01; the bins are ours.
    """
    terms, metrics = action_terms(prediction, action, action_mask, axis_name=axis_name)
    loss, metrics_by_term = total(terms, LossWeights(gripper=gripper_weight))
    return loss, {**metrics_by_term, **metrics}


def action_terms(
    prediction: Prediction, action: Array, action_mask: Array, *, axis_name: str | None = None
) -> tuple[dict[str, jax.Array], Metrics]:
    """Returns the terms of `action_loss` without a weight, for `loss_terms.total` with others.

    Args:
      prediction: as for `action_loss`.
      action: as for `action_loss`.
      action_mask: as for `action_loss`.
      axis_name: as for `action_loss`.

    Returns:
      `arm` and `gripper`, or `bins`, `[]` float32; and the metrics that are no loss.
    """
    chex.assert_shape(action_mask, action.shape[:-1])
    prediction = jax.tree.map(lambda part: jnp.asarray(part, jnp.float32), prediction)
    # The selection comes before the loss: the gradient through a NaN target would be NaN.
    target = jnp.where(jnp.asarray(action_mask)[..., None], action, 0.0)
    found = heads.errors(prediction, target) | _decoded_terms(heads.actions(prediction), target)
    means = {
        name: masked_mean(values, action_mask, axis_name=axis_name)
        for name, values in found.items()
    }
    terms = {name: mean for name, mean in means.items() if name in TERMS}
    return terms, {name: mean for name, mean in means.items() if name not in TERMS}


def token_loss(
    logits: Array, ids: Array, mask: Array, *, axis_name: str | None = None
) -> tuple[jax.Array, Metrics]:
    """Returns the cross-entropy of tokens, over the real ones.

        loss = −log softmax(logits)[ids]

    `logits[..., s, :]` are those for `ids[..., s]`: nothing is shifted here. A language model's
    logits at s speak of the token at s + 1; its caller gives `logits[..., :-1, :]`,
    `ids[..., 1:]` and `mask[..., 1:]`.

    Args:
      logits: `[..., S, V]`.
      ids: targets `[..., S]`, integers in [0, V) where they are real, anything elsewhere.
      mask: `[..., S]`, True where the target is real (PyTorch: where it is not -100).
      axis_name: mapped axis to sum over; None means that the batch is whole.

    Returns:
      Loss `[]` float32, and metrics `loss_tokens`, the same, and `acc_tokens` in [0, 1].
    """
    chex.assert_shape(logits, (*ids.shape, None))
    chex.assert_shape(mask, ids.shape)
    logits, ids = jnp.asarray(logits, jnp.float32), jnp.where(mask, ids, 0)
    terms = {
        "loss_tokens": optax.losses.softmax_cross_entropy_with_integer_labels(logits, ids),
        "acc_tokens": jnp.argmax(logits, axis=-1) == ids,
    }
    metrics = {name: masked_mean(term, mask, axis_name=axis_name) for name, term in terms.items()}
    return metrics["loss_tokens"], metrics


def action_token_loss(
    logits: Array,
    ids: Array,
    mask: Array,
    *,
    vocab_size: int,
    action_dim: int = 7,
    num_bins: int = 256,
    num_special: int = 0,
    offset: int = 10,
    axis_name: str | None = None,
) -> tuple[jax.Array, Metrics]:
    """Returns the cross-entropy of a language model that speaks actions, and how well it acts.

    `token_loss` over all real tokens, words included, shifted by the caller as there. The metrics
    are of the tokens that stand for a bin: in each row `[S]` they are counted off in groups of A,
    the last of a group being the gripper's.

    Args:
      logits: `[..., S, V]`.
      ids: targets `[..., S]`, as for `token_loss`; `action_tokens.to_token_ids` makes those of
        actions.
      mask: `[..., S]`, True where the target is real (RoboVLMs: where it is not -100).
      vocab_size: of the tokenizer, as `to_token_ids` was given it; V may be larger.
      action_dim: A, the tokens of one action.
      num_bins: bins of a number.
      num_special: as `to_token_ids` was given it.
      offset: as `to_token_ids` was given it.
      axis_name: mapped axis to sum over; None means that the batch is whole.

    Returns:
      Loss `[]` float32, and metrics: those of `token_loss`; `action_l1`, the mean absolute error
      of all A numbers after decoding, in [0, 2]; `acc_arm` and `acc_gripper` in [0, 1], the share
      of their tokens that are the argmax over all V.

    Source: Li et al. 2024, RoboVLMs (arXiv:2412.14058), `DiscreteDecoder.loss`.
    """
    loss, metrics = token_loss(logits, ids, mask, axis_name=axis_name)
    target_bins, predicted_bins = (
        bins.from_token_ids(each, vocab_size, num_special=num_special, offset=offset)
        for each in (ids, jnp.argmax(logits, axis=-1))
    )
    is_action = mask & (target_bins >= 0) & (target_bins < num_bins)
    is_gripper = jnp.cumsum(is_action, axis=-1) % action_dim == 0
    centres = (bins.decode(indices, num_bins) for indices in (target_bins, predicted_bins))
    terms = {
        "action_l1": (jnp.abs(jnp.subtract(*centres)), is_action),
        "acc_arm": (target_bins == predicted_bins, is_action & ~is_gripper),
        "acc_gripper": (target_bins == predicted_bins, is_action & is_gripper),
    }
    return loss, metrics | {
        name: masked_mean(values, kept, axis_name=axis_name)
        for name, (values, kept) in terms.items()
    }


def categorical_kl(
    logits: Array, reference_logits: Array, mask: Array, *, axis_name: str | None = None
) -> jax.Array:
    """Returns how far a discrete policy has moved from a reference, as for fine-tuning.

        KL(π ‖ ρ) = Σᵥ π(v) (log π(v) − log ρ(v)),    mean over what is kept

    The reference gets no gradient.

    Args:
      logits: of the policy π, `[..., V]`.
      reference_logits: of the reference ρ, `[..., V]`.
      mask: the leading axes of `[...]`, True where the policies are compared; the others may hold
        anything.
      axis_name: mapped axis to sum over; None means that the batch is whole.

    Returns:
      `[]` float32, at least 0.
    """
    chex.assert_equal_shape([logits, reference_logits])
    chex.assert_tree_shape_prefix(logits, mask.shape)
    trailing = (1,) * (logits.ndim - mask.ndim)
    kept = jnp.reshape(mask, mask.shape + trailing)
    # The selection comes before the softmax: the gradient through a NaN would be NaN.
    log_policy, log_reference = (
        jax.nn.log_softmax(jnp.where(kept, jnp.asarray(part, jnp.float32), 0.0))
        for part in (logits, jax.lax.stop_gradient(reference_logits))
    )
    distance = jnp.sum(jnp.exp(log_policy) * (log_policy - log_reference), axis=-1)
    return masked_mean(distance, mask, axis_name=axis_name)


def _decoded_terms(chunk: ActionChunk, target: jax.Array) -> Metrics:
    return {
        "acc_gripper": (chunk.gripper_logit > 0) == (target[..., -1] > 0),
        "arm_l1": jnp.abs(chunk.arm - target[..., :-1]),
    }
