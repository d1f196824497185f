"""Behaviour cloning on windows of demonstrations.

    python -m train.imitate --preset table_lstm --dataset demos/table --backbone-from runs/pretrain
    python -m train.imitate --preset table_lstm --kind gru --window-size 16 --run-dir runs/gru
    python -m train.imitate --preset gpu_end_to_end

The same command resumes a run that was interrupted, to the bit. `python -m vla_jax.evaluate
RUN_DIR` plays the result.
"""

import dataclasses
import json
import pathlib

import jax

from train.cache import cached_tokens
from train.command_line import command_line
from train.configs import IMITATE, ImitateConfig
from train.loop import fit, open_run
from vla_jax import checkpoint, losses, optim, policy
from vla_jax import config as configs
from vla_jax.data import lerobot, normalize
from vla_jax.data.dataset import Dataset
from vla_jax.data.loader import make_loader
from vla_jax.data.windows import WindowConfig, Windows
from vla_jax.types import Batch, Key, Metrics, Params
from vla_jax.update import init_train_state, make_update


def imitate(config: ImitateConfig) -> pathlib.Path:
    """Trains a policy; returns the run's folder."""
    run_dir = open_run(config.run_dir, config, overwrite=config.overwrite)
    backbone, decoder = config.agent.policy.backbone, config.agent.policy.decoder

    # Data: episodes -> windows of W steps, chunks of K actions.
    needs_images = backbone.kind != "state"
    dataset = lerobot.read(
        config.dataset,
        feature_keys=dict(config.feature_keys) or None,
        gripper=config.gripper,
        cameras=None if needs_images else (),
        image_size=(backbone.image_size,) * 2 if needs_images else None,
    )
    norm_stats = normalize.compute_norm_stats(dataset)

    # Model: a new one, with the eyes of an earlier run if there is one.
    init_key, key = jax.random.split(jax.random.key(config.seed))
    params = policy.init(init_key, config.agent.policy)
    if config.backbone_from:
        folder = pathlib.Path(config.backbone_from) / "checkpoints"
        params["backbone"] = checkpoint.restore_params(folder)["backbone"]

    # A frozen backbone sees every frame once; the decoder then trains on its tokens.
    tokens = None
    optim_config = config.optim
    if config.frozen_backbone:
        frames = make_windows(config, dataset, norm_stats, window_size=1, stride=1)
        folder = pathlib.Path(config.dataset) / ".tokens"
        tokens = cached_tokens(params["backbone"], backbone, frames, folder)
        freeze = (*optim_config.freeze, "backbone/*")
        optim_config = dataclasses.replace(optim_config, freeze=freeze)
    windows = make_windows(
        config,
        dataset,
        norm_stats,
        window_size=decoder.window_size,
        stride=config.stride,
        tokens=tokens,
    )
    loader = make_loader(
        windows,
        config.loader,
        augment=config.augment if tokens is None else None,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )

    # Update: Huber on the arm, cross-entropy on the gripper, at every position of the window.
    def loss_fn(params: Params, batch: Batch, key: Key) -> tuple[jax.Array, Metrics]:
        chunk = policy.apply(
            params,
            config.agent.policy,
            batch.observation,
            batch.timestep_mask,
            tokens=batch.tokens,
            key=key if decoder.dropout else None,
        )
        return losses.action_loss(
            chunk, batch.action, batch.action_mask, gripper_weight=config.gripper_weight
        )

    num_updates = config.loop.num_updates
    optimizer = optim.make_optimizer(optim_config, num_updates, params)
    ema_decay = optim_config.ema_decay
    update = make_update(loss_fn, optimizer, ema_decay=ema_decay, freeze=optim_config.freeze)
    train_state = init_train_state(params, optimizer, ema=ema_decay is not None)

    # What acting needs lies beside the weights, and inside each checkpoint.
    configs.save(config.agent, run_dir / "agent.json")
    configs.save(config.world, run_dir / "world.json")
    statistics = normalize.to_json(norm_stats)
    (run_dir / "norm_stats.json").write_text(json.dumps(statistics))
    fit(
        config.loop,
        run_dir,
        update,
        train_state,
        loader,
        key,
        schedule=optim.make_schedule(optim_config, num_updates),
        metadata={"config": configs.to_dict(config), "norm_stats": statistics},
        name=run_dir.name,
    )
    return run_dir


def make_windows(
    config: ImitateConfig,
    dataset: Dataset,
    norm_stats: dict[str, normalize.NormStats],
    *,
    window_size: int,
    stride: int,
    tokens=None,
) -> Windows:
    """The data set's windows, as this config's policy wants to see them."""
    agent = config.agent
    sizes = WindowConfig(
        window_size=window_size,
        action_horizon=agent.policy.decoder.action_horizon,
        stride=stride,
        instruction_steps=agent.instruction_steps,
        max_words=agent.policy.backbone.max_words,
        vocab_size=agent.policy.backbone.vocab_size,
    )
    return Windows(
        dataset, sizes, norm_stats=norm_stats, normalization=agent.normalize, tokens=tokens
    )


if __name__ == "__main__":
    imitate(command_line(IMITATE, description="Trains a policy on demonstrations."))
