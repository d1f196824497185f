"""Kinds of foreign models that `python -m vla_jax.convert` converts, one member each.

The kind of a converted folder is the name of its config file, such as `decoder.json`.
"""

import pathlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from vla_jax import config as configs
from vla_jax import runs
from vla_jax.acting.agent import AgentConfig
from vla_jax.config import checked
from vla_jax.convert.conversion_report import Report
from vla_jax.convert.robovlms.checkpoints import from_robovlms, report_robovlms, to_robovlms
from vla_jax.convert.robovlms.key_names import HEAD, head_name, prefix_of
from vla_jax.convert.robovlms.policies import from_robovlms_policy, to_robovlms_policy
from vla_jax.convert.robovlms.training_json import find_training
from vla_jax.convert.sizes import check_params
from vla_jax.convert.torch_rnn import from_torch, report_torch, to_torch
from vla_jax.convert.weight_files import Path, TensorFile
from vla_jax.data.normalize import NormStats
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.policies import decoders, policy
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.training import checkpoint
from vla_jax.types import Params


@dataclass(frozen=True)
@checked()
class ConvertConfig:
    """Options of a conversion that the shapes of the tensors do not determine."""

    window_size: int | None = None  # W, steps; None = positions of a GPT, 8 for other heads
    pooling: Literal["max", "none"] = "max"  # token pooling, RoboVLMs' down_sample
    num_latents: int = 1  # tokens per step after pooling, RoboVLMs' latent
    num_heads: int = 8  # attention heads of a GPT
    # globs of names of tensors that may be missing; their params are randomly initialised
    allow_missing: tuple[str, ...] = ()
    # folder of a vision-language model: that of a whole policy of RoboVLMs, which becomes a run
    # folder; with --to huggingface, that with the tokenizer and other files to copy
    vlm: str = ""
    # what a folder is converted to: "original" = the file that it was converted from; of a run on a
    # vision-language model, "huggingface" = the model's folder, "peft" = its low-rank adapter
    to: Literal["original", "huggingface", "peft"] = "original"
    # RoboVLMs' training config; empty = the JSON of the same name, or config.json, beside SRC
    config: str = ""
    prefix: str = ""  # prefix of the names of a torch.nn.LSTM, GRU or RNN, such as encoder.rnn.
    overwrite: bool = False  # replace DST if it exists

    def __post_init__(self):
        """Checks the counts."""
        for name in ("window_size", "num_latents", "num_heads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")


class Conversion(NamedTuple):
    """A converted model."""

    config: Any  # of the decoder, the recurrence, or the agent
    params: Params
    report: Report
    norm_stats: Mapping[str, NormStats] = {}  # of an agent


def save_config(folder: Path, kind: str, conversion: Conversion) -> dict[str, Any]:
    """Writes the config of a conversion, and returns it: the default `Converter.save`."""
    configs.save(conversion.config, pathlib.Path(folder) / f"{kind}.json")
    return {kind: configs.to_dict(conversion.config)}


class Converter(NamedTuple):
    """Conversion of one kind of foreign model."""

    config_class: type
    recognises: Callable[[TensorFile, ConvertConfig], bool]
    convert: Callable[[TensorFile, ConvertConfig], Conversion]
    restore: Callable[[Path, Any], Params]  # (folder, config) -> params of its checkpoint
    # (config, params, names in the foreign file, prefix) -> tensors under those names
    to_tensors: Callable[[Any, Params, Collection[str], str], dict[str, np.ndarray]]
    describe: Callable[[Any], str]  # config -> its sizes as text
    # (folder, kind, conversion) -> metadata of the checkpoint; writes everything but the params
    save: Callable[[Path, str, Conversion], dict[str, Any]] = save_config
    checkpoints: str = "."  # folder of the checkpoint inside that of the conversion


def kind_of_config(config: Any) -> str:
    """Returns the kind in `CONVERTERS` whose config this is.

    Raises:
      TypeError: no converter has such a config.
    """
    for kind, converter in CONVERTERS.items():
        if type(config) is converter.config_class:
            return kind
    known = ", ".join(converter.config_class.__name__ for converter in CONVERTERS.values())
    raise TypeError(
        f"config must be one of {known}, got a {type(config).__name__}; give the config that "
        "`from_torch` or `from_robovlms` returned."
    )


def kind_of_file(source: TensorFile, options: ConvertConfig) -> str:
    """Returns the first kind in `CONVERTERS` that recognises the tensors."""
    return next(
        kind for kind, converter in CONVERTERS.items() if converter.recognises(source, options)
    )


def _is_torch(source: TensorFile, options: ConvertConfig) -> bool:
    return bool(options.prefix) or "weight_ih_l0" in source.tensors


def _convert_torch(source: TensorFile, options: ConvertConfig) -> Conversion:
    if options != ConvertConfig(prefix=options.prefix, overwrite=options.overwrite):
        raise ValueError(
            "options of a torch.nn.LSTM, GRU or RNN must be --prefix and --overwrite only, got "
            "options of RoboVLMs' heads; remove them."
        )
    config, params = from_torch(source.tensors, prefix=options.prefix)
    report = report_torch(source.tensors, config, prefix=options.prefix)
    return Conversion(config, params, report)


def _restore_torch(folder: Path, config: RecurrenceConfig) -> Params:
    params = checkpoint.restore_params(folder)
    check_params(config, params)
    return params


def _to_torch(
    config: RecurrenceConfig, params: Params, names: Collection[str], prefix: str
) -> dict[str, np.ndarray]:
    tensors = to_torch(config, params, prefix=prefix)
    # Biases that the foreign file does not have are zero until they are trained.
    return {name: array for name, array in tensors.items() if name in names or array.any()}


def _describe_recurrence(config: RecurrenceConfig) -> str:
    directions = ", bidirectional" if config.bidirectional else ""
    return f"{config.cell}, {config.num_layers} layers of {config.hidden_size}{directions}"


def _convert_policy(source: TensorFile, options: ConvertConfig) -> Conversion:
    default = ConvertConfig()
    if (options.pooling, options.num_latents) != (default.pooling, default.num_latents):
        raise ValueError(
            "--pooling and --num-latents must be left out with --vlm, which reads them from "
            "RoboVLMs' training config; give that as --config."
        )
    training = find_training(source.path, options.config)
    if options.window_size:
        training = training._replace(window_size=options.window_size)
    agent, norm_stats, params, report = from_robovlms_policy(
        source.tensors,
        options.vlm,
        training,
        num_heads=options.num_heads,
        allow_missing=options.allow_missing,
    )
    return Conversion(agent, params, report, norm_stats)


def _restore_policy(folder: Path, config: AgentConfig) -> Params:
    like = jax.eval_shape(lambda key: policy.init(key, config.policy), jax.random.key(0))
    return checkpoint.restore_params(folder, like)


def _to_policy(
    config: AgentConfig, params: Params, names: Collection[str], _prefix: str
) -> dict[str, np.ndarray]:
    return to_robovlms_policy(config, params, names)


def _describe_policy(config: AgentConfig) -> str:
    backbone, decoder = config.policy.backbone, config.policy.decoder
    return f"policy on {backbone.kind}: {_describe_decoder(decoder)}"


def _save_policy(folder: Path, kind: str, conversion: Conversion) -> dict[str, Any]:
    del kind
    runs.write_acting(folder, conversion.config, conversion.norm_stats, None)
    return runs.acting_metadata(conversion.config, conversion.norm_stats)


def _convert_robovlms(source: TensorFile, options: ConvertConfig) -> Conversion:
    if options.config:
        raise ValueError(
            "--config must come with --vlm, the folder of the model; without it the head alone is "
            "converted, with the other options."
        )
    config, params = from_robovlms(
        source.tensors,
        window_size=options.window_size,
        pooling=options.pooling,
        num_latents=options.num_latents,
        num_heads=options.num_heads,
        allow_missing=options.allow_missing,
    )
    return Conversion(config, params, report_robovlms(source.tensors, config))


def _restore_robovlms(folder: Path, config: DecoderConfig) -> Params:
    like = jax.eval_shape(lambda key: decoders.init(key, config), jax.random.key(0))
    return checkpoint.restore_params(folder, like)


def _to_robovlms(
    config: DecoderConfig, params: Params, names: Collection[str], _prefix: str
) -> dict[str, np.ndarray]:
    """Returns RoboVLMs' tensors under the names of the file, new ones with the file's prefix."""
    name_in_file = {head_name(name): name for name in names}
    file_prefix = next((prefix_of(name) for name in names), HEAD)
    return {
        name_in_file.get(name, file_prefix + name.removeprefix(HEAD)): array
        for name, array in to_robovlms(config, params).items()
    }


def _describe_decoder(config: DecoderConfig) -> str:
    return (
        f"{config.kind}, {config.num_layers} layers of {config.hidden_size} on tokens of "
        f"{config.token_dim}, {config.action_horizon} actions of {config.action_dim}, "
        f"window {config.window_size}"
    )


CONVERTERS: dict[str, Converter] = {  # in the order in which `recognises` is tried
    "recurrence": Converter(
        RecurrenceConfig, _is_torch, _convert_torch, _restore_torch, _to_torch, _describe_recurrence
    ),
    "agent": Converter(
        AgentConfig,
        lambda source, options: bool(options.vlm),
        _convert_policy,
        _restore_policy,
        _to_policy,
        _describe_policy,
        _save_policy,
        checkpoints="checkpoints",
    ),
    "decoder": Converter(
        DecoderConfig,
        lambda source, options: True,
        _convert_robovlms,
        _restore_robovlms,
        _to_robovlms,
        _describe_decoder,
    ),
}
