"""Presets of `train.imitate`: policies on vision-language models, and the table of all presets.

Memory per device is that of `train.memory_check` for one update.
"""

from dataclasses import replace

from train import configs
from train.configs import ImitateConfig, with_decoder
from vla_jax.acting.agent import AgentConfig
from vla_jax.backbones import registry
from vla_jax.backbones.kosmos2 import Kosmos2Config
from vla_jax.backbones.paligemma import PaliGemmaConfig
from vla_jax.backbones.qwen3_vl import Qwen3VLConfig
from vla_jax.backbones.registry import BackboneConfig
from vla_jax.backbones.rotary_decoder import RotaryDecoderConfig
from vla_jax.backbones.smolvlm import SmolVLMConfig
from vla_jax.backbones.vit import VisionConfig
from vla_jax.backbones.vlm_options import VLMOptions
from vla_jax.data.image_augment import AugmentConfig
from vla_jax.data.loader import LoaderConfig
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.envs.table.jax_env import JaxTableConfig
from vla_jax.envs.table.mujoco_env import MujocoTableConfig
from vla_jax.nn.lora import LoraConfig
from vla_jax.policies import policy
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.training.loop import LoopConfig
from vla_jax.training.loss_terms import LossWeights
from vla_jax.training.optim import OptimConfig


def tiny_vlm() -> ImitateConfig:
    """A vision-language model with random weights, trained end to end on images of the JAX table.

    A SmolVLM of 0.2 million params and hashed words, to try the options of vision-language
    backbones without a download. `python -m train.record --preset table_jax --image-size 32
    --dataset demos/tiny_vlm --num-episodes 300` records its data.
    """
    vision = VisionConfig(
        hidden_size=48, intermediate_size=96, num_layers=1, num_heads=3, image_size=32, patch_size=8
    )
    language = RotaryDecoderConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    options = VLMOptions(max_text_tokens=12, proprio_dim=8)
    backbone = SmolVLMConfig(
        vision=vision, language=language, shuffle=2, image_token_id=1023, options=options
    )
    decoder = replace(configs.SMALL_LSTM, window_size=16)
    return ImitateConfig(
        dataset=DatasetConfig("demos/tiny_vlm", decode="whole"),
        run_dir="runs/tiny_vlm",
        loss=LossWeights(gripper=0.1),
        agent=AgentConfig(policy.connect(backbone, decoder), instruction_steps=-1),
        world=JaxTableConfig(image_size=32),
        loader=LoaderConfig(batch_size=8),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=20),
        loop=LoopConfig(num_updates=300, save_every=300),
    )


def smolvlm_lstm() -> ImitateConfig:
    """SmolVLM2 500M and an LSTM, trained end to end on one GPU of 24 GB; not measured yet.

    `--backbone-from FOLDER` names the model's folder; `--readout image_mean --frozen-backbone`
    trains the LSTM alone on cached features. An update needs 15 GB by the estimate.
    """
    options = VLMOptions(dtype="bfloat16", remat="layers", proprio_dim=8, images_per_pass=16)
    return _vlm_lstm(SmolVLMConfig(options=options), "runs/smolvlm_lstm")


def kosmos_lstm() -> ImitateConfig:
    """RoboVLMs' recipe: Kosmos-2 and an LSTM of four layers over 16 steps; not measured yet.

    An update needs 34 GB by the estimate.

    `--backbone-from FOLDER` names the model's folder. All params train, in bfloat16 products;
    RoboVLMs reports 4.25 of 5 tasks in a row on CALVIN ABC-D with its own code.
    """
    options = VLMOptions(
        cameras=("image_wrist", "image_primary"),
        layout="robovlms",
        prompt=Kosmos2Config().options.prompt,
        dtype="bfloat16",
        remat="layers",
        images_per_pass=32,
    )
    config = _vlm_lstm(Kosmos2Config(options=options), "runs/kosmos_lstm")
    config = with_decoder(
        config, hidden_size=1024, num_layers=4, action_horizon=10, head_sizes=(1024, 512, 256)
    )
    return replace(
        config,
        loss=LossWeights(),
        augment=AugmentConfig(shift=10),
        optim=OptimConfig(learning_rate=2e-5, warmup_steps=500, weight_decay=0.0, b2=0.999),
    )


def paligemma_lstm() -> ImitateConfig:
    """PaliGemma 3B, adapted, and an LSTM; 16 GB by the estimate, not measured yet."""
    config = _vlm_lstm(PaliGemmaConfig(options=_adapted()), "runs/paligemma_lstm")
    return replace(config, loader=replace(config.loader, batch_size=2))


def qwen3_lstm() -> ImitateConfig:
    """Qwen3-VL 2B, adapted, and an LSTM; 10 GB by the estimate, not measured yet."""
    return _vlm_lstm(Qwen3VLConfig(options=_adapted()), "runs/qwen3_lstm")


def _adapted() -> VLMOptions:
    return VLMOptions(
        dtype="bfloat16",
        param_dtype="bfloat16",
        remat="layers",
        proprio_dim=8,
        images_per_pass=16,
        lora=LoraConfig(rank=16),
    )


def _vlm_lstm(backbone: BackboneConfig, run_dir: str) -> ImitateConfig:
    """Returns the common part of the trainings of a large vision-language model on one GPU."""
    decoder = DecoderConfig(
        kind="lstm",
        window_size=16,
        action_horizon=4,
        hidden_size=512,
        num_layers=2,
        pooling="none",
        head_sizes=(512, 256),
        dtype="bfloat16",
    )
    return ImitateConfig(
        run_dir=run_dir,
        loss=LossWeights(gripper=0.1),
        agent=AgentConfig(policy.connect(backbone, decoder), instruction_steps=-1),
        world=MujocoTableConfig(image_size=registry.image_size(backbone)),
        loader=LoaderConfig(batch_size=4, num_threads=8, prefetch=8),
        augment=AugmentConfig(shift=16),
        augment_on="device",
        optim=OptimConfig(learning_rate=2e-5, warmup_steps=500, weight_decay=0.0),
        loop=LoopConfig(num_updates=20_000, save_every=1000),
    )


IMITATE = {
    preset.__name__: preset
    for preset in (
        configs.table_lstm,
        configs.table_fc,
        configs.table_jax_state,
        configs.table_jax_encoder_decoder,
        configs.table_jax_gpt,
        configs.gpu_end_to_end,
        tiny_vlm,
        smolvlm_lstm,
        kosmos_lstm,
        paligemma_lstm,
        qwen3_lstm,
    )
}
