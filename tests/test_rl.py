"""The equations of `rl/`: agreement with rlax, the exact policy gradient, SARSA's fixed point."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.rl import exploration, policy_gradient, returns, td_errors

GAMMA = 0.9


@pytest.fixture(scope="module")
def rlax(golden):
    """Inputs `[B, T, ...]` and rlax's values, written by tests/golden/make_rlax.py."""
    with np.load(golden / "rlax.npz") as file:
        return {name: file[name] for name in file.files}


def ours(targets):
    """The same values from this library, for one sequence."""
    reward, discount, lambda_ = targets["in.reward"], targets["in.discount"], targets["in.lambda_"]
    value, next_value = targets["in.value"][:-1], targets["in.value"][1:]
    q, next_q = targets["in.q"][:-1], targets["in.q"][1:]
    action, next_action = targets["in.action"][:-1], targets["in.action"][1:]
    logits, weight = targets["in.logits"][:-1], targets["in.weight"]
    probability = exploration.epsilon_greedy_probability(targets["in.q"], 0.3)
    taken = (q, action, reward, discount, next_q)
    return {
        "discounted_returns": returns.discounted_returns(reward, discount, next_value[-1]),
        "lambda_returns": returns.lambda_returns(reward, discount, next_value, lambda_),
        "advantages": returns.advantages(reward, discount, value, next_value, lambda_),
        "reinforce_loss": policy_gradient.reinforce_loss(
            logits, action, targets["in.advantage"], weight
        ),
        "entropy_loss": policy_gradient.entropy_loss(logits, weight),
        "epsilon_greedy": probability,
        "sarsa": td_errors.sarsa_error(*taken, next_action),
        "sarsa_lambda": td_errors.sarsa_error(*taken, next_action, lambda_),
        "expected_sarsa": td_errors.expected_sarsa_error(*taken, probability[1:]),
    }


def test_the_values_equal_those_of_rlax(rlax):
    found = jax.jit(jax.vmap(ours))(rlax)
    expected = {name[4:]: array for name, array in rlax.items() if name.startswith("out.")}
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=2e-6, err_msg=name)


def test_returns_by_hand():
    reward, discount = jnp.array([1.0, 2.0, 4.0]), jnp.array([0.5, 0.5, 0.5])
    np.testing.assert_allclose(
        returns.discounted_returns(reward, discount, 8.0), [1 + 0.5 * 6, 2 + 0.5 * 8, 4 + 0.5 * 8]
    )
    next_value = jnp.array([10.0, 20.0, 8.0])
    one_step = returns.lambda_returns(reward, discount, next_value, 0.0)
    np.testing.assert_allclose(one_step, reward + 0.5 * next_value)
    np.testing.assert_allclose(
        returns.lambda_returns(reward, discount, next_value, 1.0),
        returns.discounted_returns(reward, discount, 8.0),
    )


def test_two_episodes_in_one_sequence_equal_two_sequences():
    random = np.random.default_rng(0)
    reward, value, next_value = random.normal(size=(3, 7)).astype(np.float32)
    discount = np.full(7, GAMMA, np.float32)
    discount[2] = 0  # a termination
    first, second = slice(0, 3), slice(3, 7)

    def targets(part):
        taken = reward[part], discount[part]
        lambda_return = returns.lambda_returns(*taken, next_value[part], 0.8)
        return lambda_return, returns.advantages(*taken, value[part], next_value[part], 0.8)

    apart = [np.concatenate(pair) for pair in zip(targets(first), targets(second), strict=True)]
    np.testing.assert_allclose(targets(slice(0, 7)), apart, atol=1e-6)


def test_at_a_truncation_the_return_bootstraps_from_the_value():
    reward, discount = jnp.ones(4), jnp.full(4, GAMMA)
    lambda_ = jnp.array([1.0, 0.0, 1.0, 1.0])
    found = returns.lambda_returns(reward, discount, jnp.array([0.0, 5.0, 0.0, 9.0]), lambda_)
    np.testing.assert_allclose(found[1], 1 + GAMMA * 5)
    np.testing.assert_allclose(found[0], 1 + GAMMA * (1 + GAMMA * 5))


# Two states; action 1 moves to the other state; the reward depends on state and action.
REWARDS = np.array([[0.0, 1.0], [2.0, -1.0]])
HORIZON = 3
LOGITS = jnp.array([[0.3, -0.2], [-0.5, 0.4]])  # [state, action]


def episodes():
    """States and actions `[num_episodes, T]` of all possible episodes from state 0."""
    actions = np.array(list(itertools.product([0, 1], repeat=HORIZON)))
    left = np.concatenate([np.zeros((len(actions), 1), int), np.cumsum(actions, 1)[:, :-1]], 1)
    return left % 2, actions


def probability(table, states, actions):
    """Probability of each episode `[num_episodes]`."""
    return jnp.prod(jax.nn.softmax(table)[states, actions], axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("baseline", [0.0, 3.0])
@pytest.mark.parametrize("gamma", [1.0, GAMMA])
def test_reinforce_is_the_exact_policy_gradient_of_a_two_state_problem(gamma, baseline):
    states, actions = episodes()
    reward = jnp.asarray(REWARDS[states, actions], jnp.float32)
    discount, weight = jnp.full(HORIZON, gamma), gamma ** jnp.arange(HORIZON)

    def exact(table):  # J = Σ P(episode) Σ γᵗ rₜ
        return jnp.sum(probability(table, states, actions) * (reward @ weight))

    def estimate(table, states, actions, reward):
        return_ = returns.discounted_returns(reward, discount)
        advantage = return_ - baseline * (1.0 + states)  # any function of the state
        loss = policy_gradient.reinforce_loss(table[states], actions, advantage, weight)
        return HORIZON * loss

    of_each = jax.vmap(jax.grad(estimate), in_axes=(None, 0, 0, 0))
    gradients = of_each(LOGITS, states, actions, reward)
    mean = jnp.einsum("n,nsa->sa", probability(LOGITS, states, actions), gradients)
    np.testing.assert_allclose(mean, -jax.grad(exact)(LOGITS), atol=1e-6)


# A chain of three states: action 0 stays, action 1 advances and, in the last state, terminates.
REWARD = np.array([[0.1, -0.2], [0.0, 0.5], [-0.3, 1.0]], np.float32)
POLICY = np.array([[0.2, 0.8], [0.5, 0.5], [0.6, 0.4]], np.float32)
STATE, ACTION = (part.ravel() for part in np.indices((3, 2)))
NEXT_STATE = np.minimum(STATE + ACTION, 2)
DISCOUNT = np.where((STATE == 2) & (ACTION == 1), 0, GAMMA).astype(np.float32)


def closed_form():
    """Q of POLICY, the solution of the linear equations Q = R + γ P Π Q."""
    matrix = np.zeros((6, 6))
    for row in range(6):
        matrix[row, 2 * NEXT_STATE[row] : 2 * NEXT_STATE[row] + 2] = (
            DISCOUNT[row] * POLICY[NEXT_STATE[row]]
        )
    return np.linalg.solve(np.eye(6) - matrix, REWARD.ravel()).reshape(3, 2)


def chain_error(q, next_action):
    """SARSA error `[6]` of each state and action."""
    reward = REWARD[STATE, ACTION]
    return td_errors.sarsa_error(q[STATE], ACTION, reward, DISCOUNT, q[NEXT_STATE], next_action)


def test_expected_sarsa_converges_to_the_closed_form_of_a_chain():
    def loss(q):
        probability = POLICY[NEXT_STATE]
        reward = REWARD[STATE, ACTION]
        error = td_errors.expected_sarsa_error(
            q[STATE], ACTION, reward, DISCOUNT, q[NEXT_STATE], probability
        )
        return jnp.sum(jnp.square(error)) / 2

    step = jax.jit(lambda q: q - 0.5 * jax.grad(loss)(q))
    q = jnp.zeros((3, 2))
    for _ in range(200):
        q = step(q)
    np.testing.assert_allclose(q, closed_form(), atol=1e-5)


def test_the_mean_sarsa_error_is_zero_at_the_closed_form_only():
    def mean_error(q):
        """Mean over the next action under the policy."""
        errors = jnp.stack([chain_error(q, jnp.full(6, action)) for action in (0, 1)])
        return jnp.sum(POLICY[NEXT_STATE].T * errors, axis=0)

    q = jnp.asarray(closed_form(), jnp.float32)
    np.testing.assert_allclose(mean_error(q), 0, atol=1e-6)
    assert jnp.abs(mean_error(q.at[1, 1].add(0.1))).max() > 0.05


def test_sampled_sarsa_learns_the_closed_form_of_a_chain():
    def step(q, at):
        count, key = at
        actions = exploration.sample(jnp.asarray(POLICY)[NEXT_STATE], key=key)
        error = chain_error(q, actions).reshape(3, 2)
        return q + error / (1 + count) ** 0.8, None

    keys = jax.random.split(jax.random.key(0), 20_000)
    q, _ = jax.lax.scan(step, jnp.zeros((3, 2)), (jnp.arange(20_000), keys))
    np.testing.assert_allclose(q, closed_form(), atol=0.03)


def test_the_target_has_no_gradient():
    taken = (jnp.array([0, 1]), jnp.ones(2), jnp.full(2, GAMMA))
    q = jnp.array([[1.0, 2.0], [3.0, 4.0]])

    def total(q, next_q):
        return jnp.sum(jnp.square(td_errors.sarsa_error(q, *taken, next_q, jnp.array([0, 0]))))

    by_q, by_next_q = jax.grad(total, (0, 1))(q, q + 1)
    assert by_q.any()
    assert not by_next_q.any()


def test_samples_have_the_given_probabilities(key):
    chance = jnp.array([0.1, 0.0, 0.6, 0.3])
    samples = exploration.sample(jnp.broadcast_to(chance, (40_000, 4)), key=key)
    share = np.bincount(samples, minlength=4) / 40_000
    np.testing.assert_allclose(share, chance, atol=0.01)
    assert share[1] == 0


def test_epsilon_greedy_breaks_ties_uniformly():
    found = exploration.epsilon_greedy_probability(jnp.array([1.0, 3.0, 3.0, 0.0]), 0.2)
    np.testing.assert_allclose(found, [0.05, 0.45, 0.45, 0.05])


def test_epsilon_decays_linearly_and_stays():
    found = [exploration.decayed_epsilon(jnp.int32(n), 1.0, 0.1, 90) for n in (0, 45, 90, 500)]
    np.testing.assert_allclose(found, [1.0, 0.55, 0.1, 0.1], atol=1e-6)


def test_entropy_is_greatest_for_equal_logits():
    assert jnp.isclose(policy_gradient.entropy(jnp.zeros(4)), jnp.log(4.0))
    assert jnp.isclose(policy_gradient.entropy(jnp.array([1e3, 0.0, 0.0])), 0.0)


def test_the_baseline_loss_ignores_masked_steps():
    value, weight = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 0.0, 1.0])
    loss, by_value = jax.value_and_grad(policy_gradient.baseline_loss)(value, 5.0 + value, weight)
    assert jnp.isclose(loss, 2 * 25 / 3)
    np.testing.assert_allclose(by_value, [-10 / 3, 0, -10 / 3], rtol=1e-6)


def test_an_empty_episode_is_refused():
    nothing = jnp.zeros(0)
    message = "reward must hold at least one step, got 0; drop empty episodes"
    with pytest.raises(ValueError, match=message):
        returns.discounted_returns(nothing, nothing)
    with pytest.raises(ValueError, match=message):
        returns.lambda_returns(nothing, nothing, nothing)
    with pytest.raises(ValueError, match=message):
        returns.advantages(nothing, nothing, nothing, nothing)
    q, action = jnp.zeros((0, 2)), jnp.zeros(0, jnp.int32)
    with pytest.raises(ValueError, match=message):
        td_errors.sarsa_error(q, action, nothing, nothing, q, action)
