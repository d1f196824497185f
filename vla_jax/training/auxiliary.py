"""Auxiliary heads, for training only: prediction of the next steps, and of the instruction.

    features [B, W, H] → forward → tokens or images of the next F steps
                       → caption → the instruction, word by word (`captions`)

Both take the recurrent trunk's features of every step, and their losses train the trunk.
`F` is the number of predicted steps here.

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

from vla_jax.config import checked, did_you_mean
from vla_jax.nn import layers
from vla_jax.training import captions
from vla_jax.training.losses import masked_mean
from vla_jax.trees import under
from vla_jax.types import Array, Batch, Key, Metrics, Observation, Params, ShardingRules

Target = Literal["tokens", "pixels"]
CAMERAS = ("image_primary", "image_wrist")
SHARDING: ShardingRules = (
    *under("forward", layers.MLP_SHARDING),
    *under("caption", captions.SHARDING),
)


@dataclasses.dataclass(frozen=True)
@checked()
class AuxiliaryConfig:
    """Auxiliary heads and their sizes; none by default."""

    forward_horizon: int = 0  # F, environment steps ahead to predict; 0 = no forward head
    forward_target: Target = "tokens"  # forward head predicts backbone "tokens" or "pixels"
    forward_sizes: tuple[int, ...] = (256,)  # hidden layer sizes of the forward head's MLP
    forward_patch_size: int = 8  # pixels, side of the predicted image patches ("pixels")
    caption: bool = False  # add a caption head, which decodes the instruction at every step
    caption_size: int = 128  # word embedding size and GRU units of the caption head

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
    """Predictions of the auxiliary heads at every step, float32; None for a disabled head."""

    tokens: Array | None = None  # [B, W, F, N·D], at step t those of t + 1 … t + F
    image_primary: Array | None = None  # [B, W, F, patches, 3·p²], pixels about in [0, 1]
    image_wrist: Array | None = None  # the same for the wrist camera
    caption: Array | None = None  # [B, W, S, V] logits of each word given the words before it


def is_on(config: AuxiliaryConfig) -> bool:
    """Returns True if the config has any head."""
    return config.caption or config.forward_horizon > 0


def init(
    key: Key,
    config: AuxiliaryConfig,
    *,
    feature_size: int,
    target_sizes: Mapping[str, int],
    vocab_size: int,
) -> Params:
    """Returns `{"forward": {name: mlp, ...}, "caption": {...}}`, of the enabled heads only.

    Args:
      key: consumed.
      config: heads and their sizes.
      feature_size: H, the trunk's features per step.
      target_sizes: size of the forward target of one step, by name: `tokens` N·D, or h·w·3 for
        each existing camera of `image_primary` and `image_wrist`.
      vocab_size: V, word ids are in [0, V).
    """
    forward_key, caption_key = jax.random.split(key)
    params: Params = {}
    if config.forward_horizon:
        keys = jax.random.split(forward_key, len(target_sizes))
        params["forward"] = {
            name: layers.init_mlp(
                name_key, (feature_size, *config.forward_sizes, config.forward_horizon * size)
            )
            for name_key, (name, size) in zip(keys, target_sizes.items(), strict=True)
        }
    if config.caption:
        params["caption"] = captions.init(
            caption_key, feature_size, config.caption_size, vocab_size
        )
    return params


def apply(
    params: Params, config: AuxiliaryConfig, features: Array, words: Array | None = None
) -> AuxiliaryPrediction:
    """Returns the heads' predictions from the trunk's features.

    Args:
      params: from `init`.
      config: as for `init`.
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
            "words must be ids [B, W, S], got None; pass captions.visible_instruction(batch)."
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
    """Returns the unweighted loss of each head, for `loss_terms.total`.

    The forward loss is the mean squared error where `forward_mask` is True, the caption loss the
    cross-entropy of `captions.loss`.

    Args:
      prediction: from `apply`.
      config: as for `apply`.
      batch: the batch that the features were computed from.
      tokens: `[B, W, N, D]`, the backbone's output for the batch; targets get no gradient.
      axis_name: mapped axis to sum over; None outside `pmap` and `shard_map`.

    Returns:
      The terms of the enabled heads, `[]` float32, among `forward_tokens`,
      `forward_image_primary`, `forward_image_wrist` and `caption`; and the metrics of
      `captions.loss`.

    Raises:
      ValueError: the forward target is pixels and the batch has no images.
    """
    terms, metrics = {}, {}
    if config.forward_horizon:
        mask = forward_mask(batch.timestep_mask, config.forward_horizon, batch.reset)
        for name, frame in frames(config, batch.observation, tokens).items():
            predicted = getattr(prediction, name)
            if predicted is not None:  # no head was made for this camera
                error = _squared_error(predicted, frame, mask)
                terms[f"forward_{name}"] = masked_mean(error, mask, axis_name=axis_name)
    if prediction.caption is not None:
        terms["caption"], metrics = captions.loss(
            prediction.caption, captions.visible_instruction(batch), axis_name=axis_name
        )
    return terms, metrics


def frames(config: AuxiliaryConfig, observation: Observation, tokens: Array) -> dict[str, Array]:
    """Returns the forward target of every step, by the names of `AuxiliaryPrediction`.

    Args:
      config: `forward_target` and `forward_patch_size` are used.
      observation: `[B, W, ...]`.
      tokens: `[B, W, N, D]`.

    Returns:
      `tokens [B, W, N·D]` without gradient; or the existing images of `image_primary` and
      `image_wrist` as patches `[B, W, patches, 3·p²]` in [0, 1].

    Raises:
      ValueError: the target is pixels and there are no images, or p does not divide their sides.
    """
    if config.forward_target == "tokens":
        return {"tokens": rearrange(jax.lax.stop_gradient(tokens), "B W N D -> B W (N D)")}
    images = {name: getattr(observation, name) for name in CAMERAS}
    images = {name: image for name, image in images.items() if image is not None}
    if not images:
        raise ValueError(
            "auxiliary.forward_target 'pixels' needs images in the batch, got none; choose "
            "'tokens', or an image backbone that is not frozen."
        )
    size = config.forward_patch_size
    return {name: patches(image, size) for name, image in images.items()}


def patches(images: Array, patch_size: int) -> jax.Array:
    """Returns images `[..., h, w, 3]` uint8 as patches `[..., patches, 3·p²]` in [0, 1].

    Raises:
      ValueError: p does not divide h and w.
    """
    height, width = images.shape[-3:-1]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"auxiliary.forward_patch_size must divide images of {height} x {width} pixels, "
            f"got {patch_size}."
        )
    pattern = "... (h p) (w q) c -> ... (h w) (p q c)"
    return rearrange(jnp.asarray(images), pattern, p=patch_size, q=patch_size) / 255.0


def forward_mask(timestep_mask: Array, horizon: int, reset: Array | None = None) -> jax.Array:
    """Returns the mask of the steps that have a forward target.

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
    return real[..., None] & same & (_indices_ahead(real.shape[1], horizon) < real.shape[1])[None]


def ahead(steps: Array, horizon: int) -> jax.Array:
    """Returns the F steps that follow each: `[B, W, ...]` as `[B, W, F, ...]`.

    Beyond the window its last step is repeated; `forward_mask` is False there.
    """
    last = steps.shape[1] - 1
    return jnp.asarray(steps)[:, np.minimum(_indices_ahead(last + 1, horizon), last)]


def _indices_ahead(window_size: int, horizon: int) -> np.ndarray:
    return np.add.outer(np.arange(window_size), np.arange(1, horizon + 1))


def _unfold(outputs: jax.Array, config: AuxiliaryConfig, name: str) -> jax.Array:
    """Returns an MLP's output `[B, W, F·…]` in the shape of its target."""
    outputs = rearrange(outputs, "B W (F X) -> B W F X", F=config.forward_horizon)
    if name not in CAMERAS:
        return outputs
    return rearrange(outputs, "B W F (N X) -> B W F N X", X=3 * config.forward_patch_size**2)


def _squared_error(predicted: jax.Array, frame: Array, mask: jax.Array) -> jax.Array:
    target = ahead(frame, mask.shape[-1])
    chex.assert_equal_shape([predicted, target])
    mask = mask.reshape(*mask.shape, *(1,) * (target.ndim - mask.ndim))
    # The selection comes before the loss: the gradient through a NaN would be NaN.
    return jnp.square(jnp.where(mask, predicted, 0.0) - jnp.where(mask, target, 0.0))
