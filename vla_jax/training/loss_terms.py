"""One loss out of many: the terms of a training, each times its weight.

    loss = arm (or bins) + g · gripper + c · caption + v · cotrain + k · kl
         + f · (forward_tokens + forward_image_primary + forward_image_wrist)

with g, f, c, v, k from `LossWeights`. A term that is not there adds nothing, so that a training
brings what it has: `losses.action_loss` gives the first two, `auxiliary.loss` the forward terms
and the caption; `kl` (`losses.categorical_kl`) and `cotrain` (the loss of another task, such as
answering questions about pictures) are for a loss of your own.
"""

import dataclasses
import math
from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp

from vla_jax.config import did_you_mean
from vla_jax.types import Array, Metrics


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Factor of each term beside the arm's, which has none.

    RoboVLMs ships `fwd_loss_ratio` 0; here it is that of the others, since a head that is
    switched on and gets no gradient would be a trap.

    Source: Li et al. 2024, RoboVLMs (arXiv:2412.14058); its names stand behind the fields.
    """

    gripper: float = 0.01  # of the gripper's term; arm_gripper_loss_ratio
    forward: float = 0.05  # of what is predicted of the coming steps; fwd_loss_ratio
    caption: float = 0.05  # of giving the instruction back; cap_loss_ratio
    cotrain: float = 0.05  # of another task's loss; vl_cotrain_ratio
    kl: float = 0.05  # of the distance to a reference policy; kl_div_ratio

    def __post_init__(self):
        for name, weight in dataclasses.asdict(self).items():
            if not 0.0 <= weight < math.inf:
                raise ValueError(f"loss.{name} must be a finite number, 0 or more, got {weight}.")


TERMS = {  # term: the weight that it is multiplied by; None = 1
    "arm": None,
    "bins": None,
    "gripper": "gripper",
    "forward_tokens": "forward",
    "forward_image_primary": "forward",
    "forward_image_wrist": "forward",
    "caption": "caption",
    "cotrain": "cotrain",
    "kl": "kl",
}


def total(terms: Mapping[str, Array], weights: LossWeights) -> tuple[jax.Array, Metrics]:
    """Returns the weighted sum of the terms, and each of them as it came.

    Args:
      terms: name in `TERMS` to a scalar without its weight; any of them may be absent.
      weights: factor of each.

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
