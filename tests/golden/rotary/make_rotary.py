"""Writes rotary.npz, outputs of Hugging Face's Mistral that tests/test_rotary_transformer.py meets.

pip install transformers==5.23.0   # with torch
python tests/golden/rotary/make_rotary.py
"""

import pathlib

import numpy as np
import torch
from transformers import MistralConfig, MistralModel

B, T, H, M, KV, L, SPAN = 2, 11, 16, 4, 2, 2, 4


def draw(model: MistralModel) -> None:
    """Sets every parameter to random values of order 1, so that scales count too."""
    random = np.random.default_rng(0)
    for parameter in model.parameters():
        scale = 0.5 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
        values = scale * random.normal(size=parameter.shape) + (parameter.ndim == 1)
        parameter.data = torch.tensor(values, dtype=torch.float32)


if __name__ == "__main__":
    config = MistralConfig(
        vocab_size=8, hidden_size=H, intermediate_size=48, num_hidden_layers=L,
        num_attention_heads=M, num_key_value_heads=KV, head_dim=H // M, sliding_window=SPAN,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        attn_implementation="eager",
    )  # fmt: skip
    model = MistralModel(config).eval()
    draw(model)
    random = np.random.default_rng(1)
    inputs = torch.tensor(random.normal(size=(B, T, H)), dtype=torch.float32, requires_grad=True)
    weights = torch.tensor(random.normal(size=(B, T, H)), dtype=torch.float32)
    outputs = model(inputs_embeds=inputs).last_hidden_state
    (outputs * weights).sum().backward()
    arrays = {
        "inputs": inputs, "weights": weights, "outputs": outputs, "d_inputs": inputs.grad,
    }  # fmt: skip
    for name, parameter in model.named_parameters():
        if "embed_tokens" not in name:
            arrays |= {name: parameter, f"d_{name}": parameter.grad}
    np.savez_compressed(
        pathlib.Path(__file__).with_name("rotary.npz"),
        **{name: np.float32(tensor.detach()) for name, tensor in arrays.items()},
    )
