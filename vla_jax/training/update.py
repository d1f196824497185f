"""The train state and one update: gradient, optimiser step, EMA of the params.

`make_update` returns a pure function that is not compiled; `parallel.jit_update` compiles it for
one device or many.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from vla_jax.training import freezing
from vla_jax.training.optim import update_ema
from vla_jax.types import Key, Metrics, Params

LossFn = Callable[[Params, Any, Key], tuple[jax.Array, Metrics]]


@flax.struct.dataclass
class TrainState:
    """Everything that an update changes; its checkpoint is sufficient to resume a training."""

    num_updates: jax.Array  # [] int32, updates done
    params: Params
    opt_state: optax.OptState
    ema_params: Params | None  # EMA of the trained params, see `freezing`; None if disabled


class Counted(NamedTuple):
    """A batch with the number of updates, for a loss that changes during the training."""

    batch: Any
    num_updates: jax.Array  # [] int32, updates done before this one


Update = Callable[[TrainState, Any, Key], tuple[TrainState, Metrics]]


def init_train_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    *,
    ema: bool = False,
    freeze: Sequence[str] = (),
    train: Sequence[str] = (),
) -> TrainState:
    """Returns the state before the first update.

    Args:
      params: initial params.
      optimizer: the same as for `make_update`.
      ema: whether to keep an EMA of the params.
      freeze: path globs of the params without an EMA, as for `make_update`.
      train: exceptions to `freeze`, as for `make_update`.
    """
    trained, _ = freezing.split(params, freeze, train)
    return TrainState(
        num_updates=jnp.zeros([], jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        # A copy: buffers are donated to the update, and none may be donated twice.
        ema_params=jax.tree.map(jnp.copy, trained) if ema else None,
    )


def averaged_params(train_state: TrainState) -> Params:
    """Returns the params for acting: the EMA where there is one, which is more stable."""
    if train_state.ema_params is None:
        return train_state.params
    return freezing.merge(train_state.ema_params, train_state.params)


def make_update(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float | None = None,
    freeze: Sequence[str] = (),
    train: Sequence[str] = (),
    skip_bad: bool = False,
    axis_name: str | None = None,
) -> Update:
    """Returns `update(train_state, batch, key) -> (train_state, metrics)`.

    Randomness comes from `fold_in(key, num_updates)`: pass the same `key` at every update; a
    resumed training then draws the same numbers as an uninterrupted one. The metrics are those of
    `loss_fn`, `loss`, and `grad_norm` (before clipping, without frozen leaves). No gradient of a
    frozen leaf is computed, and frozen leaves are returned unchanged.

    Args:
      loss_fn: `(params, batch, key) -> (loss [], metrics)`.
      optimizer: from `optim.make_optimizer`.
      ema_decay: decay of the EMA; needs a train state made with `ema=True`.
      freeze: path globs of the params that get no gradient, as in the optimiser's config.
      train: path globs of the params that get one although a glob of `freeze` matches.
      skip_bad: whether an update with a loss or gradient that is not finite changes only the number
        of updates, as with `optax.apply_if_finite`.
      axis_name: mapped axis to average over, for `parallel.pmap_update` only; all devices then
        use the same random numbers.

    Raises:
      ValueError: by `update`, if only one of `ema_decay` and `ema_params` is None.
    """

    def loss_of(trained: Any, frozen: Any, batch: Any, key: Key) -> tuple[jax.Array, Metrics]:
        loss, metrics = loss_fn(freezing.merge(trained, frozen), batch, key)
        return loss.astype(jnp.float32), metrics

    def update(train_state: TrainState, batch: Any, key: Key) -> tuple[TrainState, Metrics]:
        count = train_state.num_updates
        trained, frozen = freezing.split(train_state.params, freeze, train)
        grad_fn = jax.value_and_grad(loss_of, has_aux=True)
        (loss, metrics), grads = grad_fn(trained, frozen, batch, jax.random.fold_in(key, count))
        if axis_name is not None:
            loss, metrics, grads = jax.lax.pmean((loss, metrics, grads), axis_name)
        updates, opt_state = optimizer.update(grads, train_state.opt_state, trained)
        params = freezing.merge(optax.apply_updates(trained, updates), frozen)
        ema_params = _next_ema(train_state, params, ema_decay)
        metrics = {**metrics, "loss": loss, "grad_norm": optax.tree.norm(grads)}
        changed = TrainState(count + 1, params, opt_state, ema_params)
        if skip_bad:
            is_finite = jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"])
            kept = TrainState(
                count + 1, train_state.params, train_state.opt_state, train_state.ema_params
            )
            changed = jax.tree.map(partial(jnp.where, is_finite), changed, kept)
        return changed, metrics

    return update


def with_count(update: Update) -> Update:
    """Returns an update whose loss takes `Counted(batch, num_updates)` instead of the batch.

    Args:
      update: from `make_update`.
    """

    def counted(train_state: TrainState, batch: Any, key: Key) -> tuple[TrainState, Metrics]:
        return update(train_state, Counted(batch, train_state.num_updates), key)

    return counted


def _next_ema(train_state: TrainState, params: Params, decay: float | None) -> Params | None:
    if (train_state.ema_params is None) != (decay is None):
        raise ValueError(
            f"ema_decay is {decay}, but ema_params are "
            f"{'absent' if train_state.ema_params is None else 'present'}; "
            "pass ema=True to init_train_state if and only if make_update has an ema_decay."
        )
    if train_state.ema_params is None or decay is None:
        return None
    new = freezing.take_present(params, train_state.ema_params)
    return update_ema(train_state.ema_params, new, train_state.num_updates, decay=decay)
