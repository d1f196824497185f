"""Compares Deep SARSA with tabular SARSA on grids with increasing numbers of obstacles.

    python -m train.tabular

Both learn from the same number of environment steps in the same environments. Every obstacle
multiplies the number of states by 50. The table has one row per state up to `max_rows`; from three
obstacles on, several states share a row. The network generalises: it reads positions relative to
the agent, with shared weights for all obstacles. One plot shows the success of both.
"""

import pathlib
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train.deep_sarsa import SarsaConfig, make_sarsa
from vla_jax.command_line import run
from vla_jax.config import checked
from vla_jax.envs import grid
from vla_jax.envs.grid import GridConfig
from vla_jax.evaluation import plots, results
from vla_jax.rl import actor, exploration
from vla_jax.rl.actor import Actor, Policy
from vla_jax.rl.learning_loop import check_devices, check_split_axes, learn
from vla_jax.rl.td_errors import sarsa_error
from vla_jax.runs import open_run, save_json
from vla_jax.training.run_lock import exclusive
from vla_jax.types import DiscreteEnv, Key, Metrics

_NEVER = 2.0  # success rate above 1: no seed stops early, so that all use the same steps


@dataclass(frozen=True)
@checked(obstacles=(0, 100))
class TabularConfig:
    """Deep SARSA and tabular SARSA on grids with different numbers of obstacles."""

    run_dir: str = "runs/tabular"  # output folder of the run
    obstacles: tuple[int, ...] = (1, 2, 3, 4)  # numbers of obstacles, one comparison each
    max_rows: int = 2**21  # maximum rows of the table; with more states several share a row
    step_size: float = 0.3  # learning rate α of the table, in (0, 1]
    deep: SarsaConfig = SarsaConfig()  # Deep SARSA; both use its environment, steps, γ and ε
    overwrite: bool = False  # delete an existing run in run_dir

    # trainings are compared, and tables are trained again from the start
    MAY_NOT_CHANGE: ClassVar[tuple[str, ...]] = ("deep.loop.num_updates",)

    def __post_init__(self):
        """Checks the environment and the table."""
        if not isinstance(self.deep.world, GridConfig) or self.deep.partially_observed:
            raise ValueError(
                "deep.world must be a fully observed grid, whose states can be numbered; choose a "
                "GridConfig and partially_observed=False."
            )
        if not self.obstacles or min(self.obstacles) < 1:
            raise ValueError(f"obstacles must hold numbers >= 1, got {self.obstacles}.")
        if self.max_rows < 1 or not 0 < self.step_size <= 1:
            raise ValueError(
                "max_rows must be >= 1 and step_size in (0, 1], got "
                f"{self.max_rows} and {self.step_size}."
            )


class TabularState(NamedTuple):
    """Everything that tabular learning changes, for one seed."""

    q: jax.Array  # [rows · num_actions]
    visits: jax.Array  # [rows · num_actions] int32, number of updates of each value
    actor: Actor


@exclusive
def compare(config: TabularConfig) -> pathlib.Path:
    """Trains both on every grid and plots their success; returns the folder of the run."""
    # Check the settings before anything slow starts.
    check_devices(config.deep.seeds, config.deep.loop)
    for num_obstacles in config.obstacles:
        check_split_axes(config.deep.loop, make_sarsa(_with_obstacles(config, num_obstacles)[1]))
    run_dir = open_run(config.run_dir, config, overwrite=config.overwrite)
    network, table = [], []
    for num_obstacles in config.obstacles:
        env_config, deep = _with_obstacles(config, num_obstacles)
        folder = run_dir / f"network_{num_obstacles}"
        result = learn(deep.seeds, deep.loop, folder, make_sarsa(deep), deep.seed, name=folder.name)
        network.append(result.report["success"])
        table.append(_success_of_table(config, deep, env_config))
        print(
            f"{num_obstacles} obstacles, {grid.num_states(env_config):,} states: success "
            f"{_interval(network[-1])} of the network, {_interval(table[-1])} of the table"
        )
    success = {"network": np.array(network), "table": np.array(table)}
    save_json({name: values.tolist() for name, values in success.items()}, run_dir / "report.json")
    title = f"{config.deep.seeds.num_seeds} seeds, mean and 95 % interval"
    curves = {name: (config.obstacles, values) for name, values in success.items()}
    panel = plots.Panel(title, "obstacles", "success", curves, y_range=(0, 1.05))
    plots.curves(run_dir / "obstacles.png", [panel])
    return run_dir


def _success_of_table(
    config: TabularConfig, deep: SarsaConfig, env_config: GridConfig
) -> np.ndarray:
    """Returns the success rates `[num_seeds]` of tables trained in one program."""

    def train_seed(key: Key) -> Metrics:
        return train_table(config, deep, env_config, key=key)

    keys = jax.random.split(jax.random.key(deep.seed), deep.seeds.num_seeds)
    metrics = jax.device_get(jax.jit(jax.vmap(train_seed))(keys))
    if not metrics["is_finite"].all():
        raise ValueError(
            f"the values of the table must be finite, got NaN or infinity with step_size "
            f"{config.step_size} and {env_config.num_obstacles} obstacles; lower --step-size."
        )
    return np.asarray(metrics["success"])


def train_table(
    config: TabularConfig, deep: SarsaConfig, env_config: GridConfig, *, key: Key
) -> Metrics:
    """Returns "return", "success" and "is_finite" `[]` of a table trained by SARSA by one seed."""
    env = grid.make(replace(env_config, observation="index"))
    rows = min(grid.num_states(env_config), config.max_rows)
    start_key, update_key, report_key = jax.random.split(key, 3)
    zeros = jnp.zeros(rows * env.num_actions)
    first = actor.start(env, deep.seeds.num_envs, {}, key=start_key)

    def update(state: TabularState, count: jax.Array) -> tuple[TabularState, None]:
        key = jax.random.fold_in(update_key, count)
        return _update(config, deep, env, state, count, key=key), None

    state = TabularState(zeros, jnp.zeros(zeros.shape, jnp.int32), first)
    state, _ = jax.lax.scan(update, state, jnp.arange(deep.loop.num_updates))
    policy = _make_policy(state.q, env.num_actions, 0.0)
    rollout = actor.play(env, policy, deep.seeds.report_episodes, {}, key=report_key)
    return {**actor.episode_metrics(rollout), "is_finite": jnp.all(jnp.isfinite(state.q))}


def _update(
    config: TabularConfig,
    deep: SarsaConfig,
    env: DiscreteEnv,
    state: TabularState,
    count: jax.Array,
    *,
    key: Key,
) -> TabularState:
    """Returns the state after a rollout; visited values move towards the mean of their targets."""
    act_key, next_key = jax.random.split(key)
    epsilon = exploration.decayed_epsilon(
        count, deep.start_epsilon, deep.end_epsilon, deep.decay_updates
    )
    policy = _make_policy(state.q, env.num_actions, epsilon)
    next_actor, rollout = actor.unroll(env, policy, state.actor, deep.seeds.num_steps, key=act_key)
    indices = _indices(state.q, env.num_actions, rollout.observation)
    values = state.q[indices]  # [B, T + 1, num_actions]
    probability = exploration.epsilon_greedy_probability(values[:, -1:], epsilon)
    last = exploration.sample(probability, key=next_key)
    error = jax.vmap(sarsa_error)(
        values[:, :-1],
        rollout.action,
        rollout.reward,
        actor.discounts(rollout, deep.gamma),
        values[:, 1:],
        jnp.concatenate([rollout.action[:, 1:], last], axis=1),
        actor.lambdas(rollout, deep.trace_decay),
    )
    visited = jnp.take_along_axis(indices[:, :-1], rollout.action[..., None], axis=-1)[..., 0]
    visits = state.visits.at[visited].add(rollout.mask.astype(jnp.int32))
    step_size = config.step_size / jnp.maximum(visits[visited] - state.visits[visited], 1)
    q = state.q.at[visited].add(jnp.where(rollout.mask, step_size * error, 0.0))
    return TabularState(q, visits, next_actor)


def _make_policy(q: jax.Array, num_actions: int, epsilon: Any) -> Policy:
    def policy(carry: Any, observation: Any, reset: Any, key: Key) -> tuple[Any, jax.Array]:
        values = q[_indices(q, num_actions, observation)]
        probability = exploration.epsilon_greedy_probability(values, epsilon)
        return carry, exploration.sample(probability, key=key)

    return policy


def _indices(q: jax.Array, num_actions: int, state_number: Any) -> jax.Array:
    """Returns the indices in the table of the values of states `[...]`, `[..., num_actions]`."""
    row = state_number % jnp.uint32(q.shape[0] // num_actions)
    return jnp.int32(row)[..., None] * num_actions + jnp.arange(num_actions).reshape(
        *(1,) * row.ndim, num_actions
    )


def _with_obstacles(config: TabularConfig, num_obstacles: int) -> tuple[GridConfig, SarsaConfig]:
    """Returns the environment, and Deep SARSA's training in it, without early stopping."""
    deep = config.deep
    assert isinstance(deep.world, GridConfig)  # checked by the config
    env_config = replace(deep.world, num_obstacles=num_obstacles)
    return env_config, replace(deep, world=env_config, seeds=replace(deep.seeds, solved_at=_NEVER))


def _interval(values: np.ndarray) -> str:
    """Returns mean and 95 % interval as text."""
    low, high = results.mean_interval(values)
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def default() -> TabularConfig:
    """The default grid with 1 to 4 obstacles, 16 seeds."""
    deep = SarsaConfig()
    return TabularConfig(deep=replace(deep, loop=replace(deep.loop, num_updates=1000)))


TABULAR = {"default": default}

if __name__ == "__main__":
    run(compare, TABULAR, description="Compares Deep SARSA with tabular SARSA.")
