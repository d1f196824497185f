"""The training loop shared by the scripts: updates, logs, checkpoints, exact resume."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import optax

from vla_jax.training import checkpoint, optim, parallel
from vla_jax.training.logs import Logs
from vla_jax.training.optim import OptimConfig
from vla_jax.training.parallel import ShardingRules, is_first_process
from vla_jax.training.update import TrainState, Update
from vla_jax.types import Key


class Batches(Protocol):
    """Endless batches with a position that can be saved, such as `data.loader.Loader`."""

    def __iter__(self) -> Iterator[Any]:
        """Yields the batches."""
        ...

    def metrics(self) -> dict[str, float]:
        """Returns values for the log."""
        ...

    def get_state(self) -> dict[str, Any]:
        """Returns the position, JSON-serialisable."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position of `get_state`."""
        ...

    def close(self) -> None:
        """Frees the resources."""
        ...


class Start(NamedTuple):
    """Train state before the first update, which is not made where a training is resumed."""

    shapes: TrainState  # from jax.eval_shape
    make: Callable[[Any], TrainState]  # shardings of the state -> the state on its devices


def random_start(init: Callable[[Key], TrainState], key: Key) -> Start:
    """Returns the start of a training whose params are all random.

    Each device computes its own part of the state.

    Args:
      init: from a key to the train state; pure.
      key: consumed, if the state is made.
    """
    shapes = jax.eval_shape(init, key)
    return Start(shapes, lambda shardings: jax.jit(init, out_shardings=shardings)(key))


@dataclass(frozen=True)
class LoopConfig:
    """Length of a training, its logs, checkpoints and devices."""

    num_updates: int = 3000  # total number of updates
    log_every: int = 50  # updates between two lines of metrics.jsonl
    save_every: int = 500  # updates between two checkpoints
    keep: int = 2  # number of latest checkpoints to keep
    num_devices: int = 0  # devices over which a batch is split; 0 = all
    fsdp_size: int = 1  # devices over which params that match a sharding rule are sharded
    tensorboard: bool = False  # also write TensorBoard event files

    def __post_init__(self):
        """Checks the counts."""
        for name in ("num_updates", "log_every", "save_every", "keep", "fsdp_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


def check(config: LoopConfig, optim_config: OptimConfig, *, batch_size: int) -> None:
    """Raises a ValueError for settings that cannot work, before anything slow starts.

    Args:
      config: length of the training, and its devices.
      optim_config: learning rate and warm-up.
      batch_size: B over all processes.

    Raises:
      ValueError: the warm-up is not shorter than the training, there are not enough devices, or the
        batch cannot be split evenly over them.
    """
    optim.make_schedule(optim_config, config.num_updates)
    mesh = parallel.make_mesh(config.num_devices or None, fsdp_size=config.fsdp_size)
    if batch_size % mesh.size:
        raise ValueError(
            f"batch_size must be a multiple of the {mesh.size} devices, got {batch_size}; choose "
            "another batch_size or num_devices."
        )


def fit(
    config: LoopConfig,
    run_dir: pathlib.Path,
    update: Update,
    start: Start,
    loader: Batches,
    key: Key,
    *,
    schedule: optax.Schedule,
    metadata: dict[str, Any],
    name: str,
    sharding_rules: ShardingRules = (),
) -> TrainState:
    """Trains to the end, from the latest checkpoint in `run_dir` if there is one.

    A resumed training is bitwise identical to an uninterrupted one: params, optimiser state, EMA
    and loader position are restored, and randomness depends on `key` and the update number only.

    Args:
      config: length of the training, logs, checkpoints and devices.
      run_dir: folder of the run.
      update: from `update.make_update`; compiled here.
      start: the state before the first update.
      loader: endless batches; closed here.
      key: consumed; source of all randomness inside the updates.
      schedule: learning rate by update, for the log.
      metadata: saved with every checkpoint (config, norm_stats).
      name: label of the progress bar.
      sharding_rules: how to shard params over the devices; () replicates them.

    Returns:
      The state after the last update, on its devices.
    """
    directory = run_dir / "checkpoints"
    mesh = parallel.make_mesh(config.num_devices or None, fsdp_size=config.fsdp_size)
    shardings = parallel.make_shardings(start.shapes, mesh, sharding_rules)
    if checkpoint.latest_step(directory) is None:
        train_state = start.make(shardings)
    else:
        placed = parallel.with_shardings(start.shapes, shardings)
        train_state, saved = checkpoint.restore(directory, placed)
        loader.set_state(saved["loader"])
    first = int(train_state.num_updates) + 1
    compiled = parallel.jit_update(update, mesh, shardings)
    with contextlib.ExitStack() as stack:
        stack.callback(loader.close)
        checkpoints = checkpoint.open_checkpoints(directory, keep=config.keep)
        stack.callback(checkpoint.close, checkpoints)
        logs = None
        if is_first_process():
            logs = Logs(
                run_dir,
                num_updates=config.num_updates,
                start=first - 1,
                name=name,
                tensorboard=config.tensorboard,
            )
            stack.enter_context(logs)
        steps = range(first, config.num_updates + 1)
        batches = logs.timed(loader) if logs else loader
        for step, batch in zip(steps, batches, strict=False):  # the loader is endless
            train_state, metrics = compiled(train_state, parallel.shard_batch(batch, mesh), key)
            if logs:
                logs.advance(step)
            if logs and (step % config.log_every == 0 or step == config.num_updates):
                extra = {"learning_rate": schedule(step - 1), **loader.metrics()}
                logs.write(step, {**metrics, **extra})
            if step % config.save_every == 0 or step == config.num_updates:
                position = {"loader": loader.get_state()}
                checkpoint.save(checkpoints, step, train_state, metadata | position)
    return train_state
