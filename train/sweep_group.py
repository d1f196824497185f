"""Members of a sweep whose params have the same shapes, trained as one program.

Every member is the training that `train.imitate` would make with its seed and learning rate: the
update of one training is mapped (`vmap`) over the members. All members see the same batches, since
these depend on `--loader.seed` and not on the seed of a training.
"""

import pathlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from train.configs import ImitateConfig
from train.imitate import make_batches, make_loss
from train.mixture import TrainingInputs
from train.setup import (
    make_init,
    make_optim_config,
    param_shapes,
    read_start,
    sharding_rules,
    trained_shapes,
)
from vla_jax import config as configs
from vla_jax.acting import mixture_robots
from vla_jax.acting.agent import AgentConfig, make_agent, read_instruction
from vla_jax.acting.rollout import Episodes, run_env
from vla_jax.files import delete_folder
from vla_jax.runs import make_metadata, write_acting
from vla_jax.training import checkpoint, optim, parallel
from vla_jax.training.loop import Start, check_resume, fit
from vla_jax.training.update import TrainState, averaged_params, make_update, with_count
from vla_jax.types import Array, Env, Key, Metrics, Params

# Loss of a member before its first finite update: a state with NaN would not be saved.
NO_LOSS = np.finfo(np.float32).max


class Member(NamedTuple):
    """One training of a sweep."""

    name: str  # such as "lstm-h128-l1-lr0.004-seed0"; its folder in that of the sweep
    config: ImitateConfig  # the same training by `train.imitate`


class Group(NamedTuple):
    """Members that are trained as one program; their configs differ in seed and learning rate."""

    name: str
    members: tuple[Member, ...]  # S of them


@flax.struct.dataclass
class MembersState:
    """Train states of S members; the state of a member that has diverged does not change."""

    num_updates: jax.Array  # [] int32, updates done
    members: TrainState  # leaves [S, ...]
    loss: jax.Array  # [S] float32, of the last finite update; NO_LOSS without any
    bad_in_a_row: jax.Array  # [S] int32, updates that were not finite, up to the last one
    diverged_at: jax.Array  # [S] int32, update at which a member diverged; 0 = it has not


def train_group(
    group: Group, data: TrainingInputs, folder: pathlib.Path, title: str
) -> MembersState:
    """Runs all updates of a group, from its last checkpoint if there is one.

    Args:
      group: the members.
      data: the same for all members.
      folder: of the logs and checkpoints of the group.
      title: label of the progress bar.

    Raises:
      ValueError: the data are others than those of the checkpoint.
      KeyboardInterrupt: after Ctrl-C, when the last update is saved.
      SystemExit: after SIGTERM, when the last update is saved.
    """
    config = group.members[0].config
    settings, num_updates = make_optim_config(config), config.loop.num_updates
    optimizer = optim.make_optimizer(settings, num_updates, param_shapes(config))
    seeds = jnp.array([member.config.seed for member in group.members])
    init_keys, update_keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed)))(seeds).T
    rates = np.array([member.config.optim.learning_rate for member in group.members])
    factors = jnp.asarray(rates / settings.learning_rate, jnp.float32)
    agent = _agent(config, data)
    metadata = make_metadata(config, agent, data.norm_stats, data.robots, world=config.world)
    batches = make_batches(config, data.source)
    check_resume(folder, batches, metadata)
    state = fit(
        config.loop,
        folder,
        _make_update(config, optimizer, factors),
        _make_start(init_keys, config, optimizer),
        batches,
        update_keys,
        schedule=optim.make_schedule(settings, num_updates),
        metadata=metadata,
        name=title,
        sharding_rules=parallel.stacked(sharding_rules(config)),
    )
    return cast(MembersState, state)  # of the same type as the start


def _make_start(keys: Key, config: ImitateConfig, optimizer: Any) -> Start:
    """Returns the state before the first update of members with the keys `[S]`."""
    init_member = make_init(config, optimizer)

    def init(keys: Key, saved: Params) -> MembersState:
        zero = jnp.zeros(len(keys), jnp.int32)
        members = jax.vmap(init_member, in_axes=(0, None))(keys, saved)
        loss = jnp.full(len(keys), NO_LOSS)
        return MembersState(jnp.zeros([], jnp.int32), members, loss, zero, zero)

    def make(shardings: Any) -> MembersState:
        mesh, rules = parallel.make_mesh(config.loop.mesh), sharding_rules(config)
        saved = read_start(
            config, parallel.make_shardings(trained_shapes(config), mesh, rules)
        )  # of one member
        return jax.jit(init, out_shardings=shardings)(keys, saved)

    shapes: Any = jax.eval_shape(init, keys, {})
    return Start(shapes, cast(Any, make))  # `fit` needs no field but num_updates


def _make_update(config: ImitateConfig, optimizer: Any, factors: Array) -> Callable[..., Any]:
    """Returns `update(state, batch, keys) -> (state, metrics)` of all members.

    Args:
      config: of the members, but for seed and learning rate.
      optimizer: with the learning rate of `config`.
      factors: `[S]`, learning rate of each member as a multiple of that.
    """
    settings, loss_fn = make_optim_config(config), make_loss(config)

    def update_member(
        state: TrainState, batch: Any, key: Key, factor: Array
    ) -> tuple[TrainState, Metrics]:
        update = make_update(
            loss_fn,
            optim.scale_learning_rate(optimizer, factor),
            ema_decay=settings.ema_decay,
            freeze=settings.freeze,
            train=settings.train,
            skip_bad=True,  # one that is not finite must not stop the other members
        )
        return with_count(update)(state, batch, key)

    def update(state: MembersState, batch: Any, keys: Key) -> tuple[MembersState, Metrics]:
        mapped = jax.vmap(update_member, in_axes=(0, None, 0, 0))
        members, metrics = mapped(state.members, batch, keys, factors)
        step = state.num_updates + 1
        has_diverged = state.diverged_at > 0
        is_bad = ~(jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"]))
        in_a_row = jnp.where(is_bad, state.bad_in_a_row + 1, 0)
        diverges = ~has_diverged & (in_a_row > config.loop.skip_bad_updates)
        members = _where(has_diverged, state.members, members)
        changed = MembersState(
            step,
            members,
            jnp.where(is_bad | has_diverged, state.loss, metrics["loss"]),
            in_a_row,
            jnp.where(diverges, step, state.diverged_at),
        )
        return changed, _summary(metrics, changed, is_bad)

    return update


def _where(condition: jax.Array, chosen: Any, other: Any) -> Any:
    """Returns leaves `[S, ...]` of one tree where `condition [S]` is True, else of the other."""

    def choose(first: jax.Array, second: jax.Array) -> jax.Array:
        lead = condition.reshape(-1, *[1] * (first.ndim - 1))
        return jnp.where(lead, first, second)

    return jax.tree.map(choose, chosen, other)


def _summary(metrics: Metrics, state: MembersState, is_bad: jax.Array) -> Metrics:
    """Returns the means over the members that have not diverged, and the loss of each member."""
    counts = ~is_bad & (state.diverged_at == 0)
    total = jnp.maximum(jnp.sum(counts), 1)
    means = {
        name: jnp.sum(jnp.where(counts, values, 0.0)) / total for name, values in metrics.items()
    }
    losses = jnp.where(state.loss == NO_LOSS, jnp.nan, state.loss)  # NaN is left out of the logs
    each = {f"loss/{index:02d}": loss for index, loss in enumerate(losses)}
    return {**means, **each, "diverged": jnp.sum(state.diverged_at > 0)}


def final_loss(state: MembersState, index: int) -> float | None:
    """Returns the loss of the last finite update of a member; None if it had none.

    Args:
      state: of the group.
      index: of the member in it.
    """
    loss = np.float32(state.loss[index])
    return None if loss == NO_LOSS else float(loss)


def member_state(state: MembersState, index: int) -> TrainState:
    """Returns the train state of one member, as that of `train.imitate`.

    Args:
      state: of the group.
      index: of the member in it.
    """
    return jax.tree.map(lambda leaf: np.asarray(leaf[index]), state.members)


def num_params(config: ImitateConfig) -> int:
    """Returns the number of params of a training, without a backbone that only encodes."""
    return sum(leaf.size for leaf in jax.tree.leaves(trained_shapes(config)))


def play_group(
    group: Group, data: TrainingInputs, state: MembersState, env: Env, seeds: Sequence[int]
) -> Episodes:
    """Returns the results of the same episodes for every member; leaves `[S, len(seeds)]`.

    Args:
      group: the members.
      data: of their training.
      state: after it.
      env: JAX environment of the demonstrations.
      seeds: one per episode, as of `vla_jax.evaluate`.
    """
    config = _agent(group.members[0].config, data)
    agent = make_agent(config, data.norm_stats)
    words = jnp.stack([read_instruction(config, sentence) for sentence in env.instructions])
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    frozen = {} if data.frozen_params is None else checkpoint.read_params(data.frozen_params)

    def play(params: Params) -> Episodes:
        return run_env(agent, frozen | params, env, words, keys)

    return jax.device_get(jax.jit(jax.vmap(play))(averaged_params(state.members)))


def save_member(
    folder: pathlib.Path, member: Member, state: TrainState, data: TrainingInputs
) -> None:
    """Writes a member as a run, which `vla_jax.evaluate` reads and `train.imitate` continues.

    Args:
      folder: of the member; what a killed process left in it is deleted.
      member: the training.
      state: its last state.
      data: of the training.
    """
    delete_folder(folder)
    agent, config = _agent(member.config, data), member.config
    configs.save_of_run(config, folder / "config.json")
    write_acting(folder, agent, data.norm_stats, config.world)
    mixture_robots.write(folder, data.robots)
    directory = folder / "checkpoints"
    if data.frozen_params:
        checkpoint.add_frozen(directory, data.frozen_params)
    batches = make_batches(config, data.source)
    position = batches.get_state() | {"num_batches": int(state.num_updates)}
    metadata = make_metadata(config, agent, data.norm_stats, data.robots, world=config.world)
    handle = checkpoint.open_checkpoints(directory)
    checkpoint.save(handle, int(state.num_updates), state, metadata | {"loader": position})
    checkpoint.close(handle)


def _agent(config: ImitateConfig, data: TrainingInputs) -> AgentConfig:
    return replace(config.agent, action_layout=data.action_layout)
