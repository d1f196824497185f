"""Heads that train the memory and never act: what comes next, and what was said at the start.

    features [B, W, H] → forward → what the next F steps show
                       → caption → the instruction, word by word (`captions`)

Both read the memory's features at every step, and their losses reach the memory through them.
`F` stands for steps ahead here.

    prediction = apply(params, config, features, captions.visible_instruction(batch))
    terms, metrics = loss(prediction, config, batch, tokens)       # then loss_terms.total
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from vla_jax.config import did_you_mean
from vla_jax.nn import layers
from vla_jax.training import captions
from vla_jax.training.losses import masked_mean
from vla_jax.types import Array, Batch, Key, Metrics, Observation, Params

Target = Literal["tokens", "pixels"]
CAMERAS = ("image_primary", "image_wrist")


@dataclasses.dataclass(frozen=True)
class AuxiliaryConfig:
    """Which heads there are; none by default."""

    forward_horizon: int = 0  # F, environment steps ahead that are predicted; 0 = no such head
    forward_target: Target = "tokens"  # what of them: the backbone's tokens, or the pictures
    forward_sizes: tuple[int, ...] = (256,)  # hidden layers of the MLP that predicts
    forward_patch_size: int = 8  # pixels, side of the patches that pictures are predicted as
    caption: bool = False  # give the instruction back at every step
    caption_size: int = 128  # features of a word, and units of the GRU that says them

    def __post_init__(self):
        if self.forward_target not in get_args(Target):
            raise ValueError(
                f"unknown auxiliary.forward_target '{self.forward_target}'; "
                f"{did_you_mean(self.forward_target, get_args(Target))}"
            )
        least = {"forward_horizon": 0, "forward_patch_size": 1, "caption_size": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(
                    f"auxiliary.{name} must be at least {smallest}, got {getattr(self, name)}."
                )
        if min(self.forward_sizes, default=1) < 1:
            raise ValueError(
                f"auxiliary.forward_sizes must be at least 1 each, got {self.forward_sizes}."
            )


class AuxiliaryPrediction(NamedTuple):
    """Predictions of the auxiliary heads at every step, float32; None where a head is off."""

    tokens: Array | None = None  # [B, W, F, N·D], at step t those of t + 1 … t + F
    image_primary: Array | None = None  # [B, W, F, patches, 3·p²], pixels about in [0, 1]
    image_wrist: Array | None = None  # the same, of the camera on the hand
    caption: Array | None = None  # [B, W, S, V] logits of each word, knowing those before it


def is_on(config: AuxiliaryConfig) -> bool:
    """Returns whether there is any head."""
    return config.caption or config.forward_horizon > 0


def init(
    key: Key,
    config: AuxiliaryConfig,
    *,
    feature_size: int,
    frame_sizes: Mapping[str, int],
    vocab_size: int,
) -> Params:
    """Returns `{"forward": {name: mlp, ...}, "caption": {...}}`, each where it is switched on.

    Args:
      key: consumed.
      config: which heads, and their sizes.
      feature_size: H, what the memory gives at a step.
      frame_sizes: how many numbers of one step are to be predicted, by name: `tokens` N·D, or
        `image_primary` and `image_wrist` h·w·3, those of the two that there are.
      vocab_size: V, word ids lie in [0, V).
    """
    forward_key, caption_key = jax.random.split(key)
    params: Params = {}
    if config.forward_horizon:
        keys = jax.random.split(forward_key, len(frame_sizes))
        params["forward"] = {
            name: layers.init_mlp(
                name_key, (feature_size, *config.forward_sizes, config.forward_horizon * size)
            )
            for name_key, (name, size) in zip(keys, frame_sizes.items(), strict=True)
        }
    if config.caption:
        params["caption"] = captions.init(
            caption_key, feature_size, config.caption_size, vocab_size
        )
    return params


def apply(
    params: Params, config: AuxiliaryConfig, features: Array, words: Array | None = None
) -> AuxiliaryPrediction:
    """Returns what each head makes of the memory's features.

    Args:
      params: from `init`.
      config: the one that `init` was given.
      features: `[B, W, H]`, from `policy.outputs` or `decoders.run_trunk`.
      words: `[B, W, S]` ids from `captions.visible_instruction`; only the caption head needs them.

    Raises:
      ValueError: there is a caption head and no words.
    """
    chex.assert_rank(features, 3)
    predicted = {
        name: _unfold(layers.apply_mlp(mlp, features), config, name)
        for name, mlp in params.get("forward", {}).items()
    }
    if "caption" not in params:
        return AuxiliaryPrediction(**predicted)
    if words is None:
        raise ValueError(
            "words must be ids [B, W, S], got None; give captions.visible_instruction(batch)."
        )
    return AuxiliaryPrediction(
        **predicted, caption=captions.apply(params["caption"], features, words)
    )


def loss(
    prediction: AuxiliaryPrediction,
    config: AuxiliaryConfig,
    batch: Batch,
    tokens: Array,
    *,
    axis_name: str | None = None,
) -> tuple[dict[str, jax.Array], Metrics]:
    """Returns the loss of each head, without a weight, for `loss_terms.total`.

    Of what comes next it is the mean squared error where `forward_mask` holds, of the instruction
    the cross-entropy of `captions.loss`.

    Args:
      prediction: from `apply`.
      config: as there.
      batch: whose steps the features are of.
      tokens: `[B, W, N, D]`, the backbone's of that batch; no gradient flows into targets.
      axis_name: mapped axis to sum over; None means that the batch is whole.

    Returns:
      Those of the terms `forward_tokens`, `forward_image_primary`, `forward_image_wrist` and
      `caption` that there are, `[]` float32; and the metrics of `captions.loss`.

    Raises:
      ValueError: pictures are to be predicted and the batch has none.
    """
    terms, metrics = {}, {}
    if config.forward_horizon:
        mask = forward_mask(batch.timestep_mask, config.forward_horizon, batch.reset)
        for name, frame in frames(config, batch.observation, tokens).items():
            predicted = getattr(prediction, name)
            if predicted is not None:  # a camera may be there that no head was made for
                error = _squared_error(predicted, frame, mask)
                terms[f"forward_{name}"] = masked_mean(error, mask, axis_name=axis_name)
    if prediction.caption is not None:
        terms["caption"], metrics = captions.loss(
            prediction.caption, captions.visible_instruction(batch), axis_name=axis_name
        )
    return terms, metrics


def frames(config: AuxiliaryConfig, observation: Observation, tokens: Array) -> dict[str, Array]:
    """Returns what is to be predicted of a step, by the names of `AuxiliaryPrediction`.

    Args:
      config: what to predict.
      observation: `[B, W, ...]`.
      tokens: `[B, W, N, D]`.

    Returns:
      `tokens [B, W, N·D]` without gradient; or `image_primary` and `image_wrist`, those that
      there are, as patches `[B, W, patches, 3·p²]` in [0, 1].

    Raises:
      ValueError: pictures are to be predicted and there are none, or p does not divide them.
    """
    if config.forward_target == "tokens":
        return {"tokens": rearrange(jax.lax.stop_gradient(tokens), "B W N D -> B W (N D)")}
    pictures = {name: getattr(observation, name) for name in CAMERAS}
    pictures = {name: picture for name, picture in pictures.items() if picture is not None}
    if not pictures:
        raise ValueError(
            "auxiliary.forward_target 'pixels' must find pictures in the batch, got none; choose "
            "'tokens', or a backbone that sees and is not frozen."
        )
    size = config.forward_patch_size
    return {name: patches(picture, size) for name, picture in pictures.items()}


def patches(pictures: Array, patch_size: int) -> jax.Array:
    """Returns pictures `[..., h, w, 3]` uint8 as patches `[..., patches, 3·p²]` in [0, 1].

    Raises:
      ValueError: p does not divide h and w.
    """
    height, width = pictures.shape[-3:-1]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"auxiliary.forward_patch_size must divide pictures of {height} x {width} pixels, "
            f"got {patch_size}."
        )
    pattern = "... (h p) (w q) c -> ... (h w) (p q c)"
    return rearrange(jnp.asarray(pictures), pattern, p=patch_size, q=patch_size) / 255.0


def forward_mask(timestep_mask: Array, horizon: int, reset: Array | None = None) -> jax.Array:
    """Returns where there is something to predict.

    Args:
      timestep_mask: `[B, W]`, True where the step is real.
      horizon: F.
      reset: `[B, W]`, True where a new episode starts; None means nowhere.

    Returns:
      `[B, W, F]`, True where steps t and t + f, f = 1 … F, are both in the window, both real, and
      no episode starts after t up to t + f.
    """
    real = jnp.asarray(timestep_mask)
    episode = jnp.zeros(real.shape, jnp.int32) if reset is None else jnp.cumsum(reset, axis=1)
    episode = jnp.where(real, episode, -1)
    same = ahead(episode, horizon) == episode[..., None]
    return real[..., None] & same & (_following(real.shape[1], horizon) < real.shape[1])[None]


def ahead(steps: Array, horizon: int) -> jax.Array:
    """Returns the F steps that follow each: `[B, W, ...]` as `[B, W, F, ...]`.

    Beyond the window its last step is repeated; `forward_mask` says where.
    """
    last = steps.shape[1] - 1
    return jnp.asarray(steps)[:, np.minimum(_following(last + 1, horizon), last)]


def _following(window_size: int, horizon: int) -> np.ndarray:
    return np.add.outer(np.arange(window_size), np.arange(1, horizon + 1))


def _unfold(outputs: jax.Array, config: AuxiliaryConfig, name: str) -> jax.Array:
    """Returns an MLP's `[B, W, F·…]` in the shape of what it predicts."""
    outputs = rearrange(outputs, "B W (F X) -> B W F X", F=config.forward_horizon)
    if name not in CAMERAS:
        return outputs
    return rearrange(outputs, "B W F (N X) -> B W F N X", X=3 * config.forward_patch_size**2)


def _squared_error(predicted: jax.Array, frame: Array, mask: jax.Array) -> jax.Array:
    following = ahead(frame, mask.shape[-1])
    chex.assert_equal_shape([predicted, following])
    kept = mask.reshape(*mask.shape, *(1,) * (following.ndim - mask.ndim))
    # The selection comes before the loss: the gradient through a NaN target would be NaN.
    return jnp.square(predicted - jnp.where(kept, following, 0.0))
