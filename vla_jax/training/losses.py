"""Losses over the real targets of a batch; 0, never NaN, if it has none.

With `axis_name` (inside `pmap` or `shard_map`) sums and counts are added over the devices before
they are divided, so that the value is that of the whole batch. Under `jit` a sharded batch needs
no `axis_name`.
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
    """Returns the mean of the values where the mask is True; 0 with zero gradient if nowhere.

        Σ values[mask] / max(1, |mask|)

    Args:
      values: `[..., any trailing axes]`; may be NaN where the mask is False.
      mask: `[...]`, True for values that count.
      axis_name: mapped axis to sum over; None outside `pmap` and `shard_map`.

    Returns:
      `[]` float32.
    """
    chex.assert_tree_shape_prefix(values, mask.shape)
    trailing = (1,) * (values.ndim - mask.ndim)
    mask = jnp.broadcast_to(jnp.reshape(mask, mask.shape + trailing), values.shape)
    total = jnp.sum(jnp.where(mask, values, 0.0), dtype=jnp.float32)
    count = jnp.sum(mask, dtype=jnp.float32)
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
    """Returns the behaviour-cloning loss and its parts.

        loss = Huber₁(arm) + gripper_weight · BCE(gripper_logit, gripper > 0)

    For bins it is the cross-entropy with the bin of each of the A numbers, all of the same
    weight, the gripper's included.

        loss = −log softmax(logits)[encode(action)]

    For a flow it is the squared error of the velocity, the mean over the A numbers.

        loss = (velocity − (action − noise))²

    Args:
      prediction: arm `[..., K, A-1]`, gripper logit `[..., K]`; or logits `[..., K, A, V]`; or
        a flow's `[..., K, A]`; arbitrary, NaN too, where the target does not exist.
      action: targets `[..., K, A]`, arm in [-1, 1], gripper +1 open / -1 closed.
      action_mask: `[..., K]`, True where the target exists; or `[..., K, A]`, True for the numbers
        of it that exist. Other targets are arbitrary.
      gripper_weight: weight of the gripper's term; bins and flows have no such term.
      axis_name: mapped axis to sum over; None outside `pmap` and `shard_map`.

    Returns:
      Loss `[]` float32, and metrics. For all: `acc_gripper` in [0, 1] (open or closed)
      and `arm_l1` (mean absolute error of the decoded arm, in normalised units). Continuous:
      `loss_arm`, `loss_gripper` (unweighted). Bins: `loss_bins`, `acc_arm` in [0, 1]
      (the argmax bin is correct). Flow: `loss_flow`.

    Source: Li et al. 2024, RoboVLMs (arXiv:2412.14058), for the continuous loss and its
    weight 0.01.
    """
    terms, metrics = action_terms(prediction, action, action_mask, axis_name=axis_name)
    loss, metrics_by_term = total(terms, LossWeights(gripper=gripper_weight))
    return loss, {**metrics_by_term, **metrics}


def action_terms(
    prediction: Prediction, action: Array, action_mask: Array, *, axis_name: str | None = None
) -> tuple[dict[str, jax.Array], Metrics]:
    """Returns the unweighted terms of `action_loss`, to combine with others in `total`.

    Args:
      prediction: as for `action_loss`.
      action: as for `action_loss`.
      action_mask: as for `action_loss`.
      axis_name: as for `action_loss`.

    Returns:
      `arm` and `gripper`, or `bins`, or `flow`, `[]` float32; and the metrics that are not losses.
    """
    mask = jnp.asarray(action_mask)
    if mask.ndim < action.ndim:
        mask = jnp.broadcast_to(mask[..., None], action.shape)
    chex.assert_shape(mask, action.shape)
    # The selection comes before the loss: the gradient through a NaN would be NaN.
    prediction = jax.tree.map(lambda part: _keep_real(part, mask), prediction)
    target = jnp.where(mask, action, 0.0)
    errors = heads.errors(prediction, target) | _decoded_terms(heads.actions(prediction), target)
    means = {
        name: masked_mean(values, _mask_of(values, mask), axis_name=axis_name)
        for name, values in errors.items()
    }
    terms = {name: mean for name, mean in means.items() if name in TERMS}
    return terms, {name: mean for name, mean in means.items() if name not in TERMS}


def token_loss(
    logits: Array, ids: Array, mask: Array, *, axis_name: str | None = None
) -> tuple[jax.Array, Metrics]:
    """Returns the mean cross-entropy of the real tokens.

        loss = −log softmax(logits)[ids]

    `logits[..., s, :]` are compared with `ids[..., s]`, without a shift. A language model's
    logits at s predict the token at s + 1; its caller passes `logits[..., :-1, :]`,
    `ids[..., 1:]` and `mask[..., 1:]`.

    Args:
      logits: `[..., S, V]`, arbitrary, NaN too, where the target is not real.
      ids: targets `[..., S]`, integers in [0, V) where real, arbitrary elsewhere.
      mask: `[..., S]`, True where the target is real (PyTorch: where it is not -100).
      axis_name: mapped axis to sum over; None outside `pmap` and `shard_map`.

    Returns:
      Loss `[]` float32, and metrics `loss_tokens`, the same, and `acc_tokens` in [0, 1].
    """
    chex.assert_shape(logits, (*ids.shape, None))
    chex.assert_shape(mask, ids.shape)
    logits = jnp.where(jnp.asarray(mask)[..., None], jnp.asarray(logits, jnp.float32), 0.0)
    ids = jnp.where(mask, ids, 0)
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
    """Returns the cross-entropy of a language model whose tokens encode actions, and its errors.

    The loss is `token_loss` over all real tokens, words included; the caller shifts them.
    The metrics cover the action tokens: in each row `[S]` they form groups of A, and the last of
    a group is the gripper's.

    Args:
      logits: `[..., S, V]`.
      ids: targets `[..., S]`, as for `token_loss`; `action_tokens.to_token_ids` encodes
        actions.
      mask: `[..., S]`, True where the target is real (RoboVLMs: where it is not -100).
      vocab_size: size of the tokenizer, as for `to_token_ids`; V may be larger.
      action_dim: A, tokens per action.
      num_bins: bins per action dimension.
      num_special: as for `to_token_ids`.
      offset: as for `to_token_ids`.
      axis_name: mapped axis to sum over; None outside `pmap` and `shard_map`.

    Returns:
      Loss `[]` float32, and metrics: those of `token_loss`; `action_l1`, the mean absolute error
      of all A numbers after decoding, in [0, 2]; `acc_arm` and `acc_gripper` in [0, 1], the
      fraction of their tokens that are the argmax over all V.

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
        name: masked_mean(values, term_mask, axis_name=axis_name)
        for name, (values, term_mask) in terms.items()
    }


def categorical_kl(
    logits: Array, reference_logits: Array, mask: Array, *, axis_name: str | None = None
) -> jax.Array:
    """Returns the KL divergence of a discrete policy from a reference, a term for fine-tuning.

        KL(π ‖ ρ) = Σᵥ π(v) (log π(v) − log ρ(v)),    mean where the mask is True

    The reference gets no gradient.

    Args:
      logits: logits of the policy π, `[..., V]`.
      reference_logits: logits of the reference ρ, `[..., V]`.
      mask: leading axes of `[...]`, True where the policies are compared; the logits elsewhere
        are arbitrary.
      axis_name: mapped axis to sum over; None outside `pmap` and `shard_map`.

    Returns:
      `[]` float32, at least 0.
    """
    chex.assert_equal_shape([logits, reference_logits])
    chex.assert_tree_shape_prefix(logits, mask.shape)
    trailing = (1,) * (logits.ndim - mask.ndim)
    logits_mask = jnp.reshape(mask, mask.shape + trailing)
    # The selection comes before the softmax: the gradient through a NaN would be NaN.
    log_policy, log_reference = (
        jax.nn.log_softmax(jnp.where(logits_mask, jnp.asarray(part, jnp.float32), 0.0))
        for part in (logits, jax.lax.stop_gradient(reference_logits))
    )
    distance = jnp.sum(jnp.exp(log_policy) * (log_policy - log_reference), axis=-1)
    return masked_mean(distance, mask, axis_name=axis_name)


def _keep_real(part: Array, mask: jax.Array) -> jax.Array:
    """Returns a part of a prediction in float32, with zeros where its target does not exist."""
    part_mask = _mask_of(part, mask)
    chex.assert_shape(part, (*mask.shape, None) if part.ndim > mask.ndim else part_mask.shape)
    return jnp.where(part_mask, jnp.asarray(part, jnp.float32), 0.0)


def _mask_of(values: Array, mask: jax.Array) -> jax.Array:
    """Returns the part of `mask [..., K, A]` for values of the arm, of all numbers or the gripper.

    Args:
      values: `[..., K, A-1]`, `[..., K, A]`, `[..., K]`, or logits `[..., K, A, V]`.
      mask: `[..., K, A]`.
    """
    if values.ndim > mask.ndim:
        return mask[..., None]
    if values.ndim < mask.ndim:
        return mask[..., -1]
    return mask[..., : values.shape[-1]]


def _decoded_terms(chunk: ActionChunk, target: jax.Array) -> Metrics:
    return {
        "acc_gripper": (chunk.gripper_logit > 0) == (target[..., -1] > 0),
        "arm_l1": jnp.abs(chunk.arm - target[..., :-1]),
    }
