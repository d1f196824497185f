"""Resuming a run: the options that may change, and the ones that are refused.

A config class lists in `MAY_CHANGE` its fields that change neither batches nor arithmetic, or only
as a user wants on purpose, such as the length of the training. The config of a script takes some
back with `MAY_NOT_CHANGE`, dotted paths of fields of its parts. The learning rate may be lowered.
If more than the learning rate depends on the length of the training, or if an update takes several
optimiser steps, the config has a method `scheduled(updates done) -> name -> value of the next one`.
"""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from vla_jax import config as configs
from vla_jax.training import checkpoint, optim, parallel


def check(saved: Any, config: Any, folder: pathlib.Path, *, num_updates: int) -> list[str]:
    """Checks that a config may resume the run of another one; returns what to tell the user.

    Args:
      saved: config of the run.
      config: the present one, of the same class.
      folder: folder of the run, for the message.
      num_updates: updates that the latest checkpoint has done.

    Returns:
      A sentence for each change that has a consequence.

    Raises:
      ValueError: the configs differ in a field that may not change.
    """
    before, now = configs.to_dict(saved), configs.to_dict(config)
    free = set(may_change(config))
    for path in free:
        _copy(path, now, before)
    loop, rate = getattr(saved, "loop", None), getattr(saved, "optim", None)
    if rate is not None and config.optim.learning_rate < rate.learning_rate:
        _copy("optim.learning_rate", now, before)
    differing = configs.differences(before, now)
    if differing:
        raise ValueError(
            f"{folder} holds a run of another config: {'; '.join(differing)}; choose another "
            "--run-dir, restore those options, or add --overwrite to start again."
        )
    if loop is None or "loop.num_updates" not in free:
        return []
    if config.loop.num_updates < min(num_updates, loop.num_updates):
        raise ValueError(
            f"num_updates must be at least {num_updates}, which {folder} has done, got "
            f"{config.loop.num_updates}; choose another --run-dir, or add --overwrite."
        )
    return _schedule_change(saved, config, num_updates)


def common_step(directory: pathlib.Path) -> int | None:
    """Returns the latest step, from which all processes resume; None if there is none.

    A process that sees a network disk as it was some time ago would resume from another one.

    Args:
      directory: folder of the steps.

    Raises:
      ValueError: this process does not see what the first one sees.
    """
    own = checkpoint.latest_step(directory)
    found = [] if own is None else [own]
    first = parallel.agree(found)
    if found != first:
        here, there = (steps[0] if steps else "none" for steps in (found, first))
        raise ValueError(
            f"all processes must see the same latest step in {directory}, got {here} in process "
            f"{jax.process_index()} and {there} in the first; put the run on a disk that they "
            "share, or start again a minute later."
        )
    return own


def may_change(config: Any) -> Iterator[str]:
    """Yields the dotted paths of the fields that may change when a run is resumed.

    Args:
      config: config of a script.
    """
    kept = getattr(type(config), "MAY_NOT_CHANGE", ())
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            inner = (f"{field.name}.{path}" for path in may_change(value))
            yield from (path for path in inner if path not in kept)
    yield from getattr(type(config), "MAY_CHANGE", ())


def scheduled(config: Any, done: float) -> dict[str, float]:
    """Returns what the next update uses that depends on the length of the training, by name.

    Args:
      config: config of a script, with `optim` and `loop`.
      done: updates so far.
    """
    if hasattr(config, "scheduled"):
        return config.scheduled(done)
    return {"learning_rate": optim.learning_rate(config.optim, config.loop.num_updates, done)}


def _copy(path: str, source: Any, target: Any) -> None:
    *parts, name = path.split(".")
    for part in parts:
        if not isinstance(target.get(part), dict):  # another member of a union
            return
        source, target = source[part], target[part]
    target[name] = source[name]


def _schedule_change(saved: Any, config: Any, num_updates: int) -> list[str]:
    """Returns a sentence if the next updates follow another schedule than before."""
    before, now = (
        {"loop": {"num_updates": each.loop.num_updates}}
        | {"optim": {"learning_rate": each.optim.learning_rate}}
        for each in (saved, config)
    )
    changes = configs.differences(before, now)
    if not changes or num_updates >= config.loop.num_updates:
        return []
    old, new = (scheduled(each, num_updates) for each in (saved, config))
    values = (
        f"{name} {new[name]:.3g} instead of {old[name]:.3g}"
        for name in new
        if new[name] != old[name]
    )
    return [
        f"{'; '.join(changes)}: from update {num_updates + 1} on the training follows the new "
        f"schedule, which starts with {', '.join(values) or 'the same values'}."
    ]
