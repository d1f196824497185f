"""Vision-language models against the outputs of Hugging Face's originals.

The folders of `golden/vlm` are named by model and version of transformers; `io*.safetensors` hold
inputs and outputs of the original, `low_variance.safetensors` the outputs of the original with all
params but those of norms and between the towers multiplied by 0.003, where the constants in the
norms matter.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from vla_jax import backbones, trees
from vla_jax.backbones import models

GOLDEN = pathlib.Path(__file__).parent / "golden/vlm"
CASES = sorted(path.relative_to(GOLDEN).as_posix() for path in GOLDEN.glob("*/io*.safetensors"))
LOW_VARIANCE = sorted(path.parent.name for path in GOLDEN.glob("*/low_variance.safetensors"))
SHRINK = 0.003


@functools.cache
def model(name):
    return backbones.load(GOLDEN / name)


@functools.cache
def arrays(case):
    """Inputs by the original's names, and outputs, of a golden file."""
    stored = load_file(GOLDEN / case)
    inputs = {k[3:]: v for k, v in stored.items() if k.startswith("in.")}
    if "inputs_embeds" in inputs:
        del inputs["input_ids"]
    return inputs, {k[4:]: v for k, v in stored.items() if k.startswith("out.")}


def largest_error(found, expected, inputs):
    real = inputs["attention_mask"].astype(bool)
    return np.abs(np.asarray(found) - expected)[real].max()


def test_every_model_is_compared_with_its_original():
    kinds = {model(pathlib.PurePath(case).parent.name)[0].kind for case in CASES}
    assert kinds == models.MODELS.keys()


@pytest.mark.sampled
@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_the_originals(case):
    config, params = model(pathlib.PurePath(case).parent.name)
    inputs, expected = arrays(case)
    found = backbones.reference.forward(params, config, inputs)
    for name in ("last_hidden", "logits"):
        assert largest_error(found[name], expected[name], inputs) < 1e-5, name


def shrunk(params):
    """Params with all but those of norms and those between the towers multiplied by SHRINK."""
    kept = ("norm", "projection", "merger", "deepstack")
    is_small = trees.map_paths(lambda path: not any(part in path for part in kept), params)
    return jax.tree.map(lambda leaf, s: leaf * SHRINK if s else leaf, params, is_small)


def test_every_model_has_inputs_of_low_variance():
    assert {model(name)[0].kind for name in LOW_VARIANCE} == models.MODELS.keys()


@pytest.mark.sampled
@pytest.mark.parametrize("name", LOW_VARIANCE)
def test_the_constants_in_the_norms_are_the_originals(name):
    config, params = model(name)
    inputs, _ = arrays(f"{name}/io.safetensors")
    expected = load_file(GOLDEN / name / "low_variance.safetensors")["out.last_hidden"]

    def error(config):
        found = backbones.reference.forward(shrunk(params), config, inputs)
        return largest_error(found["last_hidden"], expected, inputs)

    assert error(config) < 1e-5
    for part in ("vision", "language"):
        sizes = getattr(config, part)
        if not hasattr(sizes, "epsilon"):
            continue  # a constant of the model (Qwen-VL's vision towers)
        wrong = dataclasses.replace(sizes, epsilon=2 * sizes.epsilon)
        assert error(dataclasses.replace(config, **{part: wrong})) > 1e-4, part


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize("case", [case for case in CASES if "hf5.23/io.s" in case])
def test_gradients_are_finite_with_padding(case):
    config, params = model(pathlib.PurePath(case).parent.name)
    inputs, _ = arrays(case)
    real = inputs["attention_mask"].astype(bool)

    def loss_fn(params):
        hidden = backbones.reference.forward(params, config, inputs)["last_hidden"]
        return jnp.sum(jnp.where(real[..., None], jnp.sin(3 * hidden), 0))

    grads = trees.leaves_by_path(jax.grad(loss_fn)(params))
    assert all(np.isfinite(grad).all() for grad in grads.values())
    assert all(np.abs(grad).max() > 0 for path, grad in grads.items() if path.endswith("scale"))
