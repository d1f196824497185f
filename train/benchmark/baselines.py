"""Who else does the work: Flax's RNNs, `torch.nn`, and RoboVLMs' head written in PyTorch.

All get the weights of ours by `vla_jax.convert`, and are read back into its tree.
"""

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

from train.benchmark.timing import Peer
from vla_jax import convert
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.policies.decoders import DecoderConfig
from vla_jax.types import Array, Params

LINEN = {"lstm": nn.OptimizedLSTMCell, "gru": nn.GRUCell}
NNX = {"lstm": nnx.OptimizedLSTMCell, "gru": nnx.GRUCell}
FLOAT = 4  # bytes of a float32


def torch_is_missing() -> str:
    """Why PyTorch does not take part; empty where it does."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed: pip install 'vla-jax[torch]'"
    if jax.default_backend() != "cpu":
        return f"PyTorch takes part on a CPU only, JAX runs on {jax.default_backend()} here"
    return ""


def both_ways(forward: Callable[[Any, Array], jax.Array]) -> Callable[..., tuple]:
    """A jitted function that gives `(outputs, gradient by params, gradient by inputs)`.

    Args:
      forward: `(params, inputs) -> outputs`.
    """

    @jax.jit
    def run(params: Any, inputs: Array, cotangent: Array) -> tuple:
        outputs, pull = jax.vjp(forward, params, inputs)
        return outputs, *pull(cotangent)

    return run


def recurrent_bytes(params: Params, num_steps: int, *, hoisted: bool = True) -> int:
    """Bytes of weights that the products of a recurrence read on the way forward.

    Args:
      params: of the recurrence.
      num_steps: of time, each of which reads the recurrent kernels.
      hoisted: whether the input kernels are read once for all steps, or at each of them too.
    """
    layers = [layer["forward"] for layer in params.values()]
    recurrent = sum(layer["recurrent_kernel"].size for layer in layers)
    inputs = sum(layer["input_kernel"].size for layer in layers)
    return FLOAT * (num_steps * recurrent + (1 if hoisted else num_steps) * inputs)


def linen_recurrence(
    config: RecurrenceConfig, params: Params, inputs: Array, cotangent: Array
) -> Peer:
    """A stack of `flax.linen.RNN`, forward and backward."""
    cell = LINEN[config.cell]
    layer = nn.RNN(cell(config.hidden_size))

    def forward(stack: Sequence[Params], outputs: Any) -> Any:
        for own in stack:
            outputs = layer.apply({"params": {"cell": own}}, outputs)
        return outputs

    stack = convert.to_flax_stack(config, params)
    run = both_ways(forward)
    return Peer(
        "flax.linen.RNN",
        lambda: jax.block_until_ready(run(stack, inputs, cotangent)),
        lambda results: _read_flax(config, results),
        2 * recurrent_bytes(params, inputs.shape[1], hoisted=False),
    )


def nnx_recurrence(
    config: RecurrenceConfig, params: Params, inputs: Array, cotangent: Array
) -> Peer:
    """A stack of `flax.nnx.RNN`, forward and backward."""
    cell = NNX[config.cell]
    layers = []
    style = "nnx_optimized" if config.cell == "lstm" else "nnx"
    for own in convert.to_flax_stack(config, params, style):
        layer = nnx.RNN(cell(inputs.shape[-1], config.hidden_size, rngs=nnx.Rngs(0)))
        nnx.update(layer.cell, own)
        layers.append(nnx.split(layer, nnx.Param, ...))

    def forward(stack: Sequence[Any], outputs: Any) -> Any:
        for (graph, _, others), own in zip(layers, stack, strict=True):
            outputs = nnx.merge(graph, own, others, copy=True)(outputs)
        return outputs

    def read(results: tuple) -> dict[str, Any]:
        outputs, by_stack, by_inputs = results
        return _read_flax(config, (outputs, [own["cell"] for own in by_stack], by_inputs))

    stack = [own for _, own, _ in layers]
    run = both_ways(forward)
    return Peer(
        "flax.nnx.RNN",
        lambda: jax.block_until_ready(run(stack, inputs, cotangent)),
        read,
        2 * recurrent_bytes(params, inputs.shape[1], hoisted=False),
        # Its GRU has no recurrent bias of gate n.
        lacks=("recurrent_bias",) if config.cell == "gru" else (),
    )


def torch_recurrence(
    config: RecurrenceConfig, params: Params, inputs: Array, cotangent: Array
) -> Peer:
    """`torch.nn.LSTM` or `GRU`, forward and backward."""
    import torch

    module = getattr(torch.nn, config.cell.upper())(
        inputs.shape[-1], config.hidden_size, config.num_layers, batch_first=True
    )
    module.load_state_dict(_tensors(convert.to_torch(config, params)))
    weights = dict(module.named_parameters())
    given, pulled = (torch.tensor(np.asarray(part)) for part in (inputs, cotangent))
    given.requires_grad_()

    def run() -> tuple:
        outputs, _ = module(given)
        return outputs, torch.autograd.grad(outputs, [given, *weights.values()], pulled)

    def read(results: tuple) -> dict[str, Any]:
        outputs, (by_inputs, *by_weights) = results
        _, by_params = convert.from_torch(dict(zip(weights, by_weights, strict=True)))
        outputs = outputs.detach().numpy()
        return {"outputs": outputs, "by_params": by_params, "by_inputs": by_inputs.numpy()}

    num_bytes = 2 * recurrent_bytes(params, inputs.shape[1])
    return Peer(f"torch.nn.{config.cell.upper()}", run, read, num_bytes)


def torch_head(
    config: DecoderConfig,
    params: Params,
    tokens: Array,
    action: Array,
    *,
    gripper_weight: float,
    learning_rate: float,
    weight_bytes: int,
) -> Peer:
    """RoboVLMs' `LSTMDecoder` in training: forward, loss, backward, Adam."""
    import torch
    from torch.nn import functional

    head = _robovlms_head(config, params)
    weights = dict(head.named_parameters())
    optimizer = torch.optim.Adam(weights.values(), learning_rate)
    given, target = torch.tensor(np.asarray(tokens)), torch.tensor(np.asarray(action))

    def run() -> Any:
        optimizer.zero_grad()
        features, _ = head["rnn"](_robovlms_pool(given))
        arm, gripper = _robovlms_actions(head, features, config.action_horizon)
        is_open = (target[..., -1] > 0).float()
        loss = functional.huber_loss(arm, target[..., :-1])
        loss = loss + gripper_weight * functional.binary_cross_entropy_with_logits(gripper, is_open)
        loss.backward()
        optimizer.step()
        return loss

    def as_ours(tensors: dict[str, Any]) -> Params:
        return convert.from_robovlms(tensors, window_size=config.window_size)[1]

    def moment(name: str) -> Params:
        return as_ours({path: optimizer.state[leaf][name] for path, leaf in weights.items()})

    def read(loss: Any) -> dict[str, Any]:
        moments = {"mean": moment("exp_avg"), "square": moment("exp_avg_sq")}
        return {"loss": loss.item(), "params": as_ours(head.state_dict()), **moments}

    return Peer("RoboVLMs (PyTorch)", run, read, weight_bytes)


def torch_stream(
    config: DecoderConfig, params: Params, frames: Array, *, weight_bytes: int
) -> Peer:
    """RoboVLMs' `LSTMDecoder` in acting: every frame runs the last W again from a zero state.

    Args:
      config: of the decoder.
      params: of the decoder.
      frames: `[F, B, N, D]`, seen over and over; the first W are seen here.
      weight_bytes: see `Peer`.
    """
    import torch

    head = _robovlms_head(config, params)
    given = torch.tensor(np.asarray(frames))
    window = [_robovlms_pool(given[t, :, None]) for t in range(config.window_size)]
    time = config.window_size

    def run() -> tuple:
        nonlocal time
        with torch.inference_mode():
            window.append(_robovlms_pool(given[time % len(given), :, None]))
            window.pop(0)
            time += 1
            features, _ = head["rnn"](torch.cat(window, dim=1))
            return _robovlms_actions(head, features[:, -1], config.action_horizon)

    def read(results: tuple) -> dict[str, Any]:
        arm, gripper = results
        return {"arm": arm.numpy(), "gripper_logit": gripper.numpy()}

    return Peer("RoboVLMs (PyTorch), window again", run, read, weight_bytes)


def _read_flax(config: RecurrenceConfig, results: tuple) -> dict[str, Any]:
    """Flax's gradients as ours: its one bias of a gate has the gradient that each of ours has."""
    outputs, by_stack, by_inputs = results
    _, by_params = convert.from_flax_stack(by_stack)
    for own in (layer["forward"] for layer in by_params.values()):
        apart = np.array(own.pop("recurrent_bias"))
        if config.cell == "lstm":
            own["recurrent_bias"] = own["input_bias"]
        elif apart.any():  # Linen's GRU; NNX's has none at all
            summed = 2 * config.hidden_size
            own["recurrent_bias"] = np.append(own["input_bias"][:summed], apart[summed:])
    return {"outputs": outputs, "by_params": by_params, "by_inputs": by_inputs}


def _robovlms_head(config: DecoderConfig, params: Params) -> Any:
    """The modules of `LSTMDecoder`, under its names and with the weights of ours."""
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
    return head


def _robovlms_pool(tokens: Any) -> Any:
    """`[B, W, N, D]` -> `[B, W, D]`, the maximum over the tokens."""
    from torch.nn import functional

    flat = tokens.flatten(0, 1).transpose(1, 2)
    return functional.adaptive_max_pool1d(flat, 1).reshape(*tokens.shape[:2], -1)


def _robovlms_actions(head: Any, features: Any, action_horizon: int) -> tuple[Any, Any]:
    """`[..., H]` -> arm `[..., K, A-1]`, gripper logit `[..., K]`."""
    arm = head["actions"]["mlp"](features).tanh()
    return arm.unflatten(-1, (action_horizon, -1)), head["gripper"]["mlp"](features)


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(array) for name, array in arrays.items()}
