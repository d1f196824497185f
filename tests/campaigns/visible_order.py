"""Clones the expert of "sequence" where the order, and how much of it is done, are always visible.

    python tests/campaigns/visible_order.py
    python tests/campaigns/visible_order.py --joint-sizes      # a linear map of the state

No memory of the cue is needed: a policy that fails here fails to select the place of a block.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from train import memory_cloning, memory_decoders
from train.memory_grid import CloningConfig
from vla_jax.envs.memory_table import memory_env, memory_task, tasks
from vla_jax.envs.memory_table.memory_env import JaxMemoryConfig
from vla_jax.envs.memory_table.memory_task import MemoryState
from vla_jax.envs.table import rules
from vla_jax.types import Env, Key, Observation, Transition

WORLD = JaxMemoryConfig(task="sequence")
NUM_ITEMS = memory_task.items(tasks.get(WORLD.task), WORLD)


def with_order(env: Env) -> Env:
    """Returns an environment whose `environment_state` is followed by the order and the progress.

    One one-hot vector per block of the order, and one of the number of blocks already touched.
    """

    def join(state: MemoryState, observation: Observation) -> Observation:
        order = jax.nn.one_hot(state.cue.order[:NUM_ITEMS], rules.NUM_BLOCKS).reshape(-1)
        done = jax.nn.one_hot(state.progress.done, NUM_ITEMS + 1)
        seen = jnp.concatenate([jnp.asarray(observation.environment_state), order, done])
        return observation._replace(environment_state=seen)

    def reset(key: Key) -> tuple[MemoryState, Observation]:
        state, observation = env.reset(key)
        return state, join(state, observation)

    def step(state: MemoryState, action: jax.Array) -> tuple[MemoryState, Transition]:
        state, transition = env.step(state, action)
        return state, transition._replace(observation=join(state, transition.observation))

    return env._replace(reset=reset, step=step)


def main() -> None:
    """Prints the success of one training."""
    parser = argparse.ArgumentParser(description="Clones an expert whose cue is always visible.")
    default = CloningConfig().joint_sizes
    parser.add_argument("--joint-sizes", type=int, nargs="*", default=default, help="%(default)s")
    parser.add_argument("--num-updates", type=int, default=2000, help="%(default)s")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="%(default)s")
    parser.add_argument("--seed", type=int, default=0, help="%(default)s")
    options = parser.parse_args()
    env, keys = with_order(memory_env.make(WORLD)), jax.random.key(options.seed)[None]
    variant, suite = memory_decoders.variants()["lstm"], CloningConfig()
    clones = memory_cloning.clone(
        env,
        variant,
        keys=keys,
        num_demonstrations=suite.num_demonstrations,
        num_updates=options.num_updates,
        batch_size=suite.batch_size,
        hidden_size=suite.hidden_size,
        joint_sizes=tuple(options.joint_sizes),
        recall_weight=0.0,
        learning_rate=options.learning_rate,
    )
    episodes = memory_cloning.play(env, variant, clones, jax.random.fold_in(keys[0], 2), 500)
    print(f"success {np.mean(np.asarray(episodes.success)):.1%} of 500 unseen episodes")


if __name__ == "__main__":
    main()
