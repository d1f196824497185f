"""Writes rlax_ppo.npz, the results of rlax 0.1.9 that tests/test_proximal.py compares with.

    pip install rlax==0.1.9
    python tests/golden/make_rlax_ppo.py

They are stored because rlax depends on TensorFlow Probability. Two sequences of T = 9 steps.
"""

import pathlib

import jax
import numpy as np
import rlax

B, T, A, CLIP = 2, 9, 4, 0.2


def make_inputs():
    random = np.random.default_rng(0)
    logits = random.normal(size=(B, T, A))
    inputs = {
        "logits": logits.astype(np.float32),
        "old_logits": (logits + random.normal(0, 0.4, size=(B, T, A))).astype(np.float32),
        "advantage": random.normal(size=(B, T)).astype(np.float32),
        "action": random.integers(0, A, (B, T)).astype(np.int32),
    }
    return inputs


def values(of):
    """Returns the loss of rlax for one sequence, and its gradient by log π."""
    new, old = (
        jax.vmap(lambda logits, action: jax.nn.log_softmax(logits)[action])(of[name], of["action"])
        for name in ("logits", "old_logits")
    )

    def loss(new):
        ratio = jax.numpy.exp(new - old)
        return rlax.clipped_surrogate_pg_loss(ratio, of["advantage"], CLIP)

    return {"clipped_loss": loss(new), "gradient": jax.grad(loss)(new)}


if __name__ == "__main__":
    given = make_inputs()
    found = jax.vmap(values)(given)
    path = pathlib.Path(__file__).with_name("rlax_ppo.npz")
    arrays = {f"in.{name}": array for name, array in given.items()}
    np.savez(path, **arrays, **{f"out.{name}": np.asarray(found[name]) for name in found})
