"""Params divided into trained and frozen leaves, and put together again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax import trees
from vla_jax.training import freezing

PARAMS = {
    "backbone": {"kernel": jnp.ones((2, 3)), "lora_a": jnp.ones((2, 1))},
    "layers": [{"kernel": jnp.ones(2)}, {"kernel": jnp.ones(4)}],
}
FREEZE, TRAIN = ("backbone/*", "layers/1/*"), ("*/lora_a",)
TRAINED = ["backbone/lora_a", "layers/0/kernel"]


@pytest.mark.parametrize(
    ("path", "is_trained"),
    [("backbone/kernel", False), ("backbone/lora_a", True), ("layers/0/kernel", True)],
)
def test_an_exception_counts_more_than_a_frozen_glob(path, is_trained):
    assert freezing.is_trained(path, FREEZE, TRAIN) is is_trained


def test_the_parts_have_each_leaf_once_and_merge_into_the_whole():
    trained, frozen = freezing.split(PARAMS, FREEZE, TRAIN)
    assert trees.leaf_paths(trained) == TRAINED
    assert {*trees.leaf_paths(frozen), *TRAINED} == {*trees.leaf_paths(PARAMS)}
    assert not {*trees.leaf_paths(frozen)} & {*TRAINED}
    assert freezing.absent_paths(trained) == {*trees.leaf_paths(frozen)}
    for merged in (freezing.merge(trained, frozen), freezing.merge(frozen, trained)):
        assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)
        jax.tree.map(np.testing.assert_array_equal, merged, PARAMS)


def test_the_leaves_of_another_tree_are_selected():
    trained, _ = freezing.split(PARAMS, FREEZE, TRAIN)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, PARAMS)
    selected = freezing.take_present(doubled, trained)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), selected, trained)
