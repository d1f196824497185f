"""Trees of arrays: leaf paths, globs over paths, shape comparison, and selection of rows.

A path joins the keys from the root to a leaf: `decoder/layer_0/kernel`. Globs follow `fnmatch`,
and `*` also crosses `/`: `backbone/*` matches every leaf of the backbone.
"""

import difflib
import fnmatch
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from vla_jax.types import Array

Tree = TypeVar("Tree")
Value = TypeVar("Value")


def leaf_paths(tree: Any) -> list[str]:
    """Returns the path of every leaf, in the order of `jax.tree.leaves`."""
    return list(leaves_by_path(tree))


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Returns path → leaf, in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_path_name(path): leaf for path, leaf in leaves}


def map_paths(function: Callable[[str], Any], tree: Any) -> Any:
    """Returns a tree of the same structure whose leaves are `function(path)`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: function(_path_name(path)), tree)


def matches(path: str, globs: Sequence[str]) -> bool:
    """Returns True if any of the globs matches the path."""
    return any(fnmatch.fnmatchcase(path, glob) for glob in globs)


def lookup(path: str, rules: Sequence[tuple[str, Value]], default: Value) -> Value:
    """Returns the value of the first rule whose glob matches the path, else `default`.

    Args:
      path: of a leaf.
      rules: (glob, value) pairs.
      default: value of a path that no glob matches.
    """
    return next((value for glob, value in rules if fnmatch.fnmatchcase(path, glob)), default)


def under(prefix: str, rules: Sequence[tuple[str, Value]]) -> tuple[tuple[str, Value], ...]:
    """Returns rules whose globs match the paths below `prefix`.

    Args:
      prefix: path of a subtree, without `/` at its end.
      rules: (glob, value) pairs over the paths inside the subtree.
    """
    return tuple((f"{prefix}/{glob}", value) for glob, value in rules)


def check_globs(globs: Sequence[str], tree: Any, *, name: str) -> None:
    """Raises a ValueError for the first glob that matches no leaf; it names the nearest path.

    Args:
      globs: globs over paths.
      tree: arrays or shapes; only its paths are used.
      name: of the globs, for the error message.
    """
    paths = leaf_paths(tree)
    for glob in globs:
        if not any(fnmatch.fnmatchcase(path, glob) for path in paths):
            raise ValueError(
                f"no parameter path matches '{glob}' of {name}; did you mean "
                f"'{_nearest(glob, paths)}'? (`*` also crosses `/`)"
            )


def first_difference(found: Any, expected: Any) -> str:
    """Returns a clause about the first leaf whose shape or dtype differs; "" if none does.

        decoder/layer_0/kernel is float32[3, 4], expected float32[3, 5]

    Args:
      found: tree of arrays or shapes.
      expected: tree of arrays or shapes; its leaves come first.
    """
    found_leaves, expected_leaves = _descriptions(found), _descriptions(expected)
    for path in {**expected_leaves, **found_leaves}:
        found_leaf = found_leaves.get(path, "missing")
        expected_leaf = expected_leaves.get(path, "nothing")
        if found_leaf != expected_leaf:
            return f"{path} is {found_leaf}, expected {expected_leaf}"
    return ""


def select(mask: Array, if_true: Tree, if_false: Tree) -> Tree:
    """Returns the rows of `if_true` where the mask is True, and those of `if_false` elsewhere.

    Args:
      mask: `[B]` bool.
      if_true: arrays `[B, ...]`.
      if_false: arrays of the same shapes.
    """

    def select_leaf(true_leaf: Any, false_leaf: Any) -> jax.Array:
        return jnp.where(mask.reshape(-1, *(1,) * (true_leaf.ndim - 1)), true_leaf, false_leaf)

    return jax.tree.map(select_leaf, if_true, if_false)


def gather(tree: Tree, rows: Array) -> Tree:
    """Returns the rows with these indices from every leaf.

    Args:
      tree: arrays `[B, ...]`.
      rows: `[N]` int, indices into the leading axis.

    Returns:
      Arrays `[N, ...]`.
    """
    return jax.tree.map(lambda leaf: leaf[rows], tree)


def _path_name(path: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _descriptions(tree: Any) -> dict[str, str]:
    leaves = leaves_by_path(tree)
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves.items()}


def _nearest(glob: str, paths: Sequence[str]) -> str:
    """Returns the path, or the glob of a folder of paths, that is most similar to `glob`."""
    folders = {
        "/".join([*path.split("/")[:depth], "*"])
        for path in paths
        for depth in range(1, path.count("/") + 1)
    }
    nearest = difflib.get_close_matches(glob, [*paths, *sorted(folders)], n=1, cutoff=0.0)
    return "".join(nearest)
