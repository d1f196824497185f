"""Pre-trains the image encoder by regressing a column of the data set from each frame.

    python -m train.pretrain --dataset demos/table --run-dir runs/pretrain

The target is a column of the demonstrations, by default the simulator's block positions
(`environment_state`). A linear readout predicts it from the tokens, so that a recurrent decoder on
the frozen tokens can decode it linearly. The readout is discarded afterwards. The word embedding
stays random: these targets carry no information about words, and training would only make
sentence embeddings alike.

A second target is the same positions relative to the tool, squashed by tanh at distance `reach`:
an error of a centimetre is small on the table but large between the fingers, where the wrist
camera resolves it well.
"""

import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange

from train.data_parts import DataPart, check_column_sizes
from train.mixture_file import read_mixture
from vla_jax import config as configs
from vla_jax.acting import mixture_robots
from vla_jax.backbones import registry
from vla_jax.backbones.perceiver import PerceiverConfig, image_spec
from vla_jax.command_line import run
from vla_jax.config import checked
from vla_jax.data import normalize
from vla_jax.data.dataset import Dataset
from vla_jax.data.image_augment import AugmentConfig
from vla_jax.data.loader import LoaderConfig, WindowSource, make_loader
from vla_jax.data.mixing import Mixed
from vla_jax.data.normalize import NormalizeConfig, NormStats
from vla_jax.data.readers import reader
from vla_jax.data.readers.dataset_config import DatasetConfig, upgrade_config
from vla_jax.data.windows import WindowConfig, Windows
from vla_jax.runs import check_run, open_run, save_json
from vla_jax.training import device_augment, loop, losses, optim
from vla_jax.training.distributed import together
from vla_jax.training.loop import LoopConfig, check_resume, fit, random_start
from vla_jax.training.malloc import keep_freed_memory
from vla_jax.training.optim import OptimConfig
from vla_jax.training.parallel import make_mesh, row_part
from vla_jax.training.run_lock import exclusive
from vla_jax.training.update import LossFn, TrainState, init_train_state, make_update
from vla_jax.trees import under
from vla_jax.types import Array, Batch, Key, Metrics, Params


@dataclass(frozen=True)
@checked(reach=(0, 1e12))
class PretrainConfig:
    """Config of the pre-training of a backbone."""

    dataset: DatasetConfig = DatasetConfig()  # demonstrations with the target as a column
    run_dir: str = "runs/pretrain"  # output folder of the run
    # JSON file with several data sets and their weights, in place of dataset; empty = one data set
    mixture: str = ""
    target: Literal["environment_state", "proprio", "action"] = (
        "environment_state"  # column of the data set to regress from each frame
    )
    # m, distance scale of the tool-relative targets; 0 = no such targets; a mixture has none
    reach: float = 0.04
    backbone: PerceiverConfig = PerceiverConfig()  # image encoder to train
    normalize: NormalizeConfig = NormalizeConfig()  # normalisation method of each column
    augment: AugmentConfig = AugmentConfig()  # random image augmentation; none by default
    augment_on: Literal["host", "device"] = "host"  # augment in loader threads or in the update
    loader: LoaderConfig = LoaderConfig(batch_size=64)  # batch size, shuffling and workers
    optim: OptimConfig = OptimConfig(
        learning_rate=5e-3, end_factor=0.01, freeze=("*/words/*",)
    )  # learning rate, weight decay and EMA
    loop: LoopConfig = LoopConfig(
        num_updates=2000, save_every=1000
    )  # number of updates, logs and checkpoints
    seed: int = 0  # random seed of params and dropout
    overwrite: bool = False  # delete an existing run in run_dir

    upgrade = staticmethod(upgrade_config)


def table() -> PretrainConfig:
    """The table's encoder, 2 minutes on 2 cores: block positions from two 64 × 64 images."""
    return PretrainConfig(dataset=DatasetConfig(decode="whole"))


PRESETS = {"table": table}


@together
@exclusive
def pretrain(config: PretrainConfig) -> pathlib.Path:
    """Trains an encoder; returns the run's folder, with params `{"backbone", "readout"}`."""
    # Check the settings before anything slow starts.
    init = partial(init_params, backbone=config.backbone, num_targets=1)
    shapes = jax.eval_shape(init, jax.random.key(0))
    rules = under("backbone", registry.get(config.backbone).sharding_rules)
    loop.check(
        config.loop,
        config.optim,
        batch_size=config.loader.batch_size,
        sharding_rules=rules,
        params=shapes,
    )
    check_run(config.run_dir, config, overwrite=config.overwrite)
    read_mixture(config.mixture, config.dataset)
    optim.make_optimizer(config.optim, config.loop.num_updates, shapes)  # checks its globs

    # Data: single frames.
    parts = read_parts(config)
    index, count = row_part(make_mesh(config.loop.mesh))
    loader = make_loader(
        make_source(config, parts),
        config.loader,
        augment=config.augment if config.augment_on == "host" else None,
        process_index=index,
        process_count=count,
    )

    # Targets: the column, and its positions relative to the tool.
    widest = max(parts, key=lambda part: part.dataset.columns[config.target].shape[1])
    make_targets, num_targets = targets(config, widest.dataset, widest.norm_stats)

    # Model, loss, update.
    params_key, key = jax.random.split(jax.random.key(config.seed))

    def init_state(key: Key) -> TrainState:
        return init_train_state(init_params(key, config.backbone, num_targets), optimizer)

    num_updates = config.loop.num_updates
    optimizer = optim.make_optimizer(config.optim, num_updates, shapes)
    update = make_update(
        make_loss(config, make_targets, num_targets),
        optimizer,
        freeze=config.optim.freeze,
        train=config.optim.train,
        skip_bad=config.loop.skip_bad_updates > 0,
    )
    statistics = normalize.to_json(parts[0].norm_stats)
    metadata = {"config": configs.to_dict(config), "norm_stats": statistics}
    if not config.overwrite:
        check_resume(pathlib.Path(config.run_dir), loader, metadata)
    run_dir = open_run(config.run_dir, config, overwrite=config.overwrite)
    save_json(statistics, run_dir / "norm_stats.json")
    if config.mixture:
        mixture_robots.write(run_dir, {part.name: part.robot for part in parts})
    fit(
        config.loop,
        run_dir,
        update,
        random_start(init_state, params_key),
        loader,
        key,
        schedule=optim.make_schedule(config.optim, num_updates),
        metadata=metadata,
        name="pretrain",
        sharding_rules=rules,
    )
    return run_dir


def make_loss(
    config: PretrainConfig, make_targets: Callable[[Batch], jax.Array], num_targets: int
) -> LossFn:
    """Returns the loss `loss_fn(params, batch, key) -> (loss, metrics)`: Huber, δ = 1.

    Args:
      config: of the training.
      make_targets: batch -> targets `[B, W, num_targets]`.
      num_targets: their number.
    """

    def loss_fn(params: Params, batch: Batch, key: Key) -> tuple[jax.Array, Metrics]:
        if config.augment_on == "device":
            observation = device_augment.apply(key, batch.observation, config.augment)
            batch = batch._replace(observation=observation)
        predicted = read_out(params, config.backbone, batch)
        expected = make_targets(batch)
        mask = target_mask(batch, config.target, num_targets)
        loss = losses.masked_mean(optax.losses.huber_loss(predicted, expected, delta=1.0), mask)
        return loss, {"l1": losses.masked_mean(jnp.abs(predicted - expected), mask)}

    return loss_fn


def read_parts(config: PretrainConfig) -> list[DataPart]:
    """Reads the demonstrations, one data set or those of a mixture.

    Raises:
      ValueError: a data set has no target column, or they do not fit the backbone.
    """
    parts = []
    for name, weight, dataset in read_mixture(config.mixture, config.dataset):
        own = replace(config, dataset=dataset)
        data = read_dataset(own)
        parts.append(DataPart(name, weight, own, data, normalize.compute_norm_stats(data)))
    if config.mixture:
        datasets = [part.dataset for part in parts]
        check_column_sizes(config.backbone, datasets, config.mixture)
    return parts


def make_source(config: PretrainConfig, parts: Sequence[DataPart]) -> WindowSource:
    """Returns the frames of all parts, to draw from."""
    frames = {part.name: make_frames(config, part.dataset, part.norm_stats) for part in parts}
    return Mixed(frames, [part.weight for part in parts]) if config.mixture else frames[""]


def read_dataset(config: PretrainConfig) -> Dataset:
    """Reads the demonstrations; those of a mixture may lack cameras.

    Raises:
      ValueError: the data set has no target column.
    """
    spec = image_spec(config.backbone)
    dataset = reader.read_dataset(
        config.dataset,
        cameras=spec.cameras,
        image_size=(spec.height, spec.width),
        resampling=spec.resampling,
        partial=bool(config.mixture),
    )
    if config.target not in dataset.columns:
        raise ValueError(
            f"target must be a column of {config.dataset.path}, got '{config.target}'; "
            f"{configs.did_you_mean(config.target, dataset.columns)}"
        )
    return dataset


def make_frames(
    config: PretrainConfig, dataset: Dataset, norm_stats: dict[str, NormStats]
) -> Windows:
    """Returns windows of one step."""
    return Windows(
        dataset,
        WindowConfig(window_size=1),
        tokenize=registry.make_tokenizer(config.backbone, dataset.instructions),
        norm_stats=norm_stats,
        normalization=config.normalize,
    )


def init_params(key: Key, backbone: PerceiverConfig, num_targets: int) -> Params:
    """Returns random params `{"backbone", "readout"}`; `key` is consumed."""
    backbone_key, readout_key = jax.random.split(key)
    size = backbone.num_tokens * backbone.token_dim
    init = jax.jit(registry.get(backbone).init, static_argnums=1)
    return {
        "backbone": init(backbone_key, backbone),
        "readout": {
            "kernel": jax.random.normal(readout_key, (size, num_targets)) / size**0.5,
            "bias": jnp.zeros(num_targets),
        },
    }


def read_out(params: Params, backbone: PerceiverConfig, batch: Batch) -> jax.Array:
    """Returns the linear readout of each frame's tokens `[B, W, num_targets]`."""
    encoded = registry.get(backbone).apply(params["backbone"], backbone, batch.observation)
    features = rearrange(encoded.tokens, "B W N D -> B W (N D)")
    return features @ params["readout"]["kernel"] + params["readout"]["bias"][None, None]


def targets(
    config: PretrainConfig, dataset: Dataset, norm_stats: dict[str, NormStats]
) -> tuple[Callable[[Batch], jax.Array], int]:
    """Returns a function from a batch to targets `[B, W, num_targets]`, and `num_targets`.

    The first targets are the normalised column. If its dimensions are named as positions (`red.x`)
    and proprio holds the tool's position (`x`), tanh((position - tool) / reach) follows, except in
    a mixture, where metres are other numbers in every data set.
    """
    is_relative = config.reach and not config.mixture
    names = dataset.names.get(config.target, ()) if is_relative else ()
    axes = {axis: index for index, axis in enumerate(dataset.names.get("proprio", ()))}
    dim_pairs = [(index, axes[name.partition(".")[2]]) for index, name in enumerate(names)
                 if name.partition(".")[2] in axes]  # fmt: skip

    def make_targets(batch: Batch) -> jax.Array:
        column = target(batch, config.target)
        if not dim_pairs:
            return jnp.asarray(column)
        objects, tool = (
            normalize.denormalize(part, norm_stats[name], getattr(config.normalize, name))
            for part, name in ((column, config.target), (target(batch, "proprio"), "proprio"))
        )
        object_dims, tool_dims = np.array(dim_pairs).T
        relative = jnp.tanh((objects[..., object_dims] - tool[..., tool_dims]) / config.reach)
        return jnp.concatenate([column, relative], axis=-1)

    return make_targets, len(norm_stats[config.target].mean) + len(dim_pairs)


def target_mask(batch: Batch, name: str, num_targets: int) -> jax.Array:
    """Returns which targets exist, `[B, W]`, or `[B, W, num_targets]` if robots lack some."""
    observation, is_action = batch.observation, name == "action"
    steps = jnp.asarray(batch.action_mask[:, :, 0] if is_action else batch.timestep_mask)
    dims = batch.action_dims if is_action else (observation.column_mask or {}).get(name)
    if dims is None:
        return steps
    relative = ((0, 0), (0, 0), (0, num_targets - dims.shape[-1]))  # of positions, which exist
    return steps[..., None] & jnp.pad(jnp.asarray(dims), relative, constant_values=True)


def target(batch: Batch, name: str) -> Array:
    """Returns a column of the batch `[B, W, …]`; for actions, the first of each chunk."""
    return batch.action[:, :, 0] if name == "action" else getattr(batch.observation, name)


if __name__ == "__main__":
    keep_freed_memory()
    run(pretrain, PRESETS, description="Pre-trains a backbone on demonstrations.")
