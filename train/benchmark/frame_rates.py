"""Frames per second from videos and from recorded frames, and the stage that takes the time.

Synthetic episodes of one camera are recorded with the library's own writer, and their videos are
encoded anew as the tools of other data sets write them. Windows in random order are read

- by one thread: frames per second of CPU time, and the share of each stage in the time;
- by the loader with threads, and with worker processes: frames per second.

All files are in memory (the page cache of the system): the disk is not measured.
"""

import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np

from train.benchmark.cases import BenchmarkSizes, VideoSizes
from train.benchmark.system import Measurement, measured
from vla_jax.data import array_records, frame_writer, normalize
from vla_jax.data.dataset import Dataset, Episode
from vla_jax.data.frame_records import FORMATS, RECORDS, FrameFormat, records_folder
from vla_jax.data.loader import LoaderConfig, make_loader
from vla_jax.data.raw_frames import RawFrames
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.data.readers.lerobot import writer
from vla_jax.data.readers.reader import read_dataset
from vla_jax.data.shard_files import shard_folder
from vla_jax.data.video_files import open_video
from vla_jax.data.windows import WindowConfig, Windows

CAMERA = "image_primary"
FPS = 10  # Hz
ROUNDS = 3  # of reading by one thread
BATCH = 4  # B of the loader, windows
Shares = Mapping[str, float]  # stage -> seconds
# name -> encoder and options; a key frame every two frames and the quality of AV1 are lerobot's
CODECS: dict[str, tuple[str, dict[str, str]]] = {
    "H.264": ("libx264", {"crf": "23", "g": "2"}),
    "AV1": ("libsvtav1", {"crf": "30", "g": "2", "preset": "12"}),
}


class FrameSource(NamedTuple):
    """Images of one kind."""

    setting: str
    kilobytes: float  # of an image in the file
    windows: Windows
    stages: Callable[[np.ndarray], Shares]  # of reading windows `[B]`


def frames(sizes: BenchmarkSizes) -> Iterator[Measurement]:
    """Yields frames per second of every codec and of recorded frames, and their ratios."""
    for video in sizes.videos:
        with tempfile.TemporaryDirectory() as home:
            yield from _measure(video, sizes.workers, pathlib.Path(home))


def _measure(
    video: VideoSizes, workers: tuple[int, ...], home: pathlib.Path
) -> Iterator[Measurement]:
    sources = []
    for codec, encoding in CODECS.items():
        folder = home / codec
        writer.write(folder, _draw_episodes(video), fps=FPS)
        (path,) = folder.glob("videos/**/*.mp4")
        _encode(path, *encoding)
        sources.append(_video_source(codec, folder, path, video))
    sources += [_recorded_source(form, home / "H.264", video) for form in FORMATS]

    # Alternating, so that other programs on the machine slow down all of them.
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(sources[0].windows), size=(ROUNDS, video.num_windows))
    num_frames = video.num_windows * video.window_size
    rates = [[num_frames / _cpu_seconds(each, rows) for each in sources] for rows in drawn]
    by_source = list(zip(*rates, strict=True))
    for source, own in zip(sources, by_source, strict=True):
        yield measured("frames", source.setting, "size in the file", [source.kilobytes], "kB/frame")
        yield measured("frames", source.setting, "one core", own, "frames/s")
        ratios = np.divide(own, by_source[0])
        yield measured("frames", source.setting, "one core, / H.264", ratios, "")
        shares = source.stages(drawn[0])
        for stage, seconds in shares.items():
            share = 100 * seconds / sum(shares.values())
            yield measured("frames", source.setting, f"one core, {stage}", [share], "% of time")
    for count in workers:
        for kind, config in {
            "threads": LoaderConfig(BATCH, num_threads=count, prefetch=2 * count),
            "processes": LoaderConfig(BATCH, num_workers=count),
        }.items():
            loaded = [_loader_rate(source.windows, video, config) for source in sources]
            quantity = f"loader, {count} {kind}"
            for source, rate in zip(sources, loaded, strict=True):
                yield measured("frames", source.setting, quantity, [rate], "frames/s")
                ratio = [rate / loaded[0]]
                yield measured("frames", source.setting, f"{quantity}, / H.264", ratio, "")


def _draw_episodes(video: VideoSizes) -> Iterator[Episode]:
    """Yields episodes of a textured scene that moves, with a block in front of it."""
    rng, (h, w) = np.random.default_rng(0), (video.height, video.width)
    y, x = np.mgrid[:h, :w] / h
    for number in range(video.num_episodes):
        waves = np.stack([np.sin(6 * x + 3 * y + number + c) for c in range(3)], axis=-1)
        scene = (120 + 70 * waves + rng.normal(scale=video.texture, size=(h, w, 1))).clip(0, 255)
        images = np.stack([np.roll(scene, 2 * step, axis=1) for step in range(video.num_steps)])
        for step, image in enumerate(images):
            start = 3 * step % (w - w // 8)
            image[h // 8 : h // 4, start : start + w // 8] = 230
        action = rng.uniform(-1, 1, (video.num_steps, 7)).astype(np.float32)
        yield Episode({CAMERA: images.astype(np.uint8)}, action, "move the block")


def _encode(path: pathlib.Path, codec: str, options: dict[str, str]) -> None:
    """Encodes a video anew, with half the resolution of colours (yuv420p)."""
    import av

    new = path.with_suffix(".new.mp4")
    with av.open(str(path)) as source, av.open(str(new), "w") as target:
        first = source.streams.video[0]
        stream: Any = target.add_stream(codec, rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = first.width, first.height, "yuv420p"
        for frame in source.decode(first):
            target.mux(stream.encode(frame.reformat(format="yuv420p")))
        target.mux(stream.encode())
    new.replace(path)


def _read(folder: pathlib.Path, video: VideoSizes, **options: str) -> Dataset:
    size = (video.image_size, video.image_size)
    config = replace(DatasetConfig(str(folder), cache_bytes=0), **options)
    return read_dataset(config, cameras=[CAMERA], image_size=size)


def _windows(data: Dataset, video: VideoSizes) -> Windows:
    return Windows(
        data,
        WindowConfig(video.window_size),
        tokenize=lambda text: np.zeros(1, np.int32),
        norm_stats=normalize.compute_norm_stats(data),
    )


def _video_source(
    codec: str, folder: pathlib.Path, path: pathlib.Path, video: VideoSizes
) -> FrameSource:
    """Returns images that are decoded on demand from a video."""
    windows = _windows(_read(folder, video), video)
    setting = f"{codec} {video.height} × {video.width}, to {video.image_size} × {video.image_size}"
    stages = partial(_video_stages, path, windows, video)
    return FrameSource(setting, _kilobytes(path, windows), windows, stages)


def _recorded_source(form: str, folder: pathlib.Path, video: VideoSizes) -> FrameSource:
    """Returns recorded images of a video, which are written here."""
    images = cast(RawFrames, _read(folder, video).frames[CAMERA])
    home = folder.with_name(form)
    records = records_folder(images, CAMERA, str(home))
    sizes = frame_writer.prepare(records, images, cast(FrameFormat, form))
    for shard in range(sizes.num_shards):
        frame_writer.write_shard(records, shard, sizes, images, max_bytes=2**28)
    windows = _windows(_read(folder, video, decode="records", decoded_dir=str(home)), video)
    path = shard_folder(records, 0) / RECORDS
    setting = f"recorded, {form} {video.image_size} × {video.image_size}"
    stages = partial(_record_stages, path, form, windows)
    return FrameSource(setting, _kilobytes(path, windows), windows, stages)


def _kilobytes(path: pathlib.Path, windows: Windows) -> float:
    """Returns the size of an image in the only file of a camera, kB."""
    return path.stat().st_size / 1e3 / int(windows.dataset.episode_ends[-1])


def _video_stages(
    path: pathlib.Path, windows: Windows, video: VideoSizes, rows: np.ndarray
) -> Shares:
    """Returns the time of each stage for some windows, by the steps of `video_pieces.decode`."""
    from av.video.reformatter import VideoReformatter

    seconds: dict[str, float] = dict.fromkeys(("decode", "resize", "copy"), 0.0)
    scaler = VideoReformatter()
    size = video.image_size
    with open_video(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for first, last in _spans(windows, rows):
            container.seek(round(first / FPS / float(stream.time_base)), stream=stream)
            decoder = container.decode(stream)
            time_of_last = (last - 0.5) / FPS
            while True:
                began = time.perf_counter()
                frame = next(decoder)
                decoded = time.perf_counter()
                resized = scaler.reformat(frame, size, size, "rgb24", interpolation="AREA")
                scaled = time.perf_counter()
                resized.to_ndarray()
                seconds["decode"] += decoded - began
                seconds["resize"] += scaled - decoded
                seconds["copy"] += time.perf_counter() - scaled
                if frame.time > time_of_last:
                    break
    return seconds


def _record_stages(path: pathlib.Path, form: str, windows: Windows, rows: np.ndarray) -> Shares:
    """Returns the time of each stage for some windows, by the steps of `frame_records`."""
    seconds: dict[str, float] = dict.fromkeys(("read", "decode", "copy"), 0.0)
    reader, decode = array_records.open_reader(path), FORMATS[form].decode
    size = windows.dataset.frames[CAMERA].shape[1:3]
    image = np.empty((*size, 3), np.uint8)
    for first, last in _spans(windows, rows):
        for number in range(first, last + 1):
            began = time.perf_counter()
            (record,) = reader.read([number])
            read = time.perf_counter()
            decoded = decode(record, (size[0], size[1]))
            finished = time.perf_counter()
            image[:] = decoded
            seconds["read"] += read - began
            seconds["decode"] += finished - read
            seconds["copy"] += time.perf_counter() - finished
    return seconds


def _spans(windows: Windows, rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yields the first and last frame of each window in the file of all episodes."""
    ends = windows.dataset.episode_ends
    for row in rows:
        episode, last = windows.index.place(row)
        start = int(ends[episode - 1]) if episode else 0
        yield start + max(0, int(last) + 1 - windows.config.window_size), start + int(last)


def _cpu_seconds(source: FrameSource, rows: np.ndarray) -> float:
    """Returns the CPU time of this process to read windows one by one."""
    began = time.process_time()
    for row in rows:
        source.windows[row[None]]
    return time.process_time() - began


def _loader_rate(windows: Windows, video: VideoSizes, config: LoaderConfig) -> float:
    """Returns frames per second of the loader, without those that were ready at the start."""
    count, num_ready = 0, config.prefetch * max(config.num_workers, 1)
    with make_loader(windows, config) as batches:
        for _ in range(num_ready + max(config.num_workers, config.num_threads)):
            next(batches)
        began = time.perf_counter()
        while count < num_ready or time.perf_counter() - began < video.seconds:
            next(batches)
            count += 1
        elapsed = time.perf_counter() - began
    return count * BATCH * video.window_size / elapsed
