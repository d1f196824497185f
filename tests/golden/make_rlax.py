"""Writes rlax.npz, the results of rlax 0.1.9 (jax 0.10.2) that tests/test_rl.py compares with.

    pip install rlax==0.1.9
    python tests/golden/make_rlax.py

They are stored because rlax depends on TensorFlow Probability. Two sequences of T = 9 steps with a
termination at step 3 (discount 0) and a truncation at step 6 (lambda 0).
"""

import pathlib

import jax
import numpy as np
import rlax

B, T, A = 2, 9, 4


def make_inputs():
    random = np.random.default_rng(0)
    discount = np.full((B, T), 0.9, np.float32)
    discount[:, 3] = 0
    lambda_ = np.full((B, T), 0.8, np.float32)
    lambda_[:, 6] = 0
    draws = {name: random.normal(size=(B, T)) for name in ("reward", "advantage")}
    draws |= {"value": random.normal(size=(B, T + 1)), "weight": random.random((B, T)) < 0.8}
    draws |= {name: random.normal(size=(B, T + 1, A)) for name in ("q", "logits")}
    inputs = {name: draw.astype(np.float32) for name, draw in draws.items()}
    action = random.integers(0, A, (B, T + 1)).astype(np.int32)
    return inputs | {"discount": discount, "lambda_": lambda_, "action": action}


def values(of):
    """Returns the results of rlax for one sequence."""
    reward, discount, lambda_ = of["reward"], of["discount"], of["lambda_"]
    value, q, logits, action = of["value"], of["q"], of["logits"][:-1], of["action"]
    weight = of["weight"]
    probability = jax.vmap(lambda q: rlax.epsilon_greedy(0.3).probs(q))(q)
    taken = action[:-1]
    return {
        "discounted_returns": rlax.discounted_returns(reward, discount, value[1:]),
        "lambda_returns": rlax.lambda_returns(reward, discount, value[1:], lambda_),
        "advantages": rlax.truncated_generalized_advantage_estimation(
            reward, discount, lambda_, value
        ),
        "reinforce_loss": rlax.policy_gradient_loss(logits, taken, of["advantage"], weight),
        "entropy_loss": rlax.entropy_loss(logits, weight),
        "epsilon_greedy": probability,
        "sarsa": jax.vmap(rlax.sarsa)(q[:-1], taken, reward, discount, q[1:], action[1:]),
        "sarsa_lambda": rlax.sarsa_lambda(
            q[:-1], taken, reward, discount, q[1:], action[1:], lambda_
        ),
        "expected_sarsa": jax.vmap(rlax.expected_sarsa)(
            q[:-1], taken, reward, discount, q[1:], probability[1:]
        ),
    }


if __name__ == "__main__":
    given = make_inputs()
    found = jax.vmap(values)(given)
    path = pathlib.Path(__file__).with_name("rlax.npz")
    arrays = {f"in.{name}": array for name, array in given.items()}
    np.savez(path, **arrays, **{f"out.{name}": np.asarray(found[name]) for name in found})
