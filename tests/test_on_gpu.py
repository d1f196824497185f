"""Laws 1, 3, 4 and 7 on a GPU, in float32 and in TF32; some cases also run on the CPU.

    JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu

A GPU multiplies float32 numbers in TF32 unless JAX's matmul precision forbids it: both factors keep
10 bits of their mantissa, an error of up to 2⁻¹¹ each. On the CPU the factors are rounded in the
same way, so that the tolerance is known to be that of such products.
"""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_decoders import read_golden

from vla_jax import trees
from vla_jax.nn import matmul, recurrence
from vla_jax.nn.cells import CELLS
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.policies import decoders, heads, trunks
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.training import checkpoint, update

# Largest ‖found − expected‖ / ‖expected‖ of every result, by the precision of products. With all
# cases on the CPU it was 5e-6, and 7e-4 with rounded factors.
TOLERANCES = {"float32": 1e-5, "tensorfloat32": 5e-3}
NO_GPU = "needs an NVIDIA GPU: JAX_PLATFORMS=cuda,cpu"
GPU = (pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu", reason=NO_GPU))
B, T, W, N, D, K, H = 4, 9, 4, 3, 32, 2, 64


def on_platforms(names, on_cpu):
    """Cases (platform, precision, name): every name on a GPU, some of them on the CPU."""
    return pytest.mark.parametrize(
        ("platform", "precision", "name"),
        [("cpu", precision, name) for precision in TOLERANCES for name in on_cpu]
        + [
            pytest.param("gpu", precision, name, marks=GPU)
            for precision in TOLERANCES
            for name in names
        ],
    )


def rounded_product(inputs, kernel):
    """A product whose factors have the mantissa of TF32."""
    inputs, kernel = (jax.lax.reduce_precision(factor, 8, 10) for factor in (inputs, kernel))
    return jnp.matmul(inputs, kernel, preferred_element_type=jnp.float32)


@contextlib.contextmanager
def arithmetic(platform, precision):
    """Computes on a platform, with products of a precision."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.default_device(jax.devices(platform)[0]))
        stack.enter_context(jax.default_matmul_precision(precision))
        if (platform, precision) == ("cpu", "tensorfloat32"):
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(matmul, "_plain", rounded_product)
        yield


def assert_near(found, expected, precision):
    found, expected = trees.leaves_by_path(found), trees.leaves_by_path(expected)
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        difference = np.linalg.norm(np.asarray(leaf) - np.asarray(expected[path]))
        size = np.linalg.norm(np.asarray(expected[path]))
        assert difference <= TOLERANCES[precision] * size, (path, difference, size)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def config_of(kind, **changes):
    sizes = {
        "token_dim": D, "num_tokens": N, "window_size": W, "action_horizon": K, "hidden_size": H,
        "num_layers": 2, "num_heads": 4, "segment_size": 2, "num_memory_tokens": 2,
        "head_sizes": (H,),
    }  # fmt: skip
    return DecoderConfig(kind=kind, **(sizes | changes))


@on_platforms(trunks.names(), ["gru", "rotary_gpt"])
def test_streamed_equals_windowed(platform, precision, name, key):
    """Law 1, in every mode of the trunk, over one window."""
    config = config_of(name)
    with arithmetic(platform, precision):
        params, tokens = decoders.init(key, config), draw(1, B, W, N, D)
        whole = heads.actions(
            jax.jit(partial(decoders.apply, config=config))(params, tokens=tokens)
        )
        for mode in trunks.get(name).modes:
            state = decoders.init_stream(params, config, B, mode=mode)
            step = jax.jit(decoders.step, static_argnums=1, donate_argnums=2)
            chunks = []
            for time in range(W):
                state, chunk = step(params, config, state, tokens[:, time])
                chunks.append(chunk)
            streamed = jax.tree.map(lambda *steps: np.stack(steps, axis=1), *chunks)
            assert_near(streamed, whole, precision)


def implementations(cell):
    """Time loops that compute a cell, beside the plain scan."""
    found = ["bptt"]
    if CELLS[cell].coefficients is not None:
        found.append("associative")
    if CELLS[cell].chunk is not None:
        found.append("chunkwise")
    return found


@on_platforms(list(CELLS), ["lstm", "min_gru"])
def test_every_backward_pass_equals_autodiff(platform, precision, name, key):
    """Law 3, with mask and resets; outputs, carry, and gradients of params and inputs."""
    mask, reset = draw(2, B, T) > -1, draw(3, B, T) > 1
    cotangent = draw(4, B, T, H)

    def results(implementation):
        config = RecurrenceConfig(name, 2, H, num_heads=4, implementation=implementation)
        params, inputs = recurrence.init(key, config, D), draw(1, B, T, D)

        @jax.jit
        def run(params, inputs):
            def outputs_of(params, inputs):
                return recurrence.apply(params, config, inputs, mask=mask, reset=reset)[1]

            outputs, pull = jax.vjp(outputs_of, params, inputs)
            return {"outputs": outputs, "gradients": pull(jnp.asarray(cotangent))}

        return run(params, inputs)

    with arithmetic(platform, precision):
        expected = results("scan")
        for implementation in implementations(name):
            assert_near(results(implementation), expected, precision)


@on_platforms(["lstm", "gpt"], ["lstm"])
def test_a_resumed_training_equals_an_uninterrupted_one_to_the_bit(
    platform, precision, name, key, tmp_path
):
    """Law 4, dropout included, by the same compiled program."""
    config, optimizer = config_of(name, dropout=0.2), optax.adam(1e-3)

    def loss_fn(params, batch, key):
        tokens, action = batch
        chunk = decoders.apply(params, config, tokens, key=key)
        return jnp.mean(jnp.square(chunk.arm - action)) + jnp.mean(chunk.gripper_logit**2), {}

    with arithmetic(platform, precision):
        step = jax.jit(update.make_update(loss_fn, optimizer, ema_decay=0.9))
        state = update.init_train_state(decoders.init(key, config), optimizer, ema=True)
        batches = [(draw(i, B, W, N, D), draw(9 + i, B, W, K, 6)) for i in range(4)]
        for batch in batches[:2]:
            state, _ = step(state, batch, key)
        checkpoints = checkpoint.open_checkpoints(tmp_path)
        checkpoint.save(checkpoints, 2, state, {})
        checkpoint.close(checkpoints)
        restored, _ = checkpoint.restore(tmp_path, state)
        for batch in batches[2:]:
            state, _ = step(state, batch, key)
            restored, _ = step(restored, batch, key)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


GOLDEN = ["lstm_pooling", "lstm_none", "fc_pooling", "gpt_pooling"]


@on_platforms(GOLDEN, GOLDEN[:1])
def test_the_outputs_equal_those_of_robovlms(platform, precision, name, golden):
    """Law 7."""
    config, params, stored = read_golden(golden / f"{name}.safetensors")
    with arithmetic(platform, precision):
        chunk = jax.jit(partial(decoders.apply, config=config))(params, tokens=stored["in.tokens"])
    expected = {"arm": stored["out.arm"], "gripper_logit": stored["out.gripper"][..., 0]}
    assert_near(chunk._asdict(), expected, precision)
