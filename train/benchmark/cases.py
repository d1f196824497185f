"""The works that `train.benchmark` measures in turns, and the sizes of all."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp

from train.benchmark import baselines, jax_runs
from train.benchmark.timing import Contest
from train.configs import ImitateConfig, table_lstm
from vla_jax.acting.agent import AgentConfig
from vla_jax.backbones.perceiver import PerceiverConfig
from vla_jax.data.loader import LoaderConfig
from vla_jax.nn.matmul import Turned
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.policies import policy
from vla_jax.policies.decoders import DecoderConfig
from vla_jax.training.loss_terms import LossWeights


class Sizes(NamedTuple):
    """Of all works; D = H."""

    decoder: DecoderConfig  # of head; its recurrence is that of recurrence and growth
    batch_size: int  # B of head and growth
    sequences: tuple[tuple[int, int], ...]  # (B, T) of recurrence
    windows: tuple[int, ...]  # W of streaming
    robots: tuple[int, ...]  # B of streaming
    products: tuple[tuple[int, ...], tuple[int, ...]]  # every H and every B of products
    long: tuple[tuple[int, int], ...]  # (B, T) of memory
    growth: dict[str, tuple[int, ...]]  # axis -> its sizes; the other axes are those of head
    starts: int  # processes of start, cold and warm each
    imitation: ImitateConfig  # of loader
    updates: tuple[int, int]  # of loader, from tokens and from pictures
    product: int  # rows and columns of the factors that show the ceiling


LARGE = Sizes(
    decoder=DecoderConfig(token_dim=1024, num_tokens=8, window_size=12, action_horizon=2),
    batch_size=5,
    sequences=((5, 12), (32, 16)),
    windows=(8, 16, 32),
    robots=(1, 8),
    products=((128, 256, 512, 1024), (1, 5, 8, 16, 32, 64, 128)),
    long=((16, 16), (16, 64), (16, 256), (64, 256)),
    growth={
        "W": (6, 12, 24, 48, 96),
        "H": (128, 256, 512, 1024),
        "L": (1, 2, 4, 8),
        "B": (1, 2, 5, 10, 20, 40),
    },
    starts=3,
    imitation=replace(table_lstm(), backbone_from=""),
    updates=(60, 6),
    product=2048,
)
_SEEING = PerceiverConfig(image_size=8, width=8, num_latents=2, token_dim=4, num_heads=2)
_REMEMBERING = DecoderConfig(
    window_size=6, hidden_size=8, num_layers=1, pooling="none", head_sizes=(8,)
)
SMALL = Sizes(
    decoder=DecoderConfig(
        token_dim=8, num_tokens=3, window_size=3, action_horizon=2, hidden_size=8, num_layers=2,
        head_sizes=(8, 4),
    ),
    batch_size=2,
    sequences=((2, 3),),
    windows=(2,),
    robots=(2,),
    products=((8,), (2, 8)),
    long=((2, 64),),
    growth={"W": (3, 6)},
    starts=1,
    imitation=ImitateConfig(
        pack=True, agent=AgentConfig(policy.connect(_SEEING, _REMEMBERING)),
        loader=LoaderConfig(batch_size=2),
    ),
    updates=(2, 2),
    product=64,
)  # fmt: skip


def recurrences(sizes: Sizes) -> Iterator[Contest]:
    """The stack alone: outputs, and gradients by inputs and every param."""
    decoder = sizes.decoder
    for cell in ("lstm", "gru"):
        config = RecurrenceConfig(cell, decoder.num_layers, decoder.hidden_size)
        plain = replace(config, implementation="scan")
        for batch_size, num_steps in sizes.sequences:
            drawn = jax_runs.draw_sequence(config, batch_size, num_steps)
            others = [baselines.linen_recurrence, baselines.nnx_recurrence]
            others += [] if baselines.torch_is_missing() else [baselines.torch_recurrence]
            contestants = [
                jax_runs.run_recurrence("ours", config, *drawn),
                jax_runs.run_recurrence("ours, plain scan", plain, *drawn),
                *(make(config, *drawn) for make in others),
            ]
            layers = f"{decoder.num_layers} × {cell.upper()} {decoder.hidden_size}"
            case = f"{layers}, B {batch_size}, T {num_steps}"
            flop = jax_runs.recurrence_flop(drawn[0], batch_size * num_steps)
            yield Contest("recurrence", case, flop, contestants)


def heads(sizes: Sizes) -> Iterator[Contest]:
    """A training step of the decoder: forward, loss, backward, Adam."""
    config, batch_size = sizes.decoder, sizes.batch_size
    params, tokens, action = jax_runs.draw_demonstrations(config, batch_size)
    num_bytes = 2 * jax_runs.decoder_bytes(params, config.window_size)
    update, begin = jax_runs.compile_update(config, params, tokens, action)
    contestants = [jax_runs.run_head("ours", update, begin(params), tokens, action, num_bytes)]
    if not baselines.torch_is_missing():
        theirs = baselines.torch_head(
            config, params, tokens, action, gripper_weight=LossWeights.gripper,
            learning_rate=jax_runs.LEARNING_RATE, weight_bytes=num_bytes,
        )  # fmt: skip
        contestants.append(theirs)
    # The tokens need no gradient: one product less.
    products = 3 * jax_runs.num_weights(params)
    products -= params["recurrence"]["layers_0"]["forward"]["input_kernel"].size
    flop = 2 * batch_size * config.window_size * products
    yield Contest("head", jax_runs.decoder_case(config, batch_size), flop, contestants)


def streams(sizes: Sizes) -> Iterator[Contest]:
    """One step of acting on the last W frames; the FLOP are those of running them again."""
    for batch_size in sizes.robots:
        for window_size in sizes.windows:
            config = replace(sizes.decoder, window_size=window_size)
            # More frames than fit a window, so that no window is the one before it.
            longer = replace(config, window_size=window_size + 3)
            params, tokens, _ = jax_runs.draw_demonstrations(longer, batch_size)
            frames = jnp.moveaxis(tokens, 1, 0)
            contestants = [
                jax_runs.run_stream(config, params, frames),
                jax_runs.run_window_again(config, params, frames),
            ]
            if not baselines.torch_is_missing():
                num_bytes = jax_runs.decoder_bytes(params, window_size)
                theirs = baselines.torch_stream(config, params, frames, weight_bytes=num_bytes)
                contestants.append(theirs)
            flop = window_size * jax_runs.num_weights(params["recurrence"])
            flop += jax_runs.num_weights(params["heads"])
            yield Contest(
                "streaming", f"W {window_size}, B {batch_size}", 2 * batch_size * flop, contestants
            )


def growth(sizes: Sizes) -> Iterator[Contest]:
    """Our LSTM alone, forward and backward, along one axis at a time."""
    decoder = sizes.decoder
    for axis, values in sizes.growth.items():
        for value in values:
            size = {
                "W": decoder.window_size, "H": decoder.hidden_size, "L": decoder.num_layers,
                "B": sizes.batch_size, axis: value,
            }  # fmt: skip
            config = RecurrenceConfig("lstm", size["L"], size["H"])
            drawn = jax_runs.draw_sequence(config, size["B"], size["W"])
            flop = jax_runs.recurrence_flop(drawn[0], size["B"] * size["W"])
            yield Contest(
                "growth", f"{axis} {value}", flop, [jax_runs.run_recurrence("ours", config, *drawn)]
            )


def products(sizes: Sizes) -> Iterator[Contest]:
    """A step's product with the transpose of a kernel, made before the first step or not at all."""
    num_steps = sizes.decoder.window_size
    for hidden_size in sizes.products[0]:
        for batch_size in sizes.products[1]:
            kernel, deltas = jax_runs.draw_products(hidden_size, batch_size, num_steps)
            yield Contest(
                "products",
                f"H {hidden_size}, B {batch_size}, T {num_steps}",
                2 * batch_size * num_steps * kernel.size,
                [
                    jax_runs.run_products("turned over", jnp.transpose, kernel, deltas),
                    jax_runs.run_products("as it lies", Turned, kernel, deltas),
                ],
            )


CONTESTS: dict[str, Callable[[Sizes], Iterator[Contest]]] = {
    "recurrence": recurrences,
    "head": heads,
    "streaming": streams,
    "growth": growth,
    "products": products,
}
