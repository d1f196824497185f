"""Small demonstrations of the JAX table, and small trainings on them."""

from train.configs import ImitateConfig
from train.pretrain import PretrainConfig
from train.record import RecordConfig, record
from vla_jax.acting.agent import AgentConfig
from vla_jax.backbones.perceiver import PerceiverConfig
from vla_jax.backbones.state import StateConfig
from vla_jax.data.image_augment import AugmentConfig
from vla_jax.data.loader import LoaderConfig
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.envs.table import jax_env
from vla_jax.policies import policy
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.training.loop import LoopConfig
from vla_jax.training.optim import OptimConfig

WORLD = jax_env.JaxTableConfig(image_size=16, max_steps=24)
PERCEIVER = PerceiverConfig(image_size=16, width=16, num_latents=2, token_dim=8, num_heads=2)
STATE = StateConfig(token_dim=8)
DECODER = DecoderConfig(
    kind="lstm",
    window_size=6,
    action_horizon=2,
    hidden_size=8,
    num_layers=1,
    pooling="none",
    head_sizes=(8,),
    dropout=0.1,
)
LOADER = LoaderConfig(batch_size=8)
OPTIM = OptimConfig(learning_rate=1e-2, warmup_steps=0, ema_decay=0.9)
LOOP = LoopConfig(num_updates=4, log_every=1, save_every=2)


def write(folder):
    """Records twelve episodes; returns the data set's folder."""
    return record(RecordConfig(str(folder), WORLD, num_episodes=12))


def pretraining(demos, run_dir):
    """Returns the config of two pre-training updates of the backbone."""
    loop = LoopConfig(num_updates=2, log_every=1, save_every=2)
    return PretrainConfig(
        DatasetConfig(str(demos)),
        str(run_dir),
        backbone=PERCEIVER,
        loader=LOADER,
        optim=OPTIM,
        loop=loop,
    )


def imitation(demos, run_dir, *, backbone=STATE, **options):
    """Returns the config of four updates of a policy."""
    return ImitateConfig(
        DatasetConfig(str(demos)),
        str(run_dir),
        agent=AgentConfig(policy.connect(backbone, DECODER)),
        world=WORLD,
        loader=LOADER,
        augment=AugmentConfig(),
        optim=OPTIM,
        loop=LOOP,
        **options,
    )
