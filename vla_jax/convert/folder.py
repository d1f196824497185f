"""A converted checkpoint as a folder, from which the foreign file can be restored.

decoder.json           config of the decoder (of a torch.nn recurrence: recurrence.json)
0/                     its params, as `checkpoint.restore_params` reads them
conversion.json        the report; names, order and dtypes of the foreign tensors
left_over.safetensors  tensors that have no counterpart in the params

A whole policy becomes a run folder (see `runs`) with the last two files.
"""

import pathlib
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from vla_jax import config as configs
from vla_jax import records
from vla_jax.acting.agent import AgentConfig
from vla_jax.convert import conversion_report, weight_files
from vla_jax.convert.conversion_report import Report, abbreviate
from vla_jax.convert.converters import CONVERTERS, Conversion, kind_of_config
from vla_jax.convert.weight_files import Path, TensorFile
from vla_jax.data.normalize import NormStats
from vla_jax.files import read_json, replacing, write_json
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.training import checkpoint
from vla_jax.types import Params


class _Source(NamedTuple):
    """The foreign file, apart from its tensors, in `conversion.json`."""

    dtypes: dict[str, str]  # name -> dtype of its tensors, in its order
    prefix: str  # of the names of a recurrence
    container: str  # the next three as in `TensorFile`
    metadata: dict[str, str]
    wrapped: dict[str, str] | None = None  # absent in earlier versions


class _Record(NamedTuple):
    """Content of `conversion.json`."""

    source: _Source
    report: Any = None  # for the reader


_CONVERSION, _LEFT_OVER = "conversion.json", "left_over.safetensors"


def is_folder(path: Path) -> bool:
    """Returns True if `path` is a folder that `write_folder` wrote."""
    return (pathlib.Path(path) / _CONVERSION).is_file()


def check_target(folder: Path, *, overwrite: bool) -> None:
    """Raises a FileExistsError unless a conversion may be written to `folder`.

    Args:
      folder: folder to create.
      overwrite: True if an earlier conversion there, and nothing else, may be replaced.
    """
    if pathlib.Path(folder).exists() and not (overwrite and is_folder(folder)):
        reason = "" if is_folder(folder) else " and is not an earlier conversion"
        remedy = "choose another name, or --overwrite" if not reason else "choose another name"
        raise FileExistsError(f"{folder} exists already{reason}; {remedy}.")


def write_folder(
    folder: Path,
    source: TensorFile,
    config: DecoderConfig | RecurrenceConfig | AgentConfig,
    params: Params,
    report: Report,
    *,
    norm_stats: Mapping[str, NormStats] | None = None,
    prefix: str = "",
    overwrite: bool = False,
) -> None:
    """Writes a conversion atomically: completely or not at all.

    Args:
      folder: folder to create.
      source: the foreign file.
      config: of the decoder, of the recurrence, or of the agent of a whole policy.
      params: of the same.
      report: of the conversion.
      norm_stats: statistics of the actions, for an agent only.
      prefix: prefix of the names of a recurrence in the foreign file.
      overwrite: True if an earlier conversion in `folder` may be replaced.

    Raises:
      FileExistsError: `folder` exists, and `overwrite` is False or it is not a conversion.
      OSError: it cannot be written.
      TypeError: `config` is of another class.
    """
    folder = pathlib.Path(folder)
    check_target(folder, overwrite=overwrite)
    with replacing(folder) as part:
        part.mkdir()
        _fill(part, source, Conversion(config, params, report, norm_stats or {}), prefix)


def read_params(folder: Path) -> tuple[DecoderConfig, Params]:
    """Returns the config and the params, as NumPy arrays, of a converted head.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged.
    """
    return _read(folder, "decoder")


def read_recurrence(folder: Path) -> tuple[RecurrenceConfig, Params]:
    """Returns the config and the params, as NumPy arrays, of a converted `torch.nn` recurrence.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged.
    """
    return _read(folder, "recurrence")


def read_folder(folder: Path) -> TensorFile:
    """Returns the foreign file with the current params of the folder.

    Tensors that were missing from the foreign file come last. One warning names the tensors that
    have been trained since and are rounded to the file's dtype.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged.
    """
    path = pathlib.Path(folder) / _CONVERSION
    try:
        record = records.read(_Record, read_json(path, "a record of a conversion"))
        source = record.source
        dtypes = {name: np.dtype(dtype) for name, dtype in source.dtypes.items()}
    except (ValueError, TypeError) as error:  # the second: not a dtype
        raise ValueError(f"{path} is damaged ({error}); convert the file again.") from error
    left_over = pathlib.Path(folder) / _LEFT_OVER
    others = dict(weight_files.read(left_over).tensors) if left_over.is_file() else {}
    names = [name for name in dtypes if name not in others]
    kind = _kind_of_folder(folder)
    converted = CONVERTERS[kind].to_tensors(*_read(folder, kind), names, source.prefix)
    if lacking := [name for name in names if name not in converted]:
        raise ValueError(
            f"{path} is damaged (it names {abbreviate(lacking)}, which the params lack); convert "
            "the file again."
        )
    with np.errstate(over="ignore"):  # overflow is reported below, in one warning
        cast = {
            n: array.astype(dtypes.get(n, np.dtype("float32")), copy=False)
            for n, array in converted.items()
        }
    _warn_rounded(converted, cast)
    tensors = {name: others[name] if name in others else cast.pop(name) for name in dtypes}
    in_file = source.wrapped or {}
    restored = {in_file.get(name, name): array for name, array in {**tensors, **cast}.items()}
    return TensorFile(restored, source.container, metadata=source.metadata)


def _kind_of_folder(folder: Path) -> str:
    for kind in CONVERTERS:
        if (pathlib.Path(folder) / f"{kind}.json").is_file():
            return kind
    files = " or ".join(f"{kind}.json" for kind in CONVERTERS)
    raise FileNotFoundError(f"{folder} must contain {files}, got neither; convert the file again.")


def _read(folder: Path, kind: str) -> tuple[Any, Params]:
    converter = CONVERTERS[kind]
    config = configs.load(converter.config_class, pathlib.Path(folder) / f"{kind}.json")
    return config, converter.restore(pathlib.Path(folder) / converter.checkpoints, config)


def _warn_rounded(exact: Mapping[str, np.ndarray], cast: Mapping[str, np.ndarray]) -> None:
    rounded = {
        name: cast[name].dtype.name
        for name, array in exact.items()
        if not np.array_equal(cast[name].astype(array.dtype), array, equal_nan=True)
    }
    if rounded:
        dtypes = ", ".join(sorted(set(rounded.values())))
        warnings.warn(
            f"{len(rounded)} tensors are rounded to the file's {dtypes}: "
            f"{abbreviate(list(rounded))}; `read_params` returns them in float32",
            stacklevel=3,
        )


def _fill(
    folder: pathlib.Path,
    source: TensorFile,
    conversion: Conversion,
    prefix: str,
) -> None:
    config, params, report, _ = conversion
    kind = kind_of_config(config)
    converter = CONVERTERS[kind]
    metadata = converter.save(folder, kind, conversion)
    unused = {*report.left_over, *report.buffers}
    others = {name: array for name, array in source.tensors.items() if name in unused}
    if others:
        weight_files.write(folder / _LEFT_OVER, TensorFile(others))
    record = {
        "source": {
            "dtypes": {name: array.dtype.name for name, array in source.tensors.items()},
            "prefix": prefix,
            "container": source.container,
            "metadata": dict(source.metadata),
            "wrapped": dict(source.wrapped),
        },
        "report": conversion_report.to_json(report),
    }
    write_json(folder / _CONVERSION, record)
    saver = checkpoint.open_checkpoints(folder / converter.checkpoints, keep=1)
    checkpoint.save(saver, 0, {"params": params}, metadata)
    checkpoint.close(saver)
