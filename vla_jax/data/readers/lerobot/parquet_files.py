"""Access to Parquet files whose damage is reported in one sentence."""

import contextlib
import pathlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from vla_jax.data.raw import Feature
from vla_jax.data.readers.lerobot.parquet_values import to_numpy

MAX_OPEN = 4  # files that a thread keeps open
BLOCK_ROWS = 2**14  # rows of a column that are read at a time


class OpenFile(NamedTuple):
    """An open Parquet file with its rows in row groups."""

    file: Any  # pyarrow.parquet.ParquetFile
    starts: np.ndarray  # [G + 1] first row of each row group, and the number of rows
    columns: dict[tuple[str, int], Any]  # last block read of each column: (key, block) -> Arrow
    places: dict[str, "RowsOfValues"]  # column of integers -> where each value lies


class RowsOfValues(NamedTuple):
    """Rows of a file at which a column has each of its values."""

    values: np.ndarray  # [n] int64, different values, ascending
    ends: np.ndarray  # [n] int64, end of each value's rows in `rows`
    rows: np.ndarray | None  # rows sorted by value; None if they are sorted in the file


@contextlib.contextmanager
def damage_in_one_sentence(path: pathlib.Path) -> Iterator[None]:
    """Turns the errors of pyarrow into one sentence that names the file."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise ImportError(
            "reading LeRobot data sets needs pyarrow; install it with `pip install "
            "'vla-jax[data]'`."
        ) from error
    if not path.is_file():
        raise FileNotFoundError(f"Parquet file {path} is missing; copy the data set again.")
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        detail = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ValueError(
            f"Parquet file {path} cannot be read, it is damaged or cut short ({detail}); copy the "
            "data set again."
        ) from error


def read_table(path: pathlib.Path, columns: Sequence[str] | None = None) -> Any:
    """Reads columns of a file as an Arrow table.

    Args:
      path: the file.
      columns: columns to read, all of which must exist; None means all.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: it is damaged, or a column is missing.
      ImportError: pyarrow is missing.
    """
    with damage_in_one_sentence(path):
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            missing = [name for name in columns or () if name not in names]
            table = None if missing else file.read(columns=columns)
    if missing:
        raise ValueError(
            f"Parquet file {path} must have the columns {list(columns or ())}, {missing} missing; "
            "copy the data set again."
        )
    return table


def read_schema(path: pathlib.Path) -> Any:
    """Reads the Arrow schema of a file; errors as `read_table`."""
    with damage_in_one_sentence(path):
        import pyarrow.parquet as pq

        return pq.read_schema(path)


class ParquetRows:
    """Random access to rows of Parquet files; safe to share by threads, pickled without files.

    Every thread keeps a few files open and, of each column, the block of rows it read last. So a
    pass over all episodes reads every block once, and memory does not grow with the data.
    """

    def __init__(self) -> None:
        """Creates a reader without open files."""
        self._local = threading.local()

    def num_rows(self, path: pathlib.Path) -> int:
        """Returns the number of rows of a file."""
        return int(self._open(path).starts[-1])

    def find(self, path: pathlib.Path, key: str, value: int) -> np.ndarray:
        """Returns the rows `[n]` of a file at which a column of integers has a value."""
        opened = self._open(path)
        if key not in opened.places:
            column = self.read(path, key, np.arange(opened.starts[-1]))
            opened.places[key] = _places(to_numpy(column, Feature("int64", ()), key, path))
        values, ends, rows = opened.places[key]
        place = int(np.searchsorted(values, value))
        if place == len(values) or values[place] != value:
            return np.empty(0, np.int64)
        start = ends[place - 1] if place else 0
        return np.arange(start, ends[place]) if rows is None else rows[start : ends[place]]

    def read(
        self, path: pathlib.Path, key: str, rows: np.ndarray, *, is_large: bool = False
    ) -> Any:
        """Reads rows of a column.

        Args:
          path: the file.
          key: the column.
          rows: `[n]` rows of the file.
          is_large: read single row groups instead of blocks of many rows, as for images.

        Returns:
          Arrow array of n values.

        Raises:
          FileNotFoundError: the file is missing.
          ValueError: it is damaged, or the column is missing.
        """
        import pyarrow as pa

        opened = self._open(path)
        size = 1 if is_large else BLOCK_ROWS
        blocks = np.minimum(opened.starts[:-1] // size, 2**62)  # [G] block of each row group
        groups = np.searchsorted(opened.starts, rows, side="right") - 1
        parts, places = [], []
        for block in np.unique(blocks[groups]):
            inside = np.flatnonzero(blocks[groups] == block)
            members = np.flatnonzero(blocks == block)
            column = self._block(path, opened, key, members)
            with damage_in_one_sentence(path):
                parts.append(column.take(pa.array(rows[inside] - opened.starts[members[0]])))
            places.append(inside)
        with damage_in_one_sentence(path):
            values = parts[0] if len(parts) == 1 else pa.concat_arrays(parts)
            if len(parts) > 1:
                order = np.empty(len(rows), np.int64)
                order[np.concatenate(places)] = np.arange(len(rows))
                values = values.take(pa.array(order))
        return values

    def _block(self, path: pathlib.Path, opened: OpenFile, key: str, groups: np.ndarray) -> Any:
        """Returns a column of neighbouring row groups as one Arrow array."""
        place = (key, int(groups[0]))
        if place not in opened.columns:
            with damage_in_one_sentence(path):
                names = opened.file.schema_arrow.names
                table = None
                if key in names:
                    table = opened.file.read_row_groups(groups.tolist(), columns=[key])
            if table is None:
                raise ValueError(
                    f"Parquet file {path} must have the column {key!r}, got {names}; copy the data "
                    "set again."
                )
            for other in [other for other in opened.columns if other[0] == key]:
                del opened.columns[other]
            with damage_in_one_sentence(path):
                column = table.column(0).combine_chunks()
                if hasattr(column, "chunks"):
                    import pyarrow as pa

                    column = pa.concat_arrays(column.chunks)
            opened.columns[place] = column
        return opened.columns[place]

    def _open(self, path: pathlib.Path) -> OpenFile:
        """Returns this thread's open file."""
        files: OrderedDict[pathlib.Path, OpenFile]
        files = self._local.__dict__.setdefault("files", OrderedDict())
        if path not in files:
            with damage_in_one_sentence(path):
                import pyarrow.parquet as pq

                file = pq.ParquetFile(path)
                groups = [
                    file.metadata.row_group(group).num_rows
                    for group in range(file.metadata.num_row_groups)
                ]
            if any(count < 0 for count in groups):
                raise ValueError(
                    f"Parquet file {path} must have row groups of positive size, got {groups[:9]}; "
                    "copy the data set again."
                )
            starts = np.concatenate([[0], np.cumsum(groups, dtype=np.int64)]).astype(np.int64)
            files[path] = OpenFile(file, starts, {}, {})
            while len(files) > MAX_OPEN:
                files.popitem(last=False)[1].file.close()
        files.move_to_end(path)
        return files[path]

    def __reduce__(self) -> tuple[type["ParquetRows"], tuple[()]]:
        """Pickles nothing: open files cannot move to another process."""
        return ParquetRows, ()


def _places(column: np.ndarray) -> RowsOfValues:
    is_sorted = bool(np.all(column[1:] >= column[:-1]))
    rows = None if is_sorted else np.argsort(column, kind="stable")
    values, counts = np.unique(column, return_counts=True)
    return RowsOfValues(values, np.cumsum(counts), rows)
