"""Implementations in JAX for `train.benchmark`, and the random inputs of all implementations.

All inputs are arguments of the compiled functions: a constant could be folded at compile time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from train.benchmark import baselines
from train.benchmark.timing import Implementation
from vla_jax import trees
from vla_jax.nn import cells, matmul, recurrence
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.policies import decoders
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.policies.trunk import Mode
from vla_jax.training import losses
from vla_jax.types import Array, Params, Prediction

LEARNING_RATE = 1e-4  # of Adam, in all implementations


def run_recurrence(
    name: str, config: RecurrenceConfig, params: Params, inputs: Array, cotangent: Array
) -> Implementation:
    """Returns the recurrence of vla_jax, forward and backward."""
    run = baselines.forward_and_backward(lambda params, x: recurrence.apply(params, config, x)[1])
    return Implementation(
        name,
        lambda: run(params, inputs, cotangent),
        lambda results: dict(zip(("outputs", "by_params", "by_inputs"), results, strict=True)),
        2 * baselines.recurrent_bytes(params, inputs.shape[1]),
    )


def temporary_bytes(
    config: RecurrenceConfig, params: Params, inputs: Array, cotangent: Array
) -> int:
    """Returns the temporary memory of the program of `run_recurrence`."""
    run = baselines.forward_and_backward(
        lambda params, inputs: recurrence.apply(params, config, inputs)[1]
    )
    return run.lower(params, inputs, cotangent).compile().memory_analysis().temp_size_in_bytes


def run_products(
    name: str, transposed: Callable[[Array], Any], kernel: Array, deltas: Array
) -> Implementation:
    """Returns the products of a backward scan: each δ · kernelᵀ depends on the previous one.

    Args:
      name: name of the implementation.
      transposed: prepares kernelᵀ once before the first step.
      kernel: `[H, G·H]`.
      deltas: δ of every step, `[T, B, G·H]`.
    """

    @jax.jit
    def run(kernel: Array, deltas: Array) -> jax.Array:
        factor = transposed(kernel)

        def body(by_hidden: Array, delta: Array) -> tuple[jax.Array, jax.Array]:
            delta = delta + jnp.tile(by_hidden, delta.shape[-1] // by_hidden.shape[-1])
            by_hidden = jnp.tanh(matmul.product(delta, factor))
            return by_hidden, by_hidden

        return jax.lax.scan(body, jnp.zeros((deltas.shape[1], len(kernel))), deltas)[1]

    return Implementation(
        name,
        lambda: run(kernel, deltas),
        lambda outputs: {"outputs": outputs},
        baselines.FLOAT_BYTES * len(deltas) * kernel.size,
    )


def run_head(
    name: str, update: Callable[..., tuple], state: tuple, tokens: Array, action: Array, num_bytes
) -> Implementation:
    """Returns a training step of the decoder of vla_jax; the state is donated, as in training."""

    def run() -> tuple:
        nonlocal state
        state, loss = update(state, tokens, action)
        return state, loss

    def read(results: tuple) -> dict[str, Any]:
        (trained, (adam, *_)), loss = results
        return {"loss": loss, "params": trained, "mean": adam.mu, "square": adam.nu}

    return Implementation(name, run, read, num_bytes)


def compile_update(
    config: DecoderConfig, params: Params, tokens: Array, action: Array
) -> tuple[Any, Callable[[Params], tuple]]:
    """Compiles `update(state, tokens, action) -> (state, loss)` and `begin(params) -> state`."""
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


def run_stream(
    config: DecoderConfig, params: Params, frames: Array, *, mode: Mode = "refresh"
) -> Implementation:
    """Returns an acting step on `frames [num_frames, B, N, D]`."""
    step = jax.jit(decoders.step, static_argnums=1, donate_argnums=2)
    state = decoders.init_stream(params, config, frames.shape[1], mode=mode)
    prepared = decoders.prepare_params(params, config, frames.shape[1], mode=mode)
    item_bytes = jnp.dtype(config.dtype).itemsize
    return _streamed(
        f"vla_jax, {mode}",
        lambda state, frame: step(prepared, config, state, frame),
        state,
        frames,
        config.window_size,
        item_bytes * num_weights(params),
    )


def run_window_recomputed(config: DecoderConfig, params: Params, frames: Array) -> Implementation:
    """Returns an acting step that recomputes the last W of `frames [num_frames, B, N, D]`."""

    @partial(jax.jit, donate_argnums=1)
    def step(params: Params, window: Array, frame: Array) -> tuple[jax.Array, Prediction]:
        window = jnp.concatenate([window[:, 1:], frame[:, None]], axis=1)
        _, features = decoders.run_trunk(params, config, window)
        return window, decoders.predict(params, config, features[:, -1])

    _, batch_size, *token = frames.shape
    return _streamed(
        "vla_jax, window re-run",
        lambda window, frame: step(params, window, frame),
        jnp.zeros((batch_size, config.window_size, *token)),
        frames,
        config.window_size,
        decoder_bytes(params, config.window_size),
    )


def _streamed(
    name: str, step: Callable, state: Any, frames: Array, num_warm_up: int, num_bytes: int
) -> Implementation:
    """Returns one step per run over `frames`, repeated cyclically, after `num_warm_up` of them."""
    frame_list, time = list(frames), num_warm_up
    for index in range(num_warm_up):
        state, _ = step(state, frame_list[index % len(frame_list)])

    def run() -> Prediction:
        nonlocal state, time
        state, chunk = step(state, frame_list[time % len(frame_list)])
        time += 1
        return chunk

    return Implementation(name, run, lambda chunk: chunk._asdict(), num_bytes)


def draw_sequence(
    config: RecurrenceConfig, batch_size: int, num_steps: int
) -> tuple[Params, jax.Array, jax.Array]:
    """Returns params, inputs `[B, T, H]`, and the cotangent of the outputs `[B, T, H]`."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = recurrence.init(keys[0], config, config.hidden_size)
    # All implementations must compute the same, and NNX's GRU has no recurrent bias of gate n.
    num_summed = baselines.FLAX_CELLS[config.cell].num_summed * config.hidden_size
    for layer in (layer["forward"] for layer in params.values()):
        layer["recurrent_bias"] = layer["recurrent_bias"].at[num_summed:].set(0.0)
    shape = (batch_size, num_steps, config.hidden_size)
    return params, jax.random.normal(keys[1], shape), jax.random.normal(keys[2], shape)


def draw_products(hidden_size: int, batch_size: int, num_steps: int) -> tuple[Array, Array]:
    """Returns the recurrent kernel `[H, 4·H]` of an LSTM, and deltas `[T, B, 4·H]`."""
    keys = jax.random.split(jax.random.key(0))
    kernel = cells.LSTM.init(keys[0], 1, hidden_size)["recurrent_kernel"]
    return kernel, jax.random.normal(keys[1], (num_steps, batch_size, 4 * hidden_size))


def draw_demonstrations(
    config: DecoderConfig, batch_size: int
) -> tuple[Params, jax.Array, jax.Array]:
    """Returns params, tokens `[B, W, N, D]` and actions `[B, W, K, A]`."""
    keys = jax.random.split(jax.random.key(0), 3)
    steps = (batch_size, config.window_size)
    tokens = jax.random.normal(keys[1], (*steps, config.num_tokens, config.token_dim))
    shape = (*steps, config.action_horizon, config.action_dim)
    return (
        decoders.init(keys[0], config),
        tokens,
        jax.random.uniform(keys[2], shape, minval=-1.0),
    )


def describe_sizes(config: DecoderConfig, batch_size: int) -> str:
    """Returns the sizes of a decoder and its batch as text."""
    return f"B {batch_size}, W {config.window_size}, N {config.num_tokens}, H {config.hidden_size}"


def recurrence_flop(params: Params, num_rows: int) -> float:
    """Returns FLOP of both passes: three products per kernel, two operations per weight and row."""
    return 6 * num_rows * num_weights(params)


def num_weights(params: Params) -> int:
    """Returns the number of weights in all kernels."""
    is_kernel = trees.map_paths(lambda path: path.endswith("kernel"), params)
    sizes = jax.tree.map(lambda leaf, counts: leaf.size if counts else 0, params, is_kernel)
    return sum(jax.tree.leaves(sizes))


def decoder_bytes(params: Params, num_steps: int) -> int:
    """Returns the bytes of weights that the products of a decoder's forward pass read."""
    heads = baselines.FLOAT_BYTES * num_weights(params["heads"])
    return baselines.recurrent_bytes(params["recurrence"], num_steps) + heads
