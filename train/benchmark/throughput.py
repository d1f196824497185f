"""Grid-world steps per second: thousands in one program, and one in a loop over Gymnasium's API.

    python -m train.benchmark.throughput
    python -m train.benchmark.throughput --num-worlds 16384 --rounds 9

Both play by the same rules (a test holds that) and ask the same network for every action. The loop
asks it in NumPy, which for one observation is faster than to call a compiled function.
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
from vla_jax.envs import grid
from vla_jax.envs.grid import GridConfig
from vla_jax.rl import actor, network
from vla_jax.rl.network import NetworkConfig
from vla_jax.types import Params

_EPSILON = 0.1  # share of trials, in both


@dataclass(frozen=True)
class ThroughputConfig:
    """What is measured, and how often."""

    world: GridConfig = GridConfig()
    network: NetworkConfig = NetworkConfig()
    num_worlds: int = 4096  # B, side by side
    num_steps: int = 128  # T, of every world in one round
    loop_steps: int = 5000  # of the Python loop in one round
    rounds: int = 5  # in turns, after one to warm up

    def __post_init__(self):
        """Checks the counts, and that the NumPy policy can read the network."""
        for name in ("num_worlds", "num_steps", "loop_steps", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.network.kind != "fc" or self.network.object_size:
            raise ValueError(
                "network must be of kind 'fc' with object_size 0, got "
                f"'{self.network.kind}' with {self.network.object_size}; the loop knows no other."
            )


def measure(config: ThroughputConfig) -> str:
    """Returns a sentence with the steps per second of both, and their ratio."""
    world, net = grid.make(config.world), config.network
    heads = {"q": world.num_actions}
    params = network.init(jax.random.key(0), net, world.observation_shape, heads)
    side_by_side, loop = _side_by_side(config, params), _loop(config, params)
    _ = side_by_side(), loop()  # compiles
    rates = [(side_by_side(), loop()) for _ in range(config.rounds)]
    ours, theirs = (statistics.median(column) for column in zip(*rates, strict=True))
    ratios = sorted(one / other for one, other in rates)
    return (
        f"{config.num_worlds} worlds in one program: {ours / 1e6:.2f} million steps/s; Python loop "
        f"over Gymnasium's API: {theirs / 1e3:.1f} thousand; ratio {statistics.median(ratios):.0f} "
        f"({ratios[0]:.0f} to {ratios[-1]:.0f}, {config.rounds} rounds in turns)"
    )


def _side_by_side(config: ThroughputConfig, params: Params) -> Callable[[], float]:
    """Returns a function that plays a round, and returns its steps per second."""
    world = grid.make(config.world)
    policy = make_policy(params, config.network, _EPSILON)

    @jax.jit
    def play(state: actor.Actor, key: jax.Array):
        state, rollout = actor.unroll(world, policy, state, key, config.num_steps)
        return state, jnp.sum(rollout.mask), jnp.sum(rollout.observation)  # all of it is made

    start = actor.start(world, jax.random.key(1), config.num_worlds, {})

    def play_round() -> float:
        before = time.perf_counter()
        _, count, _ = jax.block_until_ready(play(start, jax.random.key(2)))
        return float(count) / (time.perf_counter() - before)  # without the steps that start anew

    return play_round


def _loop(config: ThroughputConfig, params: Params) -> Callable[[], float]:
    """Returns the same for one world in Python."""
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
    """The default grid and a small network."""
    return ThroughputConfig()


THROUGHPUT = {"default": default}

if __name__ == "__main__":
    run(measure, THROUGHPUT, description="Measures steps per second on the grid.")
