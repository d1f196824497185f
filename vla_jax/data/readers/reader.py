"""Registry of the data-set readers, and the function that chooses one.

A reader is a file or folder next to this one, and an entry of `READERS`.
"""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from vla_jax.config import did_you_mean
from vla_jax.data.dataset import Dataset
from vla_jax.data.raw import RawDataset
from vla_jax.data.readers.calvin import calvin
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.data.readers.field_columns import field_names, parse_key
from vla_jax.data.readers.fields import FieldMap, choose_fields
from vla_jax.data.readers.grippers import make_layout
from vla_jax.data.readers.hdf5 import aloha, isaac_lab, libero, robomimic, robomme
from vla_jax.data.readers.lerobot.lerobot_fields import suggest_fields
from vla_jax.data.readers.lerobot.lerobot_source import open_lerobot, probe_v2, probe_v3
from vla_jax.data.readers.rlds import rlds
from vla_jax.data.readers.training_data import make_dataset
from vla_jax.types import Resampling


class Open(Protocol):
    """Signature of a reader's `open`."""

    def __call__(self, path: pathlib.Path, *, split: str | None) -> RawDataset:
        """Opens the raw view of a data set; arguments as in `open_source`."""
        ...


class Reader(NamedTuple):
    """One data-set format."""

    probe: Callable[[pathlib.Path], bool]  # True if the path holds this format; cheap, no errors
    open: Open
    fields: Callable[[RawDataset], FieldMap]  # proposes what becomes which field of a `Dataset`


READERS: dict[str, Reader] = {
    "lerobot_v3": Reader(probe_v3, open_lerobot, suggest_fields),
    "lerobot_v2": Reader(probe_v2, open_lerobot, suggest_fields),
    "aloha": Reader(aloha.probe, aloha.open, aloha.fields),
    "calvin": Reader(calvin.probe, calvin.open, calvin.fields),
    "isaac_lab": Reader(isaac_lab.probe, isaac_lab.open, isaac_lab.fields),
    "libero": Reader(libero.probe, libero.open, libero.fields),
    "robomimic": Reader(robomimic.probe, robomimic.open, robomimic.fields),
    "robomme": Reader(robomme.probe, robomme.open, robomme.fields),
    "rlds": Reader(rlds.probe, rlds.open, rlds.fields),
}


def open_source(
    path: str | pathlib.Path, kind: str | None = None, *, split: str | None = None
) -> RawDataset:
    """Opens a data set as the original tool would read it; `vla_jax.data.readers.open`.

    Args:
      path: file or folder.
      kind: key of `READERS`; None uses the reader whose `probe` accepts the path.
      split: part of the data set, such as "train" or a filter key; None means all episodes.

    Returns:
      The raw view; numbers and images are read when they are indexed.

    Raises:
      FileNotFoundError: the path is missing, or a file of the data set.
      ValueError: unknown kind or split; no reader or several readers accept the path; damaged
        descriptions or indices.
      ImportError: a package of the extra `data` is missing.
    """
    path = pathlib.Path(path)
    reader = find_reader(DatasetConfig(str(path), kind=kind))
    return reader.open(path, split=split)


def read_dataset(
    config: DatasetConfig,
    *,
    cameras: Sequence[str] | None = None,
    image_size: tuple[int, int] | None = None,
    resampling: Resampling = "area",
    partial: bool = False,
) -> Dataset:
    """Reads a data set of any format for training.

    Args:
      config: path and format. Where `kind` is None, the reader whose `probe` accepts the path
        is used.
      cameras: image fields to read; None means all that the data set has, () means none.
      image_size: (h, w) in pixels to resize to; None keeps the size on disk.
      resampling: how to resize.
      partial: some of the `cameras` may be missing, but not all.

    Returns:
      The data set.

    Raises:
      FileNotFoundError: the path is missing, or a file of the data set.
      ValueError: unknown kind; no reader or several readers accept the path; damaged data.
    """
    reader = find_reader(config)
    raw = reader.open(pathlib.Path(config.path), split=config.split)
    return make_dataset(
        raw,
        reader.fields(raw),
        config,
        cameras=cameras,
        image_size=image_size,
        resampling=resampling,
        partial=partial,
    )


def action_dim(config: DatasetConfig) -> int | None:
    """Returns the numbers of an action for training, gripper included, without reading any data.

    Returns:
      A; None if the descriptions of the data set leave it open.

    Raises:
      FileNotFoundError: the path is missing, or a file of the data set.
      ValueError: unknown kind; no reader or several readers accept the path; damaged descriptions.
    """
    reader = find_reader(config)
    raw = reader.open(pathlib.Path(config.path), split=config.split)
    fields = choose_fields(reader.fields(raw), raw, config)
    keys = fields.columns["action"]
    if any(min(raw.columns[parse_key(key, raw.columns)[0]].shape, default=1) < 0 for key in keys):
        return None
    return make_layout(fields, len(field_names(raw.columns, keys))).size


def find_reader(config: DatasetConfig) -> Reader:
    """Returns the reader of a data set, without reading any data.

    Raises:
      FileNotFoundError: the path is missing.
      ValueError: unknown kind; no reader or several readers accept the path.
    """
    path = pathlib.Path(config.path)
    if config.kind is not None and config.kind not in READERS:
        raise ValueError(
            f"unknown dataset.kind '{config.kind}'; {did_you_mean(config.kind, READERS)}"
        )
    if not os.path.exists(path):  # False, not an error, for a name that is too long
        partial = path.with_name(path.name + ".tmp")  # folder of an unfinished recording
        remedy = (
            f"its recording was interrupted ({partial} remains), record it again"
            if os.path.exists(partial)
            else "record it first or give another path"
        )
        raise FileNotFoundError(f"data set {path} is missing; {remedy}.")
    return READERS[config.kind or detect_kind(path)]


def detect_kind(path: pathlib.Path) -> str:
    """Returns the kind of the one reader that accepts the path.

    Raises:
      ValueError: no reader or several readers accept it.
    """
    kinds = [kind for kind, reader in READERS.items() if reader.probe(path)]
    if not kinds:
        raise ValueError(
            f"no reader recognises the data set {path} (readers: {', '.join(READERS)}); give "
            "dataset.kind to see which part of that format is missing, or convert the data."
        )
    if len(kinds) > 1:
        raise ValueError(
            f"the data set {path} is recognised by several readers ({', '.join(kinds)}); choose "
            "one with dataset.kind."
        )
    return kinds[0]
