"""The backbones by the `kind` of their config."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from vla_jax.backbones import perceiver, state
from vla_jax.types import Key, Observation, Params

BackboneConfig = perceiver.PerceiverConfig | state.StateConfig


class Backbone(NamedTuple):
    """Observations `[..., parts]` -> tokens `[..., N, D]`."""

    init: Callable[[Key, Any], Params]
    apply: Callable[[Params, Any, Observation], jax.Array]


BACKBONES = {
    "perceiver": Backbone(perceiver.init, perceiver.apply),
    "state": Backbone(state.init, state.apply),
}
