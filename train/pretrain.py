"""Gives the encoder its eyes: regression of what the data set declares about each frame.

    python -m train.pretrain --dataset demos/table --run-dir runs/pretrain

The target is a column of the demonstrations, here the simulator's block positions
(`environment_state`). A linear readout from the tokens must find them, so that a recurrent
decoder on the frozen tokens need not look for them itself. The readout is thrown away. The words'
embedding stays random: nothing in these targets would teach it, only make sentences alike.
"""

import pathlib
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from train.command_line import run
from train.loop import LoopConfig, fit, open_run, save_json
from vla_jax import config as configs
from vla_jax import losses, optim
from vla_jax.backbones.family import BACKBONES
from vla_jax.backbones.perceiver import PerceiverConfig
from vla_jax.data import lerobot, normalize
from vla_jax.data.augment import AugmentConfig
from vla_jax.data.loader import LoaderConfig, make_loader
from vla_jax.data.normalize import NormalizeConfig
from vla_jax.data.windows import WindowConfig, Windows
from vla_jax.optim import OptimConfig
from vla_jax.types import Array, Batch, Key, Metrics, Params
from vla_jax.update import init_train_state, make_update


@dataclass(frozen=True)
class PretrainConfig:
    """One pre-training of a backbone."""

    dataset: str = "demos/table"  # folder of a LeRobot v3.0 data set
    run_dir: str = "runs/pretrain"  # folder to write to
    target: Literal["environment_state", "proprio", "action"] = "environment_state"
    backbone: PerceiverConfig = PerceiverConfig()
    normalize: NormalizeConfig = NormalizeConfig()  # method of each column
    augment: AugmentConfig = AugmentConfig()
    loader: LoaderConfig = LoaderConfig(batch_size=64)
    optim: OptimConfig = OptimConfig(learning_rate=5e-3, end_factor=0.01, freeze=("*/words/*",))
    loop: LoopConfig = LoopConfig(num_updates=3000, save_every=1000)
    seed: int = 0  # of the params and the dropout
    overwrite: bool = False  # delete a run that is there


def table() -> PretrainConfig:
    """The table's encoder, 2 minutes on 2 cores: block positions from two 64 × 64 pictures."""
    return PretrainConfig()


PRESETS = {"table": table}


def pretrain(config: PretrainConfig) -> pathlib.Path:
    """Trains; returns the run's folder, whose params are `{"backbone", "readout"}`."""
    size = config.backbone.image_size
    dataset = lerobot.read(config.dataset, image_size=(size, size))
    norm_stats = normalize.compute_norm_stats(dataset)
    if config.target not in norm_stats:
        raise ValueError(
            f"target must be a column of {config.dataset}, got '{config.target}'; "
            f"{configs.did_you_mean(config.target, norm_stats)}"
        )
    frames = Windows(
        dataset,
        WindowConfig(
            window_size=1,
            vocab_size=config.backbone.vocab_size,
            max_words=config.backbone.max_words,
        ),
        norm_stats=norm_stats,
        normalization=config.normalize,
    )
    loader = make_loader(
        frames,
        config.loader,
        augment=config.augment,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    statistics = normalize.to_json(norm_stats)
    run_dir = open_run(config.run_dir, config, overwrite=config.overwrite)
    save_json(statistics, run_dir / "norm_stats.json")

    backbone_key, readout_key, key = jax.random.split(jax.random.key(config.seed), 3)
    backbone = config.backbone
    size, outputs = backbone.num_tokens * backbone.token_dim, len(norm_stats[config.target].mean)
    params = {
        "backbone": jax.jit(BACKBONES[backbone.kind].init, static_argnums=1)(
            backbone_key, backbone
        ),
        "readout": {
            "kernel": jax.random.normal(readout_key, (size, outputs)) / size**0.5,
            "bias": jnp.zeros(outputs),
        },
    }

    def loss_fn(params: Params, batch: Batch, key: Key) -> tuple[jax.Array, Metrics]:
        del key  # nothing is random
        tokens = BACKBONES[backbone.kind].apply(params["backbone"], backbone, batch.observation)
        features = rearrange(tokens, "B W N D -> B W (N D)")
        predicted = features @ params["readout"]["kernel"] + params["readout"]["bias"][None, None]
        wanted = target(batch, config.target)
        mask = batch.timestep_mask
        loss = losses.masked_mean(optax.losses.huber_loss(predicted, wanted, delta=1.0), mask)
        return loss, {"l1": losses.masked_mean(jnp.abs(predicted - wanted), mask)}

    num_updates = config.loop.num_updates
    optimizer = optim.make_optimizer(config.optim, num_updates, params)
    fit(
        config.loop,
        run_dir,
        make_update(loss_fn, optimizer, freeze=config.optim.freeze),
        init_train_state(params, optimizer),
        loader,
        key,
        schedule=optim.make_schedule(config.optim, num_updates),
        metadata={"config": configs.to_dict(config), "norm_stats": statistics},
        name="pretrain",
    )
    return run_dir


def target(batch: Batch, name: str) -> Array:
    """What the readout must find `[B, W, …]`; of an action chunk, the first action."""
    return batch.action[:, :, 0] if name == "action" else getattr(batch.observation, name)


if __name__ == "__main__":
    run(pretrain, PRESETS, description="Pre-trains a backbone on demonstrations.")
