"""A converted checkpoint as a folder, from which the foreign file can be made again.

decoder.json           config of the decoder
0/                     its params, as `checkpoint.restore_params` reads them
conversion.json        the report; names, order and dtypes of the foreign tensors
left_over.safetensors  the tensors that the params have no place for
"""

import json
import os
import pathlib
import shutil

import jax
import numpy as np

from vla_jax import checkpoint, decoders
from vla_jax import config as configs
from vla_jax.convert import files, report
from vla_jax.convert.files import Path, TensorFile
from vla_jax.convert.report import Report
from vla_jax.convert.robovlms import to_robovlms
from vla_jax.convert.robovlms_names import HEAD, head_name, prefix_of
from vla_jax.decoders import DecoderConfig
from vla_jax.types import Params

_DECODER, _CONVERSION, _LEFT_OVER = "decoder.json", "conversion.json", "left_over.safetensors"


def is_folder(path: Path) -> bool:
    """Whether `write_folder` made this."""
    return (pathlib.Path(path) / _CONVERSION).is_file()


def check_target(folder: Path, *, overwrite: bool) -> None:
    """Raises a FileExistsError unless a conversion may be written to `folder`.

    Args:
      folder: to make.
      overwrite: whether an earlier conversion there, and nothing else, may be replaced.
    """
    if pathlib.Path(folder).exists() and not (overwrite and is_folder(folder)):
        remedy = "or --overwrite" if is_folder(folder) else "it is no conversion to overwrite"
        raise FileExistsError(f"{folder} is there already; choose another name, {remedy}.")


def write_folder(
    folder: Path,
    source: TensorFile,
    config: DecoderConfig,
    params: Params,
    told: Report,
    *,
    overwrite: bool = False,
) -> None:
    """Writes a conversion, whole or not at all.

    Args:
      folder: to make.
      source: the foreign file.
      config: of the decoder.
      params: of the decoder.
      told: what became of the tensors.
      overwrite: whether an earlier conversion in `folder` may be replaced.

    Raises:
      FileExistsError: `folder` is there, and `overwrite` is False or it is no conversion.
      OSError: it cannot be written.
    """
    folder = pathlib.Path(folder)
    check_target(folder, overwrite=overwrite)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        _fill(part, source, config, params, told)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(part, folder)  # a kill before this must not leave half a conversion
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_params(folder: Path) -> tuple[DecoderConfig, Params]:
    """Returns the config and the params, in NumPy arrays, of a conversion.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged.
    """
    config = configs.load(DecoderConfig, pathlib.Path(folder) / _DECODER)
    like = jax.eval_shape(lambda key: decoders.init(key, config), jax.random.key(0))
    return config, checkpoint.restore_params(folder, like)


def read_folder(folder: Path) -> TensorFile:
    """Returns the foreign file again, with the params that the folder holds now.

    What was missing in it and drawn comes last.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged.
    """
    path = pathlib.Path(folder) / _CONVERSION
    try:
        source = json.loads(path.read_text(encoding="utf-8"))["source"]
        dtypes, container, metadata = (source[n] for n in ("dtypes", "container", "metadata"))
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); convert the file again.") from error
    left_over = pathlib.Path(folder) / _LEFT_OVER
    others = dict(files.read(left_over).tensors) if left_over.is_file() else {}
    head = to_robovlms(*read_params(folder))
    tensors = {}
    for name, dtype in dtypes.items():
        own = others[name] if name in others else head.pop(head_name(name))
        tensors[name] = own.astype(np.dtype(dtype), copy=False)
    prefix = next((prefix_of(name) for name in dtypes if name not in others), HEAD)
    drawn = {prefix + name.removeprefix(HEAD): array for name, array in head.items()}
    return TensorFile({**tensors, **drawn}, container, metadata=metadata)


def _fill(
    folder: pathlib.Path, source: TensorFile, config: DecoderConfig, params: Params, told: Report
) -> None:
    configs.save(config, folder / _DECODER)
    unused = {*told.left_over, *told.buffers}
    others = {name: array for name, array in source.tensors.items() if name in unused}
    if others:
        files.write(folder / _LEFT_OVER, TensorFile(others))
    conversion = {
        "source": {
            "dtypes": {name: array.dtype.name for name, array in source.tensors.items()},
            "container": source.container,
            "metadata": dict(source.metadata),
        },
        "report": report.to_json(told),
    }
    text = json.dumps(conversion, indent=2) + "\n"
    (folder / _CONVERSION).write_text(text, encoding="utf-8")
    saver = checkpoint.open_checkpoints(folder, keep=1)
    checkpoint.save(saver, 0, {"params": params}, {"decoder": configs.to_dict(config)})
    checkpoint.close(saver)
