"""The config of a decoder, checked against the trunks and heads that exist."""

import dataclasses
from typing import get_args

from vla_jax.actions import bins
from vla_jax.config import checked, did_you_mean
from vla_jax.nn.pooling import Pooling
from vla_jax.nn.seq2seq import AnyScore
from vla_jax.policies import heads, trunks
from vla_jax.policies.decoder_fields import DecoderFields, Dtype, least_tokens


@dataclasses.dataclass(frozen=True)
@checked()
class DecoderConfig(DecoderFields):
    """Trunk, head and sizes of a decoder; the defaults are RoboVLMs' except for input and output.

    Raises:
      ValueError: an unknown name, a size that is too small, or parts that do not fit together.
    """

    def __post_init__(self):
        known_names = {
            "kind": trunks.names(),
            "head": tuple(heads.HEADS),
            "pooling": get_args(Pooling),
            "score": get_args(AnyScore),
            "dtype": get_args(Dtype),
        }
        for name, known in known_names.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"unknown {name} '{value}'; {did_you_mean(value, known)}")
        sizes = ("token_dim", "window_size", "action_horizon", "num_latents")
        sizes += ("hidden_size", "num_layers")
        fewest = 1 if self.pooling == "none" else 0
        for name, least in (("num_tokens", fewest), *((name, 1) for name in sizes)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.action_dim < 2:
            raise ValueError(
                f"action_dim must be at least 2 (arm, gripper), got {self.action_dim}."
            )
        if 0 < self.num_tokens < least_tokens(self):
            raise ValueError(
                f"num_latents must be at most num_tokens = {self.num_tokens} with "
                f"pooling='{self.pooling}', got {self.num_latents}; choose pooling='attention'."
            )
        bins.check_num_bins(self.num_bins)
        heads.HEADS[self.head].check(self)
        trunks.get(self.kind).check(self)
