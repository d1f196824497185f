"""Fields of a decoder's config, and the sizes that follow from them.

The checks are in `decoder_config`, which imports every trunk and head; these import this file.
"""

import dataclasses
from typing import Literal

from vla_jax.config import MAX_LENGTH, checked
from vla_jax.nn.pooling import POOLINGS, Pooling
from vla_jax.nn.recurrence_config import Implementation
from vla_jax.nn.residual_blocks import BlockName
from vla_jax.nn.seq2seq import AnyScore

HeadName = Literal["continuous", "discrete", "autoregressive", "flow"]
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
@checked(
    dropout=(0, 1),
    block_expansion=(0, 1024),
    flow_steps=(1, 2**16),
    attention_span=(0, MAX_LENGTH),
    segment_size=(0, 2**16),
    num_memory_tokens=(0, 2**16),
)
class DecoderFields:
    """Trunk, head and sizes; the defaults are RoboVLMs' except for input and output sizes."""

    kind: str = "lstm"  # trunk: a cell (rnn, lstm, …), gpt, rotary_gpt, memory_gpt, or fc
    token_dim: int = 256  # D, features of a token; set by the backbone
    num_tokens: int = 1  # N, tokens per step; set by the backbone; 0 = any number, if pooled
    window_size: int = 16  # W, steps of a training window, and memory of streaming mode refresh
    action_horizon: int = 10  # K, actions per predicted chunk
    action_dim: int = 7  # A, action dimensions, the last of which is the gripper
    hidden_size: int = 1024  # H, units per layer and features given to the heads
    num_layers: int = 4  # L, layers of the recurrence or transformer; unused by fc
    block: BlockName = "none"  # residual blocks around the recurrent layers: none, mlp, gated
    block_expansion: float = 2.0  # width of a block's MLP or wide cell, as a multiple of H
    gate_span: int = 0  # longest time constant of recurrent gates at init, steps; 0 = default
    num_heads: int = 8  # M, heads of transformers and of cells with matrices as their carry
    num_kv_heads: int = 0  # key and value heads of rotary_gpt and memory_gpt; 0 = num_heads
    attention_span: int = 0  # steps that a layer of rotary_gpt attends to; 0 = window_size
    segment_size: int = 16  # steps after which memory_gpt passes memory tokens to the next segment
    num_memory_tokens: int = 8  # vectors that a segment of memory_gpt passes to the next segment
    conv_size: int = 4  # S, steps of the convolution of gated_delta_net and mamba2; 1 = none
    pooling: Pooling = "max"  # how the N tokens of a step are pooled; none concatenates them
    num_latents: int = 1  # vectors per step after pooling, concatenated
    head: HeadName = "continuous"  # continuous, discrete (bins), autoregressive, or flow (matching)
    score: AnyScore = "general"  # attention score of the autoregressive head; none = no attention
    num_bins: int = 256  # V, bins of each action dimension in [-1, 1], discrete head only
    flow_steps: int = 4  # Euler steps from noise to a chunk when the flow head acts
    noise_seed: int = 0  # random seed of the noise that the flow head acts from
    head_sizes: tuple[int, ...] = (1024, 512, 256)  # widths of the hidden layers of each head MLP
    dropout: float = 0.0  # dropout probability: between recurrent layers, or in a transformer
    remat_chunk: int = 0  # steps per rematerialised chunk of the recurrence; 0 stores everything
    implementation: Implementation = "auto"  # time loop of the recurrence; auto = recommended
    dtype: Dtype = "float32"  # dtype of the factors of matrix products


def least_tokens(config: DecoderFields) -> int:
    """Returns the smallest number of tokens that can be pooled to `num_latents` vectors."""
    return POOLINGS[config.pooling].min_tokens(config.num_latents)


def pooled_size(config: DecoderFields) -> int:
    """Returns D', the features of a step after pooling."""
    num_vectors = POOLINGS[config.pooling].num_vectors(config.num_tokens, config.num_latents)
    return num_vectors * config.token_dim
