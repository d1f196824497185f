"""Deep SARSA beside a table: what happens when obstacles are added.

    python -m train.tabular

Both learn from as many environment steps of the same worlds. The table has a row for each state
where there is room for that many; every obstacle multiplies their number by 50, and the table meets
most states for the first time, again and again. From three obstacles on there is no such room, and
states share rows. The network sees things as seen from the agent, and knows what is like what. One
plot shows the success of both.
"""

import pathlib
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train.deep_sarsa import SarsaConfig, make_sarsa
from vla_jax.command_line import run
from vla_jax.envs import grid
from vla_jax.envs.grid import GridConfig
from vla_jax.evaluation import plots, results
from vla_jax.rl import actor, exploration
from vla_jax.rl.actor import Actor, Policy
from vla_jax.rl.learning_loop import learn
from vla_jax.rl.td_errors import sarsa_error
from vla_jax.training.loop import open_run, save_json
from vla_jax.types import Key, Metrics, World

_NEVER = 2.0  # a success rate that none has, so that all learn from as many steps


@dataclass(frozen=True)
class TabularConfig:
    """Both learners on grids with more and more obstacles."""

    run_dir: str = "runs/tabular"  # folder to write to
    obstacles: tuple[int, ...] = (1, 2, 3, 4)  # how many, one comparison each
    max_rows: int = 2**21  # of a table; beyond, several states share one
    step_size: float = 0.3  # share of the way to its target that a table's value goes
    deep: SarsaConfig = SarsaConfig()  # the other learner; world, steps, γ, ε of both
    overwrite: bool = False  # delete a run that is there

    def __post_init__(self):
        """Checks the worlds and the table."""
        if not isinstance(self.deep.world, GridConfig) or self.deep.partially_observed:
            raise ValueError("deep.world must be a grid, nothing hidden; a table knows no other.")
        if not self.obstacles or min(self.obstacles) < 1:
            raise ValueError(f"obstacles must hold numbers >= 1, got {self.obstacles}.")
        if self.max_rows < 1 or not 0 < self.step_size <= 1:
            raise ValueError(
                "max_rows must be >= 1 and step_size in (0, 1], got "
                f"{self.max_rows} and {self.step_size}."
            )


class TableState(NamedTuple):
    """All that a table's learning changes, of one seed."""

    q: jax.Array  # [rows · A]
    visits: jax.Array  # [rows · A] int32, how often each value was moved
    actor: Actor


def compare(config: TabularConfig) -> pathlib.Path:
    """Trains both on every grid; returns the run's folder, with `obstacles.png` in it."""
    run_dir = open_run(config.run_dir, config, overwrite=config.overwrite)
    network, table = [], []
    for num_obstacles in config.obstacles:
        world, deep = _with_obstacles(config, num_obstacles)
        folder = run_dir / f"network_{num_obstacles}"
        learnt = learn(deep.seeds, deep.loop, folder, make_sarsa(deep), deep.seed, name=folder.name)
        network.append(learnt.report["success"])
        keys = jax.random.split(jax.random.key(deep.seed), deep.seeds.num_seeds)
        found = jax.jit(jax.vmap(partial(train_table, config, deep, world)))(keys)
        table.append(np.asarray(found["success"]))
        print(
            f"{num_obstacles} obstacles, {grid.num_states(world):,} states: success "
            f"{_told(network[-1])} of the network, {_told(table[-1])} of the table"
        )
    found = {"network": np.array(network), "table": np.array(table)}
    save_json({name: values.tolist() for name, values in found.items()}, run_dir / "report.json")
    title = f"{config.deep.seeds.num_seeds} seeds, mean and 95 % interval"
    curves = {name: (config.obstacles, values) for name, values in found.items()}
    panel = plots.Panel(title, "obstacles", "success", curves, y_range=(0, 1.05))
    plots.curves(run_dir / "obstacles.png", [panel])
    return run_dir


def train_table(
    config: TabularConfig, deep: SarsaConfig, world_config: GridConfig, key: Key
) -> Metrics:
    """Returns how well a table does, "return" and "success", that learnt by SARSA; of one seed."""
    world = grid.make(replace(world_config, observation="index"))
    rows = min(grid.num_states(world_config), config.max_rows)
    start_key, update_key, report_key = jax.random.split(key, 3)
    nothing = jnp.zeros(rows * world.num_actions)
    first = actor.start(world, start_key, deep.seeds.num_worlds, {})

    def update(state: TableState, count: jax.Array) -> tuple[TableState, None]:
        return _update(config, deep, world, state, jax.random.fold_in(update_key, count), count)

    state = TableState(nothing, jnp.zeros(nothing.shape, jnp.int32), first)
    state, _ = jax.lax.scan(update, state, jnp.arange(deep.loop.num_updates))
    policy = _make_policy(state.q, world.num_actions, 0.0)
    rollout = actor.play(world, policy, report_key, deep.seeds.report_episodes, {})
    return actor.episode_metrics(rollout)


def _update(
    config: TabularConfig,
    deep: SarsaConfig,
    world: World,
    state: TableState,
    key: Key,
    count: jax.Array,
) -> tuple[TableState, None]:
    """One rollout, and every value in it moved towards the mean of its targets."""
    act_key, next_key = jax.random.split(key)
    epsilon = exploration.decayed_epsilon(
        count, deep.start_epsilon, deep.end_epsilon, deep.decay_updates
    )
    policy = _make_policy(state.q, world.num_actions, epsilon)
    following, rollout = actor.unroll(world, policy, state.actor, act_key, deep.seeds.num_steps)
    places = _places(state.q, world.num_actions, rollout.observation)
    values = state.q[places]  # [B, T + 1, A]
    probability = exploration.epsilon_greedy_probability(values[:, -1:], epsilon)
    last = exploration.sample(next_key, probability)
    error = jax.vmap(sarsa_error)(
        values[:, :-1],
        rollout.action,
        rollout.reward,
        actor.discounts(rollout, deep.gamma),
        values[:, 1:],
        jnp.concatenate([rollout.action[:, 1:], last], axis=1),
        actor.lambdas(rollout, deep.trace_decay),
    )
    moved = jnp.take_along_axis(places[:, :-1], rollout.action[..., None], axis=-1)[..., 0]
    visits = state.visits.at[moved].add(rollout.mask.astype(jnp.int32))
    share = config.step_size / jnp.maximum(visits[moved] - state.visits[moved], 1)
    q = state.q.at[moved].add(jnp.where(rollout.mask, share * error, 0.0))
    return TableState(q, visits, following), None


def _make_policy(q: jax.Array, num_actions: int, epsilon: Any) -> Policy:
    def policy(carry: Any, observation: Any, reset: Any, key: Key) -> tuple[Any, jax.Array]:
        values = q[_places(q, num_actions, observation)]
        probability = exploration.epsilon_greedy_probability(values, epsilon)
        return carry, exploration.sample(key, probability)

    return policy


def _places(q: jax.Array, num_actions: int, number: Any) -> jax.Array:
    """Returns where the values of states `[...]` lie in the table, `[..., A]`."""
    row = number % jnp.uint32(q.shape[0] // num_actions)
    return jnp.int32(row)[..., None] * num_actions + jnp.arange(num_actions).reshape(
        *(1,) * row.ndim, num_actions
    )


def _with_obstacles(config: TabularConfig, num_obstacles: int) -> tuple[GridConfig, SarsaConfig]:
    """The world, and the network's training in it, in which no seed stops early."""
    deep = config.deep
    assert isinstance(deep.world, GridConfig)  # checked by the config
    world = replace(deep.world, num_obstacles=num_obstacles)
    return world, replace(deep, world=world, seeds=replace(deep.seeds, solved_at=_NEVER))


def _told(values: np.ndarray) -> str:
    low, high = results.mean_interval(values)
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def default() -> TabularConfig:
    """The default grid with 1 to 4 obstacles, 16 seeds."""
    deep = SarsaConfig()
    return TabularConfig(deep=replace(deep, loop=replace(deep.loop, num_updates=1000)))


TABULAR = {"default": default}

if __name__ == "__main__":
    run(compare, TABULAR, description="Deep SARSA beside a table.")
