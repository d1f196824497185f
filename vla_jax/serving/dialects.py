"""Dialects of the server by the path of the WebSocket."""

from vla_jax.serving.dialect import Dialect
from vla_jax.serving.openpi import OPENPI
from vla_jax.serving.vla_eval import VLA_EVAL

DIALECTS: dict[str, Dialect] = {
    "/": OPENPI,
    "/v1/realtime/robot/openpi": OPENPI,
    "/vla-eval": VLA_EVAL,
}
