"""Synthetic memory tasks (adding, recall, permutations, counting), and gradient norms over time.

Batches are generated inside `jit` and never repeat.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vla_jax.nn import cells, layers, recurrence, tracking_tasks
from vla_jax.nn.chrono import spread_gates
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.nn.tracking_tasks import MAX_COUNT
from vla_jax.types import Array, Key, Params

NUM_SYMBOLS = 8  # V, symbols of delayed recall
TINY = 1e-30  # avoids 0 / 0 where a gradient is zero


class Trials(NamedTuple):
    """Input sequences, and the target output at their last step or at every step."""

    inputs: Array  # [B, T, D]
    target: Array  # [B], or [B, T] if the task is scored at every step: numbers or indices


class Task(NamedTuple):
    """A memory task: a member of the family `TASKS`."""

    input_size: int  # D
    output_size: int  # size of an output
    num_steps: Callable[[int], int]  # length, or delay of recall -> T
    draw: Callable[[Key, int, int], Trials]  # (key, batch_size, length) -> trials
    # (outputs [B, output_size], target [B]) -> loss [], error [] (0 = perfect)
    evaluate: Callable[[Array, Array], tuple[jax.Array, jax.Array]]
    chance: float  # error of the best constant output
    solved: float  # error below which the task counts as solved
    error_name: str  # description of the error, for plots
    every_step: bool = False  # True: the loss is over all steps; the error is of the last step


def draw_adding(key: Key, batch_size: int, length: int) -> Trials:
    """Returns the adding problem: numbers in [0, 1], two of them marked; target: their sum.

    Each half of the sequence contains one mark. The constant output 1 has a mean squared error of
    1/6, the variance of the sum of two such numbers.

    Args:
      key: consumed.
      batch_size: B.
      length: T, at least 2.

    Source: Hochreiter & Schmidhuber 1997, in the version of Le et al. 2015 (arXiv:1504.00941).
    """
    value_key, early_key, late_key = jax.random.split(key, 3)
    values = jax.random.uniform(value_key, (batch_size, length))
    early = jax.random.randint(early_key, (batch_size, 1), 0, length // 2)
    late = jax.random.randint(late_key, (batch_size, 1), length // 2, length)
    steps = jnp.broadcast_to(jnp.arange(length), (batch_size, length))
    marks = ((steps == early) | (steps == late)).astype(jnp.float32)
    return Trials(jnp.stack([values, marks], axis=-1), jnp.sum(values * marks, axis=1))


def evaluate_number(outputs: Array, target: Array) -> tuple[jax.Array, jax.Array]:
    """Returns the mean squared error as loss and as error."""
    error = jnp.mean(jnp.square(outputs[:, 0] - target))
    return error, error


def draw_recall(key: Key, batch_size: int, delay: int) -> Trials:
    """Returns delayed recall: the first symbol is marked and is the target `delay` steps later.

    Unmarked distractor symbols follow; the last step has a cue and no symbol.

    Args:
      key: consumed.
      batch_size: B.
      delay: steps from the first to the last, at least 1; T = delay + 1.

    Returns:
      Inputs `[B, delay + 1, V + 2]`: one-hot symbol, mark, cue.
    """
    symbols = jax.random.randint(key, (batch_size, delay + 1), 0, NUM_SYMBOLS)
    one_hot = jax.nn.one_hot(symbols, NUM_SYMBOLS).at[:, -1].set(0.0)
    flags = jnp.zeros((batch_size, delay + 1, 2)).at[:, 0, 0].set(1.0).at[:, -1, 1].set(1.0)
    return Trials(jnp.concatenate([one_hot, flags], axis=-1), symbols[:, 0])


def evaluate_symbol(outputs: Array, target: Array) -> tuple[jax.Array, jax.Array]:
    """Returns the mean cross-entropy as loss and the error rate as error."""
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(outputs, target)
    return jnp.mean(loss), jnp.mean(jnp.argmax(outputs, axis=-1) != target)


def _words(table: np.ndarray) -> Task:
    """Returns the task to track the product of the permutations seen so far."""
    order = len(table)

    def draw(key: Key, batch_size: int, length: int) -> Trials:
        return Trials(*tracking_tasks.draw_word(key, table, batch_size, length))

    return Task(order, order, _same, draw, evaluate_symbol, 1 - 1 / order, 0.01, "error rate", True)


def draw_counting(key: Key, batch_size: int, length: int) -> Trials:
    """Returns the counting task; see `tracking_tasks.draw_counting`."""
    return Trials(*tracking_tasks.draw_counting(key, batch_size, length))


def _same(length: int) -> int:
    return length


TASKS = {
    "adding": Task(2, 1, _same, draw_adding, evaluate_number, 1 / 6, 0.01, "mean squared error"),
    "recall": Task(
        NUM_SYMBOLS + 2,
        NUM_SYMBOLS,
        lambda delay: delay + 1,
        draw_recall,
        evaluate_symbol,
        1 - 1 / NUM_SYMBOLS,
        0.01,
        "error rate",
    ),
    "s2": _words(tracking_tasks.symmetric_group(2)),
    "s3": _words(tracking_tasks.symmetric_group(3)),
    "s4": _words(tracking_tasks.symmetric_group(4)),
    "a5": _words(tracking_tasks.alternating_group(5)),
    "counting": Task(
        2,
        MAX_COUNT + 1,
        _same,
        draw_counting,
        evaluate_symbol,
        1 - 1 / (MAX_COUNT + 1),
        0.01,
        "error rate",
        every_step=True,
    ),
}


def init(key: Key, config: RecurrenceConfig, task: Task, *, span: int = 0) -> Params:
    """Returns `{"recurrence", "readout"}`: params of a recurrence and a linear output layer.

    Args:
      key: consumed.
      config: of the recurrence, not bidirectional.
      task: task that fixes input and output size.
      span: largest time constant of chrono initialisation, steps; 0 = the default initialisation.
    """
    recurrence_key, readout_key, span_key = jax.random.split(key, 3)
    params = recurrence.init(recurrence_key, config, task.input_size)
    if span:
        for index, layer in enumerate(params.values()):
            layer_key = jax.random.fold_in(span_key, index)
            layer["forward"] = spread_gates(layer_key, config.cell, layer["forward"], span)
    readout = layers.init_mlp(readout_key, (config.hidden_size, task.output_size))
    return {"recurrence": params, "readout": readout}


def gradient_norms(params: Params, config: RecurrenceConfig, trials: Trials) -> jax.Array:
    """Returns the sensitivity of the last output to the carry of each step.

        ‖∂ Σ outputs / ∂ carryₜ‖ / ‖∂ Σ outputs / ∂ carry_T‖,  root mean square over the batch

    The carry of an LSTM is hidden and cell state together. Lag 0 is the last entry; there, the
    output takes the place of the carry.

    Args:
      params: from `init`, of one layer.
      config: config of the params.
      trials: inputs `[B, T, D]`.

    Returns:
      `[T]` float32; 1 at the last step, near 0 where the gradient vanishes.
    """
    cell, cell_params = recurrence.cell_of(config), recurrence.layer(params["recurrence"])
    inputs = jnp.swapaxes(trials.inputs, 0, 1)
    carry = cell.zero_carry(trials.inputs, config.hidden_size)
    zeros = jax.tree.map(lambda leaf: jnp.zeros((len(inputs), *leaf.shape)), carry)

    def answer(outputs: Any) -> jax.Array:
        return jnp.sum(layers.apply_mlp(params["readout"], outputs))

    def answer_of_carries(offsets: Any) -> tuple[jax.Array, Any]:
        def body(carry: Any, step: Any) -> tuple[Any, jax.Array]:
            step_inputs, offset = step
            carry = jax.tree.map(jnp.add, carry, offset)
            return cells.step(cell, cell_params, carry, step_inputs)

        outputs = jax.lax.scan(body, carry, (inputs, offsets))[1][-1]
        return answer(outputs), outputs

    slopes, outputs = jax.grad(answer_of_carries, has_aux=True)(zeros)
    leaves = [leaf.reshape(*leaf.shape[:2], -1)[1:] for leaf in jax.tree.leaves(slopes)]
    # After the last step it is the output that the answer depends on.
    last = jax.grad(answer)(outputs)
    padding = [(0, 0), (0, sum(leaf.shape[-1] for leaf in leaves) - last.shape[-1])]
    gradient = jnp.concatenate(
        [jnp.concatenate(leaves, axis=-1), jnp.pad(last, padding)[None]], axis=0
    )
    # Exploding gradients are divided by their largest number, so that their square is finite.
    largest = jnp.max(jnp.abs(gradient), axis=(1, 2))
    scaled = gradient / jnp.maximum(largest, TINY)[:, None, None]
    norms = largest * jnp.sqrt(jnp.mean(jnp.sum(jnp.square(scaled), axis=-1), axis=-1))
    return norms / norms[-1]
