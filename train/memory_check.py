"""Memory that a training needs on each device, checked before data are read."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from train.configs import ImitateConfig
from train.setup import make_optim_config, param_shapes, sharding_rules, trained_shapes
from vla_jax.backbones import registry
from vla_jax.training import memory_estimate, optim, parallel
from vla_jax.training.memory_estimate import MemoryEstimate
from vla_jax.training.update import Counted, LossFn
from vla_jax.types import Batch, Observation, Params, Tokens

LARGE = 20_000_000  # params from which the estimate is printed
_GB = 1e9  # bytes


def check_memory(config: ImitateConfig, loss_fn: LossFn, *, copies: int = 1) -> None:
    """Raises an error if the training cannot fit; prints the estimate of a large model.

    Args:
      config: of the training.
      loss_fn: of `(params, Counted, key)`, from `imitate.make_loss`.
      copies: number of such trainings in one program.

    Raises:
      ValueError: the devices have too little memory.
    """
    shapes = trained_shapes(config)
    mesh = parallel.make_mesh(config.loop.mesh)
    purpose = "this training" if copies == 1 else f"{copies} trainings in one program"
    remedy = "" if copies == 1 else "use a smaller --group-size, or "
    _check(
        estimate_memory(config, loss_fn, shapes).times(copies),
        mesh,
        shapes,
        purpose=purpose,
        remedy=f"{remedy}train fewer params (LoRA, --freeze), use rematerialisation, a smaller "
        "--batch-size, or more devices with --mesh fsdp=N",
    )


def check_encoding(config: ImitateConfig, mesh: Mesh) -> None:
    """Raises an error if the computation of cached tokens cannot fit; otherwise `check_memory`.

    Args:
      config: of the training.
      mesh: devices of this process, which encode.

    Raises:
      ValueError: the devices have too little memory.
    """
    _check(
        estimate_encoding(config, mesh),
        mesh,
        param_shapes(config)["backbone"],
        purpose="the computation of cached tokens",
        remedy="use a smaller --cache-batch, --images-per-pass, or more devices with --mesh fsdp=N",
    )


def estimate_encoding(config: ImitateConfig, mesh: Mesh) -> MemoryEstimate:
    """Returns the memory of encoding one chunk of frames; arguments as `check_encoding`."""
    backbone = config.agent.policy.backbone
    member, shapes = registry.get(backbone), param_shapes(config)["backbone"]
    activations = None
    if member.example is not None:
        rows = max(1, config.cache_batch // parallel.num_row_shards(mesh))
        batch = jax.tree.map(
            lambda part: _shape(rows, 1, *part.shape, dtype=part.dtype), member.example(backbone)
        )

        def encode(params: Params, observation: Observation) -> Tokens:
            return member.apply(params, backbone, observation)

        inputs = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
        activations = inputs + memory_estimate.forward_bytes(encode, shapes, batch)
    shardings = parallel.make_shardings(shapes, mesh, member.sharding_rules)
    params = memory_estimate.sharded_bytes(shapes, shardings)
    return MemoryEstimate(params, 0, 0, 0, activations)


def _check(
    estimate: MemoryEstimate, mesh: Mesh, shapes: Params, *, purpose: str, remedy: str
) -> None:
    """Compares an estimate with the memory of a device; prints it if there are many params."""
    available = memory_estimate.available_bytes(mesh.local_devices[0])
    if available is not None and estimate.least > available:
        raise ValueError(
            f"memory per device must be at least {estimate.least / _GB:.1f} GB for {purpose} "
            f"({describe(estimate)}), got {available / _GB:.1f} GB; {remedy}."
        )
    num_params = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    if num_params >= LARGE and parallel.is_first_process():
        limit = "" if available is None else f" of {available / _GB:.1f} GB available"
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"memory per device for {purpose}: {describe(estimate)}; "
            f"total {estimate.total / _GB:.1f} GB{limit}"
        )


def estimate_memory(config: ImitateConfig, loss_fn: LossFn, shapes: Params) -> MemoryEstimate:
    """Returns the memory of one update; nothing is allocated or compiled.

    Args:
      config: of the training.
      loss_fn: of `(params, Counted, key)`, from `imitate.make_loss`.
      shapes: of the params of the train state, from `setup.trained_shapes`.
    """

    def loss_of_batch(params: Any, batch: Batch, key: Any) -> Any:
        return loss_fn(params, Counted(batch, jnp.zeros([], jnp.int32)), key)

    optim_config = make_optim_config(config)
    return memory_estimate.estimate(
        loss_of_batch,
        shapes,
        optim.make_optimizer(optim_config, config.loop.num_updates, param_shapes(config)),
        example_batch(config),
        optim_config,
        mesh=parallel.make_mesh(config.loop.mesh),
        rules=sharding_rules(config),
    )


def example_batch(config: ImitateConfig) -> Batch | None:
    """Returns the shapes of a batch; None if the backbone has no `example`.

    Columns that the backbone does not use are left out.
    """
    decoder, backbone = config.agent.policy.decoder, config.agent.policy.backbone
    example = registry.get(backbone).example
    if example is None:
        return None
    lead = (config.loader.batch_size, decoder.window_size)
    chunk = (*lead, decoder.action_horizon)
    observation = example(backbone)
    tokens = None
    if config.frozen_backbone:
        observation = observation._replace(image_primary=None, image_wrist=None)
        tokens = Tokens(
            _shape(*lead, backbone.num_tokens, backbone.token_dim, dtype=config.cache_dtype),
            _shape(*lead, backbone.num_tokens, dtype="bool"),
        )
    return Batch(
        observation=jax.tree.map(
            lambda part: _shape(*lead, *part.shape, dtype=part.dtype), observation
        ),
        tokens=tokens,
        timestep_mask=_shape(*lead, dtype="bool"),
        action=_shape(*chunk, decoder.action_dim, dtype="float32"),
        action_mask=_shape(*chunk, dtype="bool"),
        reset=_shape(*lead, dtype="bool") if config.pack else None,
    )


def describe(estimate: MemoryEstimate) -> str:
    """Returns the parts of an estimate in GB, separated by commas."""
    names = ("params", "gradients", "optimiser", "EMA", "activations")
    return ", ".join(
        f"{name} unknown" if part is None else f"{name} {part / _GB:.2f} GB"
        for name, part in zip(names, estimate, strict=True)
    )


def _shape(*sizes: int, dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(sizes, dtype)
