"""What can be remembered: the adding problem and delayed recall, with every cell.

    python -m train.memory                                   # all of it: minutes
    python -m train.memory --cells lstm gru --adding 200     # some of it
    python -m train.memory --chunk 50 --burn-in 10           # truncated: what it costs
    python -m train.memory --small                           # seconds: does it run here?

Every net has one layer and learns at its own length from data that never come twice. A training
ends when the task is solved, or after `max_updates`. Figures and pictures lie in the run's folder.
"""

import dataclasses
import pathlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from train.memory_tasks import TASKS, Task, gradient_norms, init, remember
from vla_jax import config as configs
from vla_jax.command_line import run
from vla_jax.evaluation import plots
from vla_jax.evaluation.plots import Panel
from vla_jax.nn import layers, recurrence, truncated
from vla_jax.nn.cells import CellName
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.training.loop import save_json
from vla_jax.types import Array, Key, Params

NAMES = {
    "rnn": "RNN", "lstm": "LSTM", "gru": "GRU", "layer_norm_lstm": "LayerNorm-LSTM",
    "min_gru": "minGRU",
}  # fmt: skip
BLOCK = 50  # updates of one call; the curve has a point for each
EXPLODING = 5.0  # factor of the recurrent kernel of a plain RNN whose gradient grows


@dataclass(frozen=True)
class MemoryConfig:
    """What to learn, and how."""

    cells: tuple[CellName, ...] = get_args(CellName)  # which of them
    adding: tuple[int, ...] = (10, 50, 200)  # T, lengths of the adding problem, in steps
    recall: tuple[int, ...] = (10, 100, 1000)  # delays of delayed recall, in steps
    windows: tuple[int, ...] = (5, 10, 15, 20, 21, 25, 40)  # W, last steps that are seen
    window_delay: int = 20  # delay of the recall that is tried with windows, in steps
    hidden_size: int = 64  # H
    batch_size: int = 64  # B, sequences of an update
    max_updates: int = 1500  # of the adding problem; delayed recall has a fifth of them
    learning_rate: float = 1e-2  # Adam's
    max_grad_norm: float = 1.0  # longer gradients are scaled down to it
    spread_gates: bool = True  # gates begin with memories of 1 to T steps
    chunk: int = 0  # steps that a gradient reaches back (and an update sees); 0 = all
    burn_in: int = 0  # steps before a chunk that are run again to mend its carry
    num_trials: int = 2000  # fresh sequences of the last test
    seed: int = 0
    small: bool = False  # tiny sizes, which say nothing about memory
    run_dir: str = "runs/memory"  # folder of figures and pictures

    def __post_init__(self):
        """Checks the numbers."""
        least = {"hidden_size": 1, "batch_size": 1, "max_updates": 1, "num_trials": 1}
        for name, value in {**least, "window_delay": 3}.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, got {getattr(self, name)}.")
        for name, value in {"cells": 1, "adding": 3, "recall": 3, "windows": 1}.items():
            given = getattr(self, name)
            if not given or (name != "cells" and min(given) < value):
                raise ValueError(f"{name} must be one or more, each at least {value}, got {given}.")
        if not 0 <= self.burn_in < max(self.chunk, 1):
            raise ValueError(
                f"burn_in must be 0 or below chunk = {self.chunk}, got {self.burn_in}; choose a "
                "longer chunk."
            )


def short() -> MemoryConfig:
    """Adding up to 200 steps, recall up to 1,000: every cell, minutes on 2 CPU cores."""
    return MemoryConfig()


def long() -> MemoryConfig:
    """Adding up to 1,000 steps too: hours on 2 CPU cores."""
    return MemoryConfig(adding=(10, 50, 200, 500, 1000), max_updates=5000)


PRESETS = {"short": short, "long": long}
SMALL = {
    "adding": (4,), "recall": (3,), "windows": (2, 8), "window_delay": 4, "hidden_size": 4,
    "batch_size": 4, "max_updates": 2 * BLOCK, "num_trials": 8,
}  # fmt: skip


class Lesson(NamedTuple):
    """What one training came to."""

    task: str
    cell: str
    length: int  # of the adding problem, or delay of recall, in steps
    errors: list[float]  # mean over each block of updates: squared error, or share of wrong answers
    error: float  # on fresh sequences, at the end
    num_updates: int
    seconds: float  # compilation included


def memory(config: MemoryConfig) -> pathlib.Path:
    """Trains, measures and draws; returns the file of the figures."""
    if config.small:
        config = dataclasses.replace(config, **SMALL)
    lessons, reaches, seen = [], {}, {}
    for cell in config.cells:
        for task, lengths in (("adding", config.adding), ("recall", config.recall)):
            for length in lengths:
                lesson, params = learn(config, task, cell, length)
                print(tell(lesson), flush=True)
                lessons.append(lesson)
                if (task, length) == ("adding", config.adding[-1]):
                    reaches[cell] = reach(config, cell, params)
        seen[cell] = learn_windows(config, cell)
    run_dir = pathlib.Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    file = run_dir / "memory.json"
    figures = {
        "config": configs.to_dict(config),
        "lessons": [lesson._asdict() for lesson in lessons],
        "gradient_norms": reaches,
        "windows": {cell: dict(zip(config.windows, seen[cell], strict=True)) for cell in seen},
    }
    save_json(figures, file)
    draw(run_dir, config, lessons, reaches, seen)
    return file


def learn(config: MemoryConfig, name: str, cell: CellName, length: int) -> tuple[Lesson, Params]:
    """Trains one net on one task, until it is solved or time is up."""
    task, net, began = TASKS[name], _net(config, cell), time.perf_counter()
    init_key, data_key, test_key = jax.random.split(jax.random.key(config.seed), 3)
    num_steps = task.num_steps(length)
    params = init(init_key, net, task, span=_span(config, num_steps))
    state, errors = (params, _optimizer(config).init(params)), []
    for block in range(_num_blocks(config, name)):
        key = jax.random.fold_in(data_key, block)
        state, found = _train(state, key, num_steps, config, task, net, length)
        errors.append(float(jnp.mean(found)))
        if errors[-1] < task.solved / 2:
            break
    error = float(_test(state[0], test_key, num_steps, config, task, net, length))
    seconds = time.perf_counter() - began
    return Lesson(name, cell, length, errors, error, BLOCK * len(errors), seconds), state[0]


def learn_windows(config: MemoryConfig, cell: CellName) -> list[float]:
    """Trains one net for each window, all at once; returns their shares of wrong answers."""
    task, net, delay = TASKS["recall"], _net(config, cell), config.window_delay
    init_key, data_key, test_key = jax.random.split(jax.random.key(config.seed), 3)
    params = init(init_key, net, task, span=_span(config, task.num_steps(delay)))
    state, windows = (params, _optimizer(config).init(params)), jnp.array(config.windows)
    state = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(windows)), state)

    def train(state: Any, window: Array, key: Key) -> tuple[Any, jax.Array]:
        return _train(state, key, window, config, task, net, delay)

    for block in range(_num_blocks(config, "recall")):
        key = jax.random.fold_in(data_key, block)
        state, _ = jax.vmap(train, (0, 0, None))(state, windows, key)

    def test(params: Params, window: Array) -> jax.Array:
        return _test(params, test_key, window, config, task, net, delay)

    return jax.vmap(test)(state[0], windows).tolist()


def reach(config: MemoryConfig, cell: CellName, params: Params) -> dict[str, list[float]]:
    """How much of the gradient is left at each lag, before and after the longest adding problem."""
    task, net, length = TASKS["adding"], _net(config, cell), config.adding[-1]
    init_key, _, key = jax.random.split(jax.random.key(config.seed), 3)
    trials = task.draw(key, config.batch_size, length)
    begin = init(init_key, net, task, span=_span(config, length))
    nets = {"before": begin, "after": params}
    if cell == "rnn":
        own = begin["recurrence"]["layers_0"]["forward"]
        larger = {**own, "recurrent_kernel": EXPLODING * own["recurrent_kernel"]}
        nets["larger"] = {**begin, "recurrence": {"layers_0": {"forward": larger}}}
    norms = jax.jit(gradient_norms, static_argnums=1)
    return {when: norms(own, net, trials)[::-1].tolist() for when, own in nets.items()}


def draw(
    run_dir: pathlib.Path,
    config: MemoryConfig,
    lessons: Sequence[Lesson],
    reaches: Mapping[str, Mapping[str, Sequence[float]]],
    seen: Mapping[str, Sequence[float]],
) -> None:
    """Draws how each task was learned, and the longest of adding beside what explains it."""
    adding = [_learned(lessons, "adding", length) for length in config.adding]
    recall = [_learned(lessons, "recall", delay) for delay in config.recall]
    plots.curves(run_dir / "adding.png", adding)
    plots.curves(run_dir / "recall.png", recall)
    before = {NAMES[cell]: own["before"] for cell, own in reaches.items()}
    if "rnn" in reaches:
        before[f"RNN, recurrent weights × {EXPLODING:g}"] = reaches["rnn"]["larger"]
    after = {NAMES[cell]: own["after"] for cell, own in reaches.items()}
    right = {NAMES[cell]: (config.windows, [1 - x for x in wrong]) for cell, wrong in seen.items()}
    overview = [
        adding[-1],
        _lags("gradient before training", before),
        _lags(f"gradient after adding {config.adding[-1]}", after),
        Panel(
            f"recall after {config.window_delay} steps, seen through a window",
            "last steps that are seen (W)", "share of right answers", right,
            levels={"chance": 1 - TASKS["recall"].chance}, y_range=(0.0, 1.05),
        ),
    ]  # fmt: skip
    plots.curves(run_dir / "memory.png", overview, columns=2)


def _learned(lessons: Sequence[Lesson], name: str, length: int) -> Panel:
    task, curves = TASKS[name], {}
    for lesson in lessons:
        if (lesson.task, lesson.length) == (name, length):
            updates = [BLOCK * (block + 1) for block in range(len(lesson.errors))]
            curves[NAMES[lesson.cell]] = (updates, lesson.errors)
    kind = {"adding": "mean squared error", "recall": "share of wrong answers"}[name]
    levels = {"remembers nothing": task.chance, "solved": task.solved}
    title = f"{name}, {length} steps"
    return Panel(title, "updates", kind, curves, levels, log="y", y_range=(1e-3, 1.2))


def _lags(title: str, norms: Mapping[str, Sequence[float]]) -> Panel:
    curves = {name: (range(len(each)), each) for name, each in norms.items()}
    y_label = "‖∂ answer / ∂ carry‖, lag 0 = 1"
    return Panel(title, "lag / steps", y_label, curves, log="y", y_range=(1e-9, 1e5))


def tell(lesson: Lesson) -> str:
    """One line for the terminal."""
    task = TASKS[lesson.task]
    result = "solved" if lesson.error < task.solved else "not solved"
    return (
        f"{lesson.task:6} {lesson.length:5}  {NAMES[lesson.cell]:14}  error {lesson.error:.4f} "
        f"(chance {task.chance:.3f})  {result} after {lesson.num_updates} updates, "
        f"{lesson.seconds:.0f} s"
    )


@partial(jax.jit, static_argnums=(3, 4, 5, 6), donate_argnums=0)
def _train(
    state: tuple, key: Key, window: Array | int, config: MemoryConfig, task: Task,
    net: RecurrenceConfig, length: int,
) -> tuple[tuple, jax.Array]:  # fmt: skip
    """`BLOCK` updates; returns params and optimiser's state, and the errors `[BLOCK]`."""
    optimizer = _optimizer(config)

    def on_chunk(training: tuple, chunk: dict) -> tuple[tuple, jax.Array]:
        params, opt_state, carry, target = training
        loss = partial(_chunk_loss, config=config, task=task, net=net)
        grads, (carry, error) = jax.grad(loss, has_aux=True)(params, carry, chunk, target)
        updates, moved = optimizer.update(grads, opt_state, params)
        # A chunk without the answer has no gradient, but Adam's momentum would move on.
        is_told = jnp.any(chunk["is_last"][:, config.burn_in :])
        after, before = (optax.apply_updates(params, updates), moved), (params, opt_state)
        after = jax.tree.map(partial(jnp.where, is_told), after, before)
        return (*after, carry, target), error

    def update(state: tuple, number: Array) -> tuple[tuple, jax.Array]:
        trials = task.draw(jax.random.fold_in(key, number), config.batch_size, length)
        carry = recurrence.zero_carry(net, trials.inputs)
        chunks = _chunks(config, trials.inputs, window)
        training = (*state, carry, trials.target)
        training, errors = jax.lax.scan(on_chunk, training, chunks)
        return training[:2], jnp.sum(errors)  # all but the last chunk's are 0

    return jax.lax.scan(update, state, jnp.arange(BLOCK))


@partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _test(
    params: Params, key: Key, window: Array | int, config: MemoryConfig, task: Task,
    net: RecurrenceConfig, length: int,
) -> jax.Array:  # fmt: skip
    """The error on fresh sequences."""
    trials = task.draw(key, config.num_trials, length)
    whole = dataclasses.replace(config, chunk=0, burn_in=0)
    steps = jax.tree.map(lambda leaf: leaf[0], _chunks(whole, trials.inputs, window))
    carry = recurrence.zero_carry(net, trials.inputs)
    return _chunk_loss(params, carry, steps, trials.target, config=whole, task=task, net=net)[1][1]


def _chunks(config: MemoryConfig, inputs: Array, window: Array | int) -> dict[str, jax.Array]:
    """The steps in chunks; what lies before the last `window` steps is forgotten by a reset."""
    batch_size, num_steps, _ = inputs.shape
    numbers = jnp.broadcast_to(jnp.arange(num_steps), (batch_size, num_steps))
    steps = {
        "inputs": inputs,
        "mask": jnp.ones(numbers.shape, bool),
        "reset": numbers == num_steps - window,
        "is_last": numbers == num_steps - 1,
    }
    return truncated.chunks(steps, config.chunk or num_steps, burn_in=config.burn_in)


def _chunk_loss(
    params: Params, carry: Any, chunk: dict[str, Array], target: Array, *,
    config: MemoryConfig, task: Task, net: RecurrenceConfig,
) -> tuple[jax.Array, tuple[Any, jax.Array]]:  # fmt: skip
    """Loss, carry and error; both numbers are 0 where the chunk has not the last step."""
    model = partial(remember, net)
    carry, outputs = truncated.apply(model, params, carry, chunk, burn_in=config.burn_in)
    is_last = chunk["is_last"][:, config.burn_in :]
    last = jnp.sum(jnp.where(is_last[..., None], outputs, 0.0), axis=1)
    loss, error = task.judge(layers.apply_mlp(params["readout"], last), target)
    is_here = jnp.any(is_last)
    return jnp.where(is_here, loss, 0.0), (carry, jnp.where(is_here, error, 0.0))


def _net(config: MemoryConfig, cell: CellName) -> RecurrenceConfig:
    return RecurrenceConfig(cell, hidden_size=config.hidden_size)


def _span(config: MemoryConfig, num_steps: int) -> int:
    return num_steps if config.spread_gates else 0


def _optimizer(config: MemoryConfig) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(config.max_grad_norm)
    return optax.chain(clip, optax.adam(config.learning_rate))


def _num_blocks(config: MemoryConfig, task: str) -> int:
    share = {"adding": 1, "recall": 5}[task]
    return max(1, config.max_updates // (share * BLOCK))


if __name__ == "__main__":
    run(memory, PRESETS, description="Shows what each cell can remember.")
