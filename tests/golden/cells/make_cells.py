"""Writes cells.npz, outputs of the original RG-LRU and sLSTM that tests/test_cell_oracles.py meets.

pip install --no-deps recurrentgemma==1.0.1 xlstm==2.0.6   # with jax, flax, torch, omegaconf
python tests/golden/cells/make_cells.py
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import torch
from recurrentgemma.jax.layers import RGLRU
from xlstm.blocks.slstm.src.vanilla import slstm_forward, slstm_pointwise_function_registry

B, T, H, M = 3, 9, 8, 2  # batch, steps, units, heads
E = H // M


def rg_lru(random: np.random.Generator) -> dict[str, np.ndarray]:
    """RG-LRU with block-diagonal gates, from a carry; position 1 on: no exception for a first."""
    layer = RGLRU(width=H, num_heads=M)
    inputs = jnp.asarray(random.normal(size=(B, T, H)), jnp.float32)
    position = jnp.tile(jnp.arange(1, T + 1), (B, 1))
    carry = jnp.asarray(random.normal(size=(B, H)), jnp.float32)
    params = layer.init(jax.random.key(0), inputs, position)["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.3 * random.normal(size=leaf.shape), params)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)

    def total(inputs, carry):
        outputs, last = layer.apply({"params": params}, inputs, position, carry)
        return jnp.sum(jnp.sin(outputs)), (outputs, last)

    (slope, slope_carry), (outputs, last) = jax.grad(total, (0, 1), has_aux=True)(inputs, carry)
    return {
        "inputs": inputs, "carry": carry, "outputs": outputs, "last": last,
        "d_inputs": slope, "d_carry": slope_carry, "a_param": params["a_param"],
        "input_gate_w": params["input_gate"]["w"], "input_gate_b": params["input_gate"]["b"],
        "a_gate_w": params["a_gate"]["w"], "a_gate_b": params["a_gate"]["b"],
    }  # fmt: skip


def s_lstm(random: np.random.Generator) -> dict[str, np.ndarray]:
    """sLSTM from an empty carry: its own loop in PyTorch, R block-diagonal over the heads."""
    draws = {
        "projected": random.normal(size=(T, B, 4 * H)),
        "kernel": random.normal(size=(M, 4 * E, E)),
        "bias": random.normal(size=4 * H),
    }
    draws = {name: draw.astype(np.float32) for name, draw in draws.items()}
    tensors = {name: torch.tensor(draw, requires_grad=True) for name, draw in draws.items()}
    states, _, _ = slstm_forward(
        tensors["projected"], torch.zeros(4, B, H), tensors["kernel"], tensors["bias"],
        slstm_pointwise_function_registry["slstm"],
    )  # fmt: skip
    torch.sin(states[0, 1:]).sum().backward()
    slopes = {f"d_{name}": tensor.grad.numpy() for name, tensor in tensors.items()}
    return {**draws, **slopes, "states": states.detach().numpy()}


if __name__ == "__main__":
    arrays = {}
    for name, make in {"rg_lru": rg_lru, "s_lstm": s_lstm}.items():
        for key, array in make(np.random.default_rng(0)).items():
            arrays[f"{name}.{key}"] = np.asarray(array)
    np.savez_compressed(pathlib.Path(__file__).with_name("cells.npz"), **arrays)
