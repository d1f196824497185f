"""Steps per second on the grid: parallel environments in JAX compared with a Gymnasium loop.

    python -m train.benchmark.throughput
    python -m train.benchmark.throughput --num-envs 16384 --rounds 9

Both implement the same environment (tested) and evaluate the same network for every action. The
loop evaluates it in NumPy, which for a single observation is faster than a compiled function.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from train.deep_sarsa import make_policy
from vla_jax.command_line import run
from vla_jax.config import MAX_SIZE, MAX_STEPS, checked
from vla_jax.envs import grid
from vla_jax.envs.grid import GridConfig
from vla_jax.rl import actor, network
from vla_jax.rl.network import MEMORIES, NetworkConfig
from vla_jax.types import Params

_EPSILON = 0.1  # probability of a random action, in both


@dataclass(frozen=True)
@checked(
    num_envs=(1, MAX_SIZE), num_steps=(1, MAX_SIZE), loop_steps=(0, MAX_SIZE), rounds=(1, 1_000_000)
)
class ThroughputConfig:
    """Config of a throughput measurement."""

    world: GridConfig = GridConfig()  # grid whose steps are measured
    network: NetworkConfig = NetworkConfig()  # network of the policy; must be feed-forward
    num_envs: int = 4096  # parallel environments in the JAX program
    num_steps: int = 128  # environment steps of each of them per round
    loop_steps: int = 5000  # environment steps of the Python loop per round
    rounds: int = 5  # measured rounds, alternating between both, after one warm-up round

    def __post_init__(self):
        """Checks the counts, and that the network can be evaluated in NumPy."""
        for name in ("num_envs", "num_steps", "loop_steps", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.num_envs * self.num_steps > MAX_STEPS:
            raise ValueError(
                f"num_steps must be at most {MAX_STEPS // self.num_envs} with {self.num_envs} "
                f"environments, got {self.num_steps}."
            )
        if MEMORIES[self.network.kind].is_recurrent or self.network.object_size:
            raise ValueError(
                "network must be of kind 'fc' with object_size 0, which the NumPy loop can "
                f"evaluate, got '{self.network.kind}' with {self.network.object_size}."
            )


def measure(config: ThroughputConfig) -> str:
    """Returns a sentence with the steps per second of both, and their ratio."""
    env = grid.make(config.world)
    heads = {"q": env.num_actions}
    params = network.init(jax.random.key(0), config.network, env.observation_shape, heads)
    parallel, loop = _make_parallel(config, params), _make_loop(config, params)
    _ = parallel(), loop()  # warm-up: compiles
    rates = [(parallel(), loop()) for _ in range(config.rounds)]
    parallel_rate, loop_rate = (statistics.median(column) for column in zip(*rates, strict=True))
    ratios = sorted(in_jax / in_python for in_jax, in_python in rates)
    return (
        f"{config.num_envs} environments in one program: {parallel_rate / 1e6:.2f} million "
        f"steps/s; Python loop over Gymnasium's API: {loop_rate / 1e3:.1f} thousand; ratio "
        f"{statistics.median(ratios):.0f} ({ratios[0]:.0f} to {ratios[-1]:.0f}, "
        f"{config.rounds} alternating rounds)"
    )


def _make_parallel(config: ThroughputConfig, params: Params) -> Callable[[], float]:
    """Returns a function that plays a round in JAX and returns its steps per second."""
    env = grid.make(config.world)
    policy = make_policy(params, config.network, _EPSILON)

    @jax.jit
    def play(state: actor.Actor, key: jax.Array):
        state, rollout = actor.unroll(env, policy, state, config.num_steps, key=key)
        # The sum keeps the compiler from removing the observations.
        return state, jnp.sum(rollout.mask), jnp.sum(rollout.observation)

    start = actor.start(env, config.num_envs, {}, key=jax.random.key(1))

    def play_round() -> float:
        before = time.perf_counter()
        _, count, _ = jax.block_until_ready(play(start, jax.random.key(2)))
        return float(count) / (time.perf_counter() - before)  # resets do not count as steps

    return play_round


def _make_loop(config: ThroughputConfig, params: Params) -> Callable[[], float]:
    """Returns a function that plays a round in Python and returns its steps per second."""
    from train.benchmark.grid_gymnasium import GridEnv  # needs the extra gym

    env, random = GridEnv(config.world), np.random.default_rng(0)
    layers = [*params["mlp"].values(), params["heads"]["q"]["layers_0"]]
    weights = [(np.asarray(layer["kernel"]), np.asarray(layer["bias"])) for layer in layers]

    def choose(observation: np.ndarray) -> int:
        if random.random() < _EPSILON:
            return int(random.integers(len(grid.ACTIONS)))
        hidden = observation
        for kernel, bias in weights[:-1]:
            hidden = np.maximum(hidden @ kernel + bias, 0)
        return int(np.argmax(hidden @ weights[-1][0] + weights[-1][1]))

    def play_round() -> float:
        before = time.perf_counter()
        observation, _ = env.reset(seed=0)
        for _ in range(config.loop_steps):
            observation, _, terminated, truncated, _ = env.step(choose(observation))
            if terminated or truncated:
                observation, _ = env.reset()
        return config.loop_steps / (time.perf_counter() - before)

    return play_round


def default() -> ThroughputConfig:
    """The default grid and network."""
    return ThroughputConfig()


THROUGHPUT = {"default": default}

if __name__ == "__main__":
    run(measure, THROUGHPUT, description="Measures steps per second on the grid.")
