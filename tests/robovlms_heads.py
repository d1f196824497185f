"""Random tensors of RoboVLMs' policy heads, with the names and shapes of its classes."""

import numpy as np

SIZES = (16, 8)  # hidden layers of the two MLPs (RoboVLMs': 1024, 512, 256)


def robovlms_shapes(
    kind, *, in_features=6, hidden=4, layers=2, latent=1, chunk=2, window_size=5, sizes=SIZES
):
    """Name to shape of `LSTMDecoder` (or with a GRU or RNN), `FCDecoder` or `GPTDecoder`."""
    size, width = in_features * latent, hidden * latent
    if kind == "fc":
        shapes = linear("mlp.0", size, size // 2) | linear("mlp.2", size // 2, width)
    elif kind == "gpt":
        shapes = gpt(size, width, layers, window_size)
    else:
        shapes = rnn({"rnn": 1, "gru": 3, "lstm": 4}[kind], size, width, layers)
    for mlp, outputs in (("actions.mlp", chunk * 6), ("gripper.mlp", chunk)):
        widths = (width, *sizes, outputs)
        for layer in range(len(widths) - 1):
            shapes |= linear(f"{mlp}.{2 * layer}", widths[layer], widths[layer + 1])
    return {f"act_head.{name}": shape for name, shape in shapes.items()}


def linear(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def rnn(gates, size, width, layers):
    shapes = {}
    for layer in range(layers):
        shapes[f"rnn.weight_ih_l{layer}"] = (gates * width, size if layer == 0 else width)
        shapes[f"rnn.weight_hh_l{layer}"] = (gates * width, width)
        shapes[f"rnn.bias_ih_l{layer}"] = shapes[f"rnn.bias_hh_l{layer}"] = (gates * width,)
    return shapes


def gpt(size, width, layers, window_size):
    """Tensors of GPT-2, whose `Conv1D` kernels are `[in, out]`."""
    shapes = {"gpt.wpe.weight": (window_size, width)}
    products = {
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, 4 * width),
        "mlp.c_proj": (4 * width, width),
    }
    for layer in range(layers):
        for name, shape in products.items():
            shapes[f"gpt.h.{layer}.{name}.weight"] = shape
            shapes[f"gpt.h.{layer}.{name}.bias"] = shape[1:]
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"gpt.h.{layer}.{norm}.{leaf}": (width,) for leaf in ("weight", "bias")}
    shapes |= {f"gpt.ln_f.{leaf}": (width,) for leaf in ("weight", "bias")}
    return shapes | (linear("fc", size, width) if size != width else {})


def robovlms_head(kind, seed=0, **sizes):
    """Name to random array."""
    random = np.random.default_rng(seed)
    shapes = robovlms_shapes(kind, **sizes)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def assert_same(one, other):
    """Asserts equal names, order, dtypes and bytes."""
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert one[name].shape == other[name].shape, name
        assert one[name].tobytes() == other[name].tobytes(), name
