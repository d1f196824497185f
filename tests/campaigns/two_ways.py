"""Heads on a task with two good actions, whose mean is bad: shares of actions that are one of them.

    python tests/campaigns/two_ways.py

The arm goes to +0.6 or to -0.6, each half of the time; the gripper is open in the first case and
closed in the second. An action counts if the arm is within 0.2 of one of the two and the gripper
belongs to it.
"""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vla_jax.policies import heads
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.policies.decoder_fields import HeadName
from vla_jax.policies.head import TeacherForcing
from vla_jax.training import losses
from vla_jax.types import ActionChunk, Key, Params

SIZES = {
    "hidden_size": 1, "action_horizon": 1, "action_dim": 2, "head_sizes": (64, 64), "num_bins": 16,
}  # fmt: skip
BATCH_SIZE, NUM_UPDATES, NUM_ACTIONS = 256, 600, 500


def train(head: HeadName, seed: int) -> tuple[DecoderConfig, Params]:
    """Trains a head on constant features; returns its config and params."""
    config, member = DecoderConfig(head=head, kind="lstm", **SIZES), heads.HEADS[head]
    optimizer = optax.adam(3e-3)
    mask, features = jnp.ones((BATCH_SIZE, 1, 1), bool), jnp.ones((BATCH_SIZE, 1, 1))

    def loss(params: Params, key: Key) -> jax.Array:
        sign_key, key = jax.random.split(key)
        sign = jax.random.rademacher(sign_key, (BATCH_SIZE, 1, 1, 1), jnp.float32)
        action = jnp.concatenate([0.6 * sign, sign], axis=-1)
        targets = TeacherForcing(action, mask) if member.takes_targets else None
        chunk = member.apply(params, config, features, targets=targets, key=key)
        return losses.action_loss(chunk, action, mask)[0]

    def update(state: tuple, key: Key) -> tuple[tuple, None]:
        gradient = jax.grad(loss)(state[0], key)
        changes, opt_state = optimizer.update(gradient, state[1])
        return (optax.apply_updates(state[0], changes), opt_state), None

    first, keys = jax.random.split(jax.random.key(seed))
    params = member.init(first, config)
    run = jax.jit(lambda state: jax.lax.scan(update, state, jax.random.split(keys, NUM_UPDATES)))
    (params, _), _ = run((params, optimizer.init(params)))
    return config, params


def act(config: DecoderConfig, params: Params) -> ActionChunk:
    """Returns actions of independent noise."""
    features = jnp.ones((NUM_ACTIONS, 1, 1))
    chunk = heads.HEADS[config.head].apply(params, config, features, key=jax.random.key(1))
    return heads.actions(chunk)


def is_one_way(chunk: ActionChunk) -> np.ndarray:
    """Returns True for an arm near one of the two good actions."""
    return np.abs(np.abs(np.asarray(chunk.arm)[..., 0, 0]) - 0.6) < 0.2


def succeeds(chunk: ActionChunk) -> np.ndarray:
    """Returns True for an arm near a good action, with the gripper that belongs to it."""
    is_open = np.asarray(chunk.gripper_logit)[..., 0] > 0
    return is_one_way(chunk) & ((np.asarray(chunk.arm)[..., 0, 0] > 0) == is_open)


def main() -> None:
    """Prints a table: head, Euler steps, shares of actions that count and of +0.6, by seed."""
    print("| head | actions that count | share of +0.6 |\n| --- | --- | --- |")
    for head in get_args(HeadName):
        trained = [train(head, seed) for seed in range(3)]
        for steps in (1, 4, 10) if head == "flow" else (4,):
            chunks = [
                act(dataclasses.replace(config, flow_steps=steps), params)
                for config, params in trained
            ]
            name = f"`flow`, flow_steps {steps}" if head == "flow" else f"`{head}`"
            counted = ", ".join(f"{succeeds(chunk).mean():.0%}" for chunk in chunks)
            positive = ", ".join(f"{(np.asarray(chunk.arm) > 0).mean():.0%}" for chunk in chunks)
            print(f"| {name} | {counted} | {positive} |")


if __name__ == "__main__":
    main()
