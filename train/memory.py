"""Memory of recurrent cells: every cell on the adding problem and delayed recall.

    python -m train.memory                                   # all cells and tasks: minutes
    python -m train.memory --cells lstm gru --adding 200     # some of them
    python -m train.memory --chunk 50 --burn-in 10           # truncated backpropagation
    python -m train.memory --small                           # tiny sizes: seconds, a smoke test

Each training has one recurrent layer, task and length, and new random data in every update. It ends
when the task is solved, or after `max_updates`. Results and plots are written to the run's folder.
"""

import dataclasses
import pathlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vla_jax import config as configs
from vla_jax.command_line import run
from vla_jax.config import MAX_SIZE, checked, did_you_mean
from vla_jax.evaluation import plots
from vla_jax.evaluation.plots import Panel
from vla_jax.nn import layers, recurrence, truncated
from vla_jax.nn.cells import CELLS, CellName
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.nn.sequence_tasks import TASKS, Task, gradient_norms, init
from vla_jax.runs import save_json
from vla_jax.training.run_lock import exclusive
from vla_jax.types import Array, Key, Params

NAMES = {  # labels of cells in plots; default: the cell's name
    "rnn": "RNN", "lstm": "LSTM", "gru": "GRU", "layer_norm_lstm": "LayerNorm-LSTM",
    "min_gru": "minGRU",
}  # fmt: skip
_MOST_STEPS = 2**28  # steps of all sequences of one batch, which lie in memory together
BLOCK = 50  # updates per jitted call, one point of the curve each
EXPLODING = {"rnn": 5.0}  # factor of the recurrent kernel with which the gradient explodes
UPDATE_DIVISOR = {"adding": 1, "recall": 5}  # the maximum updates of a task are max_updates / this


@dataclass(frozen=True)
@checked(
    hidden_size=(1, MAX_SIZE), batch_size=(1, 2**31 - 1), num_trials=(1, 2**31 - 1),
    max_updates=(1, 2**31 - 1), window_delay=(3, _MOST_STEPS),
)  # fmt: skip
class MemoryConfig:
    """Cells, tasks and training of a memory experiment."""

    cells: tuple[CellName, ...] = tuple(CELLS)  # cells to train
    adding: tuple[int, ...] = (10, 50, 200)  # lengths T of the adding problem, steps
    recall: tuple[int, ...] = (10, 100, 1000)  # delays of delayed recall, steps
    windows: tuple[int, ...] = (5, 10, 15, 20, 21, 25, 40)  # window sizes W of recall, steps
    window_delay: int = 20  # delay of the recall that is trained with windows, steps
    hidden_size: int = 64  # hidden units H of the recurrent layer
    batch_size: int = 64  # sequences B per update
    max_updates: int = 1500  # maximum updates on the adding problem; on recall a fifth of it
    learning_rate: float = 1e-2  # learning rate of Adam
    max_grad_norm: float = 1.0  # clip gradients to this global norm
    spread_gates: bool = True  # chrono initialisation: gate time constants from 1 to T steps
    chunk: int = 0  # steps of truncated backpropagation, one update each; 0 = whole sequences
    burn_in: int = 0  # steps before each chunk that are run again to recompute its carry
    num_trials: int = 2000  # fresh sequences of the final test
    seed: int = 0  # seed of params and data
    small: bool = False  # use tiny sizes: a smoke test without meaningful results
    run_dir: str = "runs/memory"  # folder of results and plots

    def __post_init__(self):
        """Checks names and numbers."""
        for cell in self.cells:
            if cell not in CELLS:
                raise ValueError(f"unknown cell '{cell}'; {did_you_mean(cell, CELLS)}")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
        if not self.cells:
            raise ValueError(f"cells must be one or more of {', '.join(CELLS)}, got none.")
        for name, value in {"adding": 3, "recall": 3, "windows": 1}.items():
            values = getattr(self, name)
            if not values or min(values) < value:
                raise ValueError(
                    f"{name} must be one or more, each at least {value}, got {values}."
                )
        longest = max(*self.adding, *self.recall, *self.windows, self.window_delay)
        for name in ("batch_size", "num_trials"):
            if getattr(self, name) * longest > _MOST_STEPS:
                raise ValueError(
                    f"{name} must be at most {_MOST_STEPS // longest} for sequences of {longest} "
                    f"steps, got {getattr(self, name)}; shorten adding, recall and windows."
                )
        if not 0 <= self.burn_in < max(self.chunk, 1):
            raise ValueError(
                f"burn_in must be 0 or below chunk = {self.chunk}, got {self.burn_in}; choose a "
                "longer chunk."
            )


def short() -> MemoryConfig:
    """Adding up to 200 steps, recall up to 1,000: all cells, minutes on 2 CPU cores."""
    return MemoryConfig()


def long() -> MemoryConfig:
    """Adding and recall up to 1,000 steps: all cells, hours on 2 CPU cores."""
    return MemoryConfig(adding=(10, 50, 200, 500, 1000), max_updates=5000)


PRESETS = {"short": short, "long": long}
SMALL = {
    "adding": (4,), "recall": (3,), "windows": (2, 8), "window_delay": 4, "hidden_size": 4,
    "batch_size": 4, "max_updates": 2 * BLOCK, "num_trials": 8,
}  # fmt: skip


class TaskResult(NamedTuple):
    """Result of one training."""

    task: str
    cell: str
    length: int  # length of the adding problem, or delay of recall, steps
    errors: list[float]  # error of the task, mean of each block of updates
    error: float  # error on fresh sequences after training
    num_updates: int
    seconds: float  # training time, compilation included


@exclusive
def memory(config: MemoryConfig) -> pathlib.Path:
    """Trains every cell on every task, writes results and plots; returns the JSON file."""
    if config.small:
        config = dataclasses.replace(config, **SMALL)
    results, norms, window_errors = [], {}, {}
    for cell in config.cells:
        for task, lengths in (("adding", config.adding), ("recall", config.recall)):
            for length in lengths:
                result, params = learn(config, task, cell, length)
                print(describe(result), flush=True)
                results.append(result)
                if (task, length) == ("adding", config.adding[-1]):
                    norms[cell] = norms_by_lag(config, cell, params)
        window_errors[cell] = learn_windows(config, cell)
    run_dir = pathlib.Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    file = run_dir / "memory.json"
    windows = {
        cell: dict(zip(config.windows, errors, strict=True))
        for cell, errors in window_errors.items()
    }
    content = {
        "config": configs.to_dict(config),
        "results": [result._asdict() for result in results],
        "gradient_norms": norms,
        "windows": windows,
    }
    save_json(content, file)
    draw(run_dir, config, results, norms, window_errors)
    return file


def learn(
    config: MemoryConfig, name: str, cell: CellName, length: int
) -> tuple[TaskResult, Params]:
    """Trains one network on one task until it is solved, or for the maximum number of updates."""
    task, net, began = TASKS[name], _net(config, cell), time.perf_counter()
    init_key, data_key, test_key = jax.random.split(jax.random.key(config.seed), 3)
    num_steps = task.num_steps(length)
    params = init(init_key, net, task, span=_span(config, num_steps))
    state, errors = (params, _optimizer(config).init(params)), []
    for block in range(_num_blocks(config, name)):
        key = jax.random.fold_in(data_key, block)
        state, block_errors, is_finite = _train(state, key, num_steps, config, task, net, length)
        _check_finite(is_finite, f"{cell} on {name} of {length} steps", block)
        errors.append(float(jnp.mean(block_errors)))
        if errors[-1] < task.solved / 2:
            break
    error = float(_test(state[0], test_key, num_steps, config, task, net, length))
    seconds = time.perf_counter() - began
    return TaskResult(name, cell, length, errors, error, BLOCK * len(errors), seconds), state[0]


def _check_finite(is_finite: jax.Array, training: str, block: int) -> None:
    if not jnp.all(is_finite):
        raise ValueError(
            f"params must be finite, got NaN or infinity in {training} before update "
            f"{BLOCK * (block + 1)}; lower --learning-rate or --max-grad-norm."
        )


def learn_windows(config: MemoryConfig, cell: CellName) -> list[float]:
    """Trains one network per window in parallel; returns their error rates."""
    task, net, delay = TASKS["recall"], _net(config, cell), config.window_delay
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


def norms_by_lag(config: MemoryConfig, cell: CellName, params: Params) -> dict[str, list[float]]:
    """Returns gradient norms at each lag, before and after training on the longest adding problem.

    If `EXPLODING` has the cell, "larger" holds those before training with larger recurrent kernels.
    """
    task, net, length = TASKS["adding"], _net(config, cell), config.adding[-1]
    init_key, _, key = jax.random.split(jax.random.key(config.seed), 3)
    trials = task.draw(key, config.batch_size, length)
    before = init(init_key, net, task, span=_span(config, length))
    variants = {"before": before, "after": params}
    if cell in EXPLODING:
        layer = recurrence.layer(before["recurrence"])
        larger = {**layer, "recurrent_kernel": EXPLODING[cell] * layer["recurrent_kernel"]}
        variants["larger"] = {**before, "recurrence": recurrence.from_layer(larger)}
    norms = jax.jit(gradient_norms, static_argnums=1)
    return {name: norms(variant, net, trials)[::-1].tolist() for name, variant in variants.items()}


def draw(
    run_dir: pathlib.Path,
    config: MemoryConfig,
    results: Sequence[TaskResult],
    norms: Mapping[str, Mapping[str, Sequence[float]]],
    window_errors: Mapping[str, Sequence[float]],
) -> None:
    """Plots the learning curves of each task, and an overview with gradient norms and windows."""
    adding = [_learning_curves(results, "adding", length) for length in config.adding]
    recall = [_learning_curves(results, "recall", delay) for delay in config.recall]
    plots.curves(run_dir / "adding.png", adding)
    plots.curves(run_dir / "recall.png", recall)
    before = {_name(cell): variants["before"] for cell, variants in norms.items()}
    for cell in norms.keys() & EXPLODING:
        label = f"{_name(cell)}, recurrent weights × {EXPLODING[cell]:g}"
        before[label] = norms[cell]["larger"]
    after = {_name(cell): variants["after"] for cell, variants in norms.items()}
    accuracy = {
        _name(cell): (config.windows, [1 - error for error in errors])
        for cell, errors in window_errors.items()
    }
    overview = [
        adding[-1],
        _lags("gradient before training", before),
        _lags(f"gradient after adding {config.adding[-1]}", after),
        Panel(
            f"recall after {config.window_delay} steps, inputs limited to a window",
            "window size W / steps", "accuracy", accuracy,
            levels={"chance": 1 - TASKS["recall"].chance}, y_range=(0.0, 1.05),
        ),
    ]  # fmt: skip
    plots.curves(run_dir / "memory.png", overview, columns=2)


def _learning_curves(results: Sequence[TaskResult], name: str, length: int) -> Panel:
    task, curves = TASKS[name], {}
    for result in results:
        if (result.task, result.length) == (name, length):
            updates = [BLOCK * (block + 1) for block in range(len(result.errors))]
            curves[_name(result.cell)] = (updates, result.errors)
    levels = {"chance": task.chance, "solved": task.solved}
    title = f"{name}, {length} steps"
    return Panel(title, "updates", task.error_name, curves, levels, log="y", y_range=(1e-3, 1.2))


def _lags(title: str, norms: Mapping[str, Sequence[float]]) -> Panel:
    curves = {name: (range(len(values)), values) for name, values in norms.items()}
    y_label = "‖∂ output / ∂ carry‖, lag 0 = 1"
    return Panel(title, "lag / steps", y_label, curves, log="y", y_range=(1e-9, 1e5))


def describe(result: TaskResult) -> str:
    """Returns a result as one line for the terminal."""
    task = TASKS[result.task]
    outcome = "solved" if result.error < task.solved else "not solved"
    return (
        f"{result.task:6} {result.length:5}  {_name(result.cell):14}  error {result.error:.4f} "
        f"(chance {task.chance:.3f})  {outcome} after {result.num_updates} updates, "
        f"{result.seconds:.0f} s"
    )


def _name(cell: str) -> str:
    return NAMES.get(cell, cell)


@partial(jax.jit, static_argnums=(3, 4, 5, 6), donate_argnums=0)
def _train(
    state: tuple, key: Key, window: Array | int, config: MemoryConfig, task: Task,
    net: RecurrenceConfig, length: int,
) -> tuple[tuple, jax.Array, jax.Array]:  # fmt: skip
    """Runs `BLOCK` updates; returns params and optimiser state, errors `[BLOCK]`, all finite."""
    optimizer = _optimizer(config)

    def on_chunk(training: tuple, chunk: dict) -> tuple[tuple, jax.Array]:
        params, opt_state, carry, target = training
        loss = partial(_chunk_loss, config=config, task=task, net=net)
        grads, (carry, error) = jax.grad(loss, has_aux=True)(params, carry, chunk, target)
        updates, next_opt_state = optimizer.update(grads, opt_state, params)
        # A chunk without the last step has a zero gradient, but Adam's momentum would still act.
        has_target = jnp.any(chunk["is_last"][:, config.burn_in :])
        after, before = (optax.apply_updates(params, updates), next_opt_state), (params, opt_state)
        after = jax.tree.map(partial(jnp.where, has_target), after, before)
        return (*after, carry, target), error

    def update(state: tuple, number: Array) -> tuple[tuple, jax.Array]:
        trials = task.draw(jax.random.fold_in(key, number), config.batch_size, length)
        carry = recurrence.zero_carry(net, trials.inputs)
        chunks = _chunks(config, trials.inputs, window)
        training = (*state, carry, trials.target)
        training, errors = jax.lax.scan(on_chunk, training, chunks)
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
    steps = jax.tree.map(lambda leaf: leaf[0], _chunks(whole, trials.inputs, window))
    carry = recurrence.zero_carry(net, trials.inputs)
    return _chunk_loss(params, carry, steps, trials.target, config=whole, task=task, net=net)[1][1]


def _chunks(config: MemoryConfig, inputs: Array, window: Array | int) -> dict[str, jax.Array]:
    """Returns the steps in chunks; a reset clears the carry before the last `window` steps."""
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
    """Returns loss, carry and error; loss and error are 0 if the chunk lacks the last step."""
    model = partial(_apply, net)
    carry, outputs = truncated.apply(model, params, carry, chunk, burn_in=config.burn_in)
    is_last = chunk["is_last"][:, config.burn_in :]
    last = jnp.sum(jnp.where(is_last[..., None], outputs, 0.0), axis=1)
    loss, error = task.evaluate(layers.apply_mlp(params["readout"], last), target)
    has_last = jnp.any(is_last)
    return jnp.where(has_last, loss, 0.0), (carry, jnp.where(has_last, error, 0.0))


def _apply(
    config: RecurrenceConfig, params: Params, carry: Any, steps: dict[str, Array]
) -> tuple[Any, jax.Array]:
    """Returns carry and outputs `[B, T, H]` of `steps`: inputs, mask, reset, each `[B, T, …]`."""
    return recurrence.apply(
        params["recurrence"], config, steps["inputs"],
        mask=steps["mask"], reset=steps["reset"], carry=carry,
    )  # fmt: skip


def _net(config: MemoryConfig, cell: CellName) -> RecurrenceConfig:
    return RecurrenceConfig(cell, hidden_size=config.hidden_size)


def _span(config: MemoryConfig, num_steps: int) -> int:
    return num_steps if config.spread_gates else 0


def _optimizer(config: MemoryConfig) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(config.max_grad_norm)
    return optax.chain(clip, optax.adam(config.learning_rate))


def _num_blocks(config: MemoryConfig, task: str) -> int:
    return max(1, config.max_updates // (UPDATE_DIVISOR[task] * BLOCK))


if __name__ == "__main__":
    run(memory, PRESETS, description="Trains every recurrent cell on two memory tasks.")
