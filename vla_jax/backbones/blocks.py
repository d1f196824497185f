"""Layers shared by vision-language models: linear maps, norms, activations, stacks.

A linear map is `{"kernel" [in, out]}` with an optional `"bias" [out]` and, while it is adapted, the
entries of `nn.lora`. The params of a stack of equal layers have a leading axis L and are run by
`jax.lax.scan`. Activations have the dtype of the inputs; norms, softmax and sums are float32.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from vla_jax.config import did_you_mean
from vla_jax.nn import lora
from vla_jax.nn.sharded_params import split_rows
from vla_jax.types import Array, Key, Params

Remat = Literal["none", "layers", "products"]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
}


def check_activation(name: str) -> None:
    """Raises a ValueError for an activation that is not in `ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation '{name}'; {did_you_mean(name, ACTIVATIONS)}")


def linear(params: Params, x: jax.Array) -> jax.Array:
    """Returns `x · kernel + bias`, plus the low-rank update of `nn.lora` if there is one.

    Args:
      params: kernel `[in, out]`, optional bias `[out]`, optional low-rank factors.
      x: `[..., in]`.

    Returns:
      `[..., out]` in the dtype of `x`; sums are float32.
    """
    y = _matmul(x, params["kernel"])
    if lora.is_adapted(params):
        y = y + lora.update(params, x)
    if "bias" in params:
        y = y + jnp.broadcast_to(params["bias"], y.shape)
    return y.astype(x.dtype)


def layer_norm(params: Params, x: jax.Array, epsilon: float) -> jax.Array:
    """Returns `(x − mean) / √(var + epsilon) · scale + bias` over the last axis, dtype of `x`."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(variance + epsilon)
    scale, bias = (jnp.broadcast_to(params[name], x.shape) for name in ("scale", "bias"))
    return (normal * scale + bias).astype(x.dtype)


def rms_norm(params: Params, x: jax.Array, epsilon: float, *, offset: float = 0.0) -> jax.Array:
    """Returns `x / √(mean(x²) + epsilon) · (offset + scale)` over the last axis, dtype of `x`.

    Source: Zhang and Sennrich 2019 (arXiv:1910.07467); Gemma has offset 1.
    """
    wide = x.astype(jnp.float32)
    normal = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + epsilon)
    scale = offset + jnp.broadcast_to(params["scale"], x.shape)
    return (normal * scale).astype(x.dtype)


def keep_seen(x: jax.Array, mask: Array) -> jax.Array:
    """Returns the inputs of a decoder with zeros at positions that no query attends to.

    They may be NaN, which a weight of 0 does not remove.

    Args:
      x: `[B, T, D]`.
      mask: bool `[B or 1, T or 1, T]`, True where a query attends to a key.
    """
    return jnp.where(jnp.any(mask, axis=-2)[..., None], x, 0.0)


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """Returns `[B, T, M·E]` as `[B, T, M, E]`."""
    return rearrange(x, "B T (M E) -> B T M E", M=num_heads)


def run_layers(
    layer: Callable[[jax.Array, Any], jax.Array], x: jax.Array, stacked: Any, *, remat: Remat
) -> jax.Array:
    """Returns `x` after all layers, run as one scan.

    Args:
      layer: `(x, params and other arrays of one layer) -> x`.
      x: input of the first layer.
      stacked: arrays `[L, ...]`, sliced along L.
      remat: activations kept for the backward pass: "none" = all, "layers" = only the inputs of the
        layers, "products" = those and the outputs of matrix products.
    """
    layer = _rematerialised(layer, remat)
    return jax.lax.scan(lambda x, arrays: (layer(split_rows(x), arrays), None), x, stacked)[0]


def run_tapped_layers(
    layer: Callable[[jax.Array, Any], jax.Array],
    x: jax.Array,
    stacked: Any,
    *,
    taps: Sequence[int],
    num_layers: int,
    remat: Remat,
) -> tuple[jax.Array, jax.Array]:
    """Returns `x` after all layers, and after J layers in between.

    Besides what `run_layers` needs, only the J + 1 arrays are in memory.

    Args:
      layer: `(x, params and other arrays of one layer) -> x`.
      x: input of the first layer.
      stacked: arrays `[L, ...]`, sliced along L.
      taps: numbers of the J layers, from 0.
      num_layers: L.
      remat: see `run_layers`.

    Returns:
      `x`, and `[J, ...]` with the shape of `x`.
    """
    layer = _rematerialised(layer, remat)
    slots = np.full(num_layers, len(taps), np.int32)  # the last slot is overwritten by most layers
    slots[list(taps)] = np.arange(len(taps))

    def step(carry: tuple[jax.Array, jax.Array], arrays: Any) -> tuple[Any, None]:
        x, tapped = carry
        of_layer, slot = arrays
        x = layer(split_rows(x), of_layer)
        return (x, jax.lax.dynamic_update_index_in_dim(tapped, x, slot, 0)), None

    tapped = jnp.zeros((len(taps) + 1, *x.shape), x.dtype)
    (x, tapped), _ = jax.lax.scan(step, (x, tapped), (stacked, slots))
    return x, tapped[:-1]


def patches(images: Array, patch_size: int) -> jax.Array:
    """Returns the patches of images in raster order, with pixels as `(row, column, channel)`.

    Pixels beyond the last whole patch are left out.

    Args:
      images: `[I, h, w, 3]`.
      patch_size: height and width of a patch, pixels.

    Returns:
      `[I, number of patches, patch_size² · 3]`.
    """
    _, height, width, _ = images.shape
    whole = images[:, : height - height % patch_size, : width - width % patch_size]
    return rearrange(
        jnp.asarray(whole), "I (h p) (w q) c -> I (h w) (p q c)", p=patch_size, q=patch_size
    )


def init_tree(key: Key, shapes: Mapping[str, Any], path: str = "") -> Params:
    """Returns random params of the given shapes.

    Kernels and embeddings are drawn from N(0, 0.02²); scales are 1, and biases and all others 0.

    Args:
      key: consumed.
      shapes: nested dict of shapes.
      path: of the dict inside the params, for the keys of its leaves.
    """
    params = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        part = jax.random.fold_in(key, number)
        if isinstance(shape, Mapping):
            params[name] = init_tree(part, shape, f"{path}{name}/")
        elif name in ("kernel", "embedding"):
            params[name] = 0.02 * jax.random.normal(part, shape)
        else:
            params[name] = jnp.full(shape, 1.0 if name == "scale" else 0.0)
    return params


def _rematerialised(
    layer: Callable[[jax.Array, Any], jax.Array], remat: Remat
) -> Callable[[jax.Array, Any], jax.Array]:
    policies = {
        "layers": jax.checkpoint_policies.nothing_saveable,
        "products": jax.checkpoint_policies.dots_saveable,
    }
    if remat not in policies:
        return layer
    return jax.checkpoint(layer, policy=policies[remat], prevent_cse=False)


def _matmul(x: jax.Array, kernel: Array) -> jax.Array:
    kernel = jnp.asarray(kernel).astype(x.dtype)
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)
