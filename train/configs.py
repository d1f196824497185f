"""Config and presets of `train.imitate`.

A preset's docstring states model, data, result, training time and hardware.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from vla_jax.acting.agent import AgentConfig
from vla_jax.backbones import registry
from vla_jax.backbones.perceiver import PerceiverConfig
from vla_jax.backbones.state import StateConfig
from vla_jax.config import LEAST_FLOAT, checked
from vla_jax.data.image_augment import AugmentConfig
from vla_jax.data.loader import LoaderConfig
from vla_jax.data.readers.dataset_config import DatasetConfig, upgrade_config
from vla_jax.data.token_files import CacheDtype
from vla_jax.envs.table.jax_env import JaxTableConfig
from vla_jax.envs.table.mujoco_env import MujocoTableConfig
from vla_jax.envs.worlds import WorldConfig
from vla_jax.nn.scheduled_sampling import SamplingConfig
from vla_jax.policies import policy
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.training.auxiliary import AuxiliaryConfig
from vla_jax.training.loop import LoopConfig
from vla_jax.training.loss_terms import LossWeights
from vla_jax.training.optim import OptimConfig


@dataclass(frozen=True)
@checked(stride=(1, 2**31 - 1), max_cache_gb=(LEAST_FLOAT, 1e6), cache_batch=(0, 2**16))
class ImitateConfig:
    """Config of a training by behaviour cloning."""

    dataset: DatasetConfig = DatasetConfig()  # demonstrations to learn from
    run_dir: str = "runs/imitate"  # output folder of the run
    # JSON file with several data sets and their weights, in place of dataset; empty = one data set
    mixture: str = ""
    # run folder with the initial backbone, or folder of a vision-language model; empty = random
    backbone_from: str = ""
    # folder of a PEFT adapter of that model, to start from; it decides rank, alpha and targets
    adapter_from: str = ""
    decoder_from: str = ""  # run folder, or output of vla_jax.convert; empty = random
    frozen_backbone: bool = False  # compute every frame's tokens once, train only the decoder
    cache_dtype: CacheDtype = "float32"  # dtype of those tokens on disk
    cache_batch: int = 64  # frames per forward pass that computes those tokens
    max_cache_gb: float = 50.0  # limit of the size of those tokens on disk, GB
    stride: int = 1  # environment steps between the ends of consecutive windows
    pack: bool = False  # pack whole episodes into rows of window_size steps, instead of windows
    # limits (low, high) of the arm actions for normalisation, in data units; None = from the data
    action_bounds: tuple[float, float] | None = None
    sampling: SamplingConfig = SamplingConfig()  # scheduled sampling of the autoregressive head
    loss: LossWeights = LossWeights()  # weight of each loss term; the arm's is 1
    auxiliary: AuxiliaryConfig = AuxiliaryConfig()  # auxiliary heads for training; default none
    agent: AgentConfig = AgentConfig()  # policy, and its settings for acting
    world: WorldConfig = field(default_factory=MujocoTableConfig)  # environment to evaluate in
    loader: LoaderConfig = LoaderConfig()  # batch size, shuffling and workers
    augment: AugmentConfig = AugmentConfig()  # random shifts, brightness and contrast of images
    augment_on: Literal["host", "device"] = "host"  # augment in loader threads or in the update
    optim: OptimConfig = OptimConfig()  # learning rate, weight decay and EMA
    loop: LoopConfig = LoopConfig()  # number of updates, logs and checkpoints
    seed: int = 0  # random seed of params and dropout
    overwrite: bool = False  # delete an existing run in run_dir

    MAY_CHANGE: ClassVar[tuple[str, ...]] = ("cache_batch", "max_cache_gb")

    upgrade = staticmethod(upgrade_config)

    def __post_init__(self):
        """Checks that auxiliary heads and sampling fit the policy and the loss weights."""
        if self.auxiliary.forward_horizon and self.auxiliary.forward_target == "pixels":
            _check_images(self)
        window_size = self.agent.policy.decoder.window_size
        if self.auxiliary.forward_horizon >= window_size:
            raise ValueError(
                f"auxiliary.forward_horizon must be below window_size = {window_size}, got "
                f"{self.auxiliary.forward_horizon}; reduce it or choose a larger window_size."
            )
        _check_weights(self)
        for name in ("cache_batch", "max_cache_gb"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
        if self.action_bounds and self.action_bounds[0] >= self.action_bounds[1]:
            raise ValueError(
                "action_bounds must be two numbers, the first below the second, got "
                f"{self.action_bounds}."
            )
        head = self.agent.policy.decoder.head
        if self.sampling.schedule != "always" and head != "autoregressive":
            raise ValueError(
                f"sampling.schedule must be 'always' for head '{head}', which takes no targets, "
                f"got '{self.sampling.schedule}'; choose head 'autoregressive'."
            )


def table_lstm() -> ImitateConfig:
    """The MuJoCo table: an LSTM over whole episodes, on the tokens of a frozen image encoder.

    For 2 CPU cores. `python -m train.demo` records the demonstrations, pre-trains the encoder,
    trains this policy and evaluates it; the results of five such trainings are in README.
    """
    decoder = DecoderConfig(
        kind="lstm",
        window_size=64,
        action_horizon=2,
        hidden_size=128,
        num_layers=1,
        pooling="none",
        head_sizes=(256, 128),
    )
    return ImitateConfig(
        dataset=DatasetConfig(decode="whole"),
        run_dir="runs/table_lstm",
        backbone_from="runs/pretrain",
        frozen_backbone=True,
        pack=True,
        loss=LossWeights(gripper=0.1),
        agent=AgentConfig(policy.connect(PerceiverConfig(), decoder)),
        loader=LoaderConfig(batch_size=32),
        optim=OptimConfig(learning_rate=3e-3, end_factor=0.01, weight_decay=0.2, ema_decay=0.999),
        loop=LoopConfig(num_updates=2200, save_every=1100),
    )


def table_fc() -> ImitateConfig:
    """The memoryless baseline of `table_lstm`: same data, tokens and sizes, no recurrence."""
    config = with_kind(table_lstm(), "fc")
    return replace(config, run_dir="runs/table_fc", loop=replace(config.loop, num_updates=1200))


SMALL_LSTM = DecoderConfig(
    kind="lstm",
    window_size=32,
    action_horizon=1,
    hidden_size=128,
    num_layers=1,
    pooling="none",
    head_sizes=(128,),
)


def table_jax_state() -> ImitateConfig:
    """The JAX table from the simulator's state: an LSTM trained in seconds, to try decoders.

    Success 99.3 % [98, 100] on 600 unseen episodes after 16,000 demonstrations; half a minute on
    2 CPU cores.
    """
    return ImitateConfig(
        dataset=DatasetConfig("demos/table_jax_state", decode="whole"),
        run_dir="runs/table_jax_state",
        pack=True,
        loss=LossWeights(gripper=0.1),
        agent=AgentConfig(policy.connect(StateConfig(token_dim=32), SMALL_LSTM)),
        world=JaxTableConfig(image_size=0),
        loader=LoaderConfig(batch_size=48),
        optim=OptimConfig(learning_rate=4e-3, end_factor=0.01),
        loop=LoopConfig(num_updates=1300, save_every=1300),
    )


def table_jax_encoder_decoder() -> ImitateConfig:
    """`table_jax_state` with an autoregressive head: a second LSTM decodes chunks of two actions.

    Success 99.3 % [97, 100] on 300 unseen episodes; 97.6 % [95, 99] with the continuous head and
    chunks of two.
    """
    config = with_decoder(table_jax_state(), head="autoregressive", action_horizon=2)
    slope = 1.0 / config.loop.num_updates
    return replace(
        config,
        run_dir="runs/table_jax_encoder_decoder",
        sampling=SamplingConfig("linear", slope=slope),
    )


def table_jax_gpt() -> ImitateConfig:
    """`table_jax_state` with a transformer of two layers instead of the LSTM.

    Success 97.9 % [97.8, 98.0] on 600 unseen episodes, mean and range of three trainings.
    """
    config = with_decoder(table_jax_state(), kind="gpt", num_layers=2, num_heads=4)
    return replace(
        config,
        run_dir="runs/table_jax_gpt",
        optim=replace(config.optim, learning_rate=1e-3),
    )


def gpu_end_to_end() -> ImitateConfig:
    """Images to actions, trained end-to-end on one GPU; not measured yet.

    About 45 GB of GPU memory by the estimate, 12 GB with `--batch-size 16`.

    A small ViT with latents, an LSTM of two layers over whole episodes, bfloat16 products, random
    shifts; no frozen params and no privileged state. It needs more demonstrations:
    `python -m train.record --num-episodes 20000`.
    """
    backbone = PerceiverConfig(
        width=256, num_heads=8, patch_layers=4, num_latents=16, token_dim=64, dtype="bfloat16"
    )
    decoder = DecoderConfig(
        kind="lstm",
        window_size=64,
        action_horizon=4,
        hidden_size=512,
        num_layers=2,
        pooling="none",
        head_sizes=(512, 256),
        dropout=0.1,
        dtype="bfloat16",
    )
    return ImitateConfig(
        dataset=DatasetConfig(decode="whole"),
        run_dir="runs/gpu_end_to_end",
        pack=True,
        loss=LossWeights(gripper=0.1),
        agent=AgentConfig(policy.connect(backbone, decoder)),
        loader=LoaderConfig(batch_size=64, num_threads=8, prefetch=8),
        augment=AugmentConfig(shift=3, brightness=0.1, contrast=0.1),
        augment_on="device",
        optim=OptimConfig(
            learning_rate=5e-4, warmup_steps=1000, weight_decay=0.05, ema_decay=0.999
        ),
        loop=LoopConfig(num_updates=50_000, save_every=2500),
    )


def with_kind(config: ImitateConfig, kind: str) -> ImitateConfig:
    """Returns the config with another kind of decoder."""
    return with_decoder(config, kind=kind)


def with_decoder(config: ImitateConfig, **changes: Any) -> ImitateConfig:
    """Returns the config with some fields of the decoder changed."""
    policy_config = config.agent.policy
    policy_config = replace(policy_config, decoder=replace(policy_config.decoder, **changes))
    return replace(config, agent=replace(config.agent, policy=policy_config))


def _check_images(config: ImitateConfig) -> None:
    """Raises a ValueError unless the training has images that can be split into patches."""
    backbone, size = config.agent.policy.backbone, config.auxiliary.forward_patch_size
    spec = registry.get(backbone).image_spec(backbone)
    if config.frozen_backbone or spec is None:
        raise ValueError(
            "auxiliary.forward_target 'pixels' needs images in the batch, got backbone "
            f"'{backbone.kind}' with frozen_backbone {config.frozen_backbone}; choose 'tokens', "
            "or an image backbone that is not frozen."
        )
    if spec.any_size:
        raise ValueError(
            "resize must be 'host' with auxiliary.forward_target 'pixels', which needs images of "
            "one size, got 'device'; choose 'tokens', or --resize host."
        )
    if spec.height % size or spec.width % size:
        raise ValueError(
            f"auxiliary.forward_patch_size must divide the image size {spec.height} × {spec.width} "
            f"pixels, got {size}."
        )


def _check_weights(config: ImitateConfig) -> None:
    """Raises a ValueError for a head without a gradient, or a weight without a loss term."""
    heads = {"forward": config.auxiliary.forward_horizon > 0, "caption": config.auxiliary.caption}
    for name, is_on in heads.items():
        if is_on and getattr(config.loss, name) == 0:
            raise ValueError(
                f"loss.{name} must be above 0 if its auxiliary head is enabled, got 0; raise "
                "it, or disable the head."
            )
    for name in ("cotrain", "kl"):
        weight, default = getattr(config.loss, name), getattr(LossWeights(), name)
        if weight != default:
            raise ValueError(
                f"loss.{name} must be {default}, since train.imitate has no such loss term, got "
                f"{weight}; add the term to make_loss in train/imitate.py first."
            )
