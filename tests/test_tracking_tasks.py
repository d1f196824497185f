"""Words of permutations and counting: groups, prefix products, chance."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.nn import tracking_tasks
from vla_jax.nn.sequence_tasks import TASKS
from vla_jax.nn.tracking_tasks import MAX_COUNT

B, T = 300, 20
GROUPS = {
    "s2": tracking_tasks.symmetric_group(2),
    "s3": tracking_tasks.symmetric_group(3),
    "s4": tracking_tasks.symmetric_group(4),
    "a5": tracking_tasks.alternating_group(5),
}
each_group = pytest.mark.parametrize("name", GROUPS)


@each_group
def test_a_table_is_that_of_a_group(name):
    table = GROUPS[name]
    order = len(table)
    assert order == {"s2": 2, "s3": 6, "s4": 24, "a5": 60}[name]
    everyone = np.arange(order)
    assert (np.sort(table, axis=0) == everyone[:, None]).all()
    assert (np.sort(table, axis=1) == everyone).all()
    assert (table[0] == everyone).all()
    assert (table[:, 0] == everyone).all()
    assert (table[table] == table[:, table]).all()  # (p q) r = p (q r)
    assert (table != table.T).any() == (name != "s2")


def test_a_product_is_one_permutation_after_the_other():
    elements = list(itertools.permutations("abc"))
    swap_first, rotate = elements.index(tuple("bac")), elements.index(tuple("bca"))
    after = [elements[rotate][elements[0].index(item)] for item in elements[swap_first]]
    assert elements[tracking_tasks.symmetric_group(3)[swap_first, rotate]] == tuple(after)


@each_group
def test_the_target_is_the_product_of_all_elements_so_far(name, key):
    table = GROUPS[name]
    inputs, target = map(np.asarray, TASKS[name].draw(key, B, T))
    assert (inputs.sum(-1) == 1).all()
    word, product = inputs.argmax(-1), np.zeros(B, int)
    for t in range(T):
        product = table[product, word[:, t]]
        assert (target[:, t] == product).all()
    assert set(word.ravel()) == set(range(len(table)))


@each_group
def test_a_constant_answer_is_at_chance(name, key):
    target = np.asarray(TASKS[name].draw(key, 20_000, 5).target)[:, -1]
    outputs = jnp.zeros((len(target), len(GROUPS[name]))).at[:, 1].set(1.0)
    error = float(TASKS[name].evaluate(outputs, target)[1])
    assert error == pytest.approx(TASKS[name].chance, abs=0.01)


def test_counting_counts_the_events_so_far(key):
    inputs, counts = map(np.asarray, tracking_tasks.draw_counting(key, 20_000, T))
    events, noise = np.moveaxis(inputs, -1, 0)
    assert (np.cumsum(events, axis=1) == counts).all()
    share = np.bincount(counts[:, -1], minlength=MAX_COUNT + 1) / len(counts)
    np.testing.assert_allclose(share, 1 - TASKS["counting"].chance, atol=0.01)
    assert events.mean(0) == pytest.approx(np.full(T, MAX_COUNT / 2 / T), abs=0.02)
    assert noise.mean() == pytest.approx(0.5, abs=0.01)
    assert np.corrcoef(events.ravel(), noise.ravel())[0, 1] == pytest.approx(0, abs=0.01)
