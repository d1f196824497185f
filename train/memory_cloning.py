"""Clones the expert of a memory task and tests the clones, several seeds in one program."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train.memory_decoders import (
    ACTION_HORIZON,
    Variant,
    make_agent_config,
    with_first_observation,
)
from vla_jax.acting.agent import AgentConfig, make_agent, read_instruction
from vla_jax.acting.rollout import Episodes, run_env
from vla_jax.data import normalize
from vla_jax.data.normalize import NormStats
from vla_jax.envs.demonstrations import WANDER_STEPS, Demonstrations, collect
from vla_jax.policies import policy
from vla_jax.training import finite, loss_terms, losses, optim, recalling
from vla_jax.training.finite import DECISIVE
from vla_jax.training.loss_terms import LossWeights
from vla_jax.training.optim import OptimConfig
from vla_jax.training.update import TrainState, init_train_state, make_update
from vla_jax.types import Array, Batch, Env, Key, Metrics, Observation, Params, Recall

BLOCK = 100  # updates per jitted call, at most
_RECALL = "recall"  # name of the params that predict what must be remembered
_COLUMNS = ("proprio", "environment_state")
_WEIGHTS = LossWeights(gripper=0.1)  # as in the presets of the table


class Clones(NamedTuple):
    """Trained policies of several seeds."""

    agent: AgentConfig
    norm_stats: dict[str, NormStats]
    params: Params  # every leaf [S, ...], S seeds
    loss: np.ndarray  # [num_updates, S]


class CloningData(NamedTuple):
    """Demonstrations as inputs of a training: whole episodes, on the device."""

    observation: Observation  # [N, T, ...], normalised
    action: Array  # [N, T, A]
    real: Array  # [N, T] bool, steps of the episode
    acts: Array  # [N, T] bool, steps whose actions count
    recall: Recall  # [N, T, ...] what must be remembered


class RecallBatch(NamedTuple):
    """A batch of the policy, and what must be remembered at each of its steps."""

    batch: Batch
    recall: Recall  # [B, W, ...]


def clone(
    env: Env,
    variant: Variant,
    *,
    keys: Key,
    num_demonstrations: int,
    num_updates: int,
    batch_size: int,
    hidden_size: int,
    joint_sizes: tuple[int, ...],
    recall_weight: float,
    learning_rate: float,
    progress: Callable[[int], None] = lambda done: None,
) -> Clones:
    """Trains one policy per key on demonstrations of the expert.

    Args:
      env: with an expert.
      variant: the policy.
      keys: `[S]`, one per seed, consumed: params and batches. The demonstrations depend on the
        first.
      num_demonstrations: N, episodes.
      num_updates: of each seed; rounded up to a multiple of the blocks.
      batch_size: B, episodes, or windows of as many steps, per update.
      hidden_size: H of the policy.
      joint_sizes: widths of the MLP before its memory; empty = a linear map.
      recall_weight: weight of the loss of `recalling`, on `env.recall`; 0 = without it.
      learning_rate: peak of the schedule.
      progress: is called with the number of updates so far.

    Raises:
      ValueError: a loss, a gradient or a leaf of the params is NaN or infinite; or recall has a
        weight, and the environment has none.
    """
    if recall_weight and env.recall is None:
        raise ValueError(
            f"recall_weight must be 0 in an environment without recall, got {recall_weight}."
        )
    demonstrations_key = jax.random.fold_in(keys[0], 1)
    agent, norm_stats, data = demonstrate(
        env, variant, demonstrations_key, num_demonstrations, hidden_size, joint_sizes
    )
    config = OptimConfig(
        learning_rate=learning_rate,
        warmup_steps=min(50, num_updates // 10),
        end_factor=0.02,
    )
    init = partial(_init, agent, data.recall if recall_weight else None)
    optimizer = optim.make_optimizer(config, num_updates, jax.eval_shape(init, keys[0]))
    update = make_update(partial(_loss, agent, recall_weight), optimizer)
    window_size = variant.window_size or data.real.shape[1]
    num_windows = batch_size * data.real.shape[1] // window_size
    draw = partial(_draw, data, window_size, num_windows, ACTION_HORIZON)

    size = -(-num_updates // -(-num_updates // BLOCK))  # blocks of equal size: one compilation

    def one_update(key: Key, state: TrainState, _: Any) -> tuple[TrainState, Metrics]:
        batch = draw(jax.random.fold_in(key, state.num_updates))
        state, metrics = update(state, batch, key)
        watched = [name for name in metrics if name in DECISIVE or name.startswith("loss_")]
        return state, {name: metrics[name] for name in watched}

    @jax.jit
    @jax.vmap
    def block(key: Key, state: TrainState) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(partial(one_update, key), state, length=size)

    start = jax.vmap(lambda key: init_train_state(init(key), optimizer))
    init_keys, batch_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    state, curve = start(init_keys), []
    for done in range(size, num_updates + size, size):
        state, metrics = block(batch_keys, state)
        check_finite(metrics, state.params, done - size)
        curve.append(np.asarray(metrics["loss"]).T)
        progress(done)
    params = {name: part for name, part in state.params.items() if name != _RECALL}
    return Clones(agent, norm_stats, params, np.concatenate(curve))


def demonstrate(
    env: Env,
    variant: Variant,
    key: Key,
    num_demonstrations: int,
    hidden_size: int,
    joint_sizes: tuple[int, ...],
) -> tuple[AgentConfig, dict[str, NormStats], CloningData]:
    """Collects what a policy is trained on; returns its agent, the statistics, and the data.

    Args:
      env: with an expert.
      variant: the policy.
      key: consumed.
      num_demonstrations: episodes; those without success are left out.
      hidden_size: H of the policy.
      joint_sizes: widths of the MLP before its memory; empty = a linear map.
    """
    if variant.sees_first:
        env = with_first_observation(env)
    demonstrations = _cut(collect(env, key, num_demonstrations, wander_steps=WANDER_STEPS))
    state_dim = np.asarray(demonstrations.observation.environment_state).shape[-1]
    agent = make_agent_config(variant, env, state_dim, hidden_size, joint_sizes)
    norm_stats = _norm_stats(demonstrations)
    return agent, norm_stats, _make_data(agent, env, norm_stats, demonstrations)


def play(env: Env, variant: Variant, clones: Clones, key: Key, num_episodes: int) -> Episodes:
    """Returns the results of the same episodes for every clone; leaves `[S, num_episodes]`.

    Args:
      env: environment of the training, or one with the same observations.
      variant: the policy.
      clones: from `clone`.
      key: consumed.
      num_episodes: of each seed.
    """
    if variant.sees_first:
        env = with_first_observation(env)
    agent = make_agent(clones.agent, clones.norm_stats)
    words = jnp.asarray(_sentences(clones.agent, env))
    keys = jax.random.split(key, num_episodes)
    return jax.jit(jax.vmap(lambda params: run_env(agent, params, env, words, keys)))(clones.params)


def check_finite(metrics: Metrics, params: Params, before: int) -> None:
    """Raises a ValueError if a loss or gradient of a block, or a leaf of its params, is not finite.

    Args:
      metrics: of the block, `[S, updates]`: loss, its terms and grad_norm.
      params: after the block; the last gradient acts on them alone.
      before: updates before the block.
    """
    num_seeds, num_updates = np.shape(metrics["loss"])
    bad, _ = finite.SeedsWatch(0, num_seeds).read(before, metrics)
    if bad is not None and bad.seed is not None:
        raise ValueError(
            f"{bad.name} must be finite, got {bad.value} in update {bad.step} of seed number "
            f"{bad.seed + 1}; lower --learning-rate."
        )
    leaf = finite.first_bad_leaf(params)
    if leaf is not None:
        raise ValueError(
            f"{leaf} of the params must be finite, got NaN or infinity after update "
            f"{before + num_updates}; lower --learning-rate."
        )


def _cut(demonstrations: Demonstrations) -> Demonstrations:
    """Returns the successful episodes, cut after the longest of them.

    Raises:
      ValueError: there is none.
    """
    keep = np.flatnonzero(np.asarray(demonstrations.success))
    if not len(keep):
        raise ValueError(
            "demonstrations must have a success, got none in "
            f"{len(demonstrations.success)} episodes; raise --num-demonstrations."
        )
    longest = int(np.max(np.asarray(demonstrations.length)[keep]))
    kept = jax.tree.map(lambda part: np.asarray(part)[keep], demonstrations)
    return kept._replace(
        observation=jax.tree.map(lambda part: part[:, :longest], kept.observation),
        action=kept.action[:, :longest],
        is_acting=kept.is_acting[:, :longest],
        instruction=kept.instruction[:, :longest],
        recall=jax.tree.map(lambda part: part[:, :longest], kept.recall),
    )


def _norm_stats(demonstrations: Demonstrations) -> dict[str, NormStats]:
    real = _real(demonstrations)
    stats = {
        name: normalize.compute(getattr(demonstrations.observation, name)[real])
        for name in _COLUMNS
    }
    return {**stats, "action": normalize.fixed_bounds(-1, 1, demonstrations.action.shape[-1])}


def _real(demonstrations: Demonstrations) -> np.ndarray:
    steps = np.arange(demonstrations.action.shape[1])
    return steps[None] < np.asarray(demonstrations.length)[:, None]


def _sentences(agent: AgentConfig, env: Env) -> np.ndarray:
    return np.stack([read_instruction(agent, sentence) for sentence in env.instructions])


def _make_data(
    agent: AgentConfig,
    env: Env,
    norm_stats: dict[str, NormStats],
    demonstrations: Demonstrations,
) -> CloningData:
    real, acts = _real(demonstrations), demonstrations.is_acting
    observation = demonstrations.observation
    proprio, environment_state = (
        normalize.normalize(getattr(observation, name), norm_stats[name],
                            getattr(agent.normalize, name))
        for name in _COLUMNS
    )  # fmt: skip
    instruction = np.asarray(demonstrations.instruction)
    sentences = _sentences(agent, env)[instruction]
    is_visible = _age(instruction) < (agent.instruction_steps % (1 + real.shape[1]))
    words = np.where(is_visible[..., None], sentences, read_instruction(agent, ""))
    observation = Observation(
        proprio=proprio, environment_state=environment_state, instruction=words
    )
    acts = real & np.asarray(acts)
    data = CloningData(observation, demonstrations.action, real, acts, demonstrations.recall)
    return jax.tree.map(jnp.asarray, data)


def _age(instruction: np.ndarray) -> np.ndarray:
    """Returns the steps `[N, T]` since each instruction `[N, T]` began, as the agent counts."""
    steps = np.arange(instruction.shape[1])[None]
    begins = np.diff(instruction, axis=1, prepend=-1) != 0
    return steps - np.maximum.accumulate(np.where(begins, steps, 0), axis=1)


def _draw(
    data: CloningData, window_size: int, batch_size: int, action_horizon: int, key: Key
) -> RecallBatch:
    """Returns random windows, with the chunks that begin at each of their steps.

    A window may begin before its episode; those steps are masked.
    """
    episode_key, end_key = jax.random.split(key)
    num_episodes, length = data.real.shape
    episode = jax.random.randint(episode_key, (batch_size,), 0, num_episodes)
    end = jnp.full(batch_size, length - 1)
    if window_size < length:
        end = jax.random.randint(end_key, (batch_size,), 0, length)
    step = end[:, None] - jnp.arange(window_size)[None, ::-1]

    def take(part: Array, at: Array = step) -> Array:
        lead = episode.reshape(-1, *[1] * (at.ndim - 1))
        return part[lead, jnp.clip(at, 0, length - 1)]

    inside = step >= 0
    ahead = step[..., None] + jnp.arange(action_horizon)[None, None]
    batch = Batch(
        observation=jax.tree.map(take, data.observation),
        tokens=None,
        timestep_mask=take(data.real) & inside,
        action=take(data.action, ahead),
        action_mask=take(data.acts, ahead) & (ahead < length) & (ahead >= 0),
    )
    return RecallBatch(batch, jax.tree.map(take, data.recall))


def _init(agent: AgentConfig, recall: Recall | None, key: Key) -> Params:
    """Returns the policy's params, and those of `recalling` if there is something to recall."""
    params, size = policy.init(key, agent.policy), agent.policy.decoder.hidden_size
    if recall is None:
        return params
    # `policy.init` draws from `split(key)`, which `fold_in` gives with 0 and 1
    return {**params, _RECALL: recalling.init(jax.random.fold_in(key, 2), size, recall)}


def _loss(
    agent: AgentConfig, recall_weight: float, params: Params, inputs: RecallBatch, key: Key
) -> tuple[jax.Array, Metrics]:
    del key  # neither dropout nor sampling
    batch = inputs.batch
    outputs = policy.outputs(
        params, agent.policy, batch.observation, timestep_mask=batch.timestep_mask
    )
    mask = batch.action_mask & batch.timestep_mask[..., None]
    terms, metrics = losses.action_terms(outputs.prediction, batch.action, mask)
    loss, by_term = loss_terms.total(terms, _WEIGHTS)
    if _RECALL not in params:
        return loss, {**metrics, **by_term}
    recall_loss, _ = recalling.loss(
        params[_RECALL], outputs.features, inputs.recall, batch.timestep_mask
    )
    return loss + recall_weight * recall_loss, {**metrics, **by_term, "loss_recall": recall_loss}
