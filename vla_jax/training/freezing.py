"""Frozen params: which leaves are trained, and trees that hold only those.

A tree of some leaves has the structure of the params, with `optax.MaskedNode()` in the place of
the others. The optimiser state has the same node there; it holds no array.
"""

from collections.abc import Sequence
from typing import Any

import jax
import optax

from vla_jax import trees
from vla_jax.types import Params


def is_trained(path: str, freeze: Sequence[str], train: Sequence[str] = ()) -> bool:
    """Returns True if the leaf at a path is trained.

    Args:
      path: of a leaf of the params.
      freeze: path globs of params that are not trained.
      train: path globs of params that are trained although a glob of `freeze` matches.
    """
    return not trees.matches(path, freeze) or trees.matches(path, train)


def split(params: Params, freeze: Sequence[str], train: Sequence[str] = ()) -> tuple[Any, Any]:
    """Returns the trained leaves, and the frozen leaves, each in the structure of the params.

    Args:
      params: arrays or shapes.
      freeze: path globs, as for `is_trained`.
      train: path globs, as for `is_trained`.
    """
    trained = trees.map_paths(lambda path: is_trained(path, freeze, train), params)
    absent = optax.MaskedNode()
    return (
        jax.tree.map(lambda leaf, keep: leaf if keep else absent, params, trained),
        jax.tree.map(lambda leaf, drop: absent if drop else leaf, params, trained),
    )


def merge(tree: Any, rest: Any) -> Any:
    """Returns `tree` with the leaves of `rest` where it has none.

    Args:
      tree: some leaves of a tree, as from `split`.
      rest: at least the other leaves, in the same structure.
    """
    return jax.tree.map(
        lambda leaf, other: other if _is_absent(leaf) else leaf, tree, rest, is_leaf=_is_absent
    )


def take_present(tree: Any, like: Any) -> Any:
    """Returns the leaves of `tree` that `like` has too.

    Args:
      tree: at least the leaves of `like`.
      like: some leaves in the structure of `tree`, as from `split`.
    """
    return jax.tree.map(
        lambda wanted, leaf: wanted if _is_absent(wanted) else leaf, like, tree, is_leaf=_is_absent
    )


def absent_paths(tree: Any) -> set[str]:
    """Returns the path of every leaf of the whole tree that `tree` does not have.

    Args:
      tree: any tree that holds some from `split`, such as a train state.
    """
    marked = jax.tree.map(_is_absent, tree, is_leaf=_is_absent)
    return {path for path, is_absent in trees.leaves_by_path(marked).items() if is_absent}


def where_none(tree: Any, whole: Any) -> Any:
    """Returns the leaves of `whole` where `tree` has None, and None elsewhere.

    Args:
      tree: some leaves in the structure of `whole`, the others None, as stored in a checkpoint.
      whole: all leaves.
    """
    marks, leaves = trees.leaves_by_path(_mark_none(tree)), trees.leaves_by_path(whole)
    return trees.map_paths(lambda path: leaves[path] if marks.get(path) else None, whole)


def fill_none(tree: Any, rest: Any) -> Any:
    """Returns `tree` with the leaves of `rest` where it has None.

    Args:
      tree: as for `where_none`.
      rest: at least the other leaves.
    """
    leaves = {**trees.leaves_by_path(rest), **trees.leaves_by_path(tree)}
    return trees.map_paths(leaves.get, _mark_none(tree))


def _mark_none(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf is None, tree, is_leaf=lambda leaf: leaf is None)


def _is_absent(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)
