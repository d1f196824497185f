"""Paths, globs, shape comparison and row selection on trees of arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax import trees
from vla_jax.types import ActionChunk

PARAMS = {
    "backbone": {"embed": {"kernel": np.zeros((2, 3), np.float32)}},
    "decoder": {
        "layers": [{"kernel": np.ones((3, 2), np.float32)}, {"kernel": np.ones(1, np.float32)}],
        "bias": np.ones(2, np.float32),
    },
}
PATHS = [
    "backbone/embed/kernel", "decoder/bias", "decoder/layers/0/kernel", "decoder/layers/1/kernel",
]  # fmt: skip


def test_paths_have_the_order_of_the_leaves():
    assert trees.leaf_paths(PARAMS) == PATHS
    leaves = zip(trees.leaves_by_path(PARAMS).values(), jax.tree.leaves(PARAMS), strict=True)
    assert all(one is other for one, other in leaves)


def test_fields_of_named_tuples_are_path_names():
    chunk = ActionChunk(np.zeros((1, 6)), np.zeros(1))
    assert trees.leaf_paths({"chunk": chunk}) == ["chunk/arm", "chunk/gripper_logit"]


def test_mapping_paths_keeps_the_structure():
    lengths = trees.map_paths(len, PARAMS)
    assert jax.tree.structure(lengths) == jax.tree.structure(PARAMS)
    assert jax.tree.leaves(lengths) == [len(path) for path in PATHS]


def test_a_star_also_matches_slashes():
    assert trees.matches("decoder/layers/0/kernel", ["decoder/*"])
    assert trees.matches("decoder/layers/0/kernel", ["x", "*/kernel"])
    assert not trees.matches("decoder/bias", ["backbone/*", "bias"])


def test_the_first_matching_rule_applies():
    rules = (("*/kernel", 1), ("decoder/*", 2))
    assert [trees.lookup(path, rules, 0) for path in PATHS] == [1, 2, 1, 1]
    assert trees.lookup("other", rules, 0) == 0


def test_a_glob_without_a_match_is_refused_with_the_nearest_path():
    trees.check_globs(("backbone/*", "*bias"), PARAMS, name="freeze")
    with pytest.raises(ValueError, match=r"'backbon/\*' of freeze; .*'backbone/\*'"):
        trees.check_globs(("decoder/*", "backbon/*"), PARAMS, name="freeze")


def test_equal_shapes_and_dtypes_have_no_difference():
    shapes = jax.eval_shape(lambda: PARAMS)
    assert trees.first_difference(PARAMS, shapes) == ""


def test_the_first_different_leaf_is_named():
    def change(**changes):
        return {**PARAMS, "decoder": {**PARAMS["decoder"], **changes}}

    cases = {
        "decoder/bias is float32[3], expected float32[2]": change(bias=np.ones(3, np.float32)),
        "decoder/bias is int32[2], expected float32[2]": change(bias=np.ones(2, np.int32)),
        "decoder/other is float32[2], expected nothing": change(other=np.ones(2, np.float32)),
        "decoder/layers/1/kernel is missing, expected float32[1]": change(
            layers=PARAMS["decoder"]["layers"][:1]
        ),
    }
    for sentence, found in cases.items():
        assert trees.first_difference(found, PARAMS) == sentence


def test_rows_are_selected_from_every_leaf():
    mask = jnp.array([True, False, True])
    one = {"a": np.arange(3), "b": np.arange(6.0).reshape(3, 2), "c": np.zeros((3, 1, 2), bool)}
    other = jax.tree.map(lambda leaf: ~leaf if leaf.dtype == bool else -leaf - 1, one)
    selected = trees.select(mask, one, other)
    for name in one:
        expected = np.stack([one[name][0], other[name][1], one[name][2]])
        np.testing.assert_array_equal(selected[name], expected)


def test_rows_are_gathered_from_every_leaf():
    tree = {"a": np.arange(3), "b": np.arange(6.0).reshape(3, 2)}
    gathered = trees.gather(tree, np.array([2, 0, 0]))
    np.testing.assert_array_equal(gathered["a"], [2, 0, 0])
    np.testing.assert_array_equal(gathered["b"], [[4, 5], [0, 1], [0, 1]])
