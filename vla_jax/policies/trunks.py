"""Registry of the trunks, by `DecoderConfig.kind`: every recurrent cell, transformers, and fc."""

from vla_jax.nn.cells import CELLS
from vla_jax.policies.fc_trunk import FC
from vla_jax.policies.gpt_trunk import GPT
from vla_jax.policies.memory_gpt_trunk import MEMORY_GPT
from vla_jax.policies.recurrent_trunk import RECURRENT
from vla_jax.policies.rotary_gpt_trunk import ROTARY_GPT
from vla_jax.policies.trunk import Trunk

TRUNKS: dict[str, Trunk] = {
    "fc": FC,
    "gpt": GPT,
    "rotary_gpt": ROTARY_GPT,
    "memory_gpt": MEMORY_GPT,
}  # in addition to the recurrent trunk of every cell


def names() -> tuple[str, ...]:
    """Returns every kind of trunk."""
    return (*CELLS, *TRUNKS)


def get(kind: str) -> Trunk:
    """Returns the trunk of a kind in `names()`."""
    return TRUNKS.get(kind, RECURRENT)
