"""The backbone that a training starts from: that of a run, or a vision-language model on disk."""

import pathlib
import warnings
from dataclasses import replace
from typing import Any

import jax

from train.configs import ImitateConfig
from vla_jax.backbones import registry, vlm, weights
from vla_jax.backbones.models import MODELS
from vla_jax.policies import policy
from vla_jax.runs import read_agent
from vla_jax.training import checkpoint
from vla_jax.training.parallel import make_mesh
from vla_jax.types import Params

LARGE = 20_000_000  # params of a model whose random weights are more likely a mistake than a choice


def is_run(folder: str) -> bool:
    """Returns True if `folder` is a run with checkpoints."""
    return (pathlib.Path(folder) / "checkpoints").is_dir()


def resolve(config: ImitateConfig) -> ImitateConfig:
    """Returns the config with the vision-language model that `backbone_from` holds.

    The sizes, the tokenizer and, unless the config has one of its own, the low-rank adaptation are
    those of the folder; the policy's use of the model (readout, cameras, precision) stays that of
    the config. Other backbones are left as they are.

    Raises:
      ValueError: the model is not supported, or the config's backbone is of another kind.
    """
    agent = config.agent
    backbone: Any = agent.policy.backbone
    loaded = _config_in(config.backbone_from)
    if loaded is None or loaded.kind not in MODELS:
        return config
    if loaded.kind != backbone.kind:
        raise ValueError(
            f"backbone_from must hold a backbone '{backbone.kind}', as the preset has, got "
            f"'{loaded.kind}' in {config.backbone_from}; choose a --preset of that model."
        )
    own: dict[str, Any] = {name: getattr(backbone, name) for name in backbone.POLICY_FIELDS}
    options = own["options"]
    own["options"] = replace(
        options,
        tokenizer=loaded.options.tokenizer,
        lora=options.lora if options.lora.rank else loaded.options.lora,
    )
    policy_config = policy.connect(replace(loaded, **own), agent.policy.decoder)
    return replace(config, agent=replace(agent, policy=policy_config))


def check_backbone(config: ImitateConfig, shapes: Params) -> None:
    """Raises an error for a backbone that cannot be used as the config says; reads no weights.

    Args:
      config: from `resolve`.
      shapes: of all params.

    Raises:
      FileNotFoundError: `backbone_from` holds neither a run nor a model, or a file is missing.
      ValueError: the tokens of the backbone cannot be cached.
    """
    folder, backbone = config.backbone_from, config.agent.policy.backbone
    if folder and not is_run(folder) and not weights.is_folder(folder):
        raise FileNotFoundError(
            "backbone_from must be a run folder with checkpoints, or the folder of a "
            f"vision-language model (config.json, *.safetensors), got {folder}; train it first, or "
            "name another."
        )
    member = registry.get(backbone)
    member.tokenize(backbone, "")  # a missing tokenizer is an error here
    if config.frozen_backbone and member.history(backbone) is not None:
        raise ValueError(
            "history must be 'step' with frozen_backbone, whose tokens are those of single steps, "
            "got 'window'; train without --frozen-backbone."
        )
    if backbone.kind in MODELS:
        _check_model(config, backbone, shapes["backbone"])


def read_backbone(config: ImitateConfig) -> Params:
    """Returns the backbone's params of `backbone_from`; a model's shards go to their devices."""
    folder, backbone = config.backbone_from, config.agent.policy.backbone
    # Frozen params that are drawn are the same for every seed, so that cached tokens are too.
    key = jax.random.key(0 if config.frozen_backbone else config.seed)
    key = jax.random.fold_in(key, 3)  # policy and auxiliary heads draw from other parts
    if weights.is_folder(folder):
        mesh = make_mesh(config.loop.num_devices or None, fsdp_size=config.loop.fsdp_size)
        return weights.load(folder, config=backbone, mesh=mesh, key=key)[1]
    saved = checkpoint.restore_params(pathlib.Path(folder) / "checkpoints").get("backbone", {})
    return vlm.adopt(key, saved, backbone) if backbone.kind in MODELS else saved


def _config_in(folder: str) -> Any:
    """Returns the config of the backbone in a folder; None if there is none."""
    if not folder:
        return None
    if weights.is_folder(folder):
        return weights.load_config(folder)
    has_agent = (pathlib.Path(folder) / "agent.json").is_file()
    return read_agent(folder).policy.backbone if has_agent else None


def _check_model(config: ImitateConfig, backbone: Any, shapes: Params) -> None:
    if config.frozen_backbone and backbone.options.num_learned and not is_run(config.backbone_from):
        raise ValueError(
            "readout must be one without learned tokens with frozen_backbone, such as image_mean "
            "or last, got 'action_token', whose tokens would stay zero; choose another --readout, "
            "or a trained run as --backbone-from."
        )
    num_params = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    if not config.backbone_from and num_params > LARGE:
        warnings.warn(
            f"the vision-language model has {num_params / 1e6:.0f} million random params and "
            "hashed words; --backbone-from FOLDER starts from a trained one",
            stacklevel=2,
        )
