"""Whether a policy's memory can be learned at all: what must be remembered, asked for directly.

    python tests/campaigns/memory_probe.py kth --items 2
    python tests/campaigns/memory_probe.py cups_swapped --updates 1 --learning-rate 0.001

The network and the demonstrations are those of the memory suite, but a linear head on the trunk's
features says at every acting step which blocks were meant (`cups`: which place), and is trained
with the cross-entropy of its answers. What is learned in this way, but not by cloning, can be
remembered, and the actions teach it too weakly; what is not learned here is hard to remember.
"""

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from train import memory_cloning, memory_decoders
from vla_jax.envs.memory_table import memory_env, memory_task, permanence, tasks
from vla_jax.envs.memory_table.memory_env import JaxMemoryConfig
from vla_jax.envs.memory_table.memory_task import MemoryState
from vla_jax.nn.layers import dense, init_dense
from vla_jax.policies import policy
from vla_jax.training import optim
from vla_jax.training.optim import OptimConfig
from vla_jax.types import Array, Key, Params

NUM_DEMONSTRATIONS, NUM_TEST, BATCH_SIZE, HIDDEN_SIZE, NUM_CLASSES = 16_000, 1000, 16, 64, 4


def answers(world: JaxMemoryConfig, state: MemoryState) -> Array:
    """Returns what must be remembered, `[num_items]` int32 below 4, of one first state."""
    if world.task == "sequence":
        return state.cue.order[: memory_task.items(tasks.get(world.task), world)]
    if world.task.startswith("cups"):
        return permanence.place_of_target(world, state)[None]
    return state.cue.colour[None]


def first_states(world: JaxMemoryConfig, key: Key) -> MemoryState:
    """Returns the first states of the episodes that `demonstrations.collect` plays with a key."""
    reset_key, _ = jax.random.split(key)
    reset = jax.vmap(memory_env.make(world).reset)
    return reset(jax.random.split(reset_key, NUM_DEMONSTRATIONS))[0]


def train(
    world: JaxMemoryConfig, decoder: str, num_updates: int, learning_rate: float, seed: int
) -> None:
    """Trains one policy's backbone and trunk, and prints the share of right answers as it goes."""
    key = jax.random.key(seed)
    demonstrations_key, init_key, batch_key = (jax.random.fold_in(key, i) for i in (1, 2, 3))
    env, variant = memory_env.make(world), memory_decoders.variants()[decoder]
    agent, _, data, kept = memory_cloning.demonstrate(
        env, variant, demonstrations_key, NUM_DEMONSTRATIONS, HIDDEN_SIZE
    )
    states = first_states(world, demonstrations_key)
    target = jnp.asarray(jax.vmap(partial(answers, world))(states))[kept]
    num_items = target.shape[1]
    params = {
        "policy": policy.init(init_key, agent.policy),
        "answer": init_dense(jax.random.fold_in(init_key, 1), HIDDEN_SIZE, 4 * num_items),
    }
    config = OptimConfig(learning_rate=learning_rate, warmup_steps=50, end_factor=0.02)
    optimizer = optim.make_optimizer(config, num_updates, params)

    def logits(params: Params, rows: Array) -> jax.Array:
        observation = jax.tree.map(lambda part: part[rows], data.observation)
        outputs = policy.outputs(
            params["policy"], agent.policy, observation, timestep_mask=data.real[rows]
        )
        said = dense(outputs.features, **params["answer"])
        return said.reshape(*said.shape[:-1], num_items, NUM_CLASSES)

    def loss_fn(params: Params, rows: Array) -> jax.Array:
        wanted = jnp.broadcast_to(target[rows][:, None], (*data.acts[rows].shape, num_items))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, rows), wanted)
        return jnp.mean(losses, where=data.acts[rows][..., None])

    @jax.jit
    def block(params: Params, state: optax.OptState, key: Key) -> Any:
        def update(carry, key):
            params, state = carry
            rows = jax.random.randint(key, (BATCH_SIZE,), NUM_TEST, len(target))
            grads = jax.grad(loss_fn)(params, rows)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(update, (params, state), jax.random.split(key, 100))[0]

    @jax.jit
    def right(params: Params) -> jax.Array:
        rows = jnp.arange(NUM_TEST)  # no training uses them
        first = jnp.argmax(data.acts[rows], axis=1)
        said = jnp.argmax(logits(params, rows)[rows, first], axis=-1)
        return jnp.mean(said == target[rows], axis=0)

    state = optimizer.init(params)
    for number in range(num_updates // 100):
        params, state = block(params, state, jax.random.fold_in(batch_key, number))
        if (number + 1) % 5 == 0:
            shares = " ".join(f"{share:4.0%}" for share in np.asarray(right(params)))
            print(f"{100 * (number + 1):5} updates: right at the first acting step {shares}")


def main() -> None:
    """Reads the options."""
    parser = argparse.ArgumentParser(description="Asks for what must be remembered.")
    parser.add_argument("task", choices=("lit", "kth", "sequence", "cups", "cups_swapped", "dark"))
    parser.add_argument("--items", type=int, default=0, help="of the world; 0 = the task's default")
    parser.add_argument("--updates", type=int, default=0, help="of the world; 0 = the default")
    parser.add_argument("--decoder", default="lstm", choices=tuple(memory_decoders.variants()))
    parser.add_argument("--num-updates", type=int, default=2000)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    world = JaxMemoryConfig(task=options.task, items=options.items, updates=options.updates)
    train(world, options.decoder, options.num_updates, options.learning_rate, options.seed)


if __name__ == "__main__":
    main()
