"""Training loop of reinforcement learners: parallel seeds, sharded environments, early stopping.

A learner is written for one seed. All seeds run in one program (`vmap`), which is compiled once
and does `log_every` updates per call, rollouts included; the environments of every seed are
sharded over the devices. A seed stops learning once it has solved its environment; the training
ends when all seeds have.
"""

import contextlib
import pathlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vla_jax import stopping
from vla_jax.evaluation import plots, results
from vla_jax.rl.learner import Learner, LearnState, SeedsConfig, acting_params
from vla_jax.runs import save_json
from vla_jax.training import checkpoint, finite, parallel, resuming
from vla_jax.training.logs import Logs, read_metrics
from vla_jax.training.loop import LoopConfig
from vla_jax.training.parallel import is_first_process
from vla_jax.types import Key, Metrics, Params

# (state, start, stop) -> state, metrics of the updates, metrics of the evaluation
Run = Callable[[LearnState, int, int], tuple[LearnState, Metrics, Metrics]]


class Keys(NamedTuple):
    """Independent keys for each use, `[num_seeds]` each."""

    init: Key
    update: Key  # folded with the number of the update
    evaluate: Key  # folded with the number of the update; episodes that decide when to stop
    report: Key  # episodes of the final report, used for nothing else


class LearningResult(NamedTuple):
    """Result of a training of all seeds."""

    params: Params  # [num_seeds, ...]
    report: Mapping[str, np.ndarray]  # "return" and "success" [num_seeds], of new episodes
    num_updates: np.ndarray  # [num_seeds], until solved or the end of the training
    env_steps: int  # sum over the seeds


def check_devices(config: SeedsConfig, loop: LoopConfig) -> None:
    """Raises a ValueError unless the environments of a seed can be sharded over the devices."""
    num_parts = parallel.num_row_shards(parallel.make_mesh(loop.mesh))
    if config.num_envs % num_parts:
        raise ValueError(
            f"num_envs must be a multiple of the {num_parts} devices over which the environments "
            f"are split, got {config.num_envs}; change --num-envs or --mesh."
        )


def check_split_axes(loop: LoopConfig, learner: Learner) -> None:
    """Raises a ValueError unless the mesh splits the learner's params over its axes."""
    params = jax.eval_shape(learner.init, jax.random.key(0)).train_state.params
    parallel.check_split_axes(parallel.make_mesh(loop.mesh), learner.sharding_rules, params)


def learn(
    config: SeedsConfig,
    loop: LoopConfig,
    run_dir: pathlib.Path,
    learner: Learner,
    seed: int,
    *,
    name: str,
    record: Mapping[str, Any] | None = None,
) -> LearningResult:
    """Trains all seeds, from the latest checkpoint in `run_dir` if there is one.

    A resumed training gives bitwise the same result as an uninterrupted one.

    Args:
      config: seeds, environments, and the criterion for stopping early.
      loop: number of updates, intervals of logs and checkpoints.
      run_dir: folder of the run.
      learner: the learner of one seed.
      seed: random seed of the whole training.
      name: label of the progress bar.
      record: metadata of every checkpoint, from `learning_record.make`; None = nothing.

    Raises:
      ValueError: the environments cannot be sharded over the devices; or a reward or a loss is not
        finite, in which case the last checkpoint is kept.
    """
    check_devices(config, loop)
    check_split_axes(loop, learner)
    mesh = parallel.make_mesh(loop.mesh)
    keys = make_keys(seed, config.num_seeds)
    init = jax.vmap(learner.init)
    shardings = _shardings(mesh, learner, jax.eval_shape(init, keys.init))
    state, step = first_state(run_dir, jax.jit(init, out_shardings=shardings)(keys.init))
    compiled = _compile(config, learner, mesh, shardings)

    def run(state: LearnState, start: int, stop: int) -> tuple[LearnState, Metrics, Metrics]:
        return compiled(state, keys, np.int32(stop), stop - start)

    state = run_updates(config, loop, run_dir, run, state, step, name=name, record=record)
    params = parallel.fetch(acting_params(state), mesh)
    return make_result(
        config, state, params, jax.jit(jax.vmap(learner.report))(params, keys.report)
    )


def make_keys(seed: int, num_seeds: int) -> Keys:
    """Returns the keys of a training, `[num_seeds]` each."""
    parts = jax.random.split(jax.random.key(seed), len(Keys._fields))
    return Keys(*(jax.random.split(part, num_seeds) for part in parts))


def first_state(run_dir: pathlib.Path, state: LearnState) -> tuple[LearnState, int]:
    """Returns the latest saved state, or `state` if there is none, and its number of updates.

    Args:
      run_dir: folder of the run.
      state: state before the first update.
    """
    directory = run_dir / "checkpoints"
    if (latest := resuming.common_step(directory)) is None:
        return state, 0
    return checkpoint.restore(directory, state, step=latest)[0], latest


def run_updates(
    config: SeedsConfig,
    loop: LoopConfig,
    run_dir: pathlib.Path,
    run: Run,
    state: LearnState,
    step: int,
    *,
    name: str,
    record: Mapping[str, Any] | None = None,
) -> LearnState:
    """Returns the state at the end of the training; writes logs and checkpoints.

    SIGTERM and Ctrl-C end it after the updates of one call of `run`, which are saved.

    Args:
      config: the criterion for stopping early.
      loop: number of updates, intervals of logs and checkpoints.
      run_dir: folder of the run.
      run: `run(state, start, stop)` does the updates from `start` to `stop` and evaluates; returns
        the state, the metrics of all updates `[num_seeds, stop - start]`, and those of the
        evaluation `[num_seeds]`.
      state: state after `step` updates.
      step: updates done so far.
      name: label of the progress bar.
      record: metadata of every checkpoint; None = nothing.

    Raises:
      ValueError: a reward, a loss, a gradient norm or a param is not finite; the last checkpoint is
        kept.
      KeyboardInterrupt: after Ctrl-C, when the last updates are saved.
      SystemExit: after SIGTERM, when the last updates are saved.
    """
    watch = finite.SeedsWatch(loop.skip_bad_updates, config.num_seeds)
    if step:
        saved = checkpoint.read_metadata(run_dir / "checkpoints", step=step)
        watch.set_state(saved.get("skipped_updates"))
    with contextlib.ExitStack() as stack:
        checkpoints = checkpoint.open_checkpoints(run_dir / "checkpoints", keep=loop.keep)
        stack.callback(checkpoint.close, checkpoints)
        logs = None
        if is_first_process():
            logs = stack.enter_context(_open_logs(config, loop, run_dir, step, name))
        stop = stack.enter_context(stopping.deferred(f"block of {loop.log_every} updates"))
        while not _is_done(loop, state, step):
            before, step = step, min(step + loop.log_every, loop.num_updates)
            state, updates, evaluated = run(state, before, step)
            bad, means = watch.read(before, updates)
            if bad is not None:
                checkpoint.wait(checkpoints)
                raise ValueError(finite.sentence(bad, run_dir, allowed=loop.skip_bad_updates))
            metrics = {**means, **evaluated}
            if loop.skip_bad_updates:
                metrics["skipped_updates"] = watch.total
            if logs:
                logs.advance(step)
                logs.write(step, _scalars(metrics, config, step))
            should_stop = parallel.any_process(stop.requested)
            is_due = step // loop.save_every > before // loop.save_every
            if should_stop or is_due or _is_done(loop, state, step):
                _check_state(state, step, run_dir, checkpoints)
                metadata = {"name": name, "skipped_updates": watch.get_state(), **(record or {})}
                checkpoint.save(checkpoints, step, state, metadata)
            if should_stop:
                checkpoint.wait(checkpoints)
                stop.end(f"update {step} is saved in {run_dir}; the same command resumes")
    return state


def _check_state(
    state: LearnState, step: int, run_dir: pathlib.Path, checkpoints: checkpoint.Checkpoints
) -> None:
    path = finite.first_bad_leaf(state.train_state)
    if path is not None:
        checkpoint.wait(checkpoints)
        raise ValueError(finite.leaf_sentence(path, step, run_dir))


def _shardings(mesh: Mesh, learner: Learner, shapes: LearnState) -> LearnState:
    """Returns the shardings: environments (axis 1, after the seeds) split, params by their rules.

    Args:
      mesh: of the devices.
      learner: of one seed.
      shapes: of the state of all seeds.
    """
    rules = parallel.stacked(learner.sharding_rules)
    replicated: Any = NamedSharding(mesh, PartitionSpec())
    sharded: Any = parallel.batch_sharding(mesh, axis=1)
    return LearnState(
        parallel.make_shardings(shapes.train_state, mesh, rules),
        jax.tree.map(lambda leaf: sharded, shapes.actor),
        replicated,
    )


def _compile(
    config: SeedsConfig, learner: Learner, mesh: Mesh, shardings: LearnState
) -> Callable[..., Any]:
    """Returns `run(state, keys, stop, num_updates)`, which donates the state."""
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        parallel.on_mesh(partial(_run_block, config, learner), mesh),
        static_argnums=3,
        donate_argnums=0,
        in_shardings=(shardings, replicated, replicated),
        out_shardings=(shardings, replicated, replicated),
    )


def _run_block(
    config: SeedsConfig,
    learner: Learner,
    state: LearnState,
    keys: Keys,
    stop: jax.Array,
    num_updates: int,
) -> tuple[LearnState, Metrics, Metrics]:
    """Does `num_updates` updates of every seed, up to `stop`, and evaluates all seeds.

    Seeds that have stopped learning are evaluated on new episodes too: the success on the episodes
    that stopped them is biased upwards. Returns the state, the metrics of the updates `[num_seeds,
    num_updates]` and those of the evaluation `[num_seeds]`.
    """

    def run_seed(state: LearnState, keys: Keys) -> tuple[LearnState, Metrics, Metrics]:
        state, metrics = jax.lax.scan(
            lambda state, _: _update(learner, keys.update, state), state, length=num_updates
        )
        key = jax.random.fold_in(keys.evaluate, stop)
        evaluated = learner.evaluate(acting_params(state), key)
        solved = state.solved | (evaluated[config.solved_by] >= config.solved_at)
        return state._replace(solved=solved), metrics, {**evaluated, "solved": solved}

    return jax.vmap(run_seed)(state, keys)


def _update(learner: Learner, key: Key, state: LearnState) -> tuple[LearnState, Metrics]:
    """Does one update; a seed that has solved its environment keeps its state."""
    updated, metrics = learner.update(state, jax.random.fold_in(key, state.train_state.num_updates))
    return jax.tree.map(partial(jnp.where, state.solved), state, updated), metrics


def _is_done(loop: LoopConfig, state: LearnState, step: int) -> bool:
    return step >= loop.num_updates or bool(np.all(np.asarray(state.solved)))


def _open_logs(
    config: SeedsConfig, loop: LoopConfig, run_dir: pathlib.Path, start: int, name: str
) -> Logs:
    return Logs(
        run_dir,
        num_updates=loop.num_updates,
        start=start,
        name=name,
        tensorboard=loop.tensorboard,
        shown=(config.solved_by, "solved"),
    )


def _scalars(metrics: Metrics, config: SeedsConfig, step: int) -> dict[str, float]:
    """Returns the means over the seeds, and "return" and "success" of each seed.

    A mean is over the seeds that have a finite value: one whose updates were all skipped has none.
    """
    arrays = {name: np.asarray(values, np.float64) for name, values in metrics.items()}
    finite_values = {name: values[np.isfinite(values)] for name, values in arrays.items()}
    scalars = {name: float(values.mean()) for name, values in finite_values.items() if len(values)}
    for name in ("return", "success"):
        scalars |= {f"{name}/{i:02d}": float(value) for i, value in enumerate(arrays[name])}
    env_steps = step * config.num_steps * config.num_envs  # of each seed
    return {**scalars, "env_steps": float(env_steps)}


def make_result(
    config: SeedsConfig, state: LearnState, params: Params, report: Metrics
) -> LearningResult:
    """Returns the result of a training.

    Args:
      config: number of environments and steps of an update.
      state: final state of all seeds.
      params: final params for acting of all seeds, `[num_seeds, ...]`.
      report: metrics of the final episodes, `[num_seeds]`.
    """
    num_updates = np.asarray(state.train_state.num_updates)
    env_steps = int(num_updates.sum()) * config.num_steps * config.num_envs
    return LearningResult(
        params,
        {name: np.asarray(values) for name, values in report.items()},
        num_updates,
        env_steps,
    )


def read_curve(run_dir: pathlib.Path, name: str) -> plots.Curve:
    """Returns a learning curve: environment steps `[num_logs]`, values `[num_logs, num_seeds]`.

    A value is NaN where a log left it out, since it was not finite.

    Args:
      run_dir: folder of the run.
      name: metric, "return" or "success".
    """
    lines = read_metrics(run_dir / "metrics.jsonl")
    columns = sorted({key for line in lines for key in line if key.startswith(f"{name}/")})
    env_steps = np.array([line["env_steps"] for line in lines])
    return env_steps, np.array([[line.get(key, np.nan) for key in columns] for line in lines])


def write_report(config: SeedsConfig, run_dir: pathlib.Path, result: LearningResult) -> None:
    """Writes the learning curve (`curve.png`) and the result (`report.json`), and prints it."""
    name = config.solved_by
    title = f"{config.num_seeds} seeds, mean and 95 % interval"
    curve, goal = {run_dir.name: read_curve(run_dir, name)}, {"solved": config.solved_at}
    panel = plots.Panel(title, "environment steps of each seed", name, curve, goal)
    plots.curves(run_dir / "curve.png", [panel])
    report = {"env_steps": result.env_steps, "num_updates": result.num_updates.tolist()}
    for metric, values in result.report.items():
        low, high = results.mean_interval(values)
        report[metric] = {"mean": float(values.mean()), "interval": [low, high]}
        report[metric] |= {"median": float(np.median(values)), "seeds": values.tolist()}
        print(
            f"{metric}: mean {values.mean():.3f} [{low:.3f}, {high:.3f}], median "
            f"{np.median(values):.3f}, minimum {values.min():.3f} of {len(values)} seeds"
        )
    save_json(report, run_dir / "report.json")
