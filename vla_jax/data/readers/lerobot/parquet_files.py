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
BLOCK_ROWS = 2**14  # rows of a column that are read ahead
HELD_BYTES = 2**25  # of the blocks that a thread keeps


class Block(NamedTuple):
    """Values of a column in neighbouring row groups."""

    start: int  # first row
    end: int  # exclusive
    values: Any  # Arrow array


class OpenFile(NamedTuple):
    """An open Parquet file with its rows in row groups."""

    file: Any  # pyarrow.parquet.ParquetFile
    starts: np.ndarray  # [G + 1] first row of each row group, and the number of rows
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
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"Parquet file {path} is missing; copy the data set again."
        ) from error
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

        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            wanted = names if columns is None else columns
            missing = [name for name in wanted if name not in names]
            repeated = [name for name in wanted if names.count(name) > 1]
            table = None if missing or repeated else file.read(columns=columns)
    if table is None:
        got = f"{missing} missing" if missing else f"{repeated[0]} twice"
        raise ValueError(
            f"Parquet file {path} must have the columns {list(wanted)}, {got}; copy the data set "
            "again."
        )
    return table


def read_schema(path: pathlib.Path) -> Any:
    """Reads the Arrow schema of a file; errors as `read_table`."""
    with damage_in_one_sentence(path):
        import pyarrow.parquet as pq

        return pq.read_schema(path)


class ParquetRows:
    """Random access to rows of Parquet files; safe to share by threads, pickled without files.

    Every thread keeps a few files open and, of each column, the block of rows it read last, up to
    `HELD_BYTES` in all; blocks grow up to `BLOCK_ROWS` while rows are read in order. So a pass over
    all episodes reads every block once, random access reads little, and memory does not grow with
    the data.
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
            with damage_in_one_sentence(path):  # MemoryError of a wrong number of rows
                rows = np.arange(opened.starts[-1])
            column = self.read(path, key, rows)
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
          is_large: do not read ahead, as for images.

        Returns:
          Arrow array of n values.

        Raises:
          FileNotFoundError: the file is missing.
          ValueError: it is damaged, or the column is missing.
        """
        opened = self._open(path)
        block = self._held().get((path, key))
        first, last = (int(rows.min()), int(rows.max())) if len(rows) else (0, -1)
        if block is None or first < block.start or last >= block.end:
            groups = np.unique(np.searchsorted(opened.starts, rows, side="right") - 1)
            if len(groups) and groups[-1] - groups[0] + 1 > len(groups):
                return self._scattered(path, opened, key, rows, groups)
            block = self._block(path, opened, key, groups, block, is_large=is_large)
        with damage_in_one_sentence(path):
            if len(rows) == last - first + 1 and np.all(rows[1:] > rows[:-1]):
                return block.values.slice(first - block.start, len(rows))
            return block.values.take(_arrow_indices(rows - block.start))

    def read_together(
        self, path: pathlib.Path, keys: Sequence[str], start: int, stop: int
    ) -> dict[str, Any]:
        """Reads some columns of the rows [start, stop) and keeps nothing; errors as `read`.

        Returns:
          Column -> Arrow array of stop - start values.
        """
        opened = self._open(path)
        first = int(np.searchsorted(opened.starts, start, side="right")) - 1
        last = int(np.searchsorted(opened.starts, stop, side="left"))
        table = self._row_groups(path, opened, keys, list(range(first, last)))
        with damage_in_one_sentence(path):
            rows = table.slice(start - int(opened.starts[first]), stop - start)
            return {key: _one_array(rows[key]) for key in keys}

    def _block(
        self,
        path: pathlib.Path,
        opened: OpenFile,
        key: str,
        groups: np.ndarray,
        previous: Block | None,
        *,
        is_large: bool,
    ) -> Block:
        """Reads neighbouring row groups and stores them; reads ahead where rows come in order."""
        start, end = (int(groups[0]), int(groups[-1]) + 1) if len(groups) else (0, 0)
        is_next = previous is not None and previous.start < opened.starts[start] <= previous.end
        if previous is not None and is_next and not is_large:
            wanted = min(2 * (previous.end - previous.start), BLOCK_ROWS)
            ahead = np.searchsorted(opened.starts, opened.starts[start] + wanted, side="right") - 1
            end = max(end, int(ahead))
        values = self._column(path, opened, key, list(range(start, end)))
        block = Block(int(opened.starts[start]), int(opened.starts[end]), values)
        self._hold((path, key), block)
        return block

    def _held(self) -> OrderedDict[tuple[pathlib.Path, str], Block]:
        """Returns this thread's blocks, by file and column."""
        return self._local.__dict__.setdefault("held", OrderedDict())

    def _hold(self, key: tuple[pathlib.Path, str], block: Block) -> None:
        """Keeps a block in the place of the column's earlier one; removes the oldest ones."""
        held = self._held()
        held.pop(key, None)
        held[key] = block
        size = sum(each.values.nbytes for each in held.values())
        while size > HELD_BYTES:
            size -= held.popitem(last=False)[1].values.nbytes

    def _scattered(
        self, path: pathlib.Path, opened: OpenFile, key: str, rows: np.ndarray, groups: np.ndarray
    ) -> Any:
        """Reads rows of row groups that are no neighbours."""
        values = self._column(path, opened, key, groups.tolist())
        sizes = np.diff(opened.starts)[groups]
        shifts = np.cumsum(sizes) - sizes - opened.starts[groups]
        members = np.searchsorted(groups, np.searchsorted(opened.starts, rows, side="right") - 1)
        with damage_in_one_sentence(path):
            return values.take(_arrow_indices(rows + shifts[members]))

    def _row_groups(
        self, path: pathlib.Path, opened: OpenFile, keys: Sequence[str], groups: list[int]
    ) -> Any:
        """Reads columns of some row groups as an Arrow table."""
        with damage_in_one_sentence(path):
            names = opened.file.schema_arrow.names
            wrong = [key for key in keys if names.count(key) != 1]
            table = None if wrong else opened.file.read_row_groups(groups, columns=list(keys))
        if table is None:
            raise ValueError(
                f"Parquet file {path} must have the column {wrong[0]!r} once, got {names}; copy "
                "the data set again."
            )
        return table

    def _column(self, path: pathlib.Path, opened: OpenFile, key: str, groups: list[int]) -> Any:
        """Reads a column of some row groups as one Arrow array."""
        table = self._row_groups(path, opened, (key,), groups)
        with damage_in_one_sentence(path):
            return _one_array(table.column(0))

    def _open(self, path: pathlib.Path) -> OpenFile:
        """Returns this thread's open file."""
        files: OrderedDict[pathlib.Path, OpenFile]
        files = self._local.__dict__.setdefault("files", OrderedDict())
        if path not in files:
            with damage_in_one_sentence(path):
                import pyarrow.parquet as pq

                file = pq.ParquetFile(path, page_checksum_verification=True)
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
            files[path] = OpenFile(file, starts, {})
            while len(files) > MAX_OPEN:
                files.popitem(last=False)[1].file.close()
        files.move_to_end(path)
        return files[path]

    def __reduce__(self) -> tuple[type["ParquetRows"], tuple[()]]:
        """Pickles nothing: open files cannot move to another process."""
        return ParquetRows, ()


def _one_array(chunks: Any) -> Any:
    """Returns an Arrow array of the values of a chunked one."""
    import pyarrow as pa

    column = chunks.combine_chunks()
    return pa.concat_arrays(column.chunks) if hasattr(column, "chunks") else column


def _arrow_indices(rows: np.ndarray) -> Any:
    import pyarrow as pa

    return pa.array(rows)


def _places(column: np.ndarray) -> RowsOfValues:
    is_sorted = bool(np.all(column[1:] >= column[:-1]))
    rows = None if is_sorted else np.argsort(column, kind="stable")
    values, counts = np.unique(column, return_counts=True)
    return RowsOfValues(values, np.cumsum(counts), rows)
