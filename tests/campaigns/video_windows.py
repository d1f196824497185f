"""Windows per second from video, against lerobot's own LeRobotDataset in the same run.

    python tests/campaigns/video_windows.py --lerobot-python LEROBOT_ENV/bin/python

Writes small LeRobot v3.0 data sets (two cameras, a key frame every 2 frames, as lerobot does), then
reads windows of 16 steps in random order: by this library without and with a warm cache, and by
lerobot with PyAV in an environment of its own (see tests/lerobot_oracle.py). Both read in one
process, and with two workers (threads here, processes of DataLoader there).
"""

import argparse
import concurrent.futures
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import av
import numpy as np

from vla_jax.data.dataset import Episode, episode_starts
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.data.readers.lerobot import writer
from vla_jax.data.readers.reader import read_dataset

NUM_EPISODES, LENGTH, WINDOW, FPS = 12, 100, 16, 10
CODECS = {"H.264": ("libx264", {"crf": "30"}), "AV1": ("libsvtav1", {"crf": "30", "preset": "12"})}
PEER = """
import json, pathlib, sys, time
sys.path.insert(0, sys.argv[1])
import lerobot_oracle
lerobot_oracle.install_torchvision()
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
folder, ends, workers = pathlib.Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
times = [i / 10 for i in range(-15, 1)]
keys = ["observation.images.primary", "observation.images.wrist"]
data = LeRobotDataset("x", root=folder, video_backend="pyav",
                      delta_timestamps={key: times for key in keys})
data[ends[0]]
start = time.perf_counter()
if workers:
    subset = torch.utils.data.Subset(data, ends)
    for _ in torch.utils.data.DataLoader(subset, batch_size=None, num_workers=workers):
        pass
else:
    for end in ends:
        data[end]
print(len(ends) / (time.perf_counter() - start))
"""


def episodes(size: int):
    """Yields episodes of smooth pictures with a moving spot, two cameras."""
    y, x = np.mgrid[:size, :size] / size
    for number in range(NUM_EPISODES):
        t = np.arange(LENGTH)[:, None, None]
        waves = [np.sin(6 * x + 3 * y + 0.05 * t + number + c) for c in range(3)]
        images = (127 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)
        for step in range(LENGTH):
            column = (3 * step) % (size - 8)
            images[step, 8:16, column : column + 8] = 255
        observation = {"image_primary": images, "image_wrist": images[:, ::-1]}
        yield Episode(observation, np.ones((LENGTH, 7), np.float32), "move the spot")


def encode(path: pathlib.Path, codec: str, options: dict[str, str]) -> None:
    """Encodes a video anew, as lerobot does: yuv420p, a key frame every 2 frames."""
    new = path.with_suffix(".new.mp4")
    with av.open(str(path)) as source, av.open(str(new), "w") as target:
        first = source.streams.video[0]
        stream = target.add_stream(codec, rate=FPS, options={"g": "2", **options})
        stream.width, stream.height, stream.pix_fmt = first.width, first.height, "yuv420p"
        for frame in source.decode(first):
            target.mux(stream.encode(frame.reformat(format="yuv420p")))
        target.mux(stream.encode())
    new.replace(path)


def ours(folder: pathlib.Path, ends: list[int], workers: int, cache_bytes: int) -> list[float]:
    """Returns windows per second of a first pass and of a second one."""
    data = read_dataset(DatasetConfig(str(folder), cache_bytes=cache_bytes))
    starts = episode_starts(data.episode_ends)

    def window(end: int) -> None:
        start = starts[np.searchsorted(data.episode_ends, end, side="right")]
        rows = np.maximum(np.arange(end - WINDOW + 1, end + 1), start)
        for frames in data.frames.values():
            frames[rows]

    speeds = []
    window(ends[0])
    for _ in range(2):
        begin = time.perf_counter()
        if workers:
            with concurrent.futures.ThreadPoolExecutor(workers) as pool:
                list(pool.map(window, ends))
        else:
            for end in ends:
                window(end)
        speeds.append(len(ends) / (time.perf_counter() - begin))
    return speeds


def main() -> None:
    """Prints one row per codec, size and number of workers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lerobot-python", default="", help="Python with lerobot 0.4.4 and PyAV")
    parser.add_argument("--num-windows", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    ends = rng.integers(WINDOW, NUM_EPISODES * LENGTH, options.num_windows).tolist()
    print("windows of 16 steps, 2 cameras, per second: median of rounds; peak RSS in MB")
    with tempfile.TemporaryDirectory() as home:
        for codec, (encoder, settings) in CODECS.items():
            for size in (64, 224):
                folder = pathlib.Path(home) / f"{codec}-{size}"
                writer.write(folder, episodes(size), fps=FPS)
                for path in folder.glob("videos/**/*.mp4"):
                    encode(path, encoder, settings)
                for workers in (0, 2):
                    row(folder, ends, workers, options, f"{codec} {size} px, {workers} workers")


def row(folder: pathlib.Path, ends: list[int], workers: int, options, name: str) -> None:
    """Measures both in turn, several rounds, and prints the medians."""
    cold, warm, peer = [], [], []
    for _ in range(options.rounds):
        cold.append(ours(folder, ends, workers, 0)[0])
        warm.append(ours(folder, ends, workers, 2**30)[1])
        if options.lerobot_python:
            here = pathlib.Path(__file__).parents[1]
            command = [options.lerobot_python, "-c", PEER, str(here), str(folder)]
            command += [json.dumps(ends), str(workers)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            peer.append(float(done.stdout.split()[-1]))
    line = f"{name}: without cache {np.median(cold):.0f}, warm cache {np.median(warm):.0f}"
    if peer:
        line += f", lerobot {np.median(peer):.0f}, ratio {np.median(cold) / np.median(peer):.1f}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{line}; {peak:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
