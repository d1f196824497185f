"""Time and memory of opening and reading LeRobot and HDF5 data sets of many short episodes.

    python tests/campaigns/open_many_episodes.py [--episodes 100000]

builds a v3.0, a v2.1 and a robomimic set in a temporary folder, opens each in a process of its own,
and prints time and peak memory. In another process all numbers of the v3.0 set are read for a run.
The v2.1 set has one Parquet file and one video per camera and episode, all links to a few files:
opening lists them and reads one. The robomimic set is one file with a group per episode: opening
lists them, and their lengths are read when they are needed.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

STEPS = 20  # of an episode
CAMERAS = ("observation.images.top", "observation.images.wrist")
EPISODES_PER_FILE = 1000
COLUMNS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
MEASURE = """
import json, pathlib, resource, sys, time
import numpy as np
from vla_jax.data import readers

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

start, cpu = time.perf_counter(), time.process_time()
source = readers.open(pathlib.Path(sys.argv[1]))
opened, cpu = time.perf_counter() - start, time.process_time() - cpu
result = {"episodes": len(source.episodes), "open_s": opened, "open_cpu_s": cpu, "open_mb": peak()}
if source.kind == "lerobot_v3":
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    for index in rng.integers(0, len(source.episodes), 200):
        episode = source.episodes[int(index)]
        assert episode.columns["action"].shape[1:] == (7,)
        assert episode.columns["episode_index"][0] == index
    result["random_ms"] = (time.perf_counter() - start) / 200 * 1e3
    start = time.perf_counter()
    count = min(len(source.episodes), 10000)
    for index in range(count):
        source.episodes[index].columns["action"]
    result["in_order_ms"] = (time.perf_counter() - start) / count * 1e3
    result["read_mb"] = peak()
if source.kind == "robomimic":
    start, cpu = time.perf_counter(), time.process_time()
    assert source.lengths.sum() == 20 * len(source.episodes)
    result["lengths_s"] = time.perf_counter() - start
    result["lengths_cpu_s"] = time.process_time() - cpu
    result["read_mb"] = peak()
print(json.dumps(result))
"""


def features():
    """`features` of info.json."""
    video = {"dtype": "video", "shape": [64, 64, 3], "names": ["height", "width", "channels"]}
    numbers = {
        "action": {"dtype": "float32", "shape": [7], "names": None},
        "observation.state": {"dtype": "float32", "shape": [8], "names": None},
        **{
            name: {"dtype": "float32" if name == "timestamp" else "int64", "shape": [1]}
            for name in COLUMNS
        },
    }
    return {**dict.fromkeys(CAMERAS, video), **numbers}


def rows(first, count, rng):
    """A table of the steps of some episodes."""
    episode = np.repeat(np.arange(first, first + count), STEPS)
    step = np.tile(np.arange(STEPS), count)
    columns = {
        "timestamp": (step / 10).astype(np.float32),
        "frame_index": step,
        "episode_index": episode,
        "index": episode * STEPS + step,
        "task_index": episode % 2,
    }
    for name, size in (("action", 7), ("observation.state", 8)):
        values = rng.normal(size=len(step) * size).astype(np.float32)
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values), size)
    return pa.table(columns)


def write_info(root, version, count):
    """Writes `meta/info.json`."""
    (root / "meta").mkdir(parents=True)
    info = {
        "codebase_version": version,
        "robot_type": "widowx",
        "fps": 10,
        "total_episodes": count,
        "total_frames": count * STEPS,
        "features": features(),
    }
    (root / "meta/info.json").write_text(json.dumps(info))


def build_v3(root, count):
    """Writes a set of lerobot's layout: a row group per episode, many episodes per file."""
    write_info(root, "v3.0", count)
    tasks = pa.table({"task_index": [0, 1], "task": ["lift", "push"]})
    pq.write_table(tasks, root / "meta/tasks.parquet")
    index = np.arange(count)
    file, place = index // EPISODES_PER_FILE, index % EPISODES_PER_FILE
    columns = {
        "episode_index": index,
        "tasks": [["lift"]] * count,
        "length": np.full(count, STEPS),
        "data/chunk_index": np.zeros(count, int),
        "data/file_index": file,
    }
    for key in CAMERAS:
        columns[f"videos/{key}/chunk_index"] = np.zeros(count, int)
        columns[f"videos/{key}/file_index"] = file
        columns[f"videos/{key}/from_timestamp"] = place * STEPS / 10
    for name in ("min", "max", "mean", "std"):  # lerobot has such columns for every feature
        values = pa.array(np.zeros(count * 7))
        columns[f"stats/action/{name}"] = pa.FixedSizeListArray.from_arrays(values, 7)
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    pq.write_table(pa.table(columns), root / "meta/episodes/chunk-000/file-000.parquet")
    rng = np.random.default_rng(0)
    for number in range(int(file[-1]) + 1):
        names = [f"data/chunk-000/file-{number:03d}.parquet"]
        names += [f"videos/{key}/chunk-000/file-{number:03d}.mp4" for key in CAMERAS]
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        inside = int((file == number).sum())
        table = rows(number * EPISODES_PER_FILE, inside, rng)
        pq.write_table(table, root / names[0], row_group_size=STEPS)


def build_v2(root, count):
    """Writes a set with one file per episode, all links to the same one."""
    write_info(root, "v2.1", count)
    (root / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "lift"}\n')
    with (root / "meta/episodes.jsonl").open("w") as file:
        for index in range(count):
            row = {"episode_index": index, "tasks": ["lift"], "length": STEPS}
            file.write(json.dumps(row) + "\n")
    table = rows(0, 1, np.random.default_rng(0))
    for index in range(count):
        chunk = f"chunk-{index // 1000:03d}"
        names = [f"data/{chunk}/episode_{index:06d}.parquet"]
        names += [f"videos/{chunk}/{key}/episode_{index:06d}.mp4" for key in CAMERAS]
        if index % 1000 == 0:
            original = root / f"meta/{chunk}.parquet"  # a file has at most 65,000 links
            pq.write_table(table, original)
        for name in names:
            if index % 1000 == 0:
                (root / name).parent.mkdir(parents=True)
            os.link(original, root / name)


def build_robomimic(root, count):
    """Writes one file with a group per demo, images of 4 x 4 pixels."""
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    action, pose = rng.uniform(-1, 1, (STEPS, 7)), rng.normal(size=(STEPS, 3))
    images = rng.integers(0, 256, (STEPS, 4, 4, 3), np.uint8)
    with h5py.File(root / "image.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"type": 1, "env_kwargs": {"control_freq": 20}})
        for index in range(count):
            group = data.create_group(f"demo_{index}")
            group.attrs["num_samples"] = STEPS
            group["actions"] = action
            group["obs/robot0_eef_pos"] = pose
            group["obs/agentview_image"] = images


def measure(root, script):
    """Runs a script on a data set in a new process; returns its measurements."""
    command = [sys.executable, "-c", script, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


READ = """
import json, pathlib, resource, sys, time
from vla_jax.data import normalize
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.data.readers.reader import read_dataset

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

cpu, before = time.process_time(), peak()
dataset = read_dataset(DatasetConfig(sys.argv[1], grippers=()), cameras=())
result = {"read_cpu_s": time.process_time() - cpu, "start_mb": before, "read_mb": peak()}
cpu = time.process_time()
normalize.compute_norm_stats(dataset)
result |= {"stats_cpu_s": time.process_time() - cpu, "stats_mb": peak()}
result["numbers_mb"] = sum(column.nbytes for column in dataset.columns.values()) / 2**20
print(json.dumps(result))
"""
BUILDERS = {"v3.0": build_v3, "v2.1": build_v2, "robomimic": build_robomimic}


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=100_000)
    count = parser.parse_args().episodes
    with tempfile.TemporaryDirectory() as folder:
        for version, build in BUILDERS.items():
            root = pathlib.Path(folder) / version
            build(root, count)
            for script in (MEASURE, READ) if version == "v3.0" else (MEASURE,):
                result = {name: round(value, 2) for name, value in measure(root, script).items()}
                print(version, json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
