"""Training and testing one recurrence on one memory task."""

import dataclasses
import math
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from train.memory_config import BLOCK, EXPLODING, MemoryConfig
from vla_jax.nn import layers, recurrence, truncated
from vla_jax.nn.cells import CellName
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.nn.sequence_tasks import TASKS, Task, Trials, gradient_norms, init
from vla_jax.types import Array, Key, Params

UPDATE_DIVISOR = {"recall": 5}  # the maximum updates of a task are max_updates / this; default 1


class TaskResult(NamedTuple):
    """Result of one training."""

    task: str
    cell: str
    length: int  # length of the sequences, or delay of recall, steps
    seed: int
    errors: list[float]  # error of the task, mean of each block of updates
    error: float  # error on fresh sequences after training
    longer: dict[int, float]  # length -> error on longer sequences, of tasks with every_step
    num_updates: int
    seconds: float  # training time, compilation included


def learn(
    config: MemoryConfig, name: str, cell: CellName, length: int, *, seed: int | None = None
) -> tuple[TaskResult, Params]:
    """Trains one network on one task, at most for the maximum number of updates.

    Args:
      config: of the experiment.
      name: of the task.
      cell: name of the cell.
      length: of the sequences, or delay of recall, steps.
      seed: of params and data; None means the config's.
    """
    seed = config.seed if seed is None else seed
    task, net, began = TASKS[name], make_net(config, cell), time.perf_counter()
    init_key, data_key, test_key = jax.random.split(jax.random.key(seed), 3)
    num_steps = task.num_steps(length)
    params = init(init_key, net, task, span=_span(config, num_steps))
    state, errors = (params, _optimizer(config).init(params)), []
    for block in range(_num_blocks(config, name)):
        key = jax.random.fold_in(data_key, block)
        state, block_errors, is_finite = _train(state, key, num_steps, config, task, net, length)
        errors.append(float(jnp.mean(block_errors)))
        is_finite &= math.isfinite(errors[-1])
        _check_finite(is_finite, f"{cell} on {name} of {length} steps", block)
        if config.stop_when_solved and errors[-1] < task.solved / 2:
            break
    error = float(_test(state[0], test_key, num_steps, config, task, net, length))
    factors = config.extrapolation if task.every_step else ()
    longer = {
        length * factor: float(
            _test(state[0], test_key, num_steps * factor, config, task, net, length * factor)
        )
        for factor in factors
    }
    if not all(map(math.isfinite, (error, *longer.values()))):
        raise ValueError(
            f"error must be finite, got {error} in the test of {cell} on {name} of {length} steps, "
            f"and {longer} on longer ones; lower --learning-rate or --max-grad-norm."
        )
    seconds = time.perf_counter() - began
    result = TaskResult(
        name, cell, length, seed, errors, error, longer, BLOCK * len(errors), seconds
    )
    return result, state[0]


def _check_finite(is_finite: jax.Array, training: str, block: int) -> None:
    if not jnp.all(is_finite):
        raise ValueError(
            f"params and error must be finite, got NaN or infinity in {training} before update "
            f"{BLOCK * (block + 1)}; lower --learning-rate or --max-grad-norm."
        )


def learn_windows(config: MemoryConfig, cell: CellName) -> list[float]:
    """Trains one network per window in parallel; returns their error rates."""
    task, net, delay = TASKS["recall"], make_net(config, cell), config.window_delay
    init_key, data_key, test_key = jax.random.split(jax.random.key(config.seed), 3)
    params = init(init_key, net, task, span=_span(config, task.num_steps(delay)))
    state, windows = (params, _optimizer(config).init(params)), jnp.array(config.windows)
    state = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(windows)), state)

    def train(state: Any, window: Array, key: Key) -> tuple[Any, jax.Array, jax.Array]:
        return _train(state, key, window, config, task, net, delay)

    for block in range(_num_blocks(config, "recall")):
        key = jax.random.fold_in(data_key, block)
        state, _, is_finite = jax.vmap(train, (0, 0, None))(state, windows, key)
        _check_finite(is_finite, f"{cell} on recall with windows", block)

    def test(params: Params, window: Array) -> jax.Array:
        return _test(params, test_key, window, config, task, net, delay)

    return jax.vmap(test)(state[0], windows).tolist()


def norms_by_lag(
    config: MemoryConfig, cell: CellName, params: Params
) -> dict[str, list[float | None]]:
    """Returns gradient norms at each lag, before and after training on the longest adding problem.

    If `EXPLODING` has the cell, "larger" holds those before training with larger recurrent kernels.
    None stands for a norm that is not finite.
    """
    task, net, length = TASKS["adding"], make_net(config, cell), config.adding[-1]
    init_key, _, key = jax.random.split(jax.random.key(config.seed), 3)
    trials = task.draw(key, config.batch_size, length)
    before = init(init_key, net, task, span=_span(config, length))
    variants = {"before": before, "after": params}
    if cell in EXPLODING:
        layer = recurrence.layer(before["recurrence"])
        larger = {**layer, "recurrent_kernel": EXPLODING[cell] * layer["recurrent_kernel"]}
        variants["larger"] = {**before, "recurrence": recurrence.from_layer(larger)}
    norms = jax.jit(gradient_norms, static_argnums=1)
    by_lag = {name: norms(each, net, trials)[::-1].tolist() for name, each in variants.items()}
    return {
        name: [norm if math.isfinite(norm) else None for norm in values]
        for name, values in by_lag.items()
    }


@partial(jax.jit, static_argnums=(3, 4, 5, 6), donate_argnums=0)
def _train(
    state: tuple, key: Key, window: Array | int, config: MemoryConfig, task: Task,
    net: RecurrenceConfig, length: int,
) -> tuple[tuple, jax.Array, jax.Array]:  # fmt: skip
    """Runs `BLOCK` updates; returns params and optimiser state, errors `[BLOCK]`, all finite."""
    optimizer = _optimizer(config)

    def on_chunk(training: tuple, chunk: dict) -> tuple[tuple, jax.Array]:
        params, opt_state, carry = training
        loss = partial(_chunk_loss, config=config, task=task, net=net)
        grads, (carry, error) = jax.grad(loss, has_aux=True)(params, carry, chunk)
        updates, next_opt_state = optimizer.update(grads, opt_state, params)
        # A chunk without scored steps has a zero gradient, but Adam's momentum would still act.
        has_target = jnp.any(chunk["is_scored"][:, config.burn_in :])
        after, before = (optax.apply_updates(params, updates), next_opt_state), (params, opt_state)
        after = jax.tree.map(partial(jnp.where, has_target), after, before)
        return (*after, carry), error

    def update(state: tuple, number: Array) -> tuple[tuple, jax.Array]:
        trials = task.draw(jax.random.fold_in(key, number), config.batch_size, length)
        carry = recurrence.zero_carry(net, trials.inputs)
        chunks = _chunks(config, task, trials, window)
        training, errors = jax.lax.scan(on_chunk, (*state, carry), chunks)
        return training[:2], jnp.sum(errors)  # the errors of all but the last chunk are 0

    state, errors = jax.lax.scan(update, state, jnp.arange(BLOCK))
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(state[0])]
    return state, errors, jnp.all(jnp.stack(leaves))


@partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _test(
    params: Params, key: Key, window: Array | int, config: MemoryConfig, task: Task,
    net: RecurrenceConfig, length: int,
) -> jax.Array:  # fmt: skip
    """Returns the error on fresh sequences."""
    trials = task.draw(key, config.num_trials, length)
    whole = dataclasses.replace(config, chunk=0, burn_in=0)
    steps = jax.tree.map(lambda leaf: leaf[0], _chunks(whole, task, trials, window))
    carry = recurrence.zero_carry(net, trials.inputs)
    return _chunk_loss(params, carry, steps, config=whole, task=task, net=net)[1][1]


def _chunks(
    config: MemoryConfig, task: Task, trials: Trials, window: Array | int
) -> dict[str, jax.Array]:
    """Returns the steps in chunks; a reset clears the carry before the last `window` steps."""
    batch_size, num_steps, _ = trials.inputs.shape
    numbers = jnp.broadcast_to(jnp.arange(num_steps), (batch_size, num_steps))
    target = jnp.asarray(trials.target)
    is_last = numbers == num_steps - 1
    steps = {
        "inputs": trials.inputs,
        "target": target if task.every_step else jnp.broadcast_to(target[:, None], numbers.shape),
        "mask": jnp.ones(numbers.shape, bool),
        "reset": numbers == num_steps - window,
        "is_last": is_last,
        "is_scored": numbers >= num_steps - window if task.every_step else is_last,
    }
    return truncated.chunks(steps, config.chunk or num_steps, burn_in=config.burn_in)


def _chunk_loss(
    params: Params, carry: Any, chunk: dict[str, Array], *,
    config: MemoryConfig, task: Task, net: RecurrenceConfig,
) -> tuple[jax.Array, tuple[Any, jax.Array]]:  # fmt: skip
    """Returns loss, carry and error; the loss is 0 if no step of the chunk is scored.

    The error is that of the last step, 0 if the chunk lacks it.
    """
    model = partial(_apply, net)
    carry, outputs = truncated.apply(model, params, carry, chunk, burn_in=config.burn_in)
    outputs = layers.apply_mlp(params["readout"], outputs)
    after = {name: chunk[name][:, config.burn_in :] for name in ("target", "is_last", "is_scored")}
    losses, errors = jax.vmap(task.evaluate, 1)(outputs, after["target"])  # over steps
    weights = after["is_scored"][0]  # the same in all rows, as those of the last step
    loss = jnp.sum(jnp.where(weights, losses, 0.0)) / jnp.maximum(jnp.sum(weights), 1)
    return loss, (carry, jnp.sum(jnp.where(after["is_last"][0], errors, 0.0)))


def _apply(
    config: RecurrenceConfig, params: Params, carry: Any, steps: dict[str, Array]
) -> tuple[Any, jax.Array]:
    """Returns carry and outputs `[B, T, H]` of `steps`: inputs, mask, reset, each `[B, T, …]`."""
    return recurrence.apply(
        params["recurrence"], config, steps["inputs"],
        mask=steps["mask"], reset=steps["reset"], carry=carry,
    )  # fmt: skip


def make_net(config: MemoryConfig, cell: CellName) -> RecurrenceConfig:
    """Returns the config of the recurrence."""
    return RecurrenceConfig(cell, config.num_layers, config.hidden_size)


def _span(config: MemoryConfig, num_steps: int) -> int:
    return num_steps if config.spread_gates else 0


def _optimizer(config: MemoryConfig) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(config.max_grad_norm)
    return optax.chain(clip, optax.adam(config.learning_rate))


def _num_blocks(config: MemoryConfig, task: str) -> int:
    return max(1, config.max_updates // (UPDATE_DIVISOR.get(task, 1) * BLOCK))
