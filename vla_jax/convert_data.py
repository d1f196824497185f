"""Conversion of a data set of any format to LeRobot v3.0.

    python -m vla_jax.convert_data SRC DST
    python -m vla_jax.convert_data calvin/task_D_D demos/calvin --split training --num-workers 8
    python -m vla_jax.convert_data SRC DST --names obs/agentview_rgb observation.images.front

The same command continues an interrupted conversion, and then gives the same files. Numbers are
kept exactly (floats as float32, integers as int64); images are encoded with a small loss.
"""

import os
import pathlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from rich.console import Console

from vla_jax.command_line import exit_codes, parse
from vla_jax.config import LEAST_FLOAT, checked
from vla_jax.data.conversion.conversion_plan import make_plan
from vla_jax.data.conversion.conversion_run import Converted, convert
from vla_jax.data.readers.dataset_config import camera_option
from vla_jax.data.readers.fields import name_cameras
from vla_jax.data.readers.reader import open_source
from vla_jax.files import Path
from vla_jax.inspect_data import assumed_fields
from vla_jax.training.progress import progress_bar


@dataclass(frozen=True)
@checked(fps=(LEAST_FLOAT, 1e6))
class ConvertDataConfig:
    """Source and form of a conversion; None means as the reader proposes."""

    kind: str | None = None  # format of the source, a key of READERS; None = detect it
    split: str | None = None  # part of the data set, such as "train"; None = all episodes
    cameras: tuple[str, ...] = ()  # NAME=KEY of each camera, such as primary=observation.images.top
    num_workers: int | None = None  # processes that encode; None = one per core, 0 = none
    overwrite: bool = False  # replace DST, and an unfinished conversion of something else
    skip_bad_episodes: bool = False  # leave out and count episodes that cannot be read
    fps: float | None = None  # steps per second, Hz; None = that of the source
    action: tuple[str, ...] = ()  # columns of the action side by side, such as rel_actions
    proprio: tuple[str, ...] = ()  # columns of observation.state, such as state[:7]
    names: tuple[tuple[str, str], ...] = ()  # (column or camera of the source, name in LeRobot)
    rotate_images: bool | None = None  # rotate images by 180 degrees


def convert_data(
    source: Path,
    target: Path,
    config: ConvertDataConfig | None = None,
    *,
    console: Console | None = None,
) -> Converted:
    """Converts a data set; a warning names columns and episodes that are left out.

    Args:
      source: file or folder of the data set.
      target: folder to create.
      config: what to convert, and how.
      console: console for progress; None means stderr.

    Returns:
      The folder, and what is in it.

    Raises:
      FileNotFoundError: the source or one of its files is missing.
      FileExistsError: the target exists.
      ValueError: damaged data; unknown names; `target.tmp` holds another conversion.
      OSError: the disk is full.
      RuntimeError: a process was killed.
      ImportError: a package of the extra `data` is missing.
    """
    config = config or ConvertDataConfig()
    raw = open_source(pathlib.Path(source), config.kind, split=config.split)
    fields = name_cameras(assumed_fields(raw), raw, dict(map(camera_option, config.cameras)))
    chosen = {"action": config.action, "proprio": config.proprio}
    columns = {**fields.columns, **{name: keys for name, keys in chosen.items() if keys}}
    rotate = fields.rotate_images if config.rotate_images is None else config.rotate_images
    fields = fields._replace(columns=columns, rotate_images=rotate)
    plan = make_plan(raw, fields, fps=config.fps, names=dict(config.names))
    if plan.omitted:
        warnings.warn(
            f"columns that LeRobot cannot hold are left out: {', '.join(plan.omitted)}",
            stacklevel=2,
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = (cores or 1) if config.num_workers is None else config.num_workers
    total = int(raw.lengths.sum())
    with progress_bar(pathlib.Path(target).name, total, unit="frames", console=console) as show:
        converted = convert(
            raw,
            pathlib.Path(target),
            plan,
            num_workers=workers,
            skip_bad=config.skip_bad_episodes,
            overwrite=config.overwrite,
            show=show,
        )
    if converted.num_shifted and raw.fps:
        warnings.warn(
            f"timestamps of {converted.num_shifted} episodes differ from steps / {plan.fps:g} Hz; "
            "the converted ones are steps / fps.",
            stacklevel=2,
        )
    if converted.bad:
        index, sentence = next(iter(converted.bad.items()))
        warnings.warn(
            f"{len(converted.bad)} of {len(raw.lengths)} episodes are left out; episode {index}: "
            f"{sentence}",
            stacklevel=2,
        )
    return converted


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command with arguments from the command line; exit codes are in `command_line`."""
    import tyro

    def arguments(
        source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")],
        target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")],
        config: Annotated[ConvertDataConfig, tyro.conf.arg(name="")] = ConvertDataConfig(),
    ) -> tuple[str, str, ConvertDataConfig]:
        """Converts a data set of any format to LeRobot v3.0.

        Args:
          source: file or folder of the data set.
          target: folder to create.
          config: what to convert, and how.
        """
        return source, target, config

    with exit_codes():
        source, target, config = parse(arguments, argv, prog="python -m vla_jax.convert_data")
        converted = convert_data(source, target, config)
        print(f"{converted.root}: {converted.num_episodes} episodes, {converted.num_frames} frames")


if __name__ == "__main__":
    main()
