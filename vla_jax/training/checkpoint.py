"""Checkpoints with Orbax: saved in the background, complete or absent, readable on any machine.

    directory/1000/    after 1000 updates: the train state, and metadata as JSON
    directory/2000/
    directory/frozen/  parts of the params that no update changes, if they are stored once

The metadata (config, norm_stats, position of the loader, …) is stored with each step, so that one
step folder is sufficient to resume or to act. A checksum of every array is stored too, and checked
whenever the array is read. A folder appears under its number only when it is complete; partial
folders of a killed program are ignored, and removed by the next `open_checkpoints`. All calls to
Orbax are in this file, since its API still changes.
"""

# Orbax's annotations are narrower than what it accepts (pathlib paths, its own policies).
# pyright: reportArgumentType=false

import contextlib
import json
import os
import pathlib
import shutil
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from vla_jax import trees
from vla_jax.files import replacing
from vla_jax.training import freezing, orbax_errors, step_record
from vla_jax.training.step_record import Record
from vla_jax.types import Params

Path = str | os.PathLike[str]
State = TypeVar("State")
_FROZEN = "frozen"  # folder of the parts that are the same in every step


class Checkpoints(NamedTuple):
    """An open handle for saving, from `open_checkpoints`; `close` frees it."""

    orbax: Any  # its Checkpointer
    opened: contextlib.ExitStack  # cleanup that `close` runs


def open_checkpoints(directory: Path, *, keep: int = 2) -> Checkpoints:
    """Returns a handle for saving into `directory`, which is created if necessary.

    Args:
      directory: folder of the steps.
      keep: number of latest steps to keep; older ones are deleted.

    Raises:
      ValueError: `keep` is not positive.
      OSError: the folder cannot be created or written.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}.")
    training = _orbax().training
    with orbax_errors.quiet(), orbax_errors.one_sentence(directory):
        orbax = training.Checkpointer(
            pathlib.Path(directory).absolute(),
            save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )
    opened = contextlib.ExitStack()
    opened.enter_context(orbax_errors.quiet())  # saves fail in the background, between two calls
    return Checkpoints(orbax, opened)


def save(checkpoints: Checkpoints, step: int, train_state: Any, metadata: dict[str, Any]) -> bool:
    """Starts to save in the background; returns False if this step is already saved.

    The arrays may be donated or changed as soon as this returns. With several processes all of
    them must call it. A failure in the background is raised by the next `save`, `wait` or
    `close`; the handle can still be used afterwards.

    Args:
      checkpoints: from `open_checkpoints`.
      step: updates done; must be above all saved steps.
      train_state: any tree of arrays.
      metadata: JSON-serialisable; with several processes that of the first is saved.

    Raises:
      OSError: this or the previous save failed, as on a full disk; earlier steps are intact.
      TypeError: `metadata` is not JSON-serialisable.
      ValueError: a later step is already saved.
    """
    try:
        metadata = json.loads(json.dumps(metadata))
    except TypeError as error:
        raise TypeError(f"metadata must be JSON ({error}); convert it first.") from error
    orbax = checkpoints.orbax
    latest = orbax.latest.step if orbax.latest else -1
    if step == latest:
        return False
    if step < latest:
        raise ValueError(
            f"step must be above {latest}, the latest in {orbax.directory}, got {step}; "
            "delete the later steps or use another folder."
        )
    record = step_record.make(metadata, train_state, step)
    with orbax_errors.one_sentence(orbax.directory):
        return bool(orbax.save_async(step, train_state, custom_metadata=record))


def wait(checkpoints: Checkpoints) -> None:
    """Waits until no save is in progress.

    Raises:
      OSError: the last save failed.
    """
    with orbax_errors.one_sentence(checkpoints.orbax.directory):
        checkpoints.orbax.wait()


def close(checkpoints: Checkpoints) -> None:
    """Waits for the last save and frees the handle.

    Raises:
      OSError: the last save failed.
    """
    with checkpoints.opened, orbax_errors.one_sentence(checkpoints.orbax.directory):
        checkpoints.orbax.close()


def latest_step(directory: Path) -> int | None:
    """Returns the latest complete step in `directory`; None if there is none."""
    return max(_steps(directory), default=None)


def files(directory: Path) -> list[pathlib.Path]:
    """Returns the files that the latest params are read from.

    Raises:
      FileNotFoundError: there is no step.
    """
    folders = (_step_path(directory, None), pathlib.Path(directory).absolute() / _FROZEN)
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def has_ema(directory: Path, *, step: int | None = None) -> bool:
    """Returns True if the step has EMA params.

    Args:
      directory: folder of the steps.
      step: step to read; None means the latest.

    Raises:
      FileNotFoundError: there is no such step.
      ValueError: the files are damaged.
    """
    path = _step_path(directory, step)
    saved = _stored(path)[0]
    # A train state has the entry in any case; without checksums this alone shows that it is gone.
    if "ema_params" not in saved and set(saved) != {"params"}:
        raise ValueError(
            f"{path} must hold ema_params (None without an EMA), got {', '.join(saved)}; delete "
            "it to use the step before."
        )
    return saved.get("ema_params") is not None


def read_metadata(directory: Path, *, step: int | None = None) -> dict[str, Any]:
    """Returns the metadata passed to `save`.

    Args:
      directory: folder of the steps.
      step: step to read; None means the latest.

    Raises:
      FileNotFoundError: there is no such step.
      ValueError: the files are damaged.
    """
    return _stored(_step_path(directory, step))[1].metadata


def restore(
    directory: Path, like: State, *, step: int | None = None
) -> tuple[State, dict[str, Any]]:
    """Returns the saved train state and its metadata.

    It may have been saved on any number of devices. A leaf is a NumPy array, unless `like` has the
    shape of one with a sharding: that one is read by each device for itself, and no host holds it
    whole.

    Args:
      directory: folder of the steps.
      like: train state of the same structure (arrays, or shapes from `jax.eval_shape` or
        `parallel.with_shardings`).
      step: step to read; None means the latest.

    Raises:
      FileNotFoundError: there is no such step.
      ValueError: the checkpoint differs from `like` in a shape or dtype, or is damaged.
    """
    path = _step_path(directory, step)
    saved, record = _stored(path)
    # Earlier versions saved an EMA of frozen params, which is not read.
    absent = freezing.absent_paths(like)
    leaves = trees.leaves_by_path(saved).items()
    _check_same({name: leaf for name, leaf in leaves if name not in absent}, like, path)
    return _load(path, _as_targets(like), record), record.metadata


def restore_params(
    directory: Path, like: Params | None = None, *, step: int | None = None, ema: bool = False
) -> Params:
    """Returns the params alone, as NumPy arrays; the optimiser's state is not read.

    The EMA of frozen params is not saved, since it equals the params. Parts that are stored once
    for all steps are read too.

    Args:
      directory: folder of the steps, of a training or from `export_params`.
      like: params of the same structure to check against, and the parts to read; other saved
        parts (auxiliary heads) are not read. None reads everything, unchecked.
      step: step to read; None means the latest.
      ema: whether to read the EMA params instead of the params.

    Raises:
      FileNotFoundError: there is no such step.
      ValueError: there are no EMA params, the params do not fit `like`, or they are damaged.
    """
    path = _step_path(directory, step)
    field = "ema_params" if ema else "params"
    (stored, record), frozen = _stored(path), path.parent / _FROZEN
    tree, frozen_record = _stored(frozen) if frozen.exists() else ({}, None)
    parts = tree.get("params", {})
    saved, params = stored.get(field), stored["params"]
    if saved is None:
        raise ValueError(f"{path} holds no {field}; train with ema_decay, or read params.")
    if like is not None:
        saved, params, parts = (
            {part: tree[part] for part in like if part in tree} for tree in (saved, params, parts)
        )
        _check_same(parts | freezing.fill_none(saved, params), like, path)
    target = _as_numpy({"params": freezing.where_none(saved, params), field: saved})
    loaded = _load(path, target, record)
    unchanged = {}
    if parts and frozen_record:
        unchanged = _load(frozen, _as_numpy({"params": parts}), frozen_record)["params"]
    return unchanged | freezing.fill_none(loaded[field], loaded["params"])


def save_params(path: Path, params: Params) -> None:
    """Writes params alone, for `add_frozen`; the folder is complete or absent.

    With several processes all of them must call it.

    Args:
      path: folder to write, which does not exist.
      params: the same in every process; NumPy arrays if there are several.

    Raises:
      FileExistsError: the folder exists; another process may have written it in the meantime.
      OSError: the folder cannot be written.
    """
    path = pathlib.Path(path).absolute()
    with orbax_errors.quiet(), orbax_errors.new_folder(path):
        record = step_record.make({}, {"params": params}, None)
        _orbax().save(path, {"params": params}, custom_metadata=record)


def read_params(path: Path) -> Params:
    """Returns params from `save_params`, as NumPy arrays.

    Raises:
      ValueError: the files are damaged.
    """
    path = pathlib.Path(path).absolute()
    saved, record = _stored(path)
    return _load(path, _as_numpy(saved), record)["params"]


def add_frozen(directory: Path, path: Path) -> None:
    """Makes params from `save_params` a part of all steps; the files are linked where possible.

    Nothing is done if the steps have such a part already.

    Args:
      directory: folder of the steps.
      path: folder of the params.

    Raises:
      OSError: the folder cannot be written.
    """
    target = pathlib.Path(directory) / _FROZEN
    if not target.exists():
        with replacing(target) as part:
            shutil.copytree(path, part, copy_function=_link)


def export_params(
    directory: Path, target: Path, *, step: int | None = None, ema: bool = False
) -> pathlib.Path:
    """Writes a step's params and metadata to `target`, without the optimiser; returns the folder.

    `restore_params` and `read_metadata` can read `target` like a training's folder.

    Args:
      directory: folder of the steps.
      target: folder to write into.
      step: step to read; None means the latest.
      ema: whether to export the EMA params, as the params.

    Raises:
      FileNotFoundError: there is no such step.
      ValueError: there are no EMA params, or the checkpoint is damaged.
      FileExistsError: `target` already holds this step.
      OSError: `target` could not be written.
    """
    params = restore_params(directory, step=step, ema=ema)
    metadata = read_metadata(directory, step=step)
    path = pathlib.Path(target).absolute() / _step_path(directory, step).name
    if path.exists():
        raise FileExistsError(f"{path} exists already; choose another target.")
    with orbax_errors.one_sentence(path.parent):
        record = step_record.make(metadata, {"params": params}, int(path.name))
        _orbax().save(path, {"params": params}, custom_metadata=record)
    return path


def _orbax() -> Any:
    """Returns Orbax, imported on first use: 0.4 s that the refusal of a wrong option needs not."""
    from orbax.checkpoint import v1

    return v1


def _steps(directory: Path) -> list[int]:
    if not pathlib.Path(directory).is_dir():
        return []
    names = _orbax().path.step.standard_name_format()
    with orbax_errors.quiet():  # it reads the metadata of every step
        return sorted(step.step for step in names.find_all(pathlib.Path(directory).absolute()))


def _step_path(directory: Path, step: int | None) -> pathlib.Path:
    """Returns the folder of an existing step."""
    steps = _steps(directory)
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {directory}; train first, or give another.")
    step = steps[-1] if step is None else step
    if step not in steps:
        listed = ", ".join(map(str, steps))
        raise FileNotFoundError(f"no step {step} in {directory}; choose from {listed}.")
    return pathlib.Path(directory).absolute() / str(step)


def _stored(path: pathlib.Path) -> tuple[dict[str, Any], Record]:
    """Returns the saved tree, with shapes for arrays, and what is stored with them."""
    with orbax_errors.readable(path):
        stored: Any = _orbax().metadata(path)
        if not jax.tree.leaves(stored.metadata):
            raise ValueError("its list of arrays is broken")
        return stored.metadata, step_record.check(stored.custom_metadata, stored.metadata, path)


def _load(path: pathlib.Path, target: Any, record: Record) -> Any:
    """Returns the part of the saved tree that `target` has, its checksums compared."""
    context = _orbax().Context()
    context.pytree_options.loading.partial_load = True
    step_record.warn_if_unchecked(record, path)
    with orbax_errors.readable(path), context:
        loaded = _orbax().load(path, target)
        step_record.check_arrays(loaded, record)
        return loaded


def _as_numpy(tree: Any) -> Any:
    """Returns a target that makes Orbax return NumPy arrays, independent of the devices."""
    return jax.tree.map(lambda x: np.empty(x.shape, x.dtype), tree)


def _as_targets(tree: Any) -> Any:
    """Returns a target that makes Orbax return arrays on devices where a shape has a sharding."""

    def target(leaf: Any) -> Any:
        is_placed = isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None
        return leaf if is_placed else _as_numpy(leaf)

    return jax.tree.map(target, tree)


def _link(source: str, target: str) -> None:
    """Links a file, or copies it to another file system."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or no hard links
        shutil.copyfile(source, target)


def _check_same(saved: Any, like: Any, path: pathlib.Path) -> None:
    """Raises at the first leaf that differs (Orbax would cast another dtype silently)."""
    difference = trees.first_difference(saved, like)
    if difference:
        raise ValueError(
            f"{path} does not fit the policy: {difference}; use the config that it was saved with."
        )
