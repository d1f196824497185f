"""Trains a linear classifier of what must be remembered on a policy's features.

    python tests/campaigns/memory_probe.py kth --items 2
    python tests/campaigns/memory_probe.py sequence --learning-rate 0.001

The network and the demonstrations are those of the memory suite. In place of the actions, a linear
layer on the trunk's features gives at every acting step which blocks were lit for the robot;
backbone, trunk and layer are trained with its cross-entropy. If this succeeds and cloning does not,
the trunk can store the cue, and the loss of the actions has too small a gradient for it.
"""

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from train import memory_cloning, memory_decoders, memory_grid
from train.memory_cloning import Prepared
from train.memory_grid import CloningConfig
from vla_jax.data.normalize import normalize
from vla_jax.envs.memory_table import memory_env, memory_task, tasks
from vla_jax.envs.memory_table.memory_env import JaxMemoryConfig
from vla_jax.envs.memory_table.memory_task import MemoryState
from vla_jax.nn.layers import dense, init_dense
from vla_jax.policies import policy
from vla_jax.training import optim
from vla_jax.training.optim import OptimConfig
from vla_jax.types import Array, Key, Params

SUITE = CloningConfig()
NUM_DEMONSTRATIONS, HIDDEN_SIZE = SUITE.num_demonstrations, SUITE.hidden_size
NUM_TEST, NUM_CLASSES = 1000, 4
BLOCK, PRINT_EVERY = 100, 500  # updates
# policies of the suite whose window is the whole episode
DECODERS = tuple(
    name
    for name, variant in memory_decoders.variants().items()
    if not variant.window_size and not variant.sees_first
)


def labels(world: JaxMemoryConfig, state: MemoryState) -> Array:
    """Returns what must be remembered, `[num_items]` int32 below 4, of one first state."""
    if world.task == "sequence":
        return state.cue.order[: memory_task.items(tasks.get(world.task), world)]
    return state.cue.colour[None]


def first_states(world: JaxMemoryConfig, key: Key, prepared: Prepared) -> MemoryState:
    """Returns the first states of the demonstrations that `memory_cloning.demonstrate` kept.

    Args:
      world: of the demonstrations.
      key: the one that they were collected with.
      prepared: the demonstrations; their first observations must be those of the states.
    """
    reset_key, _ = jax.random.split(key)  # as in `demonstrations.collect`
    reset = jax.vmap(memory_env.make(world).reset)
    start = reset(jax.random.split(reset_key, NUM_DEMONSTRATIONS))
    states, first = jax.tree.map(lambda part: np.asarray(part)[prepared.kept], start)
    for name in ("environment_state", "proprio"):
        method = getattr(prepared.agent.normalize, name)
        expected = normalize(getattr(first, name), prepared.norm_stats[name], method)
        found = getattr(prepared.data.observation, name)[:, 0]
        np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=name)
    return states


def train(
    world: JaxMemoryConfig, decoder: str, num_updates: int, learning_rate: float, seed: int
) -> None:
    """Trains one policy's backbone and trunk, and prints the share of correct blocks as it goes."""
    key = jax.random.key(seed)
    demonstrations_key, init_key, batch_key = (jax.random.fold_in(key, i) for i in (1, 2, 3))
    env, variant = memory_env.make(world), memory_decoders.variants()[decoder]
    prepared = memory_cloning.demonstrate(
        env, variant, demonstrations_key, NUM_DEMONSTRATIONS, HIDDEN_SIZE, SUITE.joint_sizes
    )
    agent, data = prepared.agent, prepared.data
    states = first_states(world, demonstrations_key, prepared)
    target = jnp.asarray(jax.vmap(partial(labels, world))(states))
    num_items = target.shape[1]
    params = {
        "policy": policy.init(init_key, agent.policy),
        "classifier": init_dense(
            jax.random.fold_in(init_key, 1), HIDDEN_SIZE, num_items * NUM_CLASSES
        ),
    }
    config = OptimConfig(
        learning_rate=learning_rate or memory_grid.learning_rate(SUITE, variant.kind),
        warmup_steps=min(50, num_updates // 10),
        end_factor=0.02,
    )
    optimizer = optim.make_optimizer(config, num_updates, params)

    def logits(params: Params, rows: Array) -> jax.Array:
        observation = jax.tree.map(lambda part: part[rows], data.observation)
        outputs = policy.outputs(
            params["policy"], agent.policy, observation, timestep_mask=data.real[rows]
        )
        scores = dense(outputs.features, **params["classifier"])
        return scores.reshape(*scores.shape[:-1], num_items, NUM_CLASSES)

    def loss_fn(params: Params, rows: Array) -> jax.Array:
        expected = jnp.broadcast_to(target[rows][:, None], (*data.acts[rows].shape, num_items))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, rows), expected)
        return jnp.mean(losses, where=data.acts[rows][..., None])

    @partial(jax.jit, static_argnums=3)
    def block(params: Params, state: optax.OptState, key: Key, size: int) -> Any:
        def update(carry, key):
            params, state = carry
            rows = jax.random.randint(key, (SUITE.batch_size,), NUM_TEST, len(target))
            grads = jax.grad(loss_fn)(params, rows)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(update, (params, state), jax.random.split(key, size))[0]

    @jax.jit
    def accuracy(params: Params, rows: Array) -> jax.Array:
        first = jnp.argmax(data.acts[rows], axis=1)
        predicted = jnp.argmax(logits(params, rows)[rows, first], axis=-1)
        return jnp.mean(predicted == target[rows], axis=0)

    state, tested = optimizer.init(params), jnp.arange(NUM_TEST)  # no training uses these
    for done in range(0, num_updates, BLOCK):
        end = min(done + BLOCK, num_updates)
        params, state = block(params, state, jax.random.fold_in(batch_key, done), end - done)
        if end % PRINT_EVERY == 0 or end == num_updates:
            shares = " ".join(f"{share:4.0%}" for share in np.asarray(accuracy(params, tested)))
            print(f"{end:5} updates: accuracy at the first acting step {shares}", flush=True)


def main() -> None:
    """Reads the options."""
    parser = argparse.ArgumentParser(description="Trains a classifier of the cue.")
    parser.add_argument("task", choices=("lit", "kth", "sequence"))
    for name, kind, default, text in (
        ("items", int, 0, "of the world; 0 = the task's default"),
        ("num-updates", int, 1500, "updates of the training"),
        ("learning-rate", float, 0.0, "peak of the schedule; 0 = that of the memory suite"),
        ("seed", int, 0, "of demonstrations, params and batches"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (%(default)s)")
    parser.add_argument("--decoder", default="lstm", choices=DECODERS, help="(%(default)s)")
    options = parser.parse_args()
    world = JaxMemoryConfig(task=options.task, items=options.items)
    train(world, options.decoder, options.num_updates, options.learning_rate, options.seed)


if __name__ == "__main__":
    main()
