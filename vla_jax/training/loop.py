"""The training loop shared by the scripts: updates, logs, checkpoints, exact resume."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import optax
from jax.sharding import Mesh

from vla_jax import stopping
from vla_jax.config import checked, differences
from vla_jax.training import checkpoint, distributed, finite, optim, parallel, resuming
from vla_jax.training.agreement import Votes
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
@checked()
class LoopConfig:
    """Length of a training, its logs, checkpoints and devices."""

    num_updates: int = 3000  # total number of updates
    log_every: int = 50  # updates between two lines of metrics.jsonl
    save_every: int = 500  # updates between two checkpoints
    keep: int = 2  # number of latest checkpoints to keep
    # sizes of the mesh of devices, such as data=2,fsdp=4,tensor=1: a batch is split over data and
    # fsdp, params over fsdp and tensor; what is left out is 1, data as many devices as remain
    mesh: str = ""
    # processes that train together: none, auto, slurm, openmpi, kubernetes, or
    # host:port,processes,index with the address of the first one
    distributed: str = "none"
    tensorboard: bool = False  # also write TensorBoard event files
    # updates in a row with a loss or gradient that is not finite to skip; 0 = stop at the first
    skip_bad_updates: int = 0

    MAY_CHANGE: ClassVar[tuple[str, ...]] = (
        "num_updates", "log_every", "save_every", "keep", "mesh", "distributed", "tensorboard",
        "skip_bad_updates",
    )  # fmt: skip

    RETIRED: ClassVar[Mapping[str, str]] = {
        "num_devices": "--mesh data=2 for two devices",
        "fsdp_size": "--mesh fsdp=2 for two shards of the params",
    }  # option of an earlier version -> the one in its place

    @staticmethod
    def upgrade(data: Any) -> Any:
        """Returns the fields of an earlier version under their present names."""
        if not isinstance(data, Mapping) or not {"num_devices", "fsdp_size"} & set(data):
            return data
        data = dict(data)
        num_devices, fsdp = data.pop("num_devices", 0), data.pop("fsdp_size", 1)
        sizes = {"data": num_devices // fsdp} if num_devices else {}
        sizes |= {"fsdp": fsdp} if fsdp != 1 else {}
        return {"mesh": ",".join(f"{axis}={size}" for axis, size in sizes.items()), **data}

    def __post_init__(self):
        """Checks the counts, the mesh and the processes."""
        distributed.parse(self.distributed)
        parallel.parse_mesh(self.mesh)
        if self.skip_bad_updates < 0:
            raise ValueError(f"skip_bad_updates must be at least 0, got {self.skip_bad_updates}.")
        for name in ("num_updates", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


def check(
    config: LoopConfig,
    optim_config: OptimConfig,
    *,
    batch_size: int,
    sharding_rules: ShardingRules,
    params: Any,
) -> None:
    """Raises a ValueError for settings that cannot work, before anything slow starts.

    Args:
      config: length of the training, and its devices.
      optim_config: learning rate and warm-up.
      batch_size: B over all processes.
      sharding_rules: as for `fit`.
      params: shapes of the params.

    Raises:
      ValueError: the warm-up is not shorter than the training, there are not enough devices, the
        batch cannot be split evenly over them, or no param is split over an axis for it.
    """
    optim.make_schedule(optim_config, config.num_updates)
    mesh = parallel.make_mesh(config.mesh)
    parallel.check_split_axes(mesh, sharding_rules, params)
    num_parts = parallel.num_row_shards(mesh)
    if batch_size % num_parts:
        raise ValueError(
            f"batch_size must be a multiple of the {num_parts} devices over which it is split, got "
            f"{batch_size}; choose another batch_size or --mesh."
        )


def check_resume(run_dir: pathlib.Path, loader: Batches, metadata: dict[str, Any]) -> None:
    """Raises an error if `fit` cannot continue from the latest checkpoint; writes nothing.

    Call it before anything in the run folder changes.

    Args:
      run_dir: folder of the run, which may be absent.
      loader: of the training; its position is changed, `fit` sets it again.
      metadata: as for `fit`; what acting needs must be the same as in the checkpoint.

    Raises:
      ValueError: the loader, or what acting needs, differs from that of the checkpoint.
    """
    directory = pathlib.Path(run_dir) / "checkpoints"
    if checkpoint.latest_step(directory) is None:
        return
    saved = checkpoint.read_metadata(directory)
    loader.set_state(saved["loader"])
    for name in set(metadata) & set(saved) - {"config"}:
        differing = differences(saved[name], metadata[name])
        if differing:
            raise ValueError(
                f"{name} must be the same as in the checkpoints of {run_dir}, but "
                f"{'; '.join(differing)[:500]}; restore the data, or choose another --run-dir."
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
    SIGTERM and Ctrl-C end it after the update at hand, which is saved; with several processes after
    one that comes about a second later.

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

    Raises:
      ValueError: the loader is not that of the checkpoint; or a loss, a gradient or the state is
        not finite, which is not saved: the last checkpoint is kept.
      KeyboardInterrupt: after Ctrl-C, when the last update is saved.
      SystemExit: after SIGTERM, when the last update is saved.
    """
    mesh = parallel.make_mesh(config.mesh)
    shardings = parallel.make_shardings(start.shapes, mesh, sharding_rules)
    train_state, skipped = _first_state(run_dir, start, shardings, loader)
    step = int(train_state.num_updates)
    compiled = parallel.jit_update(update, mesh, shardings)
    with contextlib.ExitStack() as stack:
        stack.callback(loader.close)
        checkpoints = checkpoint.open_checkpoints(run_dir / "checkpoints", keep=config.keep)
        stack.callback(checkpoint.close, checkpoints)
        logs = _open_logs(config, run_dir, step, name, stack)
        stop = stack.enter_context(stopping.deferred("update"))
        watch = finite.Watch(config.skip_bad_updates, skipped)
        run = _Run(config, run_dir, loader, checkpoints, logs, watch, metadata, schedule, mesh)
        votes = Votes(step)
        steps = range(step + 1, config.num_updates + 1)
        batches = logs.timed(loader) if logs else loader
        for step, batch in zip(steps, batches, strict=False):  # the loader is endless
            train_state, metrics = compiled(train_state, parallel.shard_batch(batch, mesh), key)
            watch.add(step, metrics)
            _after_update(run, step, train_state)
            if votes.any(step, stop.requested, after=train_state):
                break
        if parallel.any_process(stop.requested):
            _save(run, step, train_state)
            checkpoint.wait(checkpoints)
            stop.end(f"update {step} is saved in {run_dir}; the same command resumes")
    return train_state


class _Run(NamedTuple):
    """Everything that is open during a training."""

    config: LoopConfig
    run_dir: pathlib.Path
    loader: Batches
    checkpoints: checkpoint.Checkpoints
    logs: Logs | None  # None in all processes but the first
    watch: finite.Watch
    metadata: dict[str, Any]
    schedule: optax.Schedule
    mesh: Mesh


def _first_state(
    run_dir: pathlib.Path, start: Start, shardings: Any, loader: Batches
) -> tuple[TrainState, finite.Skipped]:
    """Returns the latest saved state and sets the loader's position, or makes the first state."""
    directory = run_dir / "checkpoints"
    if (step := resuming.common_step(directory)) is None:
        return start.make(shardings), finite.NONE_SKIPPED
    placed = parallel.with_shardings(start.shapes, shardings)
    train_state, saved = checkpoint.restore(directory, placed, step=step)
    loader.set_state(saved["loader"])
    return train_state, finite.Skipped(*saved.get("skipped_updates", finite.NONE_SKIPPED))


def _after_update(run: _Run, step: int, train_state: TrainState) -> None:
    """Logs, checks and saves when it is time."""
    config, logs = run.config, run.logs
    is_last = step == config.num_updates
    is_log = is_last or step % config.log_every == 0
    if logs:
        logs.advance(step)
    if is_log or run.watch.is_full:
        values = _read_metrics(run)
        if logs and is_log:
            extra = {"learning_rate": run.schedule(step - 1), **run.loader.metrics()}
            if config.skip_bad_updates:
                extra["skipped_updates"] = run.watch.skipped.total
            logs.write(step, {**values, **extra})
    if is_last or step % config.save_every == 0:
        _save(run, step, train_state)


def _read_metrics(run: _Run) -> dict[str, Any]:
    """Returns the metrics of the last finite update; raises if the training must stop."""
    bad, metrics = run.watch.read()
    if bad is not None:
        checkpoint.wait(run.checkpoints)
        allowed = run.config.skip_bad_updates
        raise ValueError(finite.sentence(bad, run.run_dir, allowed=allowed))
    return metrics


def _save(run: _Run, step: int, train_state: TrainState) -> None:
    """Saves a state, if everything in it is finite."""
    _read_metrics(run)
    path = finite.first_bad_leaf(train_state, run.mesh)
    if path is not None:
        checkpoint.wait(run.checkpoints)
        raise ValueError(finite.leaf_sentence(path, step, run.run_dir))
    position = {"loader": run.loader.get_state(), "skipped_updates": list(run.watch.skipped)}
    checkpoint.save(run.checkpoints, step, train_state, run.metadata | position)


def _open_logs(
    config: LoopConfig, run_dir: pathlib.Path, start: int, name: str, stack: contextlib.ExitStack
) -> Logs | None:
    """Returns the open logs of the first process; None in the others."""
    if not is_first_process():
        return None
    logs = Logs(
        run_dir,
        num_updates=config.num_updates,
        start=start,
        name=name,
        tensorboard=config.tensorboard,
    )
    return stack.enter_context(logs)
