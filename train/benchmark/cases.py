"""Cases of `train.benchmark` that compare implementations, and the sizes of all cases."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from train.benchmark import baselines, cell_runs, jax_runs, vlm_runs
from train.benchmark.precision import Precision
from train.benchmark.timing import Comparison, Implementation
from train.configs import ImitateConfig, table_lstm
from vla_jax.acting.agent import AgentConfig
from vla_jax.backbones.perceiver import PerceiverConfig
from vla_jax.backbones.rotary_decoder import RotaryDecoderConfig
from vla_jax.backbones.smolvlm import SmolVLMConfig
from vla_jax.backbones.vit import VisionConfig
from vla_jax.backbones.vlm_options import VLMOptions
from vla_jax.data.loader import LoaderConfig
from vla_jax.nn import recurrence
from vla_jax.nn.matmul import Transposed
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.policies import policy
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.training.loss_terms import LossWeights


class VideoSizes(NamedTuple):
    """Sizes of case frames."""

    height: int  # pixels of the video
    width: int
    image_size: int  # height and width of the resized images, pixels
    texture: float  # standard deviation of the scene's noise, levels of 255
    num_episodes: int
    num_steps: int  # of an episode
    window_size: int  # W, steps
    num_windows: int  # that one thread reads in a round
    seconds: float  # that the loader is timed, at least


class BenchmarkSizes(NamedTuple):
    """Sizes of all cases; D = H."""

    # of cases head and decoders; cases recurrence and growth use its recurrence
    decoder: DecoderConfig
    batch_size: int  # B of cases head and growth
    sequences: tuple[tuple[int, int], ...]  # (B, T) of case recurrence
    windows: tuple[int, ...]  # W of case streaming
    num_robots: tuple[int, ...]  # B of cases streaming and decoders
    products: tuple[tuple[int, ...], tuple[int, ...]]  # all H and all B of case products
    cells: tuple[int, int, int]  # H, B and T of case cells
    parallel: tuple[int, int, int]  # H, B and T of case parallel
    long_sequences: tuple[tuple[int, int], ...]  # (B, T) of case memory
    growth: dict[str, tuple[int, ...]]  # axis -> its sizes; the other axes are as in case head
    num_starts: int  # processes of case start with a cold cache, and as many with a warm one
    imitation: ImitateConfig  # training of case loader
    num_updates: tuple[int, int]  # updates of case loader, from tokens and from images
    backbone: SmolVLMConfig  # model of case backbone
    num_frames: int  # B of case backbone
    videos: tuple[VideoSizes, ...]  # of case frames
    workers: tuple[int, ...]  # threads, and worker processes, of case frames
    peak_size: int  # rows and columns of the product that measures the peak GFLOP/s


LARGE = BenchmarkSizes(
    decoder=DecoderConfig(token_dim=1024, num_tokens=8, window_size=12, action_horizon=2),
    batch_size=5,
    sequences=((5, 12), (32, 16)),
    windows=(8, 16, 32),
    num_robots=(1, 8),
    products=((128, 256, 512, 1024), (1, 5, 8, 16, 32, 64, 128)),
    cells=(256, 32, 64),
    parallel=(256, 2, 1024),
    long_sequences=((16, 16), (16, 64), (16, 256), (64, 256)),
    growth={
        "W": (6, 12, 24, 48, 96),
        "H": (128, 256, 512, 1024),
        "L": (1, 2, 4, 8),
        "B": (1, 2, 5, 10, 20, 40),
    },
    num_starts=3,
    imitation=replace(table_lstm(), backbone_from=""),
    num_updates=(60, 6),
    backbone=SmolVLMConfig(
        vision=VisionConfig(
            hidden_size=384, intermediate_size=1536, num_layers=6, num_heads=6, image_size=128,
            patch_size=16,
        ),
        language=RotaryDecoderConfig(
            vocab_size=8192, hidden_size=384, intermediate_size=1152, num_layers=8, num_heads=6,
            num_key_value_heads=2, head_dim=64,
        ),
        shuffle=2,
        image_token_id=8191,
        options=VLMOptions(readout="last", max_text_tokens=32),
    ),
    num_frames=8,
    videos=(
        VideoSizes(480, 640, 224, 6.0, 4, 64, 16, 24, 3.0),
        VideoSizes(224, 224, 224, 6.0, 4, 64, 16, 24, 3.0),
        VideoSizes(64, 64, 64, 6.0, 4, 64, 16, 24, 3.0),
    ),
    workers=(1, 2, 4),
    peak_size=2048,
)  # fmt: skip
_TINY_BACKBONE = PerceiverConfig(image_size=8, width=8, num_latents=2, token_dim=4, num_heads=2)
_TINY_DECODER = DecoderConfig(
    window_size=6, hidden_size=8, num_layers=1, pooling="none", head_sizes=(8,)
)
SMALL = BenchmarkSizes(
    decoder=DecoderConfig(
        token_dim=8, num_tokens=3, window_size=3, action_horizon=2, hidden_size=8, num_layers=2,
        head_sizes=(8, 4), num_heads=2,
    ),
    batch_size=2,
    sequences=((2, 3),),
    windows=(2,),
    num_robots=(2,),
    products=((8,), (2, 8)),
    cells=(4, 2, 5),
    parallel=(4, 2, 5),
    long_sequences=((2, 64),),
    growth={"W": (3, 6)},
    num_starts=1,
    imitation=ImitateConfig(
        pack=True, agent=AgentConfig(policy.connect(_TINY_BACKBONE, _TINY_DECODER)),
        loader=LoaderConfig(batch_size=2),
    ),
    num_updates=(2, 2),
    backbone=SmolVLMConfig(
        vision=VisionConfig(
            hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2, image_size=16,
            patch_size=8,
        ),
        language=RotaryDecoderConfig(
            vocab_size=32, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2,
            num_key_value_heads=1, head_dim=4,
        ),
        shuffle=2,
        image_token_id=31,
        options=VLMOptions(readout="last", max_text_tokens=4),
    ),
    num_frames=2,
    videos=(VideoSizes(64, 64, 32, 6.0, 2, 12, 4, 4, 0.1),),
    workers=(1,),
    peak_size=64,
)  # fmt: skip


def in_precision(sizes: BenchmarkSizes, precision: Precision) -> BenchmarkSizes:
    """Returns the sizes with configs whose products have factors of that precision."""
    options = replace(sizes.backbone.options, dtype=precision.dtype)
    return sizes._replace(
        decoder=replace(sizes.decoder, dtype=precision.dtype),
        backbone=replace(sizes.backbone, options=options),
    )


def recurrences(sizes: BenchmarkSizes) -> Iterator[Comparison]:
    """Yields LSTM and GRU stacks: outputs, and gradients with respect to inputs and params."""
    decoder = sizes.decoder
    for cell in ("lstm", "gru"):
        config = RecurrenceConfig(
            cell, decoder.num_layers, decoder.hidden_size, dtype=decoder.dtype
        )
        plain = replace(config, implementation="scan")
        for batch_size, num_steps in sizes.sequences:
            drawn = jax_runs.draw_sequence(config, batch_size, num_steps)
            is_float = decoder.dtype == "float32"
            # Flax's cells in bfloat16 also carry bfloat16: another computation.
            makers = [baselines.linen_recurrence, baselines.nnx_recurrence] if is_float else []
            makers += [] if baselines.why_no_torch() else [baselines.torch_recurrence]
            implementations = [
                jax_runs.run_recurrence("vla_jax", config, *drawn),
                jax_runs.run_recurrence("vla_jax, plain scan", plain, *drawn),
                *_with_cudnn(config, drawn),
                *(make(config, *drawn) for make in makers),
            ]
            layers = f"{decoder.num_layers} × {cell.upper()} {decoder.hidden_size}"
            setting = f"{layers}, B {batch_size}, T {num_steps}"
            flop = jax_runs.recurrence_flop(drawn[0], batch_size * num_steps)
            yield Comparison("recurrence", setting, flop, implementations)


def _with_cudnn(config: RecurrenceConfig, drawn: tuple) -> list[Implementation]:
    """Returns the recurrence of vla_jax with cuDNN, where it can run."""
    if jax.default_backend() != "gpu" or (config.cell, config.dtype) != ("lstm", "float32"):
        return []
    config = replace(config, implementation="cudnn")
    return [jax_runs.run_recurrence("vla_jax, cuDNN", config, *drawn)]


def heads(sizes: BenchmarkSizes) -> Iterator[Comparison]:
    """Yields a training step of the decoder: forward, loss, backward, Adam."""
    config, batch_size = sizes.decoder, sizes.batch_size
    params, tokens, action = jax_runs.draw_demonstrations(config, batch_size)
    num_bytes = 2 * jax_runs.decoder_bytes(params, config.window_size)
    update, begin = jax_runs.compile_update(config, params, tokens, action)
    implementations = [
        jax_runs.run_head("vla_jax", update, begin(params), tokens, action, num_bytes)
    ]
    if not baselines.why_no_torch():
        other = baselines.torch_head(
            config, params, tokens, action, gripper_weight=LossWeights.gripper,
            learning_rate=jax_runs.LEARNING_RATE, weight_bytes=num_bytes,
        )  # fmt: skip
        implementations.append(other)
    # The tokens need no gradient: the first input kernel has two products instead of three.
    products = 3 * jax_runs.num_weights(params)
    products -= recurrence.layer(params["recurrence"])["input_kernel"].size
    flop = 2 * batch_size * config.window_size * products
    yield Comparison("head", jax_runs.describe_sizes(config, batch_size), flop, implementations)


def streams(sizes: BenchmarkSizes) -> Iterator[Comparison]:
    """Yields one acting step; its FLOP count is that of recomputing the window of W frames."""
    for batch_size in sizes.num_robots:
        for window_size in sizes.windows:
            config = replace(sizes.decoder, window_size=window_size)
            # More frames than a window holds, so that consecutive windows differ.
            longer = replace(config, window_size=window_size + 3)
            params, tokens, _ = jax_runs.draw_demonstrations(longer, batch_size)
            frames = jnp.moveaxis(tokens, 1, 0)
            implementations = [
                jax_runs.run_stream(config, params, frames),
                jax_runs.run_window_recomputed(config, params, frames),
            ]
            if not baselines.why_no_torch():
                num_bytes = jax_runs.decoder_bytes(params, window_size)
                num_bytes = num_bytes * jnp.dtype(config.dtype).itemsize // baselines.FLOAT_BYTES
                makers = [baselines.torch_stream]
                makers += [baselines.torch_graph_stream] * (jax.default_backend() == "gpu")
                implementations += [
                    make(config, params, frames, weight_bytes=num_bytes) for make in makers
                ]
            flop = window_size * jax_runs.num_weights(params["recurrence"])
            flop += jax_runs.num_weights(params["heads"])
            yield Comparison(
                "streaming",
                f"W {window_size}, B {batch_size}",
                2 * batch_size * flop,
                implementations,
            )


def growth(sizes: BenchmarkSizes) -> Iterator[Comparison]:
    """Yields the LSTM of vla_jax, forward and backward, at several sizes of one axis at a time."""
    decoder = sizes.decoder
    for axis, values in sizes.growth.items():
        for value in values:
            size = {
                "W": decoder.window_size, "H": decoder.hidden_size, "L": decoder.num_layers,
                "B": sizes.batch_size, axis: value,
            }  # fmt: skip
            config = RecurrenceConfig("lstm", size["L"], size["H"], dtype=decoder.dtype)
            drawn = jax_runs.draw_sequence(config, size["B"], size["W"])
            flop = jax_runs.recurrence_flop(drawn[0], size["B"] * size["W"])
            yield Comparison(
                "growth",
                f"{axis} {value}",
                flop,
                [jax_runs.run_recurrence("vla_jax", config, *drawn)],
            )


def products(sizes: BenchmarkSizes) -> Iterator[Comparison]:
    """Yields the products of a backward scan, with the kernel transposed in advance and without."""
    num_steps = sizes.decoder.window_size
    for hidden_size in sizes.products[0]:
        for batch_size in sizes.products[1]:
            kernel, deltas = jax_runs.draw_products(hidden_size, batch_size, num_steps)
            yield Comparison(
                "products",
                f"H {hidden_size}, B {batch_size}, T {num_steps}",
                2 * batch_size * num_steps * kernel.size,
                [
                    jax_runs.run_products("transposed in advance", jnp.transpose, kernel, deltas),
                    jax_runs.run_products("not transposed", Transposed, kernel, deltas),
                ],
            )


COMPARISONS: dict[str, Callable[[BenchmarkSizes], Iterator[Comparison]]] = {
    "recurrence": recurrences,
    "head": heads,
    "streaming": streams,
    "growth": growth,
    "products": products,
    "cells": lambda sizes: cell_runs.cells(*sizes.cells, dtype=sizes.decoder.dtype),
    "parallel": lambda sizes: cell_runs.parallel_forms(*sizes.parallel, dtype=sizes.decoder.dtype),
    "decoders": lambda sizes: cell_runs.streams(sizes.decoder, sizes.num_robots),
    "backbone": lambda sizes: vlm_runs.backbones(sizes.backbone, sizes.num_frames),
}
