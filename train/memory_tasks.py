"""Two tasks that only memory solves, a net to solve them, and how far back its gradient reaches.

The data are drawn anew for every batch, inside `jit`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vla_jax.nn import layers, recurrence
from vla_jax.nn.cells import CELLS, CellName
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.types import Array, Key, Params

NUM_SYMBOLS = 8  # V, of delayed recall
TINY = 1e-30  # below it a gradient has vanished


class Trials(NamedTuple):
    """Sequences, and what to answer at their last step."""

    inputs: Array  # [B, T, D]
    target: Array  # [B], a number or a symbol


class Task(NamedTuple):
    """A family member: what `memory` needs to know of a task."""

    input_size: int  # D
    output_size: int  # O
    num_steps: Callable[[int], int]  # length that a user asks for -> T
    draw: Callable[[Key, int, int], Trials]  # (key, batch_size, length) -> trials
    # (answers [B, O], target [B]) -> loss [], error []: what "solved" is told by, 0 = perfect
    judge: Callable[[Array, Array], tuple[jax.Array, jax.Array]]
    chance: float  # error of the best answer that remembers nothing
    solved: float  # error below which it counts as solved


def draw_adding(key: Key, batch_size: int, length: int) -> Trials:
    """Returns numbers in [0, 1], two of them marked; to be told: the sum of those two.

    One mark lies in each half of the sequence. Who answers 1 always has a mean squared error of
    1/6, the variance of the sum of two such numbers.

    Args:
      key: consumed.
      batch_size: B.
      length: T, at least 2.

    Source: Hochreiter & Schmidhuber 1997, as Le et al. 2015 (arXiv:1504.00941) have it.
    """
    value_key, early_key, late_key = jax.random.split(key, 3)
    values = jax.random.uniform(value_key, (batch_size, length))
    early = jax.random.randint(early_key, (batch_size, 1), 0, length // 2)
    late = jax.random.randint(late_key, (batch_size, 1), length // 2, length)
    steps = jnp.broadcast_to(jnp.arange(length), (batch_size, length))
    marks = ((steps == early) | (steps == late)).astype(jnp.float32)
    return Trials(jnp.stack([values, marks], axis=-1), jnp.sum(values * marks, axis=1))


def judge_number(answers: Array, target: Array) -> tuple[jax.Array, jax.Array]:
    """Returns the mean squared error, twice: it is loss and error."""
    error = jnp.mean(jnp.square(answers[:, 0] - target))
    return error, error


def draw_recall(key: Key, batch_size: int, delay: int) -> Trials:
    """Returns symbols, the first of them marked; to be told `delay` steps later: that first one.

    Other symbols come in between, unmarked. At the last step there is no symbol but a cue.

    Args:
      key: consumed.
      batch_size: B.
      delay: steps from the first to the last, at least 1; T is one more.

    Returns:
      Inputs `[B, delay + 1, V + 2]`: one-hot symbol, mark, cue.
    """
    symbols = jax.random.randint(key, (batch_size, delay + 1), 0, NUM_SYMBOLS)
    shown = jax.nn.one_hot(symbols, NUM_SYMBOLS).at[:, -1].set(0.0)
    flags = jnp.zeros((batch_size, delay + 1, 2)).at[:, 0, 0].set(1.0).at[:, -1, 1].set(1.0)
    return Trials(jnp.concatenate([shown, flags], axis=-1), symbols[:, 0])


def judge_symbol(answers: Array, target: Array) -> tuple[jax.Array, jax.Array]:
    """Returns the mean cross-entropy, and the share of wrong answers."""
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(answers, target)
    return jnp.mean(loss), jnp.mean(jnp.argmax(answers, axis=-1) != target)


TASKS = {
    "adding": Task(2, 1, lambda length: length, draw_adding, judge_number, 1 / 6, 0.01),
    "recall": Task(
        NUM_SYMBOLS + 2,
        NUM_SYMBOLS,
        lambda delay: delay + 1,
        draw_recall,
        judge_symbol,
        1 - 1 / NUM_SYMBOLS,
        0.01,
    ),
}


def init(key: Key, config: RecurrenceConfig, task: Task, *, span: int = 0) -> Params:
    """Returns `{"recurrence", "readout"}`.

    Args:
      key: consumed.
      config: of the recurrence, in one direction.
      task: what it is for.
      span: steps that the gates' memories are spread over; 0 leaves them as they are drawn.
    """
    recurrence_key, readout_key, span_key = jax.random.split(key, 3)
    params = recurrence.init(recurrence_key, config, task.input_size)
    if span:
        for layer in params.values():
            layer["forward"] = spread_gates(span_key, config.cell, layer["forward"], span)
    readout = layers.init_mlp(readout_key, (config.hidden_size, task.output_size))
    return {"recurrence": params, "readout": readout}


def spread_gates(key: Key, cell: CellName, params: Params, span: int) -> Params:
    """Returns the params of a cell whose units forget after 1 … `span` steps, each in its own time.

        keeping gate: b = log U(1, span − 1);    an LSTM's input gate: −b

    A gate that keeps with probability p forgets in about 1 / (1 − p) steps. A plain RNN has no
    such gate and stays as it is.

    Args:
      key: consumed.
      cell: name of the cell.
      params: from its `init`.
      span: steps, above 2.

    Source: Tallec & Ollivier 2018, "Can recurrent neural networks warp time?" (arXiv:1804.11188).
    """
    if cell not in _KEEPING:
        return params
    leaf, signs = _KEEPING[cell]
    bias = params[leaf]
    size = bias.shape[0] // CELLS[cell].num_gates
    spread = jnp.log(jax.random.uniform(key, (size,), minval=1.0, maxval=span - 1.0))
    for gate, sign in signs.items():
        bias = bias.at[gate * size : (gate + 1) * size].set(sign * spread)
    return {**params, leaf: bias}


# cell -> the bias of its gates, and which of them keep (1) or let in (-1)
_KEEPING: dict[str, tuple[str, dict[int, int]]] = {
    "lstm": ("input_bias", {0: -1, 1: 1}),
    "layer_norm_lstm": ("gate_bias", {0: -1, 1: 1}),
    "gru": ("input_bias", {1: 1}),
    "min_gru": ("input_bias", {0: -1}),
}


def remember(
    config: RecurrenceConfig, params: Params, carry: Any, steps: dict[str, Array]
) -> tuple[Any, jax.Array]:
    """Returns carry and outputs `[B, t, H]` of `steps`: inputs, mask, reset, each `[B, t, …]`."""
    return recurrence.apply(
        params["recurrence"],
        config,
        steps["inputs"],
        mask=steps["mask"],
        reset=steps["reset"],
        carry=carry,
    )


def gradient_norms(params: Params, config: RecurrenceConfig, trials: Trials) -> jax.Array:
    """Returns how much the last answer still depends on the carry of each earlier step.

        ‖∂ Σ answers / ∂ carryₜ‖  over the same at the last step, root mean square over the rows

    Of an LSTM the carry is hidden and cell together. Read from its end: lag 0 comes last.

    Args:
      params: from `init`, of one layer.
      config: the one that `init` was given.
      trials: inputs `[B, T, D]`.

    Returns:
      `[T]` float32; 1 at the last step, near 0 where the gradient has vanished.
    """
    cell, own = CELLS[config.cell], params["recurrence"]["layers_0"]["forward"]
    inputs = jnp.swapaxes(trials.inputs, 0, 1)
    carry = cell.zero_carry(trials.inputs, config.hidden_size)
    nothing = jax.tree.map(lambda leaf: jnp.zeros((len(inputs), *leaf.shape)), carry)

    def answer(pushes: Any) -> jax.Array:
        def body(carry: Any, step: Any) -> tuple[Any, None]:
            seen, push = step
            carry, _ = cell.step(own, carry, seen)
            return jax.tree.map(jnp.add, carry, push), None

        last, _ = jax.lax.scan(body, carry, (inputs, pushes))
        return jnp.sum(layers.apply_mlp(params["readout"], last.hidden))

    gradient = jnp.concatenate(jax.tree.leaves(jax.grad(answer)(nothing)), axis=-1)
    # What explodes is taken as a share of its largest number, lest its square be infinite.
    largest = jnp.max(jnp.abs(gradient), axis=(1, 2))
    shares = gradient / jnp.maximum(largest, TINY)[:, None, None]
    norms = largest * jnp.sqrt(jnp.mean(jnp.sum(jnp.square(shares), axis=-1), axis=-1))
    return norms / norms[-1]
