"""The total loss is the weighted sum of the given terms; its metrics are the unweighted terms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.training import losses
from vla_jax.training.loss_terms import LossWeights, total
from vla_jax.types import ActionChunk

WEIGHTS = LossWeights(gripper=0.5, forward=0.25, caption=2.0, cotrain=3.0, kl=0.125)
FACTORS = {
    "arm": 1.0,
    "gripper": 0.5,
    "forward_tokens": 0.25,
    "forward_image_primary": 0.25,
    "forward_image_wrist": 0.25,
    "caption": 2.0,
    "cotrain": 3.0,
    "kl": 0.125,
}
TERMS = {name: jnp.float32(1.5 + place) for place, name in enumerate(FACTORS)}


def subsets():
    pairs = itertools.combinations(FACTORS, 2)
    return [(), *((name,) for name in FACTORS), *pairs, tuple(FACTORS)]


def test_any_set_of_terms_is_summed_with_its_weights_and_reported_without_them():
    for names in subsets():
        terms = {name: TERMS[name] for name in names}
        loss, metrics = total(terms, WEIGHTS)
        expected = sum(FACTORS[name] * float(terms[name]) for name in names)
        assert loss.dtype == jnp.float32
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        assert metrics == {f"loss_{name}": term for name, term in terms.items()}


def test_a_weight_is_the_gradient_of_its_term():
    gradient = jax.grad(lambda terms: total(terms, WEIGHTS)[0])(TERMS)
    assert {name: float(slope) for name, slope in gradient.items()} == FACTORS


def test_the_first_two_terms_equal_the_action_loss():
    random = np.random.default_rng(0)
    arm, logit = random.normal(size=(2, 3, 6)), random.normal(size=(2, 3))
    chunk = ActionChunk(*(np.asarray(part, np.float32) for part in (arm, logit)))
    action = random.normal(size=(2, 3, 7)).astype(np.float32)
    loss, metrics = losses.action_loss(chunk, action, np.ones((2, 3), bool))
    terms = {name: metrics[f"loss_{name}"] for name in ("arm", "gripper")}
    assert total(terms, LossWeights())[0] == loss


def test_all_default_weights_are_positive():
    assert all(weight > 0 for weight in vars(LossWeights()).values())


def test_an_unknown_term_raises_one_sentence():
    with pytest.raises(ValueError, match=r"unknown loss term 'captoin'; .*Did you mean 'caption'"):
        total({"arm": jnp.float32(1), "captoin": jnp.float32(1)}, LossWeights())


def test_a_term_that_is_not_a_scalar_is_refused():
    with pytest.raises(AssertionError, match="assert_shape"):
        total({"arm": jnp.ones(3)}, LossWeights())


@pytest.mark.parametrize("weight", [-0.1, float("inf"), float("nan")])
def test_a_weight_out_of_range_raises_one_sentence(weight):
    with pytest.raises(ValueError, match=r"loss\.kl must be a finite number, 0 or more, got"):
        LossWeights(kl=weight)
