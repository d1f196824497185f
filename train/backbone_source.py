"""The backbone that a training starts from: that of a run, or a vision-language model on disk.

`resolve` reads the sizes before the data are read, `read_backbone` the weights.
"""

import pathlib
import warnings
from dataclasses import replace
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from train.configs import ImitateConfig
from vla_jax.backbones import models, peft, registry, weights
from vla_jax.policies import policy
from vla_jax.runs import read_agent
from vla_jax.training import checkpoint
from vla_jax.types import Params

Config = TypeVar("Config", bound=ImitateConfig)
LARGE = 20_000_000  # params of a model whose random weights are more likely a mistake than a choice


def is_run(folder: str) -> bool:
    """Returns True if `folder` is a run with checkpoints."""
    return (pathlib.Path(folder) / "checkpoints").is_dir()


def resolve(config: Config) -> Config:
    """Returns the config with the sizes of the vision-language model that `backbone_from` holds.

    The policy's use of the model (readout, cameras, precision) stays that of the config; rank and
    targets of an adaptation are those of `adapter_from`, if there is one. Other backbones are left
    as they are.

    Raises:
      FileNotFoundError: `adapter_from` is not an adapter.
      ValueError: the model or the adapter is not supported, or the config's backbone is of another
        kind.
    """
    agent, backbone = config.agent, config.agent.policy.backbone
    loaded = _config_in(config.backbone_from)
    if loaded is None:
        if config.adapter_from:
            raise ValueError(
                "backbone_from must be the model that adapter_from was trained on, got "
                f"'{config.backbone_from}'; give its folder."
            )
        return config
    if type(loaded) is not type(backbone):
        raise ValueError(
            f"backbone_from must hold a backbone '{backbone.kind}', as the preset has, got "
            f"'{loaded.kind}' in {config.backbone_from}; choose a --preset of that backbone."
        )
    started = registry.get(backbone).start_from(backbone, loaded)
    if config.adapter_from:
        started = _adapted(config, started, loaded)
    if started == backbone:
        return config
    policy_config = policy.connect(started, agent.policy.decoder)
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
    if folder and not is_run(folder) and not weights.is_model_folder(folder):
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
    if config.frozen_backbone and member.needs_training(backbone) and not is_run(folder):
        raise ValueError(
            "readout must be one without learned tokens with frozen_backbone, such as image_mean "
            "or last, got 'action_token', whose tokens would stay zero; choose another --readout, "
            "or a trained run as --backbone-from."
        )
    num_params = sum(leaf.size for leaf in jax.tree.leaves(shapes["backbone"]))
    if not folder and num_params > LARGE:
        warnings.warn(
            f"the backbone starts from {num_params / 1e6:.0f} million random params; "
            "--backbone-from FOLDER starts from trained ones",
            stacklevel=2,
        )


def source_files(config: ImitateConfig) -> dict[str, pathlib.Path]:
    """Returns name -> path of the files that the backbone's params are read from; {} = random."""
    if not config.backbone_from:
        return {}
    root = pathlib.Path(config.backbone_from).absolute()
    is_model = weights.is_model_folder(root)
    paths = root.glob("*.safetensors") if is_model else checkpoint.files(root / "checkpoints")
    files = {str(path.relative_to(root)): path for path in paths}
    if config.adapter_from:
        files["adapter"] = pathlib.Path(config.adapter_from) / peft.WEIGHTS
    return files


def read_backbone(config: ImitateConfig, mesh: Mesh | None = None) -> Params:
    """Returns the backbone's params of `backbone_from`; a model's shards go to their devices.

    Args:
      config: from `resolve`.
      mesh: devices of a model's params; None = JAX's default device.
    """
    folder, backbone = config.backbone_from, config.agent.policy.backbone
    # Frozen params that are drawn are the same for every seed, so that cached tokens are too.
    key = jax.random.key(0 if config.frozen_backbone else config.seed)
    key = jax.random.fold_in(key, 3)  # policy and auxiliary heads draw from other parts
    if weights.is_model_folder(folder):
        params = weights.load(folder, config=backbone, mesh=mesh, key=key)[1]
    else:
        saved = checkpoint.restore_params(pathlib.Path(folder) / "checkpoints").get("backbone", {})
        params = registry.get(backbone).adopt(key, saved, backbone)
    if config.adapter_from:
        params = peft.read_adapter(config.adapter_from, backbone, params)
    return params


def _adapted(config: ImitateConfig, backbone: Any, loaded: Any) -> Any:
    """Returns the backbone's config with the adaptation of `adapter_from`."""
    models.get(backbone)  # another backbone cannot be adapted
    if loaded.options.lora.rank:
        raise ValueError(
            "adapter_from must be empty if the run in backbone_from is adapted already, got "
            f"{config.adapter_from}; start from the model itself."
        )
    adaptation = peft.describe(config.adapter_from, backbone)
    return replace(backbone, options=replace(backbone.options, lora=adaptation))


def _config_in(folder: str) -> Any:
    """Returns the config of the backbone in a folder; None if there is none."""
    if not folder:
        return None
    if weights.is_model_folder(folder):
        return weights.load_config(folder)
    has_agent = (pathlib.Path(folder) / "agent.json").is_file()
    return read_agent(folder).policy.backbone if has_agent else None
