"""Behaviour cloning on windows of demonstrations.

    python -m train.imitate --preset table_lstm --dataset demos/table --backbone-from runs/pretrain
    python -m train.imitate --preset table_lstm --decoder.kind gru --run-dir runs/gru
    python -m train.imitate --preset gpu_end_to_end

The same command resumes an interrupted run, with bitwise identical results.
`python -m vla_jax.evaluate RUN_DIR` evaluates the policy in closed loop.
"""

import pathlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from train.backbone_source import resolve
from train.configs import ImitateConfig
from train.memory_check import check_memory
from train.mixture import read_training_inputs
from train.presets import IMITATE
from train.setup import check, make_optim_config, make_start, param_shapes, sharding_rules
from vla_jax.acting import mixture_robots
from vla_jax.command_line import run
from vla_jax.data.loader import Loader, WindowSource, make_loader
from vla_jax.evaluation import plots
from vla_jax.nn import scheduled_sampling
from vla_jax.policies import heads, policy
from vla_jax.policies.head import TeacherForcing
from vla_jax.runs import make_metadata, open_run, write_acting
from vla_jax.training import (
    auxiliary,
    captions,
    checkpoint,
    device_augment,
    loss_terms,
    losses,
    optim,
)
from vla_jax.training.distributed import together
from vla_jax.training.loop import check_resume, fit
from vla_jax.training.malloc import keep_freed_memory
from vla_jax.training.parallel import is_first_process, make_mesh, row_part
from vla_jax.training.run_lock import exclusive
from vla_jax.training.update import Counted, LossFn, make_update, with_count
from vla_jax.types import Batch, Key, Metrics, Params


@together
@exclusive
def imitate(config: ImitateConfig) -> pathlib.Path:
    """Trains a policy; returns the run's folder."""
    config = resolve(config)
    # Checks before anything slow starts.
    check(config)
    check_memory(config, make_loss(config))

    # Data: windows of W steps with chunks of K actions, and the normalisation statistics, which
    # acting needs too. A frozen backbone encodes every frame once.
    data = read_training_inputs(config)
    batches = make_batches(config, data.source)
    agent = replace(config.agent, action_layout=data.action_layout)
    metadata = make_metadata(config, agent, data.norm_stats, data.robots, world=config.world)
    if not config.overwrite:
        check_resume(pathlib.Path(config.run_dir), batches, metadata)

    # Run folder, with the frozen backbone, which no checkpoint repeats.
    run_dir = open_run(config.run_dir, config, overwrite=config.overwrite)
    write_acting(run_dir, agent, data.norm_stats, config.world)
    mixture_robots.write(run_dir, data.robots)
    if data.frozen_params and is_first_process():
        checkpoint.add_frozen(run_dir / "checkpoints", data.frozen_params)

    # Loop, from the last checkpoint if there is one.
    params = run_updates(config, run_dir, batches, metadata)
    names = data.action_names or _numbered(config.agent.policy.decoder.action_dim)
    _plot(run_dir, config, params, data.example, names=names, control_hz=data.fps)
    return run_dir


def run_updates(
    config: ImitateConfig, run_dir: pathlib.Path, batches: Loader, metadata: dict[str, Any]
) -> Params:
    """Runs all updates; returns the params of the last one, on their devices."""
    init_key, key = jax.random.split(jax.random.key(config.seed))
    settings, num_updates = make_optim_config(config), config.loop.num_updates
    optimizer = optim.make_optimizer(settings, num_updates, param_shapes(config))
    update = make_update(
        make_loss(config),
        optimizer,
        ema_decay=settings.ema_decay,
        freeze=settings.freeze,
        train=settings.train,
        skip_bad=config.loop.skip_bad_updates > 0,
    )
    train_state = fit(
        config.loop,
        run_dir,
        with_count(update),
        make_start(init_key, config, optimizer),
        batches,
        key,
        schedule=optim.make_schedule(settings, num_updates),
        metadata=metadata,
        name=run_dir.name,
        sharding_rules=sharding_rules(config),
    )
    return train_state.params


def make_batches(config: ImitateConfig, windows: WindowSource) -> Loader:
    """Returns an endless loader of this process's batches, which augments images if on the host."""
    on_host = not config.frozen_backbone and config.augment_on == "host"
    index, count = row_part(make_mesh(config.loop.mesh))
    return make_loader(
        windows,
        config.loader,
        augment=config.augment if on_host else None,
        process_index=index,
        process_count=count,
    )


def make_loss(config: ImitateConfig) -> LossFn:
    """Returns the training loss `loss_fn(params, counted, key) -> (loss, metrics)`.

    Huber loss on the arm and cross-entropy on the gripper (or on the bins of both) at every
    position of the window, plus the terms of the auxiliary heads. The autoregressive head is
    trained with teacher forcing or scheduled sampling (`config.sampling`).
    """
    policy_config = config.agent.policy

    def loss_fn(params: Params, counted: Counted, key: Key) -> tuple[jax.Array, Metrics]:
        batch: Batch = counted.batch
        if config.augment_on == "device":
            augment_key, key = jax.random.split(key)
            observation = device_augment.apply(augment_key, batch.observation, config.augment)
            batch = batch._replace(observation=observation)
        targets = None
        if policy.takes_targets(policy_config):
            rate = scheduled_sampling.rate(config.sampling, counted.num_updates)
            targets = TeacherForcing(batch.action, batch.action_mask, rate)
        outputs = policy.outputs(
            params,
            policy_config,
            batch.observation,
            timestep_mask=batch.timestep_mask,
            reset=batch.reset,
            tokens=batch.tokens,
            targets=targets,
            key=key,
        )
        mask = batch.action_mask
        if batch.action_dims is not None:
            mask = mask[..., None] & batch.action_dims[:, :, None]
        terms, metrics = losses.action_terms(outputs.prediction, batch.action, mask)
        if auxiliary.is_on(config.auxiliary):
            # Padding tokens are arbitrary; as targets they are set to 0.
            mask = outputs.tokens.mask[..., None]
            real_tokens = jnp.where(mask, outputs.tokens.tokens, 0.0)
            words = captions.visible_instruction(batch) if config.auxiliary.caption else None
            predictions = auxiliary.apply(
                params["auxiliary"], config.auxiliary, outputs.features, words
            )
            auxiliary_terms, accuracy = auxiliary.loss(
                predictions, config.auxiliary, batch, real_tokens
            )
            terms, metrics = terms | auxiliary_terms, metrics | accuracy
        loss, by_term = loss_terms.total(terms, config.loss)
        return loss, {**by_term, **metrics}

    return loss_fn


def _numbered(action_dim: int) -> tuple[str, ...]:
    return tuple(f"action {i}" for i in range(action_dim))


def _plot(
    run_dir: pathlib.Path,
    config: ImitateConfig,
    params: Params,
    batch: Batch,
    *,
    names: Sequence[str],
    control_hz: float,
) -> None:
    """Plots the first action of each chunk along one demonstration, with the expert's action.

    All processes compute, since the params may be sharded over their devices.
    """
    mesh = make_mesh(config.loop.mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    apply = jax.jit(policy.apply, static_argnums=1, out_shardings=replicated)
    prediction = apply(
        params,
        config.agent.policy,
        batch.observation,
        timestep_mask=batch.timestep_mask,
        tokens=batch.tokens,
    )
    if not is_first_process():
        return
    chunk = heads.actions(jax.device_get(prediction))
    gripper = 2 * jax.nn.sigmoid(chunk.gripper_logit[..., :1]) - 1
    real = batch.timestep_mask[0]
    predicted = np.concatenate([chunk.arm[:, :, 0], gripper], axis=-1)[0, real]
    plots.actions(
        run_dir / "actions.png",
        predicted,
        np.asarray(batch.action)[0, real, 0],
        names=names,
        control_hz=control_hz,
    )


if __name__ == "__main__":
    keep_freed_memory()
    run(imitate, IMITATE, description="Trains a policy on demonstrations.")
