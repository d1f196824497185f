"""Reading and writing of tensor files of other libraries, without executing code in them.

`.pt`, `.pth` and `.ckpt` are PyTorch files and need torch, which `vla-jax[torch]` installs;
`.safetensors` needs no extra. Tensors become NumPy arrays, bfloat16 included, and keep their
names, order, dtypes and bytes.
"""

import contextlib
import os
import pathlib
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors
from safetensors.numpy import save_file

from vla_jax.convert.arrays import as_numpy
from vla_jax.convert.conversion_report import abbreviate
from vla_jax.convert.wrapper_names import unwrap
from vla_jax.files import replacing

Path = str | os.PathLike[str]
CONTAINERS = ("state_dict", "model_state_dict")  # Lightning and RoboVLMs; others
SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")
_MOST_REPEATED = 2**30  # bytes of all views that repeat the numbers in a file


class TensorFile(NamedTuple):
    """Content of a file of tensors."""

    tensors: Mapping[str, np.ndarray]  # in the file's order
    container: str = CONTAINERS[0]  # entry of a torch file that holds them; "" = the file itself
    ignored: tuple[str, ...] = ()  # names of the other entries of a torch file
    metadata: Mapping[str, str] = {}  # metadata of a safetensors file
    path: Path = ""  # of the file that was read
    wrapped: Mapping[str, str] = {}  # name -> name in the file, with that of a wrapper in it


def read(path: Path) -> TensorFile:
    """Returns the tensors of a `.pt`, `.pth`, `.ckpt` or `.safetensors` file.

    Names of wrappers such as torch.compile's `_orig_mod.` are removed from the names.
    Those of a PyTorch file are memory-mapped where its format allows it, and not to be changed.

    Raises:
      FileNotFoundError: there is no such file.
      ImportError: a PyTorch file, and torch is not installed.
      ValueError: the file is of another format, empty, damaged, without tensors, or would
        execute code.
    """
    path = pathlib.Path(path)
    _check_suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give the path of a checkpoint.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty, expected a checkpoint; copy it again.")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    tensors, wrapped = unwrap(content.tensors, path)
    content = content._replace(tensors=tensors, path=path, wrapped=wrapped)
    if not content.tensors:
        raise ValueError(f"{path} holds no tensors, expected a checkpoint; save it again.")
    return content


def write(path: Path, content: TensorFile, *, overwrite: bool = False) -> None:
    """Writes a file atomically: completely or not at all.

    Args:
      path: file to write; its suffix determines the format, as for `read`.
      content: as `read` returns it; `ignored` is not written.
      overwrite: True if an existing file may be replaced.

    Raises:
      FileExistsError: `path` exists, and `overwrite` is False.
      ImportError: a PyTorch file, and torch is not installed.
      ValueError: another suffix, or a dtype that the format does not support.
    """
    path = pathlib.Path(path)
    _check_suffix(path)
    if path.is_dir() or (path.exists() and not overwrite):
        raise FileExistsError(f"{path} exists already; choose another name, or --overwrite.")
    try:
        with replacing(path) as part:
            _write(part, content, path.suffix)
    except (safetensors.SafetensorError, AttributeError) as error:  # torch has no such dtype
        raise ValueError(
            f"{path} cannot store these tensors ({error}); choose another suffix."
        ) from error


def _write(path: pathlib.Path, content: TensorFile, suffix: str) -> None:
    if suffix == ".safetensors":
        # safetensors writes the memory of an array without regard to its strides.
        tensors = {name: np.asarray(x, order="C") for name, x in content.tensors.items()}
        save_file(tensors, path, dict(content.metadata) or None)
    else:
        _write_torch(path, content)


def _read_safetensors(path: pathlib.Path) -> TensorFile:
    try:
        with safetensors.safe_open(path, "np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return TensorFile(tensors, metadata=file.metadata() or {})
    except AttributeError as error:  # NumPy has no such dtype
        raise ValueError(
            f"{path} has a dtype that NumPy lacks ({error}); save it again."
        ) from error
    except (ValueError, safetensors.SafetensorError) as error:  # NumPy refuses a huge dimension
        raise ValueError(
            f"{path} is not a safetensors file, or a truncated one ({error}); copy it again."
        ) from error


def _read_torch(path: pathlib.Path) -> TensorFile:
    torch = _torch()
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_crc(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # errors become one sentence below
            content = torch.load(path, weights_only=True, map_location="cpu", mmap=is_zip)
    except Exception as error:  # torch.load raises many types
        raise ValueError(_why_unreadable(path, error)) from error
    container, tensors = _state_dict(path, content)
    foreign = [name for name, tensor in tensors.items() if not isinstance(tensor, torch.Tensor)]
    if foreign:
        raise ValueError(
            f"{path} must hold tensors only, got other values in {abbreviate(foreign)}; remove "
            "them."
        )
    repeated = {  # views that are larger than what is stored of them are copied in full
        name: x.numel() * x.element_size()
        for name, x in tensors.items()
        if x.numel() * x.element_size() > x.untyped_storage().nbytes()
    }
    if sum(repeated.values()) > _MOST_REPEATED:
        raise ValueError(
            f"{path} must hold its tensors in full, got larger ones than the file: "
            f"{abbreviate(list(repeated))}; save their contiguous() copies."
        )
    ignored = tuple(str(name) for name in content if container and name != container)
    return TensorFile({name: as_numpy(x) for name, x in tensors.items()}, container, ignored)


def _check_crc(path: pathlib.Path) -> None:
    """Compares the CRC-32 of every member of a zip file, which `torch.load` ignores.

    Raises:
      ValueError: a member is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises many types
        raise ValueError(f"{path} is a damaged zip file ({error}); copy it again.") from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged: {damaged} differs from its checksum; copy it again.")


def _state_dict(path: pathlib.Path, content: Any) -> tuple[str, Mapping[str, Any]]:
    """Returns the name of the entry that holds the tensors, and the tensors."""
    if isinstance(content, Mapping):
        for container in CONTAINERS:
            if isinstance(content.get(container), Mapping):
                return container, content[container]
        if all(isinstance(value, _torch().Tensor) for value in content.values()):
            return "", content
        description = f"entries {abbreviate([str(name) for name in content])}"
    else:
        description = f"a {type(content).__name__}"
    raise ValueError(
        f"{path} must hold tensors by name, or a dict of them as {' or '.join(CONTAINERS)}, got "
        f"{description}; save the state_dict alone."
    )


def _why_unreadable(path: pathlib.Path, error: Exception) -> str:
    match = re.search(r"GLOBAL (\S+)", str(error))
    refused = match[1] if match else _first_global(path)
    if refused:
        return (
            f"{path} would import {refused}, which can execute code; nothing was executed: "
            "if you trust its source, load it in PyTorch and save its state_dict alone."
        )
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"PK" or isinstance(error, EOFError | RuntimeError | OSError):
        return f"{path} is truncated or damaged ({_first_line(error)}); copy it again."
    return (
        f"{path} is not a checkpoint of tensors only ({_first_line(error)}), and nothing was "
        "executed; load it where it was made and save its state_dict with torch.save."
    )


def _first_global(path: pathlib.Path) -> str | None:
    """Returns the first global that a bare pickle would import, None for other files.

    The opcodes are only listed; nothing is executed.
    """
    strings: list[str] = []
    with path.open("rb") as file, contextlib.suppress(ValueError):  # no pickle: no global
        for opcode, value, _ in pickletools.genops(file):
            if opcode.name in ("GLOBAL", "INST"):
                return str(value).replace(" ", ".")
            if opcode.name == "STACK_GLOBAL":
                return ".".join(strings[-2:])
            if isinstance(value, str):
                strings.append(value)
    return None


def _first_line(error: Exception) -> str:
    line = next(iter(str(error).splitlines()), "").partition(". ")[0]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _write_torch(path: pathlib.Path, content: TensorFile) -> None:
    torch = _torch()
    tensors = {}
    for name, array in content.tensors.items():
        flat = torch.from_numpy(np.array(array, order="C").reshape(-1).view(np.uint8))
        tensors[name] = flat.view(getattr(torch, array.dtype.name)).reshape(array.shape)
    torch.save({content.container: tensors} if content.container else tensors, path)


def _check_suffix(path: pathlib.Path) -> None:
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path} must end in {', '.join(SUFFIXES)}, got '{path.suffix}'; rename it."
        )


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "PyTorch files need torch, which is not installed; pip install 'vla-jax[torch]', or "
            "save the tensors as .safetensors."
        ) from error
    return torch
