"""The training loss as a weighted sum of named terms.

    loss = arm (or bins, or flow) + g · gripper + c · caption + v · cotrain + k · kl
         + f · (forward_tokens + forward_image_primary + forward_image_wrist)

with g, f, c, v, k from `LossWeights`. Any term may be absent. `losses.action_terms` returns `arm`
and `gripper` (or `bins`, or `flow`), `auxiliary.loss` the forward terms and the caption; `kl`
(`losses.categorical_kl`) and `cotrain` (the loss of another task, such as visual question
answering) are for custom losses.
"""

import dataclasses
import math
from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp

from vla_jax.config import checked, did_you_mean
from vla_jax.types import Array, Metrics


@dataclasses.dataclass(frozen=True)
@checked()
class LossWeights:
    """Weight of each loss term; the arm's weight is 1.

    The default of `fwd_loss_ratio` in RoboVLMs is 0; here it equals the others, so that an
    enabled forward head gets a gradient.

    Source: Li et al. 2024, RoboVLMs (arXiv:2412.14058); its names are in the fields' comments.
    """

    gripper: float = 0.01  # weight of the gripper loss (RoboVLMs: arm_gripper_loss_ratio)
    forward: float = 0.05  # weight of the forward-prediction loss (fwd_loss_ratio)
    caption: float = 0.05  # weight of the caption loss (cap_loss_ratio)
    cotrain: float = 0.05  # weight of a co-training task's loss (vl_cotrain_ratio)
    kl: float = 0.05  # weight of the KL divergence from a reference policy (kl_div_ratio)

    def __post_init__(self):
        for name, weight in dataclasses.asdict(self).items():
            if not 0.0 <= weight < math.inf:
                raise ValueError(f"loss.{name} must be a finite number, 0 or more, got {weight}.")


TERMS = {  # term: the weight that it is multiplied by; None = 1
    "arm": None,
    "bins": None,
    "flow": None,
    "gripper": "gripper",
    "forward_tokens": "forward",
    "forward_image_primary": "forward",
    "forward_image_wrist": "forward",
    "caption": "caption",
    "cotrain": "cotrain",
    "kl": "kl",
}


def total(terms: Mapping[str, Array], weights: LossWeights) -> tuple[jax.Array, Metrics]:
    """Returns the weighted sum of the terms, and each unweighted term as a metric.

    Args:
      terms: name in `TERMS` to an unweighted scalar; any of them may be absent.
      weights: weight of each term.

    Returns:
      Loss `[]` float32, 0 without terms, and metrics `loss_<name>`, unweighted.

    Raises:
      ValueError: a term of an unknown name.
    """
    loss = jnp.zeros([], jnp.float32)
    for name, term in terms.items():
        if name not in TERMS:
            raise ValueError(f"unknown loss term '{name}'; {did_you_mean(name, TERMS)}")
        chex.assert_shape(term, ())
        weight = TERMS[name]
        loss += term if weight is None else getattr(weights, weight) * term
    return loss, {f"loss_{name}": jnp.asarray(term) for name, term in terms.items()}
