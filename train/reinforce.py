"""REINFORCE with a baseline: a policy learnt from the reward of many worlds at once.

    python -m train.reinforce                                # CartPole-v1, 16 seeds
    python -m train.reinforce --preset cartpole_hidden       # velocities hidden: a GRU
    python -m train.reinforce --preset cartpole_hidden --network.kind fc --run-dir runs/blind
    python -m train.reinforce --preset gymnasium --env-id Acrobot-v1
    python -m train.reinforce --init-from RUN_DIR            # a cloned policy: train/finetune.py

Actor and learner are one compiled program, but for Gymnasium (`host_learn.py`). The same command
resumes a run that was interrupted, to the bit, but for Gymnasium's, which starts new episodes.
"""

import pathlib
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from train import from_reward
from train.finetune import FINETUNE, finetune
from vla_jax.command_line import run
from vla_jax.envs import discrete_worlds
from vla_jax.envs.cartpole import CartPoleConfig
from vla_jax.envs.discrete_worlds import GymnasiumConfig, WorldConfig
from vla_jax.envs.grid import GridConfig
from vla_jax.envs.table.discrete_table import TableChoicesConfig
from vla_jax.rl import actor, exploration, network
from vla_jax.rl.actor import Policy, Rollout
from vla_jax.rl.learner import Algorithm, Learner, SeedsConfig
from vla_jax.rl.network import NetworkConfig
from vla_jax.rl.policy_gradient import baseline_loss, entropy_loss, reinforce_loss, scale
from vla_jax.rl.returns import advantages
from vla_jax.training.loop import LoopConfig
from vla_jax.training.optim import OptimConfig
from vla_jax.types import Array, Key, Metrics, Params


@dataclass(frozen=True)
class ReinforceConfig:
    """One training by REINFORCE, of many seeds."""

    run_dir: str = "runs/reinforce"  # folder to write to
    world: WorldConfig = CartPoleConfig()
    partially_observed: bool = False  # no speeds, the instruction at the first step only
    network: NetworkConfig = NetworkConfig()
    gamma: float = 0.99  # γ, worth of a reward one step later
    trace_decay: float = 0.95  # λ of the advantages; 1 = values only past the rollout's end
    entropy_weight: float = 0.01  # of the entropy's term in the loss
    baseline_weight: float = 0.5  # of the baseline's term, whose returns are scaled by 1 − γ
    seeds: SeedsConfig = SeedsConfig(solved_by="return", solved_at=475.0)
    optim: OptimConfig = OptimConfig(learning_rate=3e-3, weight_decay=0.0)
    loop: LoopConfig = LoopConfig(num_updates=1500, save_every=500)
    seed: int = 0
    overwrite: bool = False  # delete a run that is there

    def __post_init__(self):
        """Checks that something can be hidden, and the shares and the weights."""
        discrete_worlds.check(self.world, partially_observed=self.partially_observed)
        if not 0 <= self.gamma < 1 or not 0 <= self.trace_decay <= 1:
            raise ValueError(
                "gamma must be in [0, 1) and trace_decay in [0, 1], got "
                f"{self.gamma} and {self.trace_decay}."
            )
        for name in ("entropy_weight", "baseline_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}.")


def train(config: ReinforceConfig) -> pathlib.Path:
    """Trains policies; returns the run's folder."""
    return from_reward.train_from_reward(config, make_algorithm(config))


def make_reinforce(config: ReinforceConfig) -> Learner:
    """REINFORCE with a baseline as a `Learner`."""
    return from_reward.make(config, make_algorithm(config))


def make_algorithm(config: ReinforceConfig) -> Algorithm:
    """REINFORCE with a baseline, whatever the worlds."""

    def explore(params: Params, num_updates: jax.Array) -> Policy:
        return make_policy(params, config.network)

    return Algorithm(
        config.network,
        heads=lambda num_actions: {"logits": num_actions, "value": 1},
        loss_fn=partial(_loss, config),
        explore=explore,
        exploit=partial(make_policy, net=config.network, greedy=True),
    )


def make_policy(params: Params, net: NetworkConfig, *, greedy: bool = False) -> Policy:
    """Returns the policy of a network, which draws its actions, or takes the most probable."""

    def policy(carry: Any, observation: Any, reset: Any, key: Key) -> tuple[Any, jax.Array]:
        carry, outputs = network.step(params, net, carry, observation, reset)
        if greedy:
            return carry, jnp.argmax(outputs["logits"], axis=-1)
        return carry, exploration.sample(key, jax.nn.softmax(outputs["logits"]))

    return policy


def _loss(
    config: ReinforceConfig, params: Params, batch: tuple[Rollout, jax.Array], key: Key
) -> tuple[jax.Array, Metrics]:
    """REINFORCE's loss over a rollout, the baseline's, the entropy's; through time."""
    rollout, _ = batch
    _, outputs = network.apply(
        params, config.network, rollout.carry, rollout.observation, rollout.reset
    )
    logits, value = outputs["logits"][:, :-1], outputs["value"][..., 0]
    # With rewards times 1 − γ a return lies where rewards do, so that one learning rate serves.
    reward = (1.0 - config.gamma) * rollout.reward
    advantage = jax.vmap(advantages)(
        reward,
        actor.discounts(rollout, config.gamma),
        value[:, :-1],
        value[:, 1:],
        actor.lambdas(rollout, config.trace_decay),
    )
    weight = jnp.asarray(rollout.mask, jnp.float32)
    terms = {
        "reinforce": _mean(
            reinforce_loss, logits, rollout.action, scale(advantage, weight), weight
        ),
        "baseline": _mean(baseline_loss, value[:, :-1], advantage + value[:, :-1], weight),
        "entropy": _mean(entropy_loss, logits, weight),
    }
    loss = (
        terms["reinforce"]
        + config.baseline_weight * terms["baseline"]
        + config.entropy_weight * terms["entropy"]
    )
    return loss, {f"loss_{name}": term for name, term in terms.items()}


def _mean(function: Any, *of_episodes: Array) -> jax.Array:
    return jnp.mean(jax.vmap(function)(*of_episodes))


def cartpole() -> ReinforceConfig:
    """CartPole-v1, without memory: median return 500 over 16 seeds, in less than a minute."""
    return ReinforceConfig(run_dir="runs/reinforce_cartpole")


def cartpole_hidden() -> ReinforceConfig:
    """CartPole-v1 with velocities hidden: a GRU has to see how fast things move.

    Median return 500 over 16 seeds; without memory (`--network.kind fc`) 43.
    """
    return replace(
        cartpole(),
        run_dir="runs/reinforce_cartpole_hidden",
        partially_observed=True,
        network=NetworkConfig(kind="gru"),
    )


def grid() -> ReinforceConfig:
    """The 5 × 5 grid with three moving obstacles.

    Success 78.0 % [74.8, 81.2] over 4 seeds after 1,500 updates, where Deep SARSA has 97 %; a
    network that reads the objects alike, as SARSA's does, comes to 32 %.
    """
    return replace(
        cartpole(),
        run_dir="runs/reinforce_grid",
        world=GridConfig(),
        gamma=0.95,
        seeds=SeedsConfig(),
    )


def table() -> ReinforceConfig:
    """The JAX table: touch the block that is asked for, one of eleven choices at a time.

    Success 97.2 % [95.5, 98.8] over 4 seeds of 2 million environment steps, about 2 minutes on
    2 CPU cores. The reward is shaped: for success alone (`--shaping 0`) it is 28 % after 600
    updates, where it is 87 % with shaping.
    """
    return replace(
        cartpole(),
        run_dir="runs/reinforce_table",
        world=TableChoicesConfig(shaping=2.0),
        network=NetworkConfig(hidden_sizes=(128, 128)),
        gamma=0.97,
        seeds=SeedsConfig(num_seeds=4),
        loop=LoopConfig(num_updates=1000, save_every=500),
    )


def table_hidden() -> ReinforceConfig:
    """The same, told at the first step only which block it is: a GRU has to remember it.

    Not learnt yet: 25 % after 850 updates, which is touching any block, and 23 % without memory
    (`--network.kind fc`); larger steps, longer rollouts, an LSTM and more shaping did not help.
    """
    return replace(
        table(),
        run_dir="runs/reinforce_table_hidden",
        partially_observed=True,
        network=NetworkConfig(kind="gru", hidden_sizes=(128,), memory_size=128),
    )


def gymnasium() -> ReinforceConfig:
    """Any Gymnasium environment with a few actions, stepped in Python: --env-id; one seed.

    CartPole-v1: return 500 after 300 updates of 512 environment steps, in 36 seconds.
    """
    seeds = replace(cartpole().seeds, num_seeds=1, num_worlds=16, eval_episodes=32)
    return replace(
        cartpole(),
        run_dir="runs/reinforce_gymnasium",
        world=GymnasiumConfig(),
        seeds=seeds,
        loop=LoopConfig(num_updates=600, save_every=100),
    )


PRESETS = (cartpole, cartpole_hidden, grid, table, table_hidden, gymnasium)
REINFORCE = {preset.__name__: preset for preset in PRESETS}

if __name__ == "__main__":
    # A cloned policy brings its own world and sizes, and so other options.
    if any(word.startswith(("--init-from", "--init_from")) for word in sys.argv[1:]):
        run(finetune, FINETUNE, description="Goes on training a cloned policy from reward.")
    else:
        run(train, REINFORCE, description="Trains policies from reward.")
