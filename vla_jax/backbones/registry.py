"""Registry of the backbones, by the `kind` of their config."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from vla_jax.backbones import backbone, perceiver, state
from vla_jax.backbones.backbone import Backbone
from vla_jax.backbones.models import MODELS
from vla_jax.backbones.vlm import make_backbone
from vla_jax.config import did_you_mean

BACKBONES: dict[str, Backbone] = {
    "perceiver": perceiver.BACKBONE,
    "state": state.BACKBONE,
    **{kind: make_backbone(model) for kind, model in MODELS.items()},
}
if TYPE_CHECKING:
    BackboneConfig = backbone.BackboneConfig
else:
    # Union of all backbone configs, for the command line and for reading JSON by `kind`.
    BackboneConfig = Union[tuple(member.config for member in BACKBONES.values())]  # noqa: UP007


def get(config: Any) -> Backbone:
    """Returns the backbone of a config.

    Raises:
      ValueError: there is no backbone of its kind.
    """
    if config.kind not in BACKBONES:
        raise ValueError(
            f"unknown backbone '{config.kind}'; {did_you_mean(config.kind, BACKBONES)}"
        )
    return BACKBONES[config.kind]


def image_size(config: Any) -> int:
    """Returns the height and width, in pixels, of the images to render for a backbone; 0 = none.

    Raises:
      ValueError: the backbone takes images that are not square.
    """
    spec = get(config).image_spec(config)
    if spec is None:
        return 0
    if spec.height != spec.width:
        raise ValueError(
            f"images of a simulator must be square, got {spec.height} × {spec.width} pixels for "
            f"backbone '{config.kind}'; choose a backbone with square images."
        )
    return spec.height


def make_tokenizer(config: Any, instructions: Iterable[str]) -> Callable[[str], np.ndarray]:
    """Returns the function from an instruction to its ids `[S]` int32.

    Args:
      config: of the backbone.
      instructions: all instructions of the training data.

    Raises:
      ValueError: two of the instructions would get the same ids.
    """
    member = get(config)
    member.check_instructions(config, instructions)
    return partial(member.tokenize, config)
