"""Low-rank adaptation (LoRA) of linear maps.

    y = x · kernel + s (x · A) · B,     A [in, r],  B [r, out],  s = alpha / r

An adapted linear map has the entries `lora_a`, `lora_b` and `lora_scale` (s, not trained) beside
its kernel; in a stack of layers each has a leading axis L. B is zero at first, so that a new
adapter changes nothing.

Source: Hu et al. 2021, LoRA (arXiv:2106.09685), §4.1; `rank_stabilized` is Kalajdzievski 2023
(arXiv:2312.03732).
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from vla_jax import trees
from vla_jax.config import checked
from vla_jax.types import Key, Params

TRAINED = ("*/lora_a", "*/lora_b")  # path globs of the params that a LoRA training changes


@dataclass(frozen=True)
@checked(rank=(0, 2**16))
class LoraConfig:
    """Low-rank adaptation."""

    rank: int = 0  # r, rank of the update of each kernel; 0 = no adaptation
    alpha: float = 16.0  # the update is scaled by alpha / rank
    # path globs of the linear maps to adapt, inside the model
    targets: tuple[str, ...] = ("language/layers/query", "language/layers/value")
    rank_stabilized: bool = False  # scale by alpha / √rank instead

    def __post_init__(self):
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be above 0 and finite, got {self.alpha}.")
        if self.rank and not self.targets:
            raise ValueError("targets must name at least one linear map if rank is above 0.")

    @property
    def scale(self) -> float:
        """Factor s of the update; 0 without adaptation."""
        if not self.rank:
            return 0.0
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


def is_adapted(params: Params) -> bool:
    """Returns True if a linear map has low-rank factors."""
    return "lora_a" in params


def update(params: Params, x: jax.Array) -> jax.Array:
    """Returns the low-rank term `s (x · A) · B`, float32.

    Args:
      params: linear map with `lora_a [in, r]`, `lora_b [r, out]`, `lora_scale []`.
      x: `[..., in]`.
    """
    low = jnp.matmul(x, params["lora_a"].astype(x.dtype), preferred_element_type=jnp.float32)
    high = jnp.matmul(
        low.astype(x.dtype), params["lora_b"].astype(x.dtype), preferred_element_type=jnp.float32
    )
    return jnp.broadcast_to(jax.lax.stop_gradient(params["lora_scale"]), high.shape) * high


def add(key: Key, params: Params, config: LoraConfig) -> Params:
    """Returns the params with new factors at every linear map that a target matches.

    A is drawn from U(−1/√in, 1/√in), B is zero.

    Args:
      key: consumed.
      params: nested dict with linear maps; kernels are `[in, out]`, or `[L, in, out]` in a stack.
      config: rank, scale and targets; with rank 0 the params are returned unchanged.

    Raises:
      ValueError: a target matches no linear map.
    """
    if not config.rank:
        return params
    paths = [path.removesuffix("/kernel") for path in trees.leaf_paths(params) if _is_kernel(path)]
    trees.check_globs(config.targets, dict.fromkeys(paths, 0), name="lora.targets")
    chosen = [path for path in paths if trees.matches(path, config.targets)]
    for number, path in enumerate(chosen):
        params = _replace(params, path.split("/"), jax.random.fold_in(key, number), config)
    return params


def _is_kernel(path: str) -> bool:
    return path.endswith("/kernel")


def _replace(params: Params, names: list[str], key: Key, config: LoraConfig) -> Params:
    """Returns the params with factors beside the kernel at the end of the path."""
    if names:
        return {**params, names[0]: _replace(params[names[0]], names[1:], key, config)}
    *layers, num_inputs, num_outputs = params["kernel"].shape
    bound = num_inputs**-0.5
    return {
        **params,
        "lora_a": jax.random.uniform(
            key, (*layers, num_inputs, config.rank), jnp.float32, -bound, bound
        ),
        "lora_b": jnp.zeros((*layers, config.rank, num_outputs)),
        "lora_scale": jnp.full(layers, config.scale),
    }


def merge(params: Params) -> Params:
    """Returns the params with each low-rank update added to its kernel, without the factors."""
    if is_adapted(params):
        product = jnp.matmul(params["lora_a"], params["lora_b"], precision="highest")
        scale = jnp.asarray(params["lora_scale"])[..., None, None]
        kernel = jnp.asarray(params["kernel"])
        kernel = (kernel + scale * product).astype(kernel.dtype)
        return {**remove(params), "kernel": kernel}
    return {k: merge(v) if isinstance(v, dict) else v for k, v in params.items()}


def remove(params: Params) -> Params:
    """Returns the params without low-rank factors; the kernels are not changed."""
    return {
        k: remove(v) if isinstance(v, dict) else v
        for k, v in params.items()
        if not k.startswith("lora_")
    }
