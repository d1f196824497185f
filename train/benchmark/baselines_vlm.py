"""The SmolVLM of Hugging Face's transformers in PyTorch, with the weights of vla_jax."""

import importlib.util
import pathlib
import tempfile
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from train.benchmark import baselines
from train.benchmark.baselines_torch import autocast, to_numpy, to_torch, torch_device, wait
from train.benchmark.timing import Implementation
from vla_jax.backbones import preprocess, weights
from vla_jax.backbones.sequence import IMAGE
from vla_jax.backbones.smolvlm import SmolVLMConfig
from vla_jax.backbones.weight_export import export
from vla_jax.types import Params

PREFIX = "model."  # of the inner model's tensors in a file


def why_no_transformers() -> str:
    """Returns the reason why transformers is not measured; empty if it is."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed: pip install 'vla-jax[oracles]'"
    return baselines.why_no_torch()


def run_transformers(
    config: SmolVLMConfig, params: Params, frames: Any, *, gradients: bool, weight_bytes: int
) -> Implementation:
    """Returns transformers' implementation, with its default attention (SDPA).

    Args:
      config: of the model.
      params: of the model.
      frames: `vlm_runs.FrameBatch`.
      gradients: compute the gradients of all params as well.
      weight_bytes: see `Implementation`.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    with tempfile.TemporaryDirectory() as parent:
        folder = pathlib.Path(parent) / "model"
        export(folder, config, params)
        model = AutoModelForImageTextToText.from_pretrained(folder).model.eval()
    model = model.to(torch_device())
    pixels = preprocess.normalize(frames.images, config.images.mean, config.images.std)
    inputs = {
        "input_ids": to_torch(
            np.where(frames.ids == IMAGE, config.image_token_id, frames.ids).astype(np.int64)
        ),
        "attention_mask": to_torch(np.ones(frames.ids.shape, np.int64)),
        "pixel_values": to_torch(np.moveaxis(pixels, -1, 2)),
    }
    cotangent, dtype = to_torch(frames.cotangent), config.options.dtype

    def run() -> Any:
        if not gradients:
            with torch.inference_mode(), autocast(dtype):
                return model(**inputs, use_cache=False).last_hidden_state
        model.zero_grad(set_to_none=True)
        with autocast(dtype):
            hidden = model(**inputs, use_cache=False).last_hidden_state
        hidden.float().backward(cotangent)
        return hidden.detach()

    def read(hidden: Any) -> dict[str, Any]:
        if not gradients:
            return {"hidden": to_numpy(hidden)}
        named = {PREFIX + name: to_numpy(leaf.grad) for name, leaf in model.named_parameters()}
        grads = _to_params(config, params, named)
        del grads["vision"]["layers"]["attention"]["key"]["bias"]
        return {"hidden": to_numpy(hidden), "grads": grads}

    # The softmax is invariant to the bias of keys: its gradient is rounding errors.
    return Implementation(
        "transformers (PyTorch)", run, read, weight_bytes, ("attention/key/bias",), wait
    )


def _to_params(config: SmolVLMConfig, params: Params, named: dict[str, Any]) -> Params:
    """Returns tensors of a file in the tree and layout of the params."""
    with tempfile.TemporaryDirectory() as parent:
        folder = pathlib.Path(parent) / "model"
        export(folder, config, params)
        contiguous = {name: np.ascontiguousarray(array) for name, array in named.items()}
        save_file(contiguous, folder / "model.safetensors")
        return weights.load(folder, config=config)[1]
