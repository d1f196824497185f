"""REINFORCE with a baseline, in parallel environments.

    python -m train.reinforce                                # CartPole-v1, 16 seeds
    python -m train.reinforce --preset cartpole_hidden       # velocities hidden: a GRU
    python -m train.reinforce --preset cartpole_hidden --network.kind fc --run-dir runs/no_memory
    python -m train.reinforce --preset gymnasium --env-id Acrobot-v1
    python -m train.reinforce --init-from RUN_DIR            # fine-tuning: train/finetune.py

Actor and learner are one compiled program; only Gymnasium environments are stepped by Python
(`vla_jax/rl/gymnasium_loop.py`). The same command resumes an interrupted run, with results
bitwise identical; a Gymnasium run starts new episodes instead.
"""

import pathlib
import sys
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from train.finetune import FINETUNE, finetune
from vla_jax.command_line import run
from vla_jax.config import checked
from vla_jax.envs.cartpole import CartPoleConfig
from vla_jax.envs.discrete_worlds import DiscreteGymnasiumConfig, DiscreteWorldConfig
from vla_jax.envs.grid import GridConfig
from vla_jax.envs.table.discrete_table import TableChoicesConfig
from vla_jax.rl import actor_critic, reward_training
from vla_jax.rl.actor import Rollout
from vla_jax.rl.actor_critic import mean
from vla_jax.rl.learner import Algorithm, Learner, SeedsConfig
from vla_jax.rl.network import NetworkConfig
from vla_jax.rl.policy_gradient import baseline_loss, entropy_loss, reinforce_loss, scale
from vla_jax.rl.reward_training import RewardTraining
from vla_jax.training.distributed import together
from vla_jax.training.loop import LoopConfig
from vla_jax.training.optim import OptimConfig
from vla_jax.training.run_lock import exclusive
from vla_jax.types import Key, Metrics, Params


@dataclass(frozen=True)
@checked()
class ReinforceConfig(RewardTraining):
    """Config of a training by REINFORCE with a baseline."""

    run_dir: str = "runs/reinforce"
    world: DiscreteWorldConfig = CartPoleConfig()
    gamma: float = 0.99
    trace_decay: float = 0.95
    entropy_weight: float = 0.01  # weight of the entropy bonus in the loss, >= 0
    baseline_weight: float = 0.5  # weight of the baseline's squared error in the loss, >= 0
    seeds: SeedsConfig = SeedsConfig(solved_by="return", solved_at=475.0)
    optim: OptimConfig = OptimConfig(learning_rate=3e-3, weight_decay=0.0)
    loop: LoopConfig = LoopConfig(num_updates=1500, save_every=500)

    def __post_init__(self):
        """Checks the environment and the ranges."""
        super().__post_init__()
        if self.gamma == 1:
            raise ValueError(
                f"gamma must be below 1, got {self.gamma}: rewards are scaled by 1 − gamma."
            )
        for name in ("entropy_weight", "baseline_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}.")


@together
@exclusive
def train(config: ReinforceConfig) -> pathlib.Path:
    """Trains policies; returns the folder of the run."""
    return reward_training.train_from_reward(config, make_algorithm(config))


def make_reinforce(config: ReinforceConfig) -> Learner:
    """Returns the learner of REINFORCE with a baseline."""
    return reward_training.make(config, make_algorithm(config))


def make_algorithm(config: ReinforceConfig) -> Algorithm:
    """Returns REINFORCE with a baseline as an `Algorithm`, for any environment."""
    return Algorithm(
        config.network,
        heads=actor_critic.heads,
        loss_fn=partial(_loss, config),
        explore=partial(actor_critic.explore, net=config.network),
        exploit=partial(actor_critic.make_policy, net=config.network, greedy=True),
    )


def _loss(
    config: ReinforceConfig, params: Params, batch: tuple[Rollout, jax.Array], key: Key
) -> tuple[jax.Array, Metrics]:
    """Returns the loss of a rollout, back-propagated through time.

    The terms are REINFORCE's loss, the baseline's squared error and the entropy bonus.
    """
    del key
    rollout, _ = batch
    logits, value = actor_critic.outputs(params, config.network, rollout)
    advantage = actor_critic.rollout_advantages(rollout, value, config.gamma, config.trace_decay)
    weight = jnp.asarray(rollout.mask, jnp.float32)
    terms = {
        "reinforce": mean(reinforce_loss, logits, rollout.action, scale(advantage, weight), weight),
        "baseline": mean(baseline_loss, value[:, :-1], advantage + value[:, :-1], weight),
        "entropy": mean(entropy_loss, logits, weight),
    }
    loss = (
        terms["reinforce"]
        + config.baseline_weight * terms["baseline"]
        + config.entropy_weight * terms["entropy"]
    )
    return loss, {f"loss_{name}": term for name, term in terms.items()}


def cartpole() -> ReinforceConfig:
    """CartPole-v1, without memory: median return 500 over 16 seeds, in less than a minute."""
    return ReinforceConfig(run_dir="runs/reinforce_cartpole")


def cartpole_hidden() -> ReinforceConfig:
    """CartPole-v1 with velocities hidden: a GRU has to infer them.

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

    Success 78.0 % [74.8, 81.2] over 4 seeds after 1,500 updates (Deep SARSA: 97 %). With shared
    weights for all objects, as in Deep SARSA's network, success is 32 %.
    """
    return replace(
        cartpole(),
        run_dir="runs/reinforce_grid",
        world=GridConfig(),
        gamma=0.95,
        seeds=SeedsConfig(),
    )


def table() -> ReinforceConfig:
    """The JAX table: touch the block of the instruction, with eleven discrete actions.

    Success 97.2 % [95.5, 98.8] over 4 seeds of 2 million environment steps, about 2 minutes on
    2 CPU cores. The reward is shaped: after 600 updates success is 28 % with a reward for success
    only (`--shaping 0`), and 87 % with shaping.
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
    """`table` with the instruction at the first step only: a GRU has to remember it.

    Not solved: success is 25 % after 850 updates, as for touching any block, and 23 % without
    memory (`--network.kind fc`). A larger step size, longer rollouts, an LSTM and more shaping
    did not help.
    """
    return replace(
        table(),
        run_dir="runs/reinforce_table_hidden",
        partially_observed=True,
        network=NetworkConfig(kind="gru", hidden_sizes=(128,), memory_size=128),
    )


def gymnasium() -> ReinforceConfig:
    """A Gymnasium environment with discrete actions (--env-id), stepped by Python; one seed.

    CartPole-v1: return 500 after 300 updates of 512 environment steps, in 36 seconds.
    """
    seeds = replace(cartpole().seeds, num_seeds=1, num_envs=16, eval_episodes=32)
    return replace(
        cartpole(),
        run_dir="runs/reinforce_gymnasium",
        world=DiscreteGymnasiumConfig(),
        seeds=seeds,
        loop=LoopConfig(num_updates=600, save_every=100),
    )


PRESETS = (cartpole, cartpole_hidden, grid, table, table_hidden, gymnasium)
REINFORCE = {preset.__name__: preset for preset in PRESETS}

if __name__ == "__main__":
    # A cloned policy determines environment and network, so that the options differ.
    if any(word.startswith(("--init-from", "--init_from")) for word in sys.argv[1:]):
        run(finetune, FINETUNE, description="Fine-tunes a cloned policy by REINFORCE.")
    else:
        run(train, REINFORCE, description="Trains policies by REINFORCE with a baseline.")
