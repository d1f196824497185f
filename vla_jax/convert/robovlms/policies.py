"""Conversion of RoboVLMs' whole policies, a vision-language model with an action head, and back.

    model.backbone.…     the model, under the names of the modules in transformers
    model.action_token   the learned token
    model.act_head.…     the head, see `checkpoints`

The kernel of the model's logits is its embedding, and a file has it under both names.
"""

import dataclasses
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vla_jax.acting.agent import AgentConfig
from vla_jax.backbones import models, weight_export, weight_report, weights
from vla_jax.convert.arrays import as_float32, as_numpy
from vla_jax.convert.conversion_report import Report, check, compare, warn
from vla_jax.convert.robovlms.acting_presets import calvin
from vla_jax.convert.robovlms.checkpoints import from_robovlms, report_robovlms, to_robovlms
from vla_jax.convert.robovlms.key_names import HEAD, find_head, head_name, head_tensors
from vla_jax.convert.robovlms.training_json import Training
from vla_jax.data.normalize import NormStats, fixed_bounds
from vla_jax.files import Path
from vla_jax.policies import policy
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.types import Params

MODEL, TOKEN = "backbone.", "action_token"
FILE_PREFIX = "model."  # of new names
_PREFIX = re.compile(r"(?:(?:module|model)\.)*")  # of training wrappers
_EMBEDDING = "language/embed/embedding"  # path of the param that the logits share
_LOGITS = re.compile(r".*\blm_head\.weight")  # name of their kernel
_AS_TRAINED = {"paligemma": {"prefix": "none"}}  # kind -> fields of its config in RoboVLMs


class ConvertedPolicy(NamedTuple):
    """A converted policy."""

    agent: AgentConfig
    norm_stats: dict[str, NormStats]
    params: Params
    report: Report


def from_robovlms_policy(
    tensors: Mapping[str, Any],
    folder: Path,
    training: Training,
    *,
    num_heads: int = 8,
    allow_missing: str | Sequence[str] = (),
) -> ConvertedPolicy:
    """Converts a whole policy of RoboVLMs.

    The result acts as RoboVLMs does with one robot; see `VLMOptions.layout`.

    Args:
      tensors: name to array (NumPy, JAX or torch), float32, float16 or bfloat16.
      folder: of the vision-language model, with `config.json` and `tokenizer.json`; its weights
        are not read.
      training: settings of the training.
      num_heads: M, attention heads of a GPT.
      allow_missing: globs of names of the head that may be missing; see `from_robovlms`.

    Raises:
      FileNotFoundError: a file of the model is missing.
      ValueError: a tensor is missing, unknown or of another shape, or the folder or the settings
        are of another policy.

    Source: Li et al. 2024, RoboVLMs (arXiv:2412.14058), `BaseRoboVLM`.
    """
    backbone = read_backbone_config(folder, training)
    head = find_head(tensors)
    with warnings.catch_warnings():  # one warning below counts the tensors of all parts
        warnings.filterwarnings("ignore", r"\d+ tensors (cast|missing)|tensors with NaN")
        decoder, decoder_params = from_robovlms(
            {name: tensors[name] for name in head.values()},
            window_size=training.window_size,
            pooling=training.pooling,
            num_latents=training.num_latents,
            num_heads=num_heads,
            allow_missing=allow_missing,
        )
    _check_decoder(decoder, training, backbone)
    agent = _agent(policy.connect(backbone, decoder), training)
    report = report_robovlms_policy(tensors, agent)
    check(
        report,
        f"tensors must be those of the model in {folder}, of a learned token and of a head",
        "give the folder of the model that the policy was trained from, and the complete file",
        allow_missing=allow_missing,
    )
    warn(report, tensors)
    low, high = training.bounds or (-1.0, 1.0)
    params = {"backbone": _read_backbone(tensors, backbone), "decoder": decoder_params}
    return ConvertedPolicy(
        agent, {"action": fixed_bounds(low, high, decoder.action_dim)}, params, report
    )


def to_robovlms_policy(
    agent: AgentConfig, params: Params, names: Collection[str]
) -> dict[str, np.ndarray]:
    """Converts a policy to RoboVLMs' tensors.

    Args:
      agent: from `from_robovlms_policy`.
      params: of its policy; low-rank factors are merged.
      names: of the tensors in the file that was converted.

    Returns:
      Name to float32 array.

    Raises:
      ValueError: RoboVLMs has no counterpart of the decoder or of the learned tokens.
    """
    backbone = agent.policy.backbone
    tensors = {
        MODEL + name: array
        for name, array in weight_export.to_tensors(backbone, params["backbone"]).items()
    }
    tensors[TOKEN] = _common_row(np.asarray(params["backbone"]["action_token"]))
    tensors |= to_robovlms(agent.policy.decoder, params["decoder"])
    in_file = _by_common_name(names, backbone)
    result = {in_file.get(name, FILE_PREFIX + name): array for name, array in tensors.items()}
    logits = [name for common, name in in_file.items() if _is_logits(common, tensors)]
    return result | dict.fromkeys(logits, tensors[_embedding_name(backbone)])


def report_robovlms_policy(tensors: Mapping[str, Any], agent: AgentConfig) -> Report:
    """Returns the report of `from_robovlms_policy` on the same tensors.

    Args:
      tensors: as for `from_robovlms_policy`.
      agent: its result.
    """
    backbone, decoder = agent.policy.backbone, agent.policy.decoder
    in_file = _by_common_name(tensors, backbone)
    needed = {
        **{MODEL + name: place.shape for name, place in models.places(backbone).items()},
        TOKEN: (backbone.token_dim,),
        **{HEAD + name: tensor.their_shape for name, tensor in head_tensors(decoder).items()},
    }
    expected = {in_file.get(name, name): shape for name, shape in needed.items()}
    embedding = in_file.get(_embedding_name(backbone))
    for common, name in in_file.items():
        if embedding and _is_logits(common, needed) and _equal(tensors[name], tensors[embedding]):
            expected[name] = needed[_embedding_name(backbone)]
    head = {name: tensors[name] for name in find_head(tensors).values()}
    ignored = models.get(backbone).ignored
    buffers = [
        name
        for common, name in in_file.items()
        if name not in expected
        and any(re.fullmatch(pattern, common.removeprefix(MODEL)) for pattern in ignored)
    ]
    return compare(expected, tensors, [*buffers, *report_robovlms(head, decoder).buffers])


def read_backbone_config(folder: Path, training: Training) -> Any:
    """Returns the config of a model as RoboVLMs uses it.

    Args:
      folder: of the model.
      training: settings of the training.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the folder is of another model than the training, or damaged.
    """
    config = weights.load_config(folder)
    if training.model not in (None, config.kind):
        raise ValueError(
            f"{folder} must be the folder of a {training.model} model as in the training config, "
            f"got {config.kind}; give the right folder, or the right --config."
        )
    options = dataclasses.replace(
        config.options,
        cameras=training.cameras,
        layout="robovlms",
        readout="action_token",
        history=training.history,
        num_action_tokens=training.num_latents,
    )
    return dataclasses.replace(config, **_AS_TRAINED.get(config.kind, {}), options=options)


def _agent(config: policy.PolicyConfig, training: Training) -> AgentConfig:
    agent = calvin(config, mu=training.action_mu)
    method = "bounds" if training.bounds else "none"
    return dataclasses.replace(agent, normalize=dataclasses.replace(agent.normalize, action=method))


def _check_decoder(decoder: DecoderConfig, training: Training, backbone: Any) -> None:
    """Raises a ValueError if the head is not that of the settings or of the model."""
    widths = (decoder.hidden_size, decoder.hidden_size / training.num_latents)  # of all copies, one
    checks = (
        ("fwd_pred_next_n", training.action_horizon, (decoder.action_horizon,)),
        ("act_head.hidden_size", training.hidden_size, widths),
        ("the model's hidden size", backbone.token_dim, (decoder.token_dim,)),
    )
    for name, stated, found in checks:
        if stated is not None and stated not in found:
            raise ValueError(
                f"{name} must be {found[0]} as in the tensors of the head, got {stated}; give the "
                "training config and the model of this checkpoint."
            )


def _read_backbone(tensors: Mapping[str, Any], config: Any) -> Params:
    """Returns the params of the backbone, float32; one copy of every tensor is made."""
    in_file = _by_common_name(tensors, config)
    shapes: dict[str, Any] = flatten_dict(models.get(config).shapes(config), sep="/")
    leaves: dict[str, Any] = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
    for name, place in models.places(config).items():
        array = as_numpy(tensors[in_file[MODEL + name]])
        row = ... if place.layer is None else place.layer
        leaves[place.tensor.path][row] = place.tensor.order.to_params(array)
    token = as_float32(in_file[TOKEN], tensors[in_file[TOKEN]])
    leaves["action_token"] = np.tile(token, (config.options.num_action_tokens, 1))
    for path in leaves:  # the host's copy of a leaf is freed before the next one is placed
        leaves[path] = jnp.asarray(leaves[path])
    return unflatten_dict(leaves, sep="/")


def _by_common_name(names: Collection[str], config: Any) -> dict[str, str]:
    """Returns a dict from names without prefixes, as in the model's table, to those in the file.

    Raises:
      ValueError: two names differ only in their prefixes.
    """
    result: dict[str, str] = {}
    for name in names:
        common = head_name(name) if HEAD in name else _common_name(name, config)
        if common in result:
            raise ValueError(
                f"'{result[common]}' and '{name}' name the same tensor; keep one of them."
            )
        result[common] = name
    return result


def _common_name(name: str, config: Any) -> str:
    match = _PREFIX.match(name)
    rest = name.removeprefix(match[0] if match else "")
    if not rest.startswith(MODEL):
        return rest
    return MODEL + weight_report.rename(models.get(config), rest.removeprefix(MODEL))


def _embedding_name(config: Any) -> str:
    tensors = models.get(config).tensors(config)
    return MODEL + next(tensor.name for tensor in tensors if tensor.path == _EMBEDDING)


def _is_logits(common: str, known: Collection[str]) -> bool:
    """Returns True for the kernel of the logits, if it has no param of its own."""
    return common not in known and common.startswith(MODEL) and bool(_LOGITS.fullmatch(common))


def _equal(one: Any, other: Any) -> bool:
    one, other = as_numpy(one), as_numpy(other)
    return one.shape == other.shape and np.array_equal(one, other)


def _common_row(rows: np.ndarray) -> np.ndarray:
    """Returns the learned token of which RoboVLMs puts copies into the sequence."""
    if (rows != rows[0]).any():
        raise ValueError(
            f"action_token must be {len(rows)} copies of one token, as in RoboVLMs, got different "
            "ones, which were trained apart; such a policy cannot be converted."
        )
    return rows[0]
