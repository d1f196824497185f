"""A converted checkpoint as a folder, from which the foreign file can be made again.

decoder.json           config of the decoder (of a torch.nn recurrence: recurrence.json)
0/                     its params, as `checkpoint.restore_params` reads them
conversion.json        the report; names, order and dtypes of the foreign tensors
left_over.safetensors  the tensors that the params have no place for
"""

import json
import pathlib
import warnings
from collections.abc import Collection, Mapping

import jax
import numpy as np

from vla_jax import config as configs
from vla_jax.convert import conversion_report, weight_files
from vla_jax.convert.conversion_report import Report, listed
from vla_jax.convert.robovlms.checkpoints import to_robovlms
from vla_jax.convert.robovlms.key_names import HEAD, head_name, prefix_of
from vla_jax.convert.sizes import check_params
from vla_jax.convert.torch_rnn import to_torch
from vla_jax.convert.weight_files import Path, TensorFile
from vla_jax.files import replacing, write_json
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.policies import decoders
from vla_jax.policies.decoders import DecoderConfig
from vla_jax.training import checkpoint
from vla_jax.types import Params

_DECODER, _RECURRENCE = "decoder.json", "recurrence.json"
_CONVERSION, _LEFT_OVER = "conversion.json", "left_over.safetensors"


def is_folder(path: Path) -> bool:
    """Whether `write_folder` made this."""
    return (pathlib.Path(path) / _CONVERSION).is_file()


def is_recurrence(folder: Path) -> bool:
    """Whether a conversion is of a `torch.nn` recurrence, and not of a policy head."""
    return (pathlib.Path(folder) / _RECURRENCE).is_file()


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
    config: DecoderConfig | RecurrenceConfig,
    params: Params,
    told: Report,
    *,
    prefix: str = "",
    overwrite: bool = False,
) -> None:
    """Writes a conversion, whole or not at all.

    Args:
      folder: to make.
      source: the foreign file.
      config: of the decoder, or of the recurrence.
      params: of the same.
      told: what became of the tensors.
      prefix: what stands before the names of a recurrence.
      overwrite: whether an earlier conversion in `folder` may be replaced.

    Raises:
      FileExistsError: `folder` is there, and `overwrite` is False or it is no conversion.
      OSError: it cannot be written.
    """
    folder = pathlib.Path(folder)
    check_target(folder, overwrite=overwrite)
    with replacing(folder) as part:
        part.mkdir()
        _fill(part, source, config, params, told, prefix)


def read_params(folder: Path) -> tuple[DecoderConfig, Params]:
    """Returns the config and the params, in NumPy arrays, of a converted head.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged.
    """
    config = configs.load(DecoderConfig, pathlib.Path(folder) / _DECODER)
    like = jax.eval_shape(lambda key: decoders.init(key, config), jax.random.key(0))
    return config, checkpoint.restore_params(folder, like)


def read_recurrence(folder: Path) -> tuple[RecurrenceConfig, Params]:
    """Returns the config and the params, in NumPy arrays, of a converted `torch.nn` recurrence.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged.
    """
    config = configs.load(RecurrenceConfig, pathlib.Path(folder) / _RECURRENCE)
    params = checkpoint.restore_params(folder)
    check_params(config, params)
    return config, params


def read_folder(folder: Path) -> TensorFile:
    """Returns the foreign file again, with the params that the folder holds now.

    What was missing in it and drawn comes last. One warning names the tensors that were trained
    since and lose digits in the file's dtype.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged.
    """
    path = pathlib.Path(folder) / _CONVERSION
    try:
        source = json.loads(path.read_text(encoding="utf-8"))["source"]
        fields = ("dtypes", "prefix", "container", "metadata")
        dtypes, prefix, container, metadata = (source[name] for name in fields)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); convert the file again.") from error
    left_over = pathlib.Path(folder) / _LEFT_OVER
    others = dict(weight_files.read(left_over).tensors) if left_over.is_file() else {}
    names = [name for name in dtypes if name not in others]
    own = _recurrence(folder, names, prefix) if is_recurrence(folder) else _head(folder, names)
    with np.errstate(over="ignore"):  # what is too large is told below, in a line
        back = {n: array.astype(np.dtype(dtypes.get(n, "float32"))) for n, array in own.items()}
    _warn_rounded(own, back)
    tensors = {name: others[name] if name in others else back.pop(name) for name in dtypes}
    return TensorFile({**tensors, **back}, container, metadata=metadata)


def _head(folder: Path, names: Collection[str]) -> dict[str, np.ndarray]:
    """Returns RoboVLMs' tensors of the params, by these names where they have them."""
    named = {head_name(name): name for name in names}
    prefix = next((prefix_of(name) for name in names), HEAD)
    return {
        named.get(name, prefix + name.removeprefix(HEAD)): array
        for name, array in to_robovlms(*read_params(folder)).items()
    }


def _recurrence(folder: Path, names: Collection[str], prefix: str) -> dict[str, np.ndarray]:
    tensors = to_torch(*read_recurrence(folder), prefix=prefix)
    # Biases that the file had not are zeros, until they are trained.
    return {name: array for name, array in tensors.items() if name in names or array.any()}


def _warn_rounded(own: Mapping[str, np.ndarray], back: Mapping[str, np.ndarray]) -> None:
    rounded = {
        name: back[name].dtype.name
        for name, array in own.items()
        if not np.array_equal(back[name].astype(array.dtype), array, equal_nan=True)
    }
    if rounded:
        dtypes = ", ".join(sorted(set(rounded.values())))
        warnings.warn(
            f"{len(rounded)} tensors lose digits in the file's {dtypes}: {listed(list(rounded))}; "
            "`read_params` has them all",
            stacklevel=3,
        )


def _fill(
    folder: pathlib.Path,
    source: TensorFile,
    config: DecoderConfig | RecurrenceConfig,
    params: Params,
    told: Report,
    prefix: str,
) -> None:
    name = _DECODER if isinstance(config, DecoderConfig) else _RECURRENCE
    configs.save(config, folder / name)
    unused = {*told.left_over, *told.buffers}
    others = {name: array for name, array in source.tensors.items() if name in unused}
    if others:
        weight_files.write(folder / _LEFT_OVER, TensorFile(others))
    conversion = {
        "source": {
            "dtypes": {name: array.dtype.name for name, array in source.tensors.items()},
            "prefix": prefix,
            "container": source.container,
            "metadata": dict(source.metadata),
        },
        "report": conversion_report.to_json(told),
    }
    write_json(folder / _CONVERSION, conversion)
    saver = checkpoint.open_checkpoints(folder, keep=1)
    checkpoint.save(
        saver, 0, {"params": params}, {pathlib.Path(name).stem: configs.to_dict(config)}
    )
    checkpoint.close(saver)
