"""Record beside the arrays of a step: the caller's metadata, and checksums that detect damage.

    {"metadata": {…}, "integrity": {"step": 1000, "arrays": {path: checksum}, "text": checksum}}

`text` is the checksum of all the rest. Steps of earlier versions have the metadata only.
"""

import json
import pathlib
import warnings
import zlib
from typing import Any, NamedTuple

from vla_jax import trees
from vla_jax.training import checksums


class Record(NamedTuple):
    """Content of a record that has been checked."""

    metadata: dict[str, Any]  # the caller's
    arrays: dict[str, int] | None  # path of every array -> checksum; None = not stored


def make(metadata: dict[str, Any], tree: Any, step: int | None) -> dict[str, Any]:
    """Returns the record of a step as JSON.

    Args:
      metadata: the caller's, JSON-serialisable.
      tree: all arrays of the step.
      step: number of the step; None for params that belong to no step.
    """
    integrity = {"step": step, "arrays": checksums.of_tree(tree)}
    text = text_checksum(metadata, integrity)
    return {"metadata": metadata, "integrity": {**integrity, "text": text}}


def check(stored: Any, tree: Any, path: pathlib.Path) -> Record:
    """Returns the content of a record.

    Args:
      stored: the record in a checkpoint.
      tree: all shapes that the checkpoint lists.
      path: its folder, whose name is the step if it is a number.

    Raises:
      ValueError: the record, the list of arrays or the number of the step is damaged.
    """
    if not isinstance(stored, dict) or not {"metadata"} <= {*stored} <= {"metadata", "integrity"}:
        raise ValueError("its metadata is broken")
    metadata = stored["metadata"]
    if "integrity" not in stored:
        return Record(metadata, None)
    integrity = dict(stored["integrity"])
    if integrity.pop("text", None) != text_checksum(metadata, integrity):
        raise ValueError("the checksum of its metadata differs")
    step, arrays = integrity["step"], integrity["arrays"]
    if path.name.isdigit() and step != int(path.name):
        raise ValueError(f"its files are those of step {step}")
    differing = sorted({*arrays} ^ {*trees.leaves_by_path(tree)})
    if differing:
        raise ValueError(f"its list of arrays is broken at {differing[0]}")
    return Record(metadata, arrays)


def warn_if_unchecked(record: Record, path: pathlib.Path) -> None:
    """Warns if a step has no checksums; the text is the same for every part that is read."""
    if record.arrays is None:
        warnings.warn(
            f"{path} was saved by an earlier version, without checksums; damaged values in it are "
            "not detected",
            stacklevel=2,
        )


def check_arrays(tree: Any, record: Record) -> None:
    """Raises a ValueError for the first array whose checksum differs.

    Args:
      tree: arrays that were read, some of the step's.
      record: of the step.
    """
    if record.arrays is not None:
        name = checksums.first_difference(tree, record.arrays)
        if name:
            raise ValueError(f"the checksum of array {name} differs")


def text_checksum(metadata: Any, integrity: Any) -> int:
    """Returns the checksum of a record's text, `integrity` without its own."""
    return zlib.crc32(json.dumps([metadata, integrity], sort_keys=True).encode())
