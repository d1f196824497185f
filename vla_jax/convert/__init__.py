"""Foreign weights to ours and back; what is converted in and out again is the same file."""

from vla_jax.convert.flax_cells import from_flax, from_flax_stack, to_flax, to_flax_stack
from vla_jax.convert.torch_rnn import from_torch, to_torch

__all__ = [
    "from_flax",
    "from_flax_stack",
    "from_torch",
    "to_flax",
    "to_flax_stack",
    "to_torch",
]
