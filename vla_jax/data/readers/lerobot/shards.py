"""MP4 and Parquet files written episode by episode, with a new file when one is full."""

import pathlib
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from vla_jax.data.readers.lerobot import layout

DATA_MB, VIDEO_MB, CHUNK_FILES = 100, 200, 1000  # lerobot's limits: MB per file, files per folder
# Measured on 64-pixel scenes with small coloured blocks: 45-49 dB, 0.15 ms of one core and 1.4 kB
# per frame. Preset veryfast with crf 18 has 41-43 dB in 0.35 ms and 0.8 kB; yuv420p would halve
# the resolution of colour.
CODEC, CODEC_NAME, PIXELS = "libx264rgb", "h264", "gbrp"
CODEC_OPTIONS = {"crf": "22", "preset": "ultrafast", "g": "10"}


class Video(NamedTuple):
    """An open MP4 file."""

    container: Any
    stream: Any
    file_index: int  # index of the file among those of this camera
    num_frames: int  # frames encoded so far
    num_bytes: int  # bytes written so far


class Table(NamedTuple):
    """An open Parquet file."""

    writer: Any
    path: pathlib.Path
    file_index: int  # index of the file


def append_rows(
    root: pathlib.Path, table: Table | None, columns: Mapping[str, np.ndarray]
) -> Table:
    """Writes an episode as one row group; starts a new file if the current one is full.

    Args:
      root: folder of the data set.
      table: result of the previous call, None at first.
      columns: key -> `[T, ...]` numbers or texts.

    Returns:
      The current file; the caller closes its `writer` after the last call.
    """
    import pyarrow.parquet as pq

    rows = arrow_table(columns)
    if table and table.path.stat().st_size > DATA_MB * 2**20:
        table.writer.close()
        table = _next_table(root, rows.schema, table.file_index + 1, pq)
    table = table or _next_table(root, rows.schema, 0, pq)
    table.writer.write_table(rows)
    return table


def append_frames(
    root: pathlib.Path, video: Video | None, key: str, images: np.ndarray, fps: float
) -> Video:
    """Encodes an episode; starts a new file if the current one is full.

    Args:
      root: folder of the data set.
      video: result of the previous call, None at first.
      key: the camera's key on disk.
      images: `[T, h, w, 3]` uint8.
      fps: frames per second, Hz.

    Returns:
      The current file; the caller closes it with `close_video` after the last call.
    """
    size = images.shape[1:3]
    if video and video.num_bytes > VIDEO_MB * 2**20:
        close_video(video)
        video = new_video(root, key, video.file_index + 1, size, fps)
    return encode(video or new_video(root, key, 0, size, fps), images)


def encode(video: Video, images: np.ndarray) -> Video:
    """Appends images `[n, h, w, 3]` uint8 to an open file."""
    import av

    num_bytes = video.num_bytes
    for image in images:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        packets = video.stream.encode(frame)
        video.container.mux(packets)
        num_bytes += sum(packet.size for packet in packets)
    return video._replace(num_frames=video.num_frames + len(images), num_bytes=num_bytes)


def close_video(video: Video) -> None:
    """Flushes the encoder and closes the file."""
    video.container.mux(video.stream.encode())
    video.container.close()


def place(file_index: int) -> dict[str, int]:
    """Returns chunk (folder) and file number of the n-th file of its kind."""
    return {"chunk_index": file_index // CHUNK_FILES, "file_index": file_index % CHUNK_FILES}


def _next_table(root: pathlib.Path, schema: Any, file_index: int, pq: Any) -> Table:
    path = root / layout.DATA_PATH.format(**place(file_index))
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = pq.ParquetWriter(path, schema, compression="snappy", write_page_checksum=True)
    return Table(writer, path, file_index)


def arrow_table(columns: Mapping[str, np.ndarray]) -> Any:
    """Returns an Arrow table of columns `[T, ...]`."""
    import pyarrow as pa

    return pa.table({key: _arrow(column) for key, column in columns.items()})


def _arrow(column: np.ndarray) -> Any:
    """Returns an Arrow array with lerobot's types.

    Scalars are plain values, vectors are lists of a fixed size, matrices lists of lists.
    """
    import pyarrow as pa

    is_text = column.dtype.kind == "U"
    flat = column.reshape(-1)
    values = pa.array(flat.tolist(), pa.string()) if is_text else pa.array(flat)
    if column.ndim == 1 or column.shape[1:] == (1,):
        return values
    if column.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(values, column.shape[1])
    for size in column.shape[:0:-1]:
        values = pa.ListArray.from_arrays(
            pa.array(range(0, len(values) + 1, size), pa.int32()), values
        )
    return values


def new_video(
    root: pathlib.Path, key: str, file_index: int, size: tuple[int, int], fps: float
) -> Video:
    """Creates the n-th video of a camera.

    Args:
      root: folder of the data set.
      key: the camera's key on disk.
      file_index: n.
      size: (h, w) in pixels.
      fps: frames per second, Hz.
    """
    import av

    path = root / layout.VIDEO_PATH.format(video_key=key, **place(file_index))
    path.parent.mkdir(parents=True, exist_ok=True)
    container = av.open(str(path), "w")
    rate = Fraction(fps).limit_denominator(1001)
    stream = container.add_stream(CODEC, rate=rate, options=CODEC_OPTIONS)
    stream.height, stream.width = size
    stream.pix_fmt = "rgb24"
    stream.codec_context.thread_count = 1
    return Video(container, stream, file_index, 0, 0)
