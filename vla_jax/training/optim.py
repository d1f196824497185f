"""The optimiser: clipping, AdamW, learning-rate schedule, freezing and factors by path, EMA.

A path joins the keys from the root of the params to a leaf, as in `decoder/layer_0/kernel`. Globs
follow `fnmatch`, and `*` also crosses `/`: `backbone/*` is the whole backbone. One `update` takes
one batch; with `accumulation_steps` k the params change at every k-th update.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vla_jax import trees
from vla_jax.config import MAX_INT, checked
from vla_jax.training import freezing
from vla_jax.types import Array, Params


@dataclasses.dataclass(frozen=True)
@checked(weight_decay=(0, 1000), lr_factors=(0, 1000), warmup_steps=(0, MAX_INT))
class OptimConfig:
    """Optimiser, learning-rate schedule, frozen params and EMA."""

    learning_rate: float = 3e-4  # peak learning rate
    warmup_steps: int = 100  # updates of linear warm-up
    end_factor: float = 0.1  # last learning rate as a fraction of the peak
    b1: float = 0.9  # Adam's decay of the gradient mean, per optimiser step
    b2: float = 0.95  # Adam's decay of the squared-gradient mean, per optimiser step
    weight_decay: float = 1e-4  # AdamW's decoupled weight decay, of kernels only
    max_grad_value: float | None = None  # clip each gradient element to ± this; None = no clipping
    max_grad_norm: float = 1.0  # then clip gradients to this global norm
    # updates (batches) whose gradients are averaged per optimiser step, with equal weights: each
    # batch counts the same, however many of its targets are real
    accumulation_steps: int = 1
    ema_decay: float | None = None  # decay of the EMA of the params, per update; None = no EMA
    freeze: tuple[str, ...] = ()  # path globs of params that are not trained
    train: tuple[str, ...] = ()  # path globs of params that are trained although `freeze` matches
    lr_factors: tuple[tuple[str, float], ...] = ()  # (path glob, factor) pairs; last match counts

    def __post_init__(self):
        """Raises a ValueError for the first field that is out of range."""
        _check("end_factor", self.end_factor, 0 <= self.end_factor <= 1, "in [0, 1]")
        _check("b1", self.b1, 0 <= self.b1 < 1, "in [0, 1)")
        _check("b2", self.b2, 0 <= self.b2 < 1, "in [0, 1)")
        value = self.max_grad_value
        _check("max_grad_value", value, value is None or value > 0, "None or above 0")
        _check("max_grad_norm", self.max_grad_norm, self.max_grad_norm > 0, "above 0")
        _check("accumulation_steps", self.accumulation_steps, self.accumulation_steps >= 1, ">= 1")
        _check("ema_decay", self.ema_decay, 0 <= (self.ema_decay or 0) < 1, "None or in [0, 1)")


def make_schedule(config: OptimConfig, num_updates: int) -> optax.Schedule:
    """Returns the learning rate as a function of the number of updates done.

    It rises linearly to the peak in `warmup_steps` (and is not 0 at the first update), falls along
    half a cosine to `end_factor` of the peak at `num_updates`, and stays there.

    Args:
      config: peak, warm-up and end factor.
      num_updates: length of the training, in updates.

    Raises:
      ValueError: the warm-up is not shorter than the training.
    """
    if config.warmup_steps >= num_updates:
        raise ValueError(
            f"warmup_steps must be below num_updates = {num_updates}, got {config.warmup_steps}; "
            "shorten the warm-up or train longer."
        )
    return optax.schedules.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (config.warmup_steps + 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=num_updates,
        end_value=config.learning_rate * config.end_factor,
    )


def learning_rate(
    config: OptimConfig, num_updates: int, done: float, *, steps_per_update: int = 1
) -> float:
    """Returns the learning rate that the next call of the optimiser uses.

    Args:
      config: settings of the optimiser.
      num_updates: length of the training.
      done: updates so far.
      steps_per_update: calls of the optimiser in each of these updates.

    Raises:
      ValueError: the warm-up is not shorter than the training.
    """
    schedule = make_schedule(config, num_updates * steps_per_update)
    every = config.accumulation_steps  # calls that share a rate
    return np.asarray(schedule(done * steps_per_update // every * every)).item()


def make_optimizer(
    config: OptimConfig, num_updates: int, params: Params
) -> optax.GradientTransformation:
    """Returns the optimiser: clipping, AdamW with schedule, factors, accumulation, freezing.

    Weight decay applies to leaves whose name ends in `kernel`, not to biases, scales and
    embeddings. Frozen leaves have no optimiser state and do not count in the clipped norm; their
    gradients may be absent, as in `make_update`.

    Args:
      config: settings of the optimiser.
      num_updates: length of the training, in updates.
      params: the tree to be optimised (arrays or shapes); only its paths are used.

    Raises:
      ValueError: a glob matches no path, all params are frozen, or the warm-up is too long.
    """
    trees.check_globs(config.freeze, params, name="freeze")
    trees.check_globs(config.train, params, name="train")
    trees.check_globs([glob for glob, _ in config.lr_factors], params, name="lr_factors")

    def is_trained(path: str) -> bool:
        return freezing.is_trained(path, config.freeze, config.train)

    if not any(map(is_trained, trees.leaf_paths(params))):
        raise ValueError(f"freeze = {config.freeze} leaves nothing to train; drop a glob.")

    every = config.accumulation_steps
    schedule = make_schedule(config, num_updates)
    value = config.max_grad_value
    train = optax.chain(
        *([] if value is None else [optax.clip(value)]),
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            lambda step: schedule(step * every),  # the chain counts optimiser steps, not updates
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=partial(trees.map_paths, lambda path: path.endswith("kernel")),
        ),
        _scale_by_path(config.lr_factors),
    )
    if every > 1:
        train = optax.MultiSteps(train, every).gradient_transformation()

    labels = partial(trees.map_paths, lambda path: "train" if is_trained(path) else "frozen")
    return optax.partition({"train": train, "frozen": optax.set_to_zero()}, labels)


def scale_learning_rate(
    optimizer: optax.GradientTransformation, factor: Array | float
) -> optax.GradientTransformation:
    """Returns an optimiser whose learning rate is `factor` times as large at every update.

    The updates of AdamW, decoupled weight decay included, are proportional to the learning rate.
    The state is the same, so that optimisers with different factors can be mapped.

    Args:
      optimizer: from `make_optimizer`.
      factor: `[]`, may be traced.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(updates, state, params)
        return jax.tree.map(lambda each: factor * each, updates), state

    return optax.GradientTransformation(optimizer.init, update)


def update_ema(
    ema_params: Params, params: Params, num_updates: jax.Array, *, decay: float
) -> Params:
    """Returns the exponential moving average (EMA) of the params after one more update.

        ema ← d·ema + (1 − d)·params,    d = min(decay, (1 + n) / (10 + n))

    The smaller d of the first updates removes the random initial params quickly.

    Args:
      ema_params: EMA so far, shaped like `params`.
      params: params after the update.
      num_updates: n `[]`, updates done before this one.
      decay: the upper limit of d.

    Source: the warm-up is that of TensorFlow's `ExponentialMovingAverage(num_updates=)`.
    """
    step_size = 1.0 - jnp.minimum(decay, (1.0 + num_updates) / (10.0 + num_updates))
    return jax.tree.map(
        lambda ema, new: (ema + step_size * (new - ema)).astype(ema.dtype), ema_params, params
    )


def _scale_by_path(factors: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    def factor(path: str) -> float:
        return trees.lookup(path, factors[::-1], 1.0)  # the last match counts

    def scale(updates: Any, _: Any) -> Any:
        return jax.tree.map(jnp.multiply, updates, trees.map_paths(factor, updates))

    return optax.stateless(scale)


def _check(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {value}.")
