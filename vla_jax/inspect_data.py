"""Inspection of a data set: what it is, what a training would read, and what looks wrong.

    python -m vla_jax.inspect_data PATH
    python -m vla_jax.inspect_data PATH --html page.html
    python -m vla_jax.inspect_data PATH --json > inspection.json
    python -m vla_jax.inspect_data PATH --num-episodes 200 --out inspection

Every format that a reader of `READERS` opens. Episodes are read one at a time, so memory does not
grow with the data.
"""

import json
import pathlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from rich.console import Console

from vla_jax.command_line import exit_codes, parse
from vla_jax.config import checked
from vla_jax.data.inspection.inspection_json import to_json
from vla_jax.data.inspection.survey import Survey, survey
from vla_jax.data.raw import RawDataset
from vla_jax.data.readers.dataset_config import camera_option
from vla_jax.data.readers.fields import FieldMap, name_cameras
from vla_jax.data.readers.reader import READERS, open_source
from vla_jax.evaluation import data_page, data_tables
from vla_jax.files import Path, write_json
from vla_jax.training.progress import progress_bar

_WIDTH = 100  # columns of the tables in a file


@dataclass(frozen=True)
@checked()
class InspectConfig:
    """Data to inspect, and where the results go."""

    kind: str | None = None  # format, a key of READERS such as "rlds"; None = detect it
    split: str | None = None  # part of the data set, such as "train"; None = all episodes
    cameras: tuple[str, ...] = ()  # NAME=KEY of each camera, such as primary=observation.images.top
    num_episodes: int | None = None  # episodes to read, at equal distances; None = all
    num_sampled: int = 8  # episodes of which frames are decoded, at equal distances
    num_frames: int = 12  # frames to decode per camera in each of these episodes
    json: bool = False  # print one JSON object instead of tables
    html: str | None = None  # HTML file to write, with tables, frames and plots inside
    out: str | None = None  # folder to write index.html and inspection.json into

    def __post_init__(self) -> None:
        """Checks the counts."""
        for name, least in (("num_episodes", 1), ("num_sampled", 0), ("num_frames", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")


class Inspection(NamedTuple):
    """Result of `inspect_data`."""

    survey: Survey
    report: dict[str, Any]  # the same as JSON values
    pages: tuple[pathlib.Path, ...]  # HTML files that were written


def inspect_data(
    path: Path, config: InspectConfig | None = None, *, console: Console | None = None
) -> Inspection:
    """Reads a data set once and reports what it holds.

    Args:
      path: file or folder of the data set.
      config: what to read and to write.
      console: console for progress; None means stderr.

    Returns:
      The survey, the report, and the pages written.

    Raises:
      FileNotFoundError: the data set or one of its files is missing.
      ValueError: no reader opens it, its description is damaged, or no episode can be read.
      ImportError: a package of the extra `data` is missing.
    """
    config = config or InspectConfig()
    raw = open_source(pathlib.Path(path), config.kind, split=config.split)
    fields = name_cameras(assumed_fields(raw), raw, dict(map(camera_option, config.cameras)))
    total = min(len(raw.lengths), config.num_episodes or len(raw.lengths))
    with progress_bar(raw.path.name, total, unit="episodes", console=console) as show:
        result = survey(
            raw,
            fields,
            num_episodes=config.num_episodes,
            num_sampled=config.num_sampled,
            num_frames=config.num_frames,
            show=show,
        )
    report = to_json(result)
    pages = [pathlib.Path(config.html)] if config.html else []
    if config.out:
        write_json(pathlib.Path(config.out) / "inspection.json", report)
        pages.append(pathlib.Path(config.out) / "index.html")
    for page in pages:
        data_page.write_page(page, result, report)
    return Inspection(result, report, tuple(pages))


def assumed_fields(raw: RawDataset) -> FieldMap:
    """Returns the fields that the reader proposes; none, with a warning, if it cannot."""
    propose = READERS[raw.kind].fields
    if propose is None:
        return FieldMap()
    try:
        return propose(raw)
    except ValueError as error:
        warnings.warn(f"the reader proposes no fields: {error}", stacklevel=2)
        return FieldMap()


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command with arguments from the command line; exit codes are in `command_line`."""
    import tyro

    def arguments(
        path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")],
        config: Annotated[InspectConfig, tyro.conf.arg(name="")] = InspectConfig(),
    ) -> tuple[str, InspectConfig]:
        """Shows what a data set holds, what a training would read, and what looks wrong.

        Args:
          path: file or folder of the data set.
          config: what to read and to write.
        """
        return path, config

    with exit_codes():
        path, config = parse(arguments, argv, prog="python -m vla_jax.inspect_data")
        found = inspect_data(path, config)
        if config.json:
            print(json.dumps(found.report))
            return
        terminal = Console()
        console = terminal if terminal.is_terminal else Console(width=_WIDTH)
        console.print(data_tables.tables(found.report))
        for page in found.pages:
            print(page)


if __name__ == "__main__":
    main()
