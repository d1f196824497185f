"""Other libraries' implementations: Flax's RNNs, `torch.nn`, RoboVLMs' head written in PyTorch.

All have the weights of vla_jax, converted by `vla_jax.convert`; their results are converted back.
"""

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

from train.benchmark.baselines_torch import autocast, to_numpy, to_torch, torch_device, wait
from train.benchmark.timing import Implementation
from vla_jax import convert
from vla_jax.convert.flax_cells import Style
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.types import Array, Params

FLOAT_BYTES = 4  # bytes of a float32


class FlaxCell(NamedTuple):
    """Flax's two classes of one cell, and their differences from the cell of vla_jax."""

    linen: Any  # class of flax.linen
    nnx: Any  # class of flax.nnx
    nnx_style: Style
    nnx_lacks: tuple[str, ...]  # params of vla_jax that the NNX class lacks
    num_summed: int  # leading gates whose two biases are one in Flax


FLAX_CELLS = {
    "lstm": FlaxCell(nn.OptimizedLSTMCell, nnx.OptimizedLSTMCell, "nnx_optimized", (), 4),
    "gru": FlaxCell(nn.GRUCell, nnx.GRUCell, "nnx", ("recurrent_bias",), 2),
}


def why_no_torch() -> str:
    """Returns the reason why PyTorch is not measured; empty if it is."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed: pip install 'vla-jax[torch]'"
    backend = jax.default_backend()
    if backend not in ("cpu", "gpu"):
        return f"PyTorch is measured on CPUs and NVIDIA GPUs, JAX runs on {backend} here"
    import torch

    if backend == "gpu" and not torch.cuda.is_available():
        return "this PyTorch sees no GPU, JAX does: install its build for CUDA"
    return ""


def forward_and_backward(forward: Callable[[Any, Array], jax.Array]) -> Callable[..., tuple]:
    """Returns a jitted function that computes outputs and the gradients of params and inputs.

    Args:
      forward: `(params, inputs) -> outputs`.
    """

    @jax.jit
    def run(params: Any, inputs: Array, cotangent: Array) -> tuple:
        outputs, pull = jax.vjp(forward, params, inputs)
        return outputs, *pull(cotangent)

    return run


def recurrent_bytes(params: Params, num_steps: int, *, hoisted: bool = True) -> int:
    """Returns the bytes of weights that the matrix products of a forward pass read.

    Args:
      params: params of the recurrence.
      num_steps: T; the recurrent kernels are read at each step.
      hoisted: True if the input kernels are read once for all steps, False if at each step.
    """
    layers = [layer["forward"] for layer in params.values()]
    recurrent = sum(
        layer["recurrent_kernel"].size for layer in layers if "recurrent_kernel" in layer
    )
    inputs = sum(layer["input_kernel"].size for layer in layers)
    return FLOAT_BYTES * (num_steps * recurrent + (1 if hoisted else num_steps) * inputs)


def linen_recurrence(
    config: RecurrenceConfig, params: Params, inputs: Array, cotangent: Array
) -> Implementation:
    """Returns a stack of `flax.linen.RNN`, forward and backward."""
    cell = FLAX_CELLS[config.cell].linen
    layer = nn.RNN(cell(config.hidden_size))

    def forward(stack: Sequence[Params], outputs: Any) -> Any:
        for layer_params in stack:
            outputs = layer.apply({"params": {"cell": layer_params}}, outputs)
        return outputs

    stack = convert.to_flax_stack(config, params)
    run = forward_and_backward(forward)
    return Implementation(
        "flax.linen.RNN",
        lambda: run(stack, inputs, cotangent),
        lambda results: _read_flax(config, results),
        2 * recurrent_bytes(params, inputs.shape[1], hoisted=False),
    )


def nnx_recurrence(
    config: RecurrenceConfig, params: Params, inputs: Array, cotangent: Array
) -> Implementation:
    """Returns a stack of `flax.nnx.RNN`, forward and backward."""
    cell = FLAX_CELLS[config.cell]
    layers = []
    for layer_params in convert.to_flax_stack(config, params, cell.nnx_style):
        layer = nnx.RNN(cell.nnx(inputs.shape[-1], config.hidden_size, rngs=nnx.Rngs(0)))
        nnx.update(layer.cell, layer_params)
        layers.append(nnx.split(layer, nnx.Param, ...))

    def forward(stack: Sequence[Any], outputs: Any) -> Any:
        for (graph, _, others), layer_params in zip(layers, stack, strict=True):
            outputs = nnx.merge(graph, layer_params, others, copy=True)(outputs)
        return outputs

    def read(results: tuple) -> dict[str, Any]:
        outputs, by_stack, by_inputs = results
        by_cells = [layer_params["cell"] for layer_params in by_stack]
        return _read_flax(config, (outputs, by_cells, by_inputs), lacks=cell.nnx_lacks)

    stack = [layer_params for _, layer_params, _ in layers]
    run = forward_and_backward(forward)
    return Implementation(
        "flax.nnx.RNN",
        lambda: run(stack, inputs, cotangent),
        read,
        2 * recurrent_bytes(params, inputs.shape[1], hoisted=False),
        lacks=cell.nnx_lacks,
    )


def torch_recurrence(
    config: RecurrenceConfig, params: Params, inputs: Array, cotangent: Array
) -> Implementation:
    """Returns `torch.nn.LSTM` or `GRU`, forward and backward."""
    import torch

    module = getattr(torch.nn, config.cell.upper())(
        inputs.shape[-1], config.hidden_size, config.num_layers, batch_first=True
    )
    module.load_state_dict(_tensors(convert.to_torch(config, params)))
    module = module.to(torch_device())
    weights = dict(module.named_parameters())
    x, x_cotangent = (to_torch(part) for part in (inputs, cotangent))
    x.requires_grad_()

    def run() -> tuple:
        with autocast(config.dtype):
            outputs, _ = module(x)
        outputs = outputs.float()
        return outputs, torch.autograd.grad(outputs, [x, *weights.values()], x_cotangent)

    def read(results: tuple) -> dict[str, Any]:
        outputs, (by_inputs, *by_weights) = results
        named = {name: to_numpy(leaf) for name, leaf in zip(weights, by_weights, strict=True)}
        _, by_params = convert.from_torch(named)
        by_inputs = to_numpy(by_inputs)
        return {"outputs": to_numpy(outputs), "by_params": by_params, "by_inputs": by_inputs}

    num_bytes = 2 * recurrent_bytes(params, inputs.shape[1])
    return Implementation(f"torch.nn.{config.cell.upper()}", run, read, num_bytes, wait=wait)


def torch_head(
    config: DecoderConfig,
    params: Params,
    tokens: Array,
    action: Array,
    *,
    gripper_weight: float,
    learning_rate: float,
    weight_bytes: int,
) -> Implementation:
    """Returns a training step of RoboVLMs' `LSTMDecoder`: forward, loss, backward, Adam."""
    import torch
    from torch.nn import functional

    head = _robovlms_head(config, params)
    weights = dict(head.named_parameters())
    optimizer = torch.optim.Adam(weights.values(), learning_rate)
    inputs, target = to_torch(tokens), to_torch(action)

    def run() -> Any:
        optimizer.zero_grad()
        with autocast(config.dtype):
            features, _ = head["rnn"](_robovlms_pool(inputs))
            actions = _robovlms_actions(head, features, config.action_horizon)
        arm, gripper = (part.float() for part in actions)
        is_open = (target[..., -1] > 0).float()
        loss = functional.huber_loss(arm, target[..., :-1])
        loss = loss + gripper_weight * functional.binary_cross_entropy_with_logits(gripper, is_open)
        loss.backward()
        optimizer.step()
        return loss

    def to_params(named: dict[str, Any]) -> Params:
        tensors = {name: to_numpy(tensor) for name, tensor in named.items()}
        return convert.from_robovlms(tensors, window_size=config.window_size)[1]

    def moment(name: str) -> Params:
        return to_params({path: optimizer.state[leaf][name] for path, leaf in weights.items()})

    def read(loss: Any) -> dict[str, Any]:
        moments = {"mean": moment("exp_avg"), "square": moment("exp_avg_sq")}
        return {"loss": loss.item(), "params": to_params(head.state_dict()), **moments}

    return Implementation("RoboVLMs (PyTorch)", run, read, weight_bytes, wait=wait)


def torch_stream(
    config: DecoderConfig, params: Params, frames: Array, *, weight_bytes: int
) -> Implementation:
    """Returns an acting step of RoboVLMs' `LSTMDecoder`: the last W frames from a zero state.

    Args:
      config: config of the decoder.
      params: params of the decoder.
      frames: `[num_frames, B, N, D]`, repeated cyclically; the first W fill the window.
      weight_bytes: see `Implementation`.
    """
    import torch

    head, inputs = _stored(config, params, frames)
    window = [_robovlms_pool(inputs[t, :, None]) for t in range(config.window_size)]
    time = config.window_size

    def run() -> tuple:
        nonlocal time
        with torch.inference_mode():
            window.append(_robovlms_pool(inputs[time % len(inputs), :, None]))
            window.pop(0)
            time += 1
            features, _ = head["rnn"](torch.cat(window, dim=1))
            return _robovlms_actions(head, features[:, -1], config.action_horizon)

    name = "RoboVLMs (PyTorch), window re-run"
    return Implementation(name, run, _read_actions, weight_bytes, wait=wait)


def torch_graph_stream(
    config: DecoderConfig, params: Params, frames: Array, *, weight_bytes: int
) -> Implementation:
    """Returns the acting step of `torch_stream` as a CUDA graph, which is captured once.

    A replay starts all kernels of a step at once, as one compiled program does.

    Args:
      config: config of the decoder.
      params: params of the decoder.
      frames: as for `torch_stream`.
      weight_bytes: see `Implementation`.
    """
    import torch

    head, inputs = _stored(config, params, frames)

    def step(window: Any, frame: Any) -> tuple[Any, Any, Any]:
        window = torch.cat([window[:, 1:], _robovlms_pool(frame[:, None])], dim=1)
        features, _ = head["rnn"](window)
        return window, *_robovlms_actions(head, features[:, -1], config.action_horizon)

    window = _robovlms_pool(inputs[: config.window_size].transpose(0, 1).contiguous())
    # The samples are written to: they are copies of what the first step reads.
    samples = (window.clone(), inputs[0].clone())
    replay = cast(Callable[..., tuple], torch.cuda.make_graphed_callables(step, samples))
    time = config.window_size

    def run() -> tuple:
        nonlocal window, time
        window, *actions = replay(window, inputs[time % len(inputs)])
        time += 1
        return tuple(actions)

    name = "RoboVLMs (PyTorch), window re-run, CUDA graph"
    return Implementation(name, run, _read_actions, weight_bytes, wait=wait)


def _stored(config: DecoderConfig, params: Params, frames: Array) -> tuple[Any, Any]:
    """Returns the modules without gradients, and the frames, both in the dtype of the config."""
    import torch

    dtype = getattr(torch, config.dtype)
    head = _robovlms_head(config, params).to(dtype).requires_grad_(False)
    return head, to_torch(frames).to(dtype)


def _read_actions(results: tuple) -> dict[str, Any]:
    arm, gripper = results
    return {"arm": to_numpy(arm), "gripper_logit": to_numpy(gripper)}


def _read_flax(
    config: RecurrenceConfig, results: tuple, *, lacks: Sequence[str] = ()
) -> dict[str, Any]:
    """Returns Flax's results, with gradients in the tree of vla_jax.

    If Flax has one bias instead of two, both get its gradient.
    """
    outputs, by_stack, by_inputs = results
    _, by_params = convert.from_flax_stack(by_stack)
    num_summed = FLAX_CELLS[config.cell].num_summed * config.hidden_size
    for layer in (layer["forward"] for layer in by_params.values()):
        separate = np.array(layer["recurrent_bias"])[num_summed:]
        layer["recurrent_bias"] = np.append(layer["input_bias"][:num_summed], separate)
        for name in lacks:
            del layer[name]
    return {"outputs": outputs, "by_params": by_params, "by_inputs": by_inputs}


def _robovlms_head(config: DecoderConfig, params: Params) -> Any:
    """Returns the modules of `LSTMDecoder`, with its names and the weights of vla_jax."""
    from torch import nn

    def mlp(num_outputs: int) -> nn.ModuleDict:
        sizes = (config.hidden_size, *config.head_sizes, num_outputs)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.ModuleDict({"mlp": nn.Sequential(*layers[:-1])})

    sizes = (config.token_dim, config.hidden_size, config.num_layers)
    horizon, arm_dim = config.action_horizon, config.action_dim - 1
    head = nn.ModuleDict(
        {
            "rnn": nn.LSTM(*sizes, batch_first=True),
            "actions": mlp(horizon * arm_dim),
            "gripper": mlp(horizon),
        }
    )
    tensors = convert.to_robovlms(config, params)
    head.load_state_dict(
        _tensors({name.removeprefix("act_head."): tensor for name, tensor in tensors.items()})
    )
    return head.to(torch_device())


def _robovlms_pool(tokens: Any) -> Any:
    """Max-pools `[B, W, N, D]` over the tokens to `[B, W, D]`."""
    from torch.nn import functional

    flat = tokens.flatten(0, 1).transpose(1, 2)
    return functional.adaptive_max_pool1d(flat, 1).reshape(*tokens.shape[:2], -1)


def _robovlms_actions(head: Any, features: Any, action_horizon: int) -> tuple[Any, Any]:
    """Maps features `[..., H]` to arm `[..., K, A-1]` and gripper logit `[..., K]`."""
    arm = head["actions"]["mlp"](features).tanh()
    return arm.unflatten(-1, (action_horizon, -1)), head["gripper"]["mlp"](features)


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(array) for name, array in arrays.items()}
