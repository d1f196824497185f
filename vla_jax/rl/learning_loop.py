"""What learners from reward share: seeds side by side, worlds on the mesh, curves, early stop.

A learner is written for one seed. Here all seeds run in one program (`vmap`), which is compiled
once and does `log_every` updates per call, rollouts included; the worlds of every seed are shared
out over the devices. A seed that has solved its world stops learning; when all have, the training
ends.
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

from vla_jax.evaluation import plots, results
from vla_jax.rl.learner import Learner, LearnState, SeedsConfig, acting_params
from vla_jax.training import checkpoint, parallel
from vla_jax.training.logs import Logs, read_metrics
from vla_jax.training.loop import LoopConfig, is_first_process, save_json
from vla_jax.types import Key, Metrics, Params


class Keys(NamedTuple):
    """Of each seed `[S]`, for different uses, so that none meets the randomness of another."""

    init: Key
    update: Key  # folded with the number of the update
    evaluate: Key  # likewise; these episodes decide when to stop
    report: Key  # of episodes that decided nothing


class Learnt(NamedTuple):
    """What came of all seeds."""

    params: Params  # [S, ...]
    report: Mapping[str, np.ndarray]  # "return" and "success" `[S]`, on episodes never used before
    num_updates: np.ndarray  # [S] until solved, or the end
    env_steps: int  # of all seeds


def learn(
    config: SeedsConfig,
    loop: LoopConfig,
    run_dir: pathlib.Path,
    learner: Learner,
    seed: int,
    *,
    name: str,
) -> Learnt:
    """Learns to the end, from the latest checkpoint in `run_dir` if there is one.

    What resumes is the same to the bit as what was never interrupted.

    Args:
      config: seeds, worlds, and when to stop.
      loop: length, and what to keep.
      run_dir: folder of the run.
      learner: the algorithm.
      seed: of all randomness.
      name: what the progress bar is about.

    Returns:
      What came of it.

    Raises:
      ValueError: a world gave a reward that is not finite, or the loss is no longer finite; the
        last checkpoint is as it was.
    """
    mesh = parallel.make_mesh(loop.num_devices or None)
    if config.num_worlds % mesh.size:
        raise ValueError(
            f"num_worlds {config.num_worlds} cannot be shared out over {mesh.size} devices; "
            f"choose a multiple of {mesh.size}."
        )
    keys = make_keys(seed, config.num_seeds)
    state, step = first_state(run_dir, jax.jit(jax.vmap(learner.init))(keys.init))
    state = jax.device_put(state, _shardings(mesh))
    compiled = _compile(config, learner, mesh)

    def run(state: LearnState, start: int, stop: int) -> tuple[LearnState, Metrics]:
        return compiled(state, keys, np.int32(stop), stop - start)

    state = keep_learning(config, loop, run_dir, run, state, step, name=name)
    everywhere = NamedSharding(mesh, PartitionSpec())
    evaluate = jax.jit(jax.vmap(learner.report), out_shardings=everywhere)
    return make_learnt(config, state, evaluate(acting_params(state), keys.report))


def make_keys(seed: int, num_seeds: int) -> Keys:
    """Returns the keys of a training, `[S]` each."""
    parts = jax.random.split(jax.random.key(seed), len(Keys._fields))
    return Keys(*(jax.random.split(part, num_seeds) for part in parts))


def first_state(run_dir: pathlib.Path, state: LearnState) -> tuple[LearnState, int]:
    """Returns the state as it was saved last, or else the one given; and updates done.

    Args:
      run_dir: folder of the run.
      state: before the first update.
    """
    directory = run_dir / "checkpoints"
    if (latest := checkpoint.latest_step(directory)) is None:
        return state, 0
    return checkpoint.restore(directory, state)[0], latest


def keep_learning(
    config: SeedsConfig,
    loop: LoopConfig,
    run_dir: pathlib.Path,
    run: Callable[[LearnState, int, int], tuple[LearnState, Metrics]],
    state: LearnState,
    step: int,
    *,
    name: str,
) -> LearnState:
    """Returns the state at the end; logs and saves on the way.

    Args:
      config: when to stop.
      loop: length, and what to keep.
      run_dir: folder of the run.
      run: goes from one number of updates to another, and evaluates; its metrics are `[S]`.
      state: after `step` updates.
      step: updates done.
      name: what the progress bar is about.

    Raises:
      ValueError: as `learn`.
    """
    with contextlib.ExitStack() as stack:
        checkpoints = checkpoint.open_checkpoints(run_dir / "checkpoints", keep=loop.keep)
        stack.callback(checkpoint.close, checkpoints)
        logs = None
        if is_first_process():
            logs = stack.enter_context(_open_logs(config, loop, run_dir, step, name))
        while not _is_done(loop, state, step):
            before, step = step, min(step + loop.log_every, loop.num_updates)
            state, metrics = run(state, before, step)
            _check_finite(metrics, step, run_dir)
            if logs:
                logs.advance(step)
                logs.write(step, _scalars(metrics, config, step))
            if _is_done(loop, state, step) or step // loop.save_every > before // loop.save_every:
                checkpoint.save(checkpoints, step, state, {"name": name})
    return state


def _shardings(mesh: Mesh) -> LearnState:
    """Worlds are shared out, along the axis behind that of the seeds; all else is everywhere."""
    everywhere: Any = NamedSharding(mesh, PartitionSpec())
    worlds: Any = NamedSharding(mesh, PartitionSpec(None, "data"))
    return LearnState(everywhere, worlds, everywhere)


def _compile(config: SeedsConfig, learner: Learner, mesh: Mesh) -> Callable[..., Any]:
    """Returns `run(state, keys, stop, num_updates)`, which donates the state."""
    shardings, everywhere = _shardings(mesh), NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        partial(_run_block, config, learner),
        static_argnums=3,
        donate_argnums=0,
        in_shardings=(shardings, everywhere, everywhere),
        out_shardings=(shardings, everywhere),
    )


def _run_block(
    config: SeedsConfig,
    learner: Learner,
    state: LearnState,
    keys: Keys,
    stop: jax.Array,
    num_updates: int,
) -> tuple[LearnState, Metrics]:
    """Does `num_updates` updates of every seed, up to `stop`, and evaluates it; metrics are `[S]`.

    One that has stopped learning is evaluated on fresh episodes too: those at which it stopped
    were chosen by its success.
    """

    def of_seed(state: LearnState, keys: Keys) -> tuple[LearnState, Metrics]:
        state, metrics = jax.lax.scan(
            lambda state, _: _update(learner, keys.update, state), state, length=num_updates
        )
        key = jax.random.fold_in(keys.evaluate, stop)
        found = learner.evaluate(acting_params(state), key)
        solved = state.solved | (found[config.solved_by] >= config.solved_at)
        means = {name: jnp.mean(values) for name, values in metrics.items()}
        return state._replace(solved=solved), {**means, **found, "solved": solved}

    return jax.vmap(of_seed)(state, keys)


def _update(learner: Learner, key: Key, state: LearnState) -> tuple[LearnState, Metrics]:
    """One update; a seed that has solved its world stays as it is."""
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
    """Means over the seeds, and of what tells how good a policy is each seed's value."""
    found = {name: np.asarray(values, np.float64) for name, values in metrics.items()}
    scalars = {name: float(values.mean()) for name, values in found.items()}
    for name in ("return", "success"):
        scalars |= {f"{name}/{i:02d}": float(value) for i, value in enumerate(found[name])}
    env_steps = step * config.num_steps * config.num_worlds
    return {**scalars, "env_steps": float(env_steps)}  # of one seed


def _check_finite(metrics: Metrics, step: int, run_dir: pathlib.Path) -> None:
    """Raises before anything is saved that came of a number that is none."""
    slower = "lower the learning rate"
    remedies = {"reward": "mend the world", "loss": slower, "grad_norm": slower}
    for name, remedy in remedies.items():
        bad = np.flatnonzero(~np.isfinite(np.asarray(metrics[name])))
        if bad.size:
            raise ValueError(
                f"{name} must be finite, got {float(metrics[name][bad[0]])} in seed {bad[0]} "
                f"before update {step}; {remedy}, {tell_latest(run_dir)}."
            )


def tell_latest(run_dir: pathlib.Path) -> str:
    """Returns how far a training that fails can go back, in words."""
    latest = checkpoint.latest_step(run_dir / "checkpoints")
    if latest is None:
        return "nothing was saved before"
    return f"the last checkpoint, at update {latest}, is as it was"


def make_learnt(config: SeedsConfig, state: LearnState, found: Metrics) -> Learnt:
    """Returns what came of a training.

    Args:
      config: worlds and steps of an update.
      state: of all seeds, at the end.
      found: how they do on fresh episodes, `[S]`.
    """
    num_updates = np.asarray(state.train_state.num_updates)
    env_steps = int(num_updates.sum()) * config.num_steps * config.num_worlds
    return Learnt(
        jax.device_get(acting_params(state)),
        {name: np.asarray(values) for name, values in found.items()},
        num_updates,
        env_steps,
    )


def read_curve(run_dir: pathlib.Path, name: str) -> plots.Curve:
    """Returns the learning curve in a run's folder: environment steps `[N]`, values `[N, S]`.

    Args:
      run_dir: folder of the run.
      name: of the metric, "return" or "success".
    """
    lines = read_metrics(run_dir / "metrics.jsonl")
    of_seeds = sorted(key for key in lines[0] if key.startswith(f"{name}/"))
    places = np.array([line["env_steps"] for line in lines])
    return places, np.array([[line[key] for key in of_seeds] for line in lines])


def show(config: SeedsConfig, run_dir: pathlib.Path, learnt: Learnt) -> None:
    """Draws the curve, and tells and keeps what came of the seeds (`report.json`)."""
    name = config.solved_by
    title = f"{config.num_seeds} seeds, mean and 95 % interval"
    curve, goal = {run_dir.name: read_curve(run_dir, name)}, {"solved": config.solved_at}
    panel = plots.Panel(title, "environment steps of each seed", name, curve, goal)
    plots.curves(run_dir / "curve.png", [panel])
    report = {"env_steps": learnt.env_steps, "num_updates": learnt.num_updates.tolist()}
    for metric, values in learnt.report.items():
        low, high = results.mean_interval(values)
        report[metric] = {"mean": float(values.mean()), "interval": [low, high]}
        report[metric] |= {"median": float(np.median(values)), "seeds": values.tolist()}
        print(
            f"{metric}: mean {values.mean():.3f} [{low:.3f}, {high:.3f}], median "
            f"{np.median(values):.3f}, least {values.min():.3f} of {len(values)} seeds"
        )
    save_json(report, run_dir / "report.json")
