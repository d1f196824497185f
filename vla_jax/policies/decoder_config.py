"""The config of a decoder, and those of the parts inside it that follow from it."""

import dataclasses
from typing import Literal, cast, get_args

from vla_jax.actions import bins
from vla_jax.config import did_you_mean
from vla_jax.nn.cells import CELLS, CellName
from vla_jax.nn.pooling import POOLINGS, Pooling
from vla_jax.nn.recurrence import Implementation, RecurrenceConfig
from vla_jax.nn.seq2seq import AnyScore, Seq2SeqConfig
from vla_jax.nn.transformer import TransformerConfig

Kind = Literal["rnn", "lstm", "gru", "layer_norm_lstm", "min_gru", "fc", "gpt"]
Head = Literal["continuous", "discrete", "autoregressive"]
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder; the defaults are RoboVLMs' but for the sizes of its inputs and outputs."""

    kind: Kind = "lstm"  # cell of the recurrence, "gpt" for a transformer, "fc" for no memory
    token_dim: int = 256  # D, features of a token; the backbone's
    num_tokens: int = 1  # N, tokens per step; the backbone's; 0 = any number, where it is pooled
    window_size: int = 16  # W, steps it is trained on, and remembers in streaming mode "refresh"
    action_horizon: int = 10  # K, actions of a chunk
    action_dim: int = 7  # A, the last of which is the gripper
    hidden_size: int = 1024  # H, units of a layer, features that the heads get
    num_layers: int = 4  # L, of the recurrence or the transformer (RoboVLMs' has 8); not of "fc"
    num_heads: int = 8  # M, attention heads of kind "gpt"
    pooling: Pooling = "max"  # how N tokens become `num_latents`; "none" keeps and joins them all
    num_latents: int = 1  # vectors that are left of a step's tokens, joined to one
    # Numbers (arm, gripper logit); or "discrete": bins of each number; or "autoregressive": numbers
    # again, each action told the one before, by a recurrence that looks back at the window.
    head: Head = "continuous"
    score: AnyScore = "general"  # how head "autoregressive" looks back; "none" = it does not
    num_bins: int = 256  # V, bins of a number from -1 to 1; of head "discrete"
    # Hidden layers of each MLP of the heads; head "autoregressive" has none.
    head_sizes: tuple[int, ...] = (1024, 512, 256)
    dropout: float = 0.0  # probability: between two recurrent layers, or in GPT-2's three places
    remat_chunk: int = 0  # recurrent steps computed again for the gradient; 0 = keep all
    implementation: Implementation = "auto"  # of the recurrence, see there
    dtype: Dtype = "float32"  # of the factors of matrix products

    def __post_init__(self):
        literals = {"kind": Kind, "pooling": Pooling, "head": Head, "score": AnyScore}
        literals["dtype"] = Dtype
        for name, choices in literals.items():
            value, known = getattr(self, name), get_args(choices)
            if value not in known:
                raise ValueError(f"unknown {name} '{value}'; {did_you_mean(value, known)}")
        least_count = 1 if self.pooling == "none" else 0
        sizes = ("token_dim", "window_size", "action_horizon", "num_latents")
        sizes += ("hidden_size", "num_layers")
        for name, least in (("num_tokens", least_count), *((name, 1) for name in sizes)):
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
        if self.head == "autoregressive" and self.kind not in CELLS:
            raise ValueError(
                f"kind must be one of {', '.join(CELLS)} with head 'autoregressive', whose cell it "
                f"is, got '{self.kind}'; choose one of them, or another head."
            )
        bins.check_num_bins(self.num_bins)
        _check_trunk(self)


def recurrence_config(config: DecoderConfig) -> RecurrenceConfig:
    """Returns the config of the recurrence inside, for the kinds that are cells."""
    return RecurrenceConfig(
        cell=cast(CellName, config.kind),
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        dropout=config.dropout,
        remat_chunk=config.remat_chunk,
        implementation=config.implementation,
        dtype=config.dtype,
    )


def transformer_config(config: DecoderConfig) -> TransformerConfig:
    """Returns the config of the transformer inside, which has a position for each step."""
    return TransformerConfig(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        hidden_size=config.hidden_size,
        num_positions=config.window_size,
        dropout=config.dropout,
        dtype=config.dtype,
    )


def writer_config(config: DecoderConfig) -> Seq2SeqConfig:
    """Returns the config of head "autoregressive": one layer of the trunk's cell, H wide."""
    size = config.hidden_size
    return Seq2SeqConfig(
        source="vectors",
        source_size=size,
        target="vectors",
        target_size=config.action_dim,
        embed_size=size,
        cell=cast(CellName, config.kind),
        hidden_size=size,
        bidirectional=False,
        score=config.score,
        score_size=size,
        dropout=config.dropout,
        dtype=config.dtype,
    )


def pooled_size(config: DecoderConfig) -> int:
    """Returns D', the features that `pool` leaves of a step."""
    num_vectors = POOLINGS[config.pooling].num_vectors(config.num_tokens, config.num_latents)
    return num_vectors * config.token_dim


def least_tokens(config: DecoderConfig) -> int:
    """Returns the smallest number of tokens that can be pooled to `num_latents` vectors."""
    return POOLINGS[config.pooling].min_tokens(config.num_latents)


def _check_trunk(config: DecoderConfig) -> None:
    """Raises a ValueError unless such a trunk can be made."""
    if config.kind == "gpt":
        transformer_config(config)
    elif config.kind != "fc":
        recurrence_config(config)
    elif config.dropout != 0.0:
        raise ValueError(
            f"dropout must be 0 for a decoder of kind 'fc', which drops nothing, got "
            f"{config.dropout}."
        )
