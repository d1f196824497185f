"""Writes matrix_cells.npz, outputs of the original recurrences for tests/test_matrix_cells.py.

pip install --no-deps xlstm==2.0.6 fla-core==0.6.0                 # with torch, einops
git clone https://github.com/state-spaces/mamba                    # e9594ce1c732
python tests/golden/matrix_cells/make_matrix_cells.py mamba/mamba_ssm/modules/ssd_minimal.py

The recurrences are those of the packages: `recurrent_step_stabilized_simple` and
`parallel_stabilized_simple` of xlstm, `naive_recurrent_gated_delta_rule` of fla-core and
`ssd_minimal_discrete` of mamba. Convolution, normalisation and gates around them are PyTorch's.
"""

import importlib.util
import pathlib
import sys
import types

import numpy as np
import torch
from torch.nn import functional

B, T, M, E = 2, 12, 3, 4  # batch, steps, heads, features per head
H, S = M * E, 4  # units, steps of the convolution


def load(path):
    """Imports a file alone: its package needs Triton."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package_file(package, path):
    return pathlib.Path(importlib.util.find_spec(package).submodule_search_locations[0]) / path


def convolve(recent, inputs, kernel, bias=None):
    window = torch.cat([recent, inputs], dim=1).transpose(1, 2)
    mixed = functional.conv1d(window, kernel.T[:, None], bias, groups=inputs.shape[-1])
    return functional.silu(mixed).transpose(1, 2)


def heads(features):
    return features.reshape(*features.shape[:-1], M, -1)


def m_lstm(leaf):
    backends = load(package_file("xlstm", "blocks/mlstm/backends.py"))
    projected, scale = leaf("projected", B, T, 4 * H + 2 * M), leaf("norm_scale", H)
    query, key, value, output = (heads(part) for part in projected[..., : 4 * H].split(H, -1))
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    admit, keep = (part.transpose(1, 2)[..., None] for part in projected[..., 4 * H :].split(M, -1))
    memory, normaliser = leaf("memory", B, M, E, E), leaf("normaliser", B, M, E)
    stabiliser = leaf("stabiliser", B, M)
    state = (memory.transpose(-1, -2), normaliser[..., None], stabiliser[..., None, None])
    steps = []
    for t in range(T):
        now = (part[:, :, t : t + 1].clone() for part in (query, key, value, admit, keep))
        step, state = backends.recurrent_step_stabilized_simple(*state, *now, eps=0.0)
        steps.append(step)
    parallel = backends.parallel_stabilized_simple(query, key, value, admit, keep, eps=0.0)

    def finish(read):  # [B, M, T, E]
        normal = functional.layer_norm(read.transpose(1, 2), (E,)).reshape(B, T, H) * scale
        return torch.sigmoid(output.reshape(B, T, H)) * normal

    outputs = finish(torch.cat(steps, dim=2))
    last = {"memory": state[0].transpose(-1, -2), "normaliser": state[1][..., 0]}
    last["stabiliser"] = state[2][..., 0, 0]
    return outputs, last, {"from_zeros": finish(parallel)}


def gated_delta_net(leaf):
    naive = load(package_file("fla", "ops/gated_delta_rule/naive.py"))
    projected, scale = leaf("projected", B, T, 4 * H + 2 * M), leaf("norm_scale", E)
    inputs, gate, strength, step = projected.split([3 * H, H, M, M], -1)
    memory, recent = leaf("memory", B, M, E, E), leaf("recent", B, S - 1, 3 * H)
    mixed = convolve(recent, inputs, leaf("conv_weights", S, 3 * H))
    query, key, value = (heads(part) for part in mixed.split(H, -1))
    query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    decay = -leaf("log_rate", M).exp() * functional.softplus(step)
    read, state = naive.naive_recurrent_gated_delta_rule(
        query, key, value, 2 * torch.sigmoid(strength), decay, scale=1.0,
        initial_state=memory.transpose(-1, -2), output_final_state=True,
    )  # fmt: skip
    normal = functional.rms_norm(read, (E,), scale, eps=1e-5).reshape(B, T, H)
    last = {"memory": state.transpose(-1, -2), "recent": inputs[:, 1 - S :]}
    return normal * functional.silu(gate), last, {}


def mamba2(leaf):
    triton = types.ModuleType("mamba_ssm.ops.triton.ssd_combined")
    triton.mamba_chunk_scan_combined = None  # imported by the file, used in its own test only
    sys.modules[triton.__name__] = triton
    projected, scale = leaf("projected", B, T, 2 * H + 2 * E + M), leaf("norm_scale", H)
    gate, inputs, step = projected.split([H, H + 2 * E, M], -1)
    memory, recent = leaf("memory", B, M, E, E), leaf("recent", B, S - 1, H + 2 * E)
    kernel, bias = leaf("conv_weights", S, H + 2 * E), leaf("conv_bias", H + 2 * E)
    value, key, query = convolve(recent, inputs, kernel, bias).split([H, E, E], -1)
    value, step = heads(value), functional.softplus(step)
    key, query = (part[:, :, None].expand(B, T, M, E) for part in (key, query))
    read, state = load(sys.argv[1]).ssd_minimal_discrete(
        value * step[..., None], -leaf("log_rate", M).exp() * step, key, query, T // 2,
        initial_states=memory[:, None],
    )  # fmt: skip
    read = (read + leaf("skip_scale", M)[:, None] * value).reshape(B, T, H)
    outputs = functional.rms_norm(read * functional.silu(gate), (H,), scale, eps=1e-5)
    return outputs, {"memory": state, "recent": inputs[:, 1 - S :]}, {}


if __name__ == "__main__":
    arrays = {}
    for make in (m_lstm, gated_delta_net, mamba2):
        name = make.__name__
        random, leaves = np.random.default_rng(0), {}

        def leaf(path, *shape, random=random, leaves=leaves):
            draw = torch.tensor(random.normal(size=shape), dtype=torch.float32, requires_grad=True)
            leaves[path] = draw
            return draw

        outputs, last, others = make(leaf)
        total = sum(torch.sin(part).sum() for part in (outputs, *last.values()))
        total.backward()
        arrays |= {f"{name}.in.{path}": draw for path, draw in leaves.items()}
        arrays |= {f"{name}.slope.{path}": draw.grad for path, draw in leaves.items()}
        arrays |= {f"{name}.last.{path}": part for path, part in last.items()}
        arrays |= {f"{name}.{path}": part for path, part in {"outputs": outputs, **others}.items()}
    numbers = {path: array.detach().numpy() for path, array in arrays.items()}
    np.savez_compressed(pathlib.Path(__file__).with_name("matrix_cells.npz"), **numbers)
