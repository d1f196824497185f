"""Dialects of the server by the path of the WebSocket."""

from vla_jax.serving.dialect import Dialect
from vla_jax.serving.openpi import OPENPI

DIALECTS: dict[str, Dialect] = {"/": OPENPI, "/v1/realtime/robot/openpi": OPENPI}
