"""Record of a training in the checkpoints of a reinforcement learner: its config and its origin."""

import pathlib
import zlib
from dataclasses import replace
from typing import Any

from vla_jax import config as configs
from vla_jax.runs import Run
from vla_jax.training import checkpoint, checksums, resuming


def make(config: Any, initial: Run | None = None) -> dict[str, Any]:
    """Returns the metadata that every checkpoint of a training holds.

    Args:
      config: whole config of the script, with the fields `run_dir` and `overwrite`.
      initial: run of the policy that is fine-tuned; None = random params.
    """
    record: dict[str, Any] = {"config": configs.to_dict(config)}
    return record if initial is None else {**record, "initial": _identity(initial)}


def check(
    run_dir: pathlib.Path, folder: pathlib.Path, config: Any, initial: Run | None = None
) -> None:
    """Raises an error if the latest checkpoint is one of another training; writes nothing.

    Checkpoints of earlier versions hold no record, and are not compared.

    Args:
      run_dir: folder of the run.
      folder: holds `checkpoints`.
      config: as for `make`.
      initial: as for `make`.

    Raises:
      ValueError: the config differs in a field that may not change, or the run of the initial
        policy has been trained again.
    """
    step = checkpoint.latest_step(folder / "checkpoints")
    if config.overwrite or step is None:
        return
    saved = checkpoint.read_metadata(folder / "checkpoints")
    if "config" in saved:
        before = configs.from_dict(type(config), saved["config"])
        before = replace(before, run_dir=config.run_dir, overwrite=config.overwrite)
        resuming.check(before, config, run_dir, num_updates=step)
    if initial is not None and "initial" in saved:
        differing = configs.differences(saved["initial"], _identity(initial))
        if differing:
            raise ValueError(
                f"{initial.folder} must hold the policy with which {run_dir} was started, but "
                f"{'; '.join(differing)}; restore it, or add --overwrite to start again."
            )


def _identity(run: Run) -> dict[str, int]:
    """Returns the number of updates and a checksum of a policy."""
    sums = sorted(checksums.of_tree(run.params).items())
    return {"updates": run.step, "checksum": zlib.crc32(repr(sums).encode())}
