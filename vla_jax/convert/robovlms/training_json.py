"""RoboVLMs' training config, the JSON that belongs to a released checkpoint.

What it decides beyond the shapes of the tensors is read here; what is not supported is refused.
Its `image_mean`, `image_std`, `act_head.window_size` and `act_head.fwd_pred_next_n` are not used by
RoboVLMs either: the image processor and the top-level entries are.
"""

import pathlib
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from vla_jax.backbones.vlm_options import History
from vla_jax.config import did_you_mean
from vla_jax.files import Path, read_json

MODELS = {"kosmos": "kosmos2", "paligemma": "paligemma"}  # RoboVLMs' `model` -> our kind
HEADS = ("LSTMDecoder", "FCDecoder", "GPTDecoder")
HISTORIES: dict[str, History] = {"post": "step", "pre": "window"}  # RoboVLMs' -> ours
_CONTENT = "the training config of RoboVLMs"
_MISSING = object()


class Training(NamedTuple):
    """Settings of a training; the defaults are those of most of RoboVLMs' configs."""

    model: str | None = None  # kind of backbone; None = not stated
    window_size: int | None = None  # W, steps; None = not stated
    action_horizon: int | None = None  # K; None = not stated
    pooling: Literal["max", "none"] = "none"  # of the tokens of a step
    num_latents: int = 1  # copies of the learned token
    hidden_size: int | None = None  # of the head, for each copy; None = not stated
    history: History = "step"  # steps that the model sees, see `VLMOptions.history`
    cameras: tuple[str, ...] = ("image_wrist", "image_primary")  # in the order of the sequence
    bounds: tuple[float, float] | None = (-0.65, 0.65)  # actions mapped to ±1; None = not scaled
    action_mu: float = 0.0  # μ of the μ-law companding of the arm; 0 = off


def read_training(path: Path) -> Training:
    """Returns the settings in a file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, or the policy is of a kind that is not supported.
    """
    data = read_json(path, _CONTENT)
    try:
        return from_json(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def find_training(checkpoint: Path, config: str) -> Training:
    """Returns the settings of a checkpoint.

    Args:
      checkpoint: the file of the weights.
      config: path of the JSON; "" = the JSON of the same name beside the checkpoint, or
        `config.json` there; if there is none, the defaults with a warning.

    Raises:
      FileNotFoundError: `config` is not a file.
      ValueError: as for `read_training`.
    """
    checkpoint = pathlib.Path(checkpoint)
    beside = (checkpoint.with_suffix(".json"), checkpoint.with_name("config.json"))
    found = [config] if config else [path for path in beside if path.is_file()]
    if found:
        return read_training(found[0])
    training = Training()
    warnings.warn(
        f"{checkpoint} has no training config beside it: assuming cameras "
        f"{', '.join(training.cameras)}, actions in ±0.65 and one learned token; give --config",
        stacklevel=2,
    )
    return training


def from_json(data: Mapping[str, Any]) -> Training:
    """Returns the settings of a training config.

    Raises:
      ValueError: an entry is missing, of another type, or of a policy that is not supported.
    """
    head = data.get("act_head")
    if not isinstance(head, Mapping):
        raise ValueError("act_head must be the settings of an action head; give RoboVLMs' JSON.")
    name = str(data.get("model"))
    if name not in MODELS:
        raise ValueError(f"unknown model '{name}'; {did_you_mean(name, MODELS)}")
    _check_supported(data, head)
    pooling = head.get("down_sample", "none")
    wrist = ("image_wrist",) if data.get("use_hand_rgb", False) else ()
    limits = _number(data, "norm_min", -0.65), _number(data, "norm_max", 0.65)
    return Training(
        model=MODELS[name],
        window_size=_count(data, "window_size"),
        action_horizon=_count(data, "fwd_pred_next_n"),
        pooling="max" if pooling == "pooling" else "none",
        num_latents=_count(head, "latent", 1),
        hidden_size=_count(head, "hidden_size", 1024),
        history=HISTORIES[head.get("history_type", "post")],
        cameras=(*wrist, "image_primary"),
        bounds=limits if data.get("norm_action", True) else None,
        action_mu=_number(data, "mu_val", 255.0) if data.get("use_mu_law") else 0.0,
    )


def _check_supported(data: Mapping[str, Any], head: Mapping[str, Any]) -> None:
    """Raises a ValueError for the first entry of a policy that cannot be converted."""
    entries = (
        ("act_head.type", head.get("type"), HEADS),
        ("act_head.action_space", head.get("action_space", "continuous"), ("continuous",)),
        ("act_head.history_type", head.get("history_type", "post"), tuple(HISTORIES)),
        ("act_head.down_sample", head.get("down_sample", "none"), ("none", "pooling")),
        ("use_vision_resampler", data.get("use_vision_resampler", False), (False,)),
        ("use_state", data.get("use_state", False), (False,)),
        ("act_encoder", data.get("act_encoder"), (None,)),
        ("fwd_head", data.get("fwd_head"), (None,)),
        ("train_setup.lora_enable", _entry(data, "train_setup", "lora_enable"), (False, None)),
    )
    for name, value, supported in entries:
        if value not in supported:
            listed = " or ".join(_text(choice) for choice in supported if choice is not None)
            raise ValueError(
                f"{name} must be {listed or 'absent'}, got {_text(value)}; such policies cannot be "
                "converted."
            )


def _entry(data: Mapping[str, Any], section: str, name: str) -> Any:
    inner = data.get(section)
    return inner.get(name) if isinstance(inner, Mapping) else None


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"'{value}'"


def _count(data: Mapping[str, Any], name: str, default: Any = _MISSING) -> int:
    value = data.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        got = "nothing" if value is _MISSING else value
        raise ValueError(f"{name} must be a whole number from 1, got {got}; restore the file.")
    return value


def _number(data: Mapping[str, Any], name: str, default: float) -> float:
    value = data.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {value}; restore the file.")
    return float(value)
