"""Small RLDS data sets for tests, written without TensorFlow."""

import io
import json
import struct

import numpy as np
from PIL import Image

from vla_jax.data.readers.rlds.record_files import masked_crc32c


def varint(number):
    encoded = bytearray()
    number %= 2**64
    while True:
        encoded.append(number & 0x7F | (0x80 if number > 0x7F else 0))
        number >>= 7
        if not number:
            return bytes(encoded)


def delimited(field, content):
    return varint(field << 3 | 2) + varint(len(content)) + content


def feature(values):
    """A `Feature` of texts, bytes, integers or floats."""
    if isinstance(values, list):
        encoded = [v.encode() if isinstance(v, str) else v for v in values]
        return delimited(1, b"".join(delimited(1, v) for v in encoded))
    values = np.asarray(values).ravel()
    if values.dtype.kind == "f":
        return delimited(2, delimited(1, values.astype("<f4").tobytes()))
    return delimited(3, delimited(1, b"".join(varint(int(v)) for v in values)))


def example(features):
    entries = (delimited(1, key.encode()) + delimited(2, feature(v)) for key, v in features.items())
    return delimited(1, b"".join(delimited(1, entry) for entry in entries))


def record(data):
    """A record of a TFRecord file."""
    length = struct.pack("<Q", len(data))
    crcs = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
    return length + crcs[0] + data + crcs[1]


def encode(image, kind="png"):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def tensor(dtype, *shape):
    return {"tensor": {"dtype": dtype, "shape": {"dimensions": [str(s) for s in shape]}}}


def image(*shape):
    return {"image": {"shape": {"dimensions": [str(s) for s in shape]}, "dtype": "uint8"}}


def members(features):
    return {"featuresDict": {"features": features}}


def sequence(feature, length=-1):
    return {"sequence": {"feature": feature, "length": str(length)}}


TEXT = {"text": {}}
STEP = {
    "observation": members({"image": image(6, 8, 3), "state": tensor("float64", 3)}),
    "action": tensor("float64", 14),
    "language_instruction": TEXT,
    "is_first": tensor("bool"),
}
METADATA = {"episode_metadata": members({"file_path": TEXT, "success": tensor("bool")})}


def episode(length, number=0):
    """Features of an episode of `STEP`."""
    rng = np.random.default_rng(number)
    pictures = rng.integers(0, 255, (length, 6, 8, 3), np.uint8)
    return {
        "steps/observation/image": [encode(each) for each in pictures],
        "steps/observation/state": rng.normal(size=(length, 3)),
        "steps/action": rng.normal(size=(length, 14)),
        "steps/language_instruction": [f"grüß {number} 你好"] * length,
        "steps/is_first": np.arange(length) == 0,
        "episode_metadata/file_path": [f"/data/é{number}"],
        "episode_metadata/success": np.array([number % 2]),
    }


def write(root, splits, step=None, rest=None, name="tiny", info=None):
    """Writes a data set.

    Args:
      root: folder of the version.
      splits: split -> files -> episodes, each a mapping of features.
      step: types of a step; None means `STEP`.
      rest: types outside the steps; None means `METADATA`.
      name: of the data set.
      info: changes of dataset_info.json.
    """
    root.mkdir(parents=True)
    for split, files in splits.items():
        for number, episodes in enumerate(files):
            path = root / f"{name}-{split}.tfrecord-{number:05d}-of-{len(files):05d}"
            path.write_bytes(b"".join(record(example(each)) for each in episodes))
    described = [
        {"name": split, "shardLengths": [str(len(file)) for file in files]}
        for split, files in splits.items()
    ]
    info = {"name": name, "fileFormat": "tfrecord", "splits": described, **(info or {})}
    (root / "dataset_info.json").write_text(json.dumps(info))
    top = {"steps": sequence(members(step or STEP)), **(METADATA if rest is None else rest)}
    (root / "features.json").write_text(json.dumps(members(top)))
    return root
