"""The works that `train.benchmark` measures, and how ours does them.

All data are arguments of what is compiled, none a constant that a compiler could work out before
the clock starts.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from train import peers
from train.timing import Contest, Peer, check
from vla_jax import decoders, losses, recurrence, streaming
from vla_jax.decoders import DecoderConfig
from vla_jax.loss_terms import LossWeights
from vla_jax.recurrence import RecurrenceConfig
from vla_jax.types import Array, Params, Prediction

LEARNING_RATE = 1e-4  # of Adam


class Sizes(NamedTuple):
    """Of all works; D = H."""

    decoder: DecoderConfig  # of head; its recurrence is that of recurrence and growth
    batch_size: int  # B of head and growth
    sequences: tuple[tuple[int, int], ...]  # (B, T) of recurrence
    windows: tuple[int, ...]  # W of streaming
    robots: tuple[int, ...]  # B of streaming
    long: tuple[int, int, int]  # (B, T, remat_chunk) of memory
    growth: dict[str, tuple[int, ...]]  # axis -> its sizes; the other axes are those of head
    product: int  # rows and columns of the factors that show the ceiling


class Memory(NamedTuple):
    """What a training step needs beside its arguments and results."""

    case: str
    remat_chunk: int  # 0 = nothing is computed again
    temp_bytes: int
    share: float  # of what it is without remat


LARGE = Sizes(
    decoder=DecoderConfig(token_dim=1024, num_tokens=8, window_size=12, action_horizon=2),
    batch_size=5,
    sequences=((5, 12), (32, 16)),
    windows=(8, 16, 32),
    robots=(1, 8),
    long=(16, 256, 16),
    growth={
        "W": (6, 12, 24, 48, 96),
        "H": (128, 256, 512, 1024),
        "L": (1, 2, 4, 8),
        "B": (1, 2, 5, 10, 20, 40),
    },
    product=2048,
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
    long=(2, 32, 8),
    growth={"W": (3, 6)},
    product=64,
)  # fmt: skip


def recurrences(sizes: Sizes) -> Iterator[Contest]:
    """The stack alone: outputs, and gradients by inputs and every param."""
    decoder = sizes.decoder
    for cell in ("lstm", "gru"):
        config = RecurrenceConfig(cell, decoder.num_layers, decoder.hidden_size)
        for batch_size, num_steps in sizes.sequences:
            drawn = _draw_sequence(config, batch_size, num_steps)
            others = [peers.linen_recurrence, peers.nnx_recurrence]
            others += [] if peers.torch_is_missing() else [peers.torch_recurrence]
            contestants = [
                _our_recurrence("ours", config, *drawn),
                _our_recurrence("ours, plain scan", replace(config, implementation="scan"), *drawn),
                *(make(config, *drawn) for make in others),
            ]
            layers = f"{decoder.num_layers} × {cell.upper()} {decoder.hidden_size}"
            case = f"{layers}, B {batch_size}, T {num_steps}"
            flop = _recurrence_flop(drawn[0], batch_size * num_steps)
            yield Contest("recurrence", case, flop, contestants)


def heads(sizes: Sizes) -> Iterator[Contest]:
    """A training step of the decoder: forward, loss, backward, Adam."""
    config, batch_size = sizes.decoder, sizes.batch_size
    params, tokens, action = _draw_demonstrations(config, batch_size)
    num_bytes = 2 * _decoder_bytes(params, config.window_size)
    update, begin = _compile_update(config, params, tokens, action)
    contestants = [_our_head("ours", update, begin(params), tokens, action, num_bytes)]
    if not peers.torch_is_missing():
        theirs = peers.torch_head(
            config, params, tokens, action, gripper_weight=LossWeights.gripper,
            learning_rate=LEARNING_RATE, weight_bytes=num_bytes,
        )  # fmt: skip
        contestants.append(theirs)
    # The tokens need no gradient: one product less.
    products = 3 * _num_weights(params)
    products -= params["recurrence"]["layers_0"]["forward"]["input_kernel"].size
    flop = 2 * batch_size * config.window_size * products
    yield Contest("head", _decoder_case(config, batch_size), flop, contestants)


def streams(sizes: Sizes) -> Iterator[Contest]:
    """One step of acting on the last W frames; the FLOP are those of running them again."""
    for batch_size in sizes.robots:
        for window_size in sizes.windows:
            config = replace(sizes.decoder, window_size=window_size)
            # More frames than fit a window, so that no window is the one before it.
            longer = replace(config, window_size=window_size + 3)
            params, tokens, _ = _draw_demonstrations(longer, batch_size)
            frames = jnp.moveaxis(tokens, 1, 0)
            contestants = [
                _our_stream(config, params, frames),
                _our_window_again(config, params, frames),
            ]
            if not peers.torch_is_missing():
                num_bytes = _decoder_bytes(params, window_size)
                theirs = peers.torch_stream(config, params, frames, weight_bytes=num_bytes)
                contestants.append(theirs)
            flop = window_size * _num_weights(params["recurrence"]) + _num_weights(params["heads"])
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
            drawn = _draw_sequence(config, size["B"], size["W"])
            flop = _recurrence_flop(drawn[0], size["B"] * size["W"])
            yield Contest(
                "growth", f"{axis} {value}", flop, [_our_recurrence("ours", config, *drawn)]
            )


CONTESTS: dict[str, Callable[[Sizes], Iterator[Contest]]] = {
    "recurrence": recurrences,
    "head": heads,
    "streaming": streams,
    "growth": growth,
}


def measure_memory(sizes: Sizes) -> list[Memory]:
    """A training step on long windows without and with remat.

    Raises:
      ValueError: the two train otherwise.
    """
    batch_size, num_steps, remat_chunk = sizes.long
    config = replace(sizes.decoder, window_size=num_steps)
    params, tokens, action = _draw_demonstrations(config, batch_size)
    case, contestants, temp_bytes = _decoder_case(config, batch_size), [], []
    for chunk in (0, remat_chunk):
        config = replace(config, remat_chunk=chunk)
        update, begin = _compile_update(config, params, tokens, action)
        contestants.append(
            _our_head(f"remat_chunk {chunk}", update, begin(params), tokens, action, 0)
        )
        temp_bytes.append(update.memory_analysis().temp_size_in_bytes)
    check(Contest("memory", case, 0.0, contestants))
    return [
        Memory(case, chunk, num_bytes, num_bytes / temp_bytes[0])
        for chunk, num_bytes in zip((0, remat_chunk), temp_bytes, strict=True)
    ]


def _our_recurrence(
    name: str, config: RecurrenceConfig, params: Params, inputs: Array, cotangent: Array
) -> Peer:
    both_ways = peers.both_ways(lambda own, x: recurrence.apply(own, config, x)[1])
    return Peer(
        name,
        lambda: jax.block_until_ready(both_ways(params, inputs, cotangent)),
        lambda results: dict(zip(("outputs", "by_params", "by_inputs"), results, strict=True)),
        2 * peers.recurrent_bytes(params, inputs.shape[1]),
    )


def _our_head(
    name: str, update: Callable[..., tuple], state: tuple, tokens: Array, action: Array, num_bytes
) -> Peer:
    """The state is donated, as in a training."""

    def run() -> tuple:
        nonlocal state
        state, loss = jax.block_until_ready(update(state, tokens, action))
        return state, loss

    def read(results: tuple) -> dict[str, Any]:
        (trained, (adam, *_)), loss = results
        return {"loss": loss, "params": trained, "mean": adam.mu, "square": adam.nu}

    return Peer(name, run, read, num_bytes)


def _compile_update(
    config: DecoderConfig, params: Params, tokens: Array, action: Array
) -> tuple[Any, Callable[[Params], tuple]]:
    """`update(state, tokens, action) -> (state, loss)`, and `begin(params) -> state`."""
    optimizer = optax.adam(LEARNING_RATE)

    def loss_fn(params: Params, tokens: Array, action: Array) -> jax.Array:
        mask = jnp.ones(action.shape[:-1], bool)
        loss, _ = losses.action_loss(decoders.apply(params, config, tokens), action, mask)
        return loss

    def update(state: tuple, tokens: Array, action: Array) -> tuple:
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens, action)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    def begin(params: Params) -> tuple:
        return jax.tree.map(jnp.copy, params), optimizer.init(params)

    jitted = jax.jit(update, donate_argnums=0)
    return jitted.lower(begin(params), tokens, action).compile(), begin


def _our_stream(config: DecoderConfig, params: Params, frames: Array) -> Peer:
    step = jax.jit(streaming.step, static_argnums=1, donate_argnums=2)
    state = streaming.init(params, config, frames.shape[1])
    laid_out = streaming.lay_out(params, config, state)
    return _streamed(
        "ours, refresh",
        lambda state, frame: step(laid_out, config, state, frame),
        state,
        frames,
        config.window_size,
        _decoder_bytes(params, 1),
    )


def _our_window_again(config: DecoderConfig, params: Params, frames: Array) -> Peer:
    @partial(jax.jit, donate_argnums=1)
    def step(params: Params, window: Array, frame: Array) -> tuple[jax.Array, Prediction]:
        window = jnp.concatenate([window[:, 1:], frame[:, None]], axis=1)
        _, features = decoders.features(params, config, window)
        return window, decoders.predict(params, config, features[:, -1])

    _, batch_size, *token = frames.shape
    return _streamed(
        "ours, window again",
        lambda window, frame: step(params, window, frame),
        jnp.zeros((batch_size, config.window_size, *token)),
        frames,
        config.window_size,
        _decoder_bytes(params, config.window_size),
    )


def _streamed(
    name: str, step: Callable, state: Any, frames: Array, num_seen: int, num_bytes: int
) -> Peer:
    """One step per run, after the first `num_seen` of `frames [F, B, N, D]`; then round again."""
    listed, time = list(frames), num_seen
    for frame in listed[:num_seen]:
        state, _ = step(state, frame)

    def run() -> Prediction:
        nonlocal state, time
        state, chunk = jax.block_until_ready(step(state, listed[time % len(listed)]))
        time += 1
        return chunk

    return Peer(name, run, lambda chunk: chunk._asdict(), num_bytes)


def _draw_sequence(
    config: RecurrenceConfig, batch_size: int, num_steps: int
) -> tuple[Params, jax.Array, jax.Array]:
    """Params, inputs `[B, T, H]`, and the gradient `[B, T, H]` that comes from above."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = recurrence.init(keys[0], config, config.hidden_size)
    if config.cell == "gru":
        # NNX's GRU has no recurrent bias of gate n, and all shall compute the same.
        for own in (layer["forward"] for layer in params.values()):
            own["recurrent_bias"] = own["recurrent_bias"].at[2 * config.hidden_size :].set(0.0)
    shape = (batch_size, num_steps, config.hidden_size)
    return params, jax.random.normal(keys[1], shape), jax.random.normal(keys[2], shape)


def _draw_demonstrations(
    config: DecoderConfig, batch_size: int
) -> tuple[Params, jax.Array, jax.Array]:
    """Params, tokens `[B, W, N, D]`, actions `[B, W, K, A]`."""
    keys = jax.random.split(jax.random.key(0), 3)
    steps = (batch_size, config.window_size)
    tokens = jax.random.normal(keys[1], (*steps, config.num_tokens, config.token_dim))
    shape = (*steps, config.action_horizon, config.action_dim)
    return (
        decoders.init(keys[0], config),
        tokens,
        jax.random.uniform(keys[2], shape, minval=-1.0),
    )


def _decoder_case(config: DecoderConfig, batch_size: int) -> str:
    return f"B {batch_size}, W {config.window_size}, N {config.num_tokens}, H {config.hidden_size}"


def _recurrence_flop(params: Params, num_rows: int) -> float:
    """Forward and backward: three products per kernel, two operations per factor."""
    return 6 * num_rows * _num_weights(params)


def _num_weights(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim == 2)


def _decoder_bytes(params: Params, num_steps: int) -> int:
    """Bytes of weights that the products of a decoder read on the way forward."""
    once = peers.FLOAT * _num_weights(params["heads"])
    return peers.recurrent_bytes(params["recurrence"], num_steps) + once
