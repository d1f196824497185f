"""Opening a run folder: only a new one, or one that the same script has made."""

import dataclasses
import pathlib
from typing import Any

from vla_jax import config as configs
from vla_jax.files import read_json
from vla_jax.training import resuming, run_lock

# Besides hidden files: parts that killed processes left, and the logs of a scheduler.
_HARMLESS = (".part", ".out", ".err", ".log")


def check(path: pathlib.Path, config: Any, *, overwrite: bool, mark: str = "") -> list[str]:
    """Checks that a run folder may be opened; returns the consequences of changed options.

    Args:
      path: the folder.
      config: whole config of the script.
      overwrite: whether an earlier run in the folder may be deleted.
      mark: file of folders of an earlier version, which had no `config.json`.

    Raises:
      ValueError: the folder holds a run of another config or script, or something else.
      OSError: the folder cannot be written.
    """
    run_lock.check_writable(path)
    file = path / "config.json"
    others = _others(path)
    is_earlier = mark in others and not file.exists()
    if overwrite:
        if is_earlier:  # it may hold anything else, which the run did not write
            raise ValueError(
                f"{path} is that of an earlier version, which wrote no config.json; delete it "
                "yourself, or continue it without --overwrite."
            )
        if others:
            _check_deletable(path, config)
        return []
    if not file.exists():
        if is_earlier:
            return [f"{path} has no config.json; {mark} is taken for that of an earlier version."]
        if others:
            raise ValueError(
                f"{path} must be a new folder or that of a run, but it has no config.json and "
                f"holds {', '.join(others[:3])}; choose another --run-dir."
            )
        return []
    saved, done = _load(path, config), _updates_done(path)
    if done is None:
        return []
    kept = [each.name for each in dataclasses.fields(config)]
    not_compared = {n: getattr(config, n) for n in ("run_dir", "overwrite") if n in kept}
    saved = dataclasses.replace(saved, **not_compared)
    return resuming.check(saved, config, path, num_updates=done)


def contents(path: pathlib.Path) -> list[pathlib.Path]:
    """Returns what is in a run folder, besides its lock; nothing if there is no folder."""
    return [each for each in path.iterdir() if each.name != run_lock.NAME] if path.is_dir() else []


def _load(path: pathlib.Path, config: Any) -> Any:
    """Returns the config of a run folder; the error about an older one says how to begin again."""
    file = path / "config.json"
    try:
        return configs.load(type(config), file)
    except ValueError as error:
        if read_json(file, "the config of a run").get(configs.CLASS) != type(config).__name__:
            raise
        raise ValueError(
            f"{error} An earlier version may have written it; choose another --run-dir, or delete "
            "the run with --overwrite."
        ) from error


def _check_deletable(path: pathlib.Path, config: Any) -> None:
    """Raises a ValueError unless a folder holds a run of the same script."""
    file = path / "config.json"
    saved = read_json(file, "the config of a run") if file.is_file() else {}
    if "run_dir" not in saved:  # nothing, or the config of a model
        raise ValueError(
            f"{path} is not a run folder (no config.json of a run); delete it yourself."
        )
    cls = type(config)
    writer = saved.pop(configs.CLASS, None)
    if writer is not None and writer != cls.__name__:
        raise ValueError(
            f"{path} must hold a run of the same script to be deleted, but its config.json is the "
            f"{writer} of another one; choose another --run-dir, or delete it yourself."
        )
    # Earlier versions wrote no class. Of other scripts the fields differ, but one that is absent
    # may also have been added since.
    names = {field.name for field in dataclasses.fields(config)}
    found = getattr(cls, "upgrade", dict)(saved).keys()
    differing = [*sorted(found - names), *sorted(names - found)]
    if writer is None and differing:
        raise ValueError(
            f"{path} must hold a run of the same script to be deleted, but its config.json, of an "
            "earlier version, may be that of another one: it differs in "
            f"{', '.join(differing[:3])}; choose another --run-dir, or delete it yourself."
        )


def _others(path: pathlib.Path) -> list[str]:
    """Returns what is in a folder besides harmless files."""
    names = [each.name for each in contents(path) if each.suffix not in _HARMLESS]
    return sorted(name for name in names if not name.startswith("."))


def _updates_done(path: pathlib.Path) -> int | None:
    """Returns the updates of the latest checkpoint, of any training in a run folder."""
    names = (each.name for each in (*path.glob("checkpoints/*"), *path.glob("*/checkpoints/*")))
    return max((int(name) for name in names if name.isdecimal()), default=None)
