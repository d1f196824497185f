"""Policies with a value head: acting, outputs over a rollout and its advantages.

REINFORCE and PPO share them. The heads of the network are "logits", one per action, and "value".
"""

from typing import Any

import jax
import jax.numpy as jnp

from vla_jax.rl import actor, exploration, network
from vla_jax.rl.actor import Policy, Rollout
from vla_jax.rl.network import NetworkConfig
from vla_jax.rl.returns import advantages
from vla_jax.types import Array, Key, Params


def heads(num_actions: int) -> dict[str, int]:
    """Returns the names and sizes of the network's heads."""
    return {"logits": num_actions, "value": 1}


def make_policy(params: Params, net: NetworkConfig, *, greedy: bool = False) -> Policy:
    """Returns the policy of a network: samples its actions, or takes the most probable one."""

    def policy(carry: Any, observation: Any, reset: Any, key: Key) -> tuple[Any, jax.Array]:
        carry, outputs = network.step(params, net, carry, observation, reset)
        logits = outputs["logits"]
        if greedy:
            action = jnp.argmax(logits, axis=-1)
        else:
            action = exploration.sample(jax.nn.softmax(logits), key=key)
        return carry, exploration.refuse_non_finite(action, logits)

    return policy


def explore(params: Params, num_updates: Array, *, net: NetworkConfig) -> Policy:
    """Returns the training policy, which does not change with the number of updates."""
    del num_updates
    return make_policy(params, net)


def outputs(params: Params, net: NetworkConfig, rollout: Rollout) -> tuple[jax.Array, jax.Array]:
    """Returns logits `[B, T, num_actions]` and values `[B, T + 1]` from the rollout's carry on."""
    _, of_heads = network.apply(params, net, rollout.carry, rollout.observation, rollout.reset)
    return of_heads["logits"][:, :-1], of_heads["value"][..., 0]


def rollout_advantages(rollout: Rollout, value: Array, gamma: float, lambda_: float) -> jax.Array:
    """Returns generalised advantage estimates `[B, T]`, from rewards scaled by 1 − γ.

    Scaled returns are of the size of rewards: one learning rate then fits all γ.

    Args:
      rollout: the rollout.
      value: v `[B, T + 1]`.
      gamma: γ, below 1.
      lambda_: λ.
    """
    found = jax.vmap(advantages)(
        (1.0 - gamma) * rollout.reward,
        actor.discounts(rollout, gamma),
        value[:, :-1],
        value[:, 1:],
        actor.lambdas(rollout, lambda_),
    )
    return jnp.asarray(found)


def mean(function: Any, *sequences: Array) -> jax.Array:
    """Returns the mean of a loss of one sequence over a batch of sequences."""
    return jnp.mean(jax.vmap(function)(*sequences))
