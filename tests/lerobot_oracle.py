"""Reads data sets with lerobot itself; run by hand, in an environment of its own.

    python tests/lerobot_oracle.py FOLDER ... --out readings

Needs lerobot 0.4.4, torch and PyAV, not this library and not torchvision: what lerobot uses of
torchvision to read, `io.VideoReader` on PyAV and `ToTensor`, is replaced by the same few lines.
Every number, text and picture of `LeRobotDataset[i]` goes into `FOLDER.npz`, and the versions into
`versions.json`.
"""

import argparse
import importlib.metadata
import json
import pathlib
import sys
import types

import av
import numpy as np
import torch


class VideoReader:
    """The reader that lerobot's decode_video_frames_torchvision calls."""

    def __init__(self, path, stream):
        self.container = av.open(path)

    def seek(self, time, keyframes_only=False):
        offset = round(time * 1_000_000)
        self.container.seek(offset, any_frame=False, backward=True)

    def __iter__(self):
        for frame in self.container.decode(video=0):
            data = torch.as_tensor(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
            yield {"data": data, "pts": frame.time}


def install_torchvision():
    """Registers a module "torchvision" with what the reading of data sets uses."""
    import datasets  # noqa: F401  before: it looks for the real torchvision

    names = ("torchvision", "torchvision.io", "torchvision.transforms", "torchvision.transforms.v2")
    modules = {name: types.ModuleType(name) for name in names}
    root, io, transforms, v2 = modules.values()
    root.set_video_backend = lambda name: None
    root.io, root.transforms, transforms.v2 = io, transforms, v2
    io.VideoReader = VideoReader
    v2.Transform, v2.functional = torch.nn.Module, types.ModuleType("functional")
    transforms.ToTensor = lambda: None
    sys.modules |= modules


def read(folder):
    """Returns feature -> values of all frames, as lerobot gives them one by one."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset(folder.name, root=folder, video_backend="pyav")
    items = [dataset[i] for i in range(len(dataset))]
    values = {}
    for key in items[0]:
        column = [item[key] for item in items]
        is_tensor = isinstance(column[0], torch.Tensor)
        values[key] = np.stack([v.numpy() for v in column]) if is_tensor else np.array(column)
    for key in dataset.meta.video_keys:
        values[key] = np.rint(255 * values[key]).astype(np.uint8).transpose(0, 2, 3, 1)
    rows = dataset.meta.episodes
    values["episodes/length"] = np.array(rows["length"])
    values["episodes/from"] = np.array(rows["dataset_from_index"])
    for key, stats in dataset.meta.stats.items():
        values |= {f"stats/{key}/{name}": np.asarray(value) for name, value in stats.items()}
    return values


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    options = parser.parse_args()
    install_torchvision()
    options.out.mkdir(parents=True, exist_ok=True)
    for folder in options.folders:
        np.savez_compressed(options.out / f"{folder.name}.npz", **read(folder))
        print(folder)
    packages = ("lerobot", "torch", "av", "datasets", "pyarrow", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    (options.out / "versions.json").write_text(json.dumps(versions, indent=2))


if __name__ == "__main__":
    main()
