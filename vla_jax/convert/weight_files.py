"""Foreign files of tensors, read without running anything that they hold, and written.

`.pt`, `.pth` and `.ckpt` are PyTorch's; they need torch, which comes with `vla-jax[torch]`.
`.safetensors` needs nothing more. Tensors are NumPy arrays here, bfloat16 included, and keep
their names, order, dtypes and bytes.
"""

import contextlib
import os
import pathlib
import pickletools
import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors
from safetensors.numpy import save_file

from vla_jax.convert.arrays import as_numpy
from vla_jax.convert.conversion_report import listed
from vla_jax.files import replacing

Path = str | os.PathLike[str]
CONTAINERS = ("state_dict", "model_state_dict")  # of Lightning and RoboVLMs; of others
SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")


class TensorFile(NamedTuple):
    """What a file holds."""

    tensors: Mapping[str, np.ndarray]  # in the file's order
    container: str = CONTAINERS[0]  # entry of a torch file they lie in; "" = it is nothing else
    ignored: tuple[str, ...] = ()  # the other entries of a torch file
    metadata: Mapping[str, str] = {}  # of a safetensors file


def read(path: Path) -> TensorFile:
    """Returns the tensors of a `.pt`, `.pth`, `.ckpt` or `.safetensors` file.

    Raises:
      FileNotFoundError: there is no such file.
      ImportError: a PyTorch file, and torch is not installed.
      ValueError: the file is of another kind, empty, damaged, holds no tensors, or wants to run
        code.
    """
    path = pathlib.Path(path)
    _check_suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; name a checkpoint.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty, expected a checkpoint; copy it again.")
    found = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not found.tensors:
        raise ValueError(f"{path} holds no tensors, expected a checkpoint; save it again.")
    return found


def write(path: Path, content: TensorFile, *, overwrite: bool = False) -> None:
    """Writes the file, whole or not at all.

    Args:
      path: what to write; the suffix says in which format, as for `read`.
      content: as `read` gives it; `ignored` is not written.
      overwrite: whether a file that is there may be replaced.

    Raises:
      FileExistsError: `path` is there, and `overwrite` is False.
      ImportError: a PyTorch file, and torch is not installed.
      ValueError: another suffix, or tensors of a dtype that the format lacks.
    """
    path = pathlib.Path(path)
    _check_suffix(path)
    if path.is_dir() or (path.exists() and not overwrite):
        raise FileExistsError(f"{path} is there already; choose another name, or --overwrite.")
    try:
        with replacing(path) as part:
            _write(part, content, path.suffix)
    except (safetensors.SafetensorError, AttributeError) as error:  # of torch, by a dtype's name
        raise ValueError(
            f"{path} cannot hold these tensors ({error}); choose another suffix."
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
    except AttributeError as error:  # of NumPy, by the dtype's name
        raise ValueError(
            f"{path} has a dtype that NumPy lacks ({error}); save it again."
        ) from error
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is not a safetensors file, or a truncated one ({error}); copy it again."
        ) from error


def _read_torch(path: pathlib.Path) -> TensorFile:
    torch = _torch()
    try:
        with warnings.catch_warnings(action="ignore"):  # what is wrong is told here, in a line
            content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # of many types
        raise ValueError(_why_unreadable(path, error)) from error
    container, tensors = _state_dict(path, content)
    foreign = [name for name, tensor in tensors.items() if not isinstance(tensor, torch.Tensor)]
    if foreign:
        raise ValueError(f"{path} must hold tensors, got others in {listed(foreign)}; drop them.")
    ignored = tuple(str(name) for name in content if container and name != container)
    return TensorFile({name: as_numpy(x) for name, x in tensors.items()}, container, ignored)


def _state_dict(path: pathlib.Path, content: Any) -> tuple[str, Mapping[str, Any]]:
    """Returns the dict of tensors, and the name of the entry in which it lies."""
    if isinstance(content, Mapping):
        for container in CONTAINERS:
            if isinstance(content.get(container), Mapping):
                return container, content[container]
        if all(isinstance(value, _torch().Tensor) for value in content.values()):
            return "", content
        held = f"entries {listed([str(name) for name in content])}"
    else:
        held = f"a {type(content).__name__}"
    raise ValueError(
        f"{path} must hold tensors by name, or such a dict as {' or '.join(CONTAINERS)}, got "
        f"{held}; save the state_dict alone."
    )


def _why_unreadable(path: pathlib.Path, error: Exception) -> str:
    found = re.search(r"GLOBAL (\S+)", str(error))
    refused = found[1] if found else _first_global(path)
    if refused:
        return (
            f"{path} wants to load {refused}, which can run code; nothing of it was run: "
            "if you trust who made it, load it in PyTorch and save its state_dict alone."
        )
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"PK" or isinstance(error, EOFError | RuntimeError | OSError):
        return f"{path} is truncated or damaged ({_first_line(error)}); copy it again."
    return (
        f"{path} is not a checkpoint of tensors alone ({_first_line(error)}), and nothing of it "
        "was run; load it where it was made and save its state_dict with torch.save."
    )


def _first_global(path: pathlib.Path) -> str | None:
    """Returns what a bare pickle would load first, None where it is no such file.

    Its opcodes are only listed, and nothing is run.
    """
    strings: list[str] = []
    with path.open("rb") as file, contextlib.suppress(ValueError):
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
            "PyTorch's files need torch, which is missing; pip install 'vla-jax[torch]', or save "
            "the tensors as .safetensors."
        ) from error
    return torch
