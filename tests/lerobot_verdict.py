"""Makes `golden/lerobot_verdict.json`: what lerobot reads of the data sets that we convert.

    python tests/lerobot_verdict.py convert FOLDER
    python tests/lerobot_oracle.py FOLDER/* --out READINGS      # where lerobot is installed
    python tests/lerobot_verdict.py compare FOLDER READINGS

`compare` stops at the first number, text or picture that lerobot reads otherwise than this library,
which tests compare with the source. The verdict holds a hash of the content of each converted set,
without pictures: as long as a conversion has this hash, lerobot reads it.
"""

import json
import pathlib
import sys

import numpy as np
import pyarrow.parquet as pq
import tiny_raw

from vla_jax.convert_data import ConvertDataConfig, convert_data
from vla_jax.data.conversion import conversion_parts
from vla_jax.data.conversion.conversion_plan import make_plan
from vla_jax.data.conversion.conversion_run import convert
from vla_jax.data.dataset import digest
from vla_jax.data.readers.reader import open_source

HERE = pathlib.Path(__file__).parent
VERDICT = HERE / "golden/lerobot_verdict.json"
SETS = {  # folder of tests/datasets -> options
    "calvin": ConvertDataConfig(num_workers=0),
    "lerobot_v21": ConvertDataConfig(num_workers=0),
    "lerobot_v30": ConvertDataConfig(num_workers=0),
    "libero": ConvertDataConfig(num_workers=0),
    "rlds": ConvertDataConfig(num_workers=0, fps=10),
    "robomimic": ConvertDataConfig(num_workers=0),
}


def convert_set(name, root):
    """Converts a data set of tests/datasets, or "tiny": columns of all types, in three parts."""
    if name in SETS:
        return convert_data(HERE / "datasets" / name / "dataset", root, SETS[name]).root
    raw = tiny_raw.make_raw(tiny_raw.make_episodes(), "nowhere")
    before = conversion_parts.PART_FRAMES
    conversion_parts.PART_FRAMES = 10
    try:
        return convert(raw, root, make_plan(raw, tiny_raw.FIELDS)).root
    finally:
        conversion_parts.PART_FRAMES = before


def content(root):
    """Hash of everything that lerobot reads of a data set, except pictures and statistics."""
    info = json.loads((root / "meta/info.json").read_text())
    parts: list = [sorted(info), info["features"], info["fps"], info["splits"]]
    for path in sorted(root.glob("**/*.parquet")):
        table = pq.read_table(path)
        names = [name for name in table.column_names if not name.startswith("stats/")]
        types = [
            str(kind).replace("element:", "item:") for kind in table.select(names).schema.types
        ]
        parts += [path.relative_to(root).as_posix(), types]
        parts += [(name, table[name].to_pylist()) for name in names]
    parts += sorted(path.relative_to(root).as_posix() for path in root.glob("videos/**/*.mp4"))
    return digest(*parts)


def compare(root, reading):
    """Compares what lerobot and this library read; returns the number of frames."""
    source, start = open_source(root), 0
    for episode in source.episodes:
        rows = slice(start, start + len(episode.timestamps))
        start = rows.stop
        for key, values in episode.columns.items():
            found = reading[key][rows]
            np.testing.assert_array_equal(found.reshape(values.shape), values, err_msg=key)
            assert found.dtype == values.dtype or values.dtype.kind == "U", key
        for key, images in episode.images.items():
            np.testing.assert_array_equal(reading[key][rows], images[:], err_msg=key)
        assert reading["task"][rows].tolist() == list(episode.instructions)
    np.testing.assert_array_equal(reading["episodes/length"], source.lengths)
    assert start == len(reading["index"])
    return start


def main():
    command, folder, *rest = sys.argv[1:]
    names = [*SETS, "tiny"]
    if command == "convert":
        for name in names:
            print(convert_set(name, pathlib.Path(folder) / name))
        return
    readings = pathlib.Path(rest[0])
    sets = {}
    for name in names:
        root = pathlib.Path(folder) / name
        with np.load(readings / f"{name}.npz") as reading:
            sets[name] = {"content": content(root), "frames": compare(root, reading)}
    versions = json.loads((readings / "versions.json").read_text())
    VERDICT.write_text(json.dumps({"read_by": versions, "sets": sets}, indent=2) + "\n")


if __name__ == "__main__":
    main()
