"""Groups and data sets inside HDF5 files: safe access, types, bounded reads."""

import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from vla_jax.data.raw import Feature
from vla_jax.data.readers.hdf5.hdf5_files import import_h5py, reading

MAX_LENGTH = 2**31  # steps of an episode
MAX_DEPTH = 12  # of nested groups
MAX_CHILDREN = 4096  # data sets of one episode
MAX_CHUNK_BYTES = 2**29
MAX_IMAGE_PIXELS = 2**26
SMALL_BYTES = 2**26  # data sets up to this size are read whatever the file says
MAX_COMPRESSION = 1100  # a little above deflate's limit of 1032


def child(group: Any, name: str, path: pathlib.Path) -> Any:
    """Returns a group or data set inside a group.

    Args:
      group: h5py group of the file `path`.
      name: name of the child, or a path of names joined by "/".
      path: file that is read; links may lead to files in its folder only.

    Raises:
      ValueError: the child is missing, damaged, or in a file outside the folder.
    """
    for part in filter(None, name.split("/")):
        group = _direct_child(group, part, path)
    return group


def _direct_child(group: Any, name: str, path: pathlib.Path) -> Any:
    """Returns a child; the usual hard link by low-level calls, which take half the time."""
    h5py = import_h5py()
    if not isinstance(group, h5py.Group):
        raise ValueError(f"{path}: {group.name} must be a group with {name!r}; restore the file.")
    place = f"{group.name}/{name}".replace("//", "/")
    link = name.encode("utf-8", "surrogateescape")
    with reading(path, f"the link {place}"):
        exists = group.id.links.exists(link)
        if exists and group.id.links.get_info(link).type == h5py.h5l.TYPE_HARD:
            item = h5py.h5o.open(group.id, link)
            wrap = {h5py.h5g.GroupID: h5py.Group, h5py.h5d.DatasetID: h5py.Dataset}
            return wrap.get(type(item), h5py.Datatype)(item)
    if not exists:
        raise ValueError(
            f"{path} must hold {place}, got {short_list(names_of(group, path))} in "
            f"{group.name}; add it or choose another data set."
        )
    return _linked(group, name, path, place)


def _linked(group: Any, name: str, path: pathlib.Path, place: str) -> Any:
    """Returns the target of a soft or external link, which must be in the folder of `path`."""
    with reading(path, f"the link {place}"):
        file = getattr(group.get(name, getlink=True), "filename", None)
    if file is not None:
        check_inside(pathlib.Path(os.fsdecode(file)), path, place)
    with reading(path, place):
        found = group[name]
        file = pathlib.Path(os.fsdecode(found.file.filename))
    check_inside(file.resolve(), path, place)  # a soft link may lead through an external one
    return found


def check_inside(file: pathlib.Path, path: pathlib.Path, place: str) -> None:
    """Raises a ValueError if a file to which `place` of `path` refers is outside its folder."""
    folder = path.parent.resolve()
    if not (path.parent.resolve() / file).resolve().is_relative_to(folder):
        raise ValueError(
            f"{path}: {place} refers to {file}, outside the folder of the data set; copy the "
            "data into the file."
        )


def names_of(group: Any, path: pathlib.Path) -> list[str]:
    """Returns the names of a group's children; ValueError if it is no group."""
    if not isinstance(group, import_h5py().Group):
        raise ValueError(f"{path}: {group.name} must be a group; restore the file.")
    with reading(path, f"the list of {group.name}"):
        names = list(group)
    if not all(isinstance(name, str) for name in names):  # bytes that are not UTF-8
        raise ValueError(f"{path}: the names in {group.name} must be UTF-8; restore the file.")
    return names


def num_rows(group: Any, name: str, path: pathlib.Path) -> int:
    """Returns the size of the first axis of a data set inside a group; 0 for a single value.

    Raises:
      ValueError: it is missing, or a group.
    """
    item = child(group, name, path)
    if not isinstance(item, import_h5py().Dataset):
        raise ValueError(f"{path}: {item.name} must be an array [T, …], got a group; restore it.")
    with reading(path, item.name):
        return int(item.shape[0]) if item.shape else 0


def short_list(names: list[str]) -> str:
    """Returns the first names as they appear in messages."""
    return ", ".join(repr(name) for name in names[:8]) + (", …" if len(names) > 8 else "")


def walk(group: Any, path: pathlib.Path, *, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns all data sets below a group: names joined by "/" -> h5py data set.

    Args:
      group: h5py group of the file `path`.
      path: file that is read.
      skip: names of direct children that are left out.

    Raises:
      ValueError: damaged or foreign objects; too many, or nested too deeply.
    """
    found: dict[str, Any] = {}
    for key, dataset in _walk(group, path, skip=skip, depth=0):
        found[key] = dataset
        if len(found) > MAX_CHILDREN:
            raise ValueError(
                f"{path}: {group.name} must hold at most {MAX_CHILDREN} data sets; restore it."
            )
    return found


def _walk(
    group: Any, path: pathlib.Path, *, skip: tuple[str, ...], depth: int
) -> Iterator[tuple[str, Any]]:
    h5py = import_h5py()
    if depth > MAX_DEPTH:
        raise ValueError(
            f"{path}: {group.name} must be nested at most {MAX_DEPTH} groups deep (a link that "
            "leads back to a group above?); restore the file."
        )
    for name in names_of(group, path):
        if name in skip:
            continue
        item = _direct_child(group, name, path)
        if isinstance(item, h5py.Group):
            for key, dataset in _walk(item, path, skip=(), depth=depth + 1):
                yield f"{name}/{key}", dataset
        elif isinstance(item, h5py.Dataset):
            yield name, item


def feature(dataset: Any) -> Feature | None:
    """Returns the type of one step of a data set; None if it holds neither numbers nor texts."""
    h5py = import_h5py()
    if h5py.check_string_dtype(dataset.dtype) is not None:
        return Feature("str", tuple(dataset.shape[1:]))
    if dataset.dtype.kind not in "biuf" or dataset.dtype.subdtype:
        return None
    return Feature(dataset.dtype.name, tuple(dataset.shape[1:]))


def check_kind(kind: Feature | None, dataset: Any, path: pathlib.Path) -> None:
    """Raises a ValueError if a data set holds neither numbers nor texts."""
    if kind is None:
        raise ValueError(
            f"{path}: {dataset.name} must hold numbers or texts, got {dataset.dtype!s:.60}; "
            "convert it or leave the episode out."
        )


def is_image(kind: Feature) -> bool:
    """Returns True for a step that is an image `[h, w, 3]` uint8."""
    return kind.dtype == "uint8" and len(kind.shape) == 3 and kind.shape[2] == 3


def check_dataset(dataset: Any, path: pathlib.Path) -> None:
    """Checks that a data set can be read within the memory that its size on disk suggests.

    Raises:
      ValueError: raw data outside the folder; a declared size far above that of the stored data;
        data that were never written.
    """
    with reading(path, dataset.name):
        chunk = math.prod(dataset.chunks or ()) * dataset.dtype.itemsize
        size, stored = dataset.size * dataset.dtype.itemsize, dataset.id.get_storage_size()
        stored = min(stored, import_h5py().h5i.get_file_id(dataset.id).get_filesize())
        limit = max(SMALL_BYTES, MAX_COMPRESSION * stored) if dataset.chunks else stored
        others = [name for name, *_ in dataset.external or ()]
        if dataset.is_virtual:
            others = [source.file_name for source in dataset.virtual_sources()]
    for name in others:
        if name != ".":
            check_inside(pathlib.Path(os.fsdecode(name)), path, dataset.name)
    if others:
        return
    if size and not stored:
        raise ValueError(
            f"{path}: {dataset.name} has shape {dataset.shape} but no data were written to it; "
            "record the episode again."
        )
    if chunk > MAX_CHUNK_BYTES or size > limit:
        raise ValueError(
            f"{path}: {dataset.name} must be about as large as its data on disk ({stored} bytes), "
            f"got shape {dataset.shape}, chunks {dataset.chunks}; restore the file."
        )


def read_all(dataset: Any, path: pathlib.Path) -> np.ndarray:
    """Returns the whole content of a data set, texts as NumPy strings."""
    h5py = import_h5py()
    check_dataset(dataset, path)
    with reading(path, dataset.name):
        if h5py.check_string_dtype(dataset.dtype) is not None:
            return np.array(dataset.asstr("utf-8")[()], dtype=np.str_)
        return dataset[()]


def read_steps(dataset: Any, steps: np.ndarray, path: pathlib.Path) -> np.ndarray:
    """Returns rows of a data set.

    Args:
      dataset: h5py data set `[T, …]`.
      steps: `[n]` ascending distinct steps.
      path: file that is read.

    Returns:
      `[n, …]`.
    """
    rows = np.empty((len(steps), *dataset.shape[1:]), dataset.dtype)
    with reading(path, dataset.name):
        for run in np.split(np.arange(len(steps)), np.flatnonzero(np.diff(steps) != 1) + 1):
            if len(run):
                source = np.s_[int(steps[run[0]]) : int(steps[run[-1]]) + 1]
                dataset.read_direct(rows, source, np.s_[int(run[0]) : int(run[-1]) + 1])
    return rows


def text(value: Any, path: pathlib.Path, place: str) -> str:
    """Returns a text of an attribute or a scalar data set.

    Args:
      value: bytes or str as h5py gives them, or an array of them, of which the first counts.
      path: file that is read.
      place: where, for the message.

    Raises:
      ValueError: no text, or not UTF-8.
    """
    if isinstance(value, np.ndarray) and value.size:
        value = value.reshape(-1)[0]
    if isinstance(value, bytes):
        with reading(path, place):
            value = value.decode("utf-8")
    if not isinstance(value, str):
        raise ValueError(f"{path}: {place} must be a text, got {value!r:.80}; restore it.")
    return str(value)


def attribute(item: Any, name: str, path: pathlib.Path) -> Any:
    """Returns a text or number in an attribute of a group or data set; None if it is missing.

    Raises:
      ValueError: it is damaged, or neither a text nor a number.
    """
    types = import_h5py().h5t
    place = f"the attribute {name} of {item.name}"
    with reading(path, place):
        if name not in item.attrs:
            return None
        found = item.attrs.get_id(name)
        size, kind = found.get_storage_size(), found.get_type()
    # HDF5 may crash on damaged attributes of other types
    is_known = isinstance(kind, types.TypeStringID | types.TypeIntegerID | types.TypeFloatID)
    if not is_known or size > SMALL_BYTES:
        raise ValueError(f"{path}: {place} must be one text or number; restore or delete it.")
    with reading(path, place):
        return item.attrs[name]


def by_number(names: list[str], prefix: str, path: pathlib.Path, place: str) -> list[str]:
    """Returns names such as "demo_12", sorted by their number.

    Raises:
      ValueError: a name is of another form.
    """
    for name in names:
        number = name.removeprefix(prefix)
        if number == name or not (number.isascii() and number.isdigit() and len(number) < 19):
            raise ValueError(
                f"{path}: the children of {place} must be named {prefix}<number>, got {name!r}; "
                "move it out of this group."
            )
    return sorted(names, key=lambda name: (int(name.removeprefix(prefix)), name))
