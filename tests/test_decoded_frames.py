"""Videos are decoded once, into memory-mapped images."""

import json
import os
import pathlib
import subprocess
import sys
from functools import partial
from typing import get_args

import av
import numpy as np
import pytest
from tiny_video import Segment, decode_segments

from vla_jax.data.raw_frames import RawFrames
from vla_jax.types import Resampling


def make_video(path, count=12, size=(16, 24), codec="libx264rgb", seed=0):
    """Writes a video of smooth frames of different brightness; returns the images."""
    ramp = np.linspace(0, 60, size[0] * size[1] * 3).reshape(*size, 3)
    images = np.stack([ramp + 12 * i + seed for i in range(count)]).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options={"crf": "1"})
        stream.height, stream.width = size
        stream.pix_fmt = "rgb24" if codec == "libx264rgb" else "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return images


@pytest.mark.parametrize(("codec", "error"), [("libx264rgb", 1.0), ("libx264", 3.0)])
def test_each_segment_is_decoded_into_its_rows(codec, error, tmp_path):
    first = make_video(tmp_path / "videos/a.mp4", codec=codec)
    second = make_video(tmp_path / "videos/b.mp4", codec=codec, seed=60)
    segments = [
        Segment(tmp_path / "videos/b.mp4", 2, 3),
        Segment(tmp_path / "videos/a.mp4", 0, 5),
        Segment(tmp_path / "videos/a.mp4", 9, 2),
    ]
    images = decode_segments(segments, tmp_path)
    expected = np.concatenate([second[2:5], first[0:5], first[9:11]])
    assert images.dtype == np.uint8
    assert np.abs(images.astype(int) - expected).mean() < error


def test_videos_are_decoded_once_and_again_only_when_they_change(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    make_video(path)
    segments = [Segment(path, 0, 12)]
    before = decode_segments(segments, tmp_path)
    assert isinstance(before, np.memmap)
    assert not before.flags.writeable
    with monkeypatch.context() as patch:
        patch.setattr(RawFrames, "__getitem__", None)
        again = decode_segments(segments, tmp_path)
        np.testing.assert_array_equal(before, again)
    make_video(path, seed=50)
    changed = decode_segments(segments, tmp_path)
    assert np.abs(changed.astype(int) - before).mean() > 40


def flip(content):
    return content[:-5] + bytes([content[-5] ^ 4]) + content[-4:]


DAMAGE = {  # change of the bytes -> sentence
    "flipped bit": (flip, "its checksum differs"),
    "flipped header": (lambda b: b[:70] + bytes([b[70] ^ 1]) + b[71:], "its checksum differs"),
    "zeroed": (lambda b: bytes(len(b)), "its checksum differs"),
    "half": (lambda b: b[: len(b) // 2], r"it has \d+ bytes instead of \d+"),
    "longer": (lambda b: b + b"x", r"it has \d+ bytes instead of \d+"),
    "empty": (lambda b: b"", r"it has 0 bytes instead of \d+"),
}


def test_damaged_images_are_refused_and_decoded_again_when_deleted(tmp_path):
    make_video(tmp_path / "a.mp4")
    segments = [Segment(tmp_path / "a.mp4", 0, 12)]
    before = decode_segments(segments, tmp_path).copy()
    (file,) = (tmp_path / ".frames").glob("*.npy")
    content = file.read_bytes()
    for change, reason in DAMAGE.values():
        file.write_bytes(change(content))
        with pytest.raises(ValueError, match=rf"npy is damaged .{reason}.; delete this file, and"):
            decode_segments(segments, tmp_path)
    file.unlink()
    np.testing.assert_array_equal(decode_segments(segments, tmp_path), before)
    file.with_suffix(".json").unlink()
    file.write_bytes(flip(content))
    with pytest.warns(UserWarning, match="has no checksum, .*; the images are decoded again"):
        np.testing.assert_array_equal(decode_segments(segments, tmp_path), before)


def test_images_of_another_camera_are_refused(tmp_path):
    decode = []
    for name in ("a", "b"):
        make_video(tmp_path / f"{name}.mp4", seed=10 * len(decode))
        segments = [Segment(tmp_path / f"{name}.mp4", 0, 12)]
        decode.append(partial(decode_segments, segments, tmp_path))
        decode[-1]()
    files = sorted((tmp_path / ".frames").glob("*"))  # .json and .npy of both
    for old, new in zip(files, (*files[2:], *files[:2]), strict=True):
        old.rename(new.with_name(f"{new.name}.new"))
    for file in files:
        file.with_name(f"{file.name}.new").rename(file)
    for each in decode:
        with pytest.raises(ValueError, match=r"npy is damaged .it was written as image_primary-"):
            each()
    for file in files[::2]:
        record = json.loads(file.read_text())
        del record["file"]
        file.write_text(json.dumps(record))
    with pytest.warns(UserWarning, match="by an earlier version, without its name"):
        decode[0]()


def test_images_are_resized_to_the_requested_size(tmp_path):
    images = make_video(tmp_path / "a.mp4")
    segments = [Segment(tmp_path / "a.mp4", 0, 12)]
    small = decode_segments(segments, tmp_path, image_size=(8, 12))
    assert small.shape == (12, 8, 12, 3)
    means = images.reshape(12, 8, 2, 12, 2, 3).mean((2, 4))
    assert np.abs(small - means).mean() < 2


def test_images_are_resized_by_the_requested_method(tmp_path):
    make_video(tmp_path / "a.mp4")
    segments = [Segment(tmp_path / "a.mp4", 0, 12)]
    size = {"image_size": (40, 60)}
    with av.open(tmp_path / "a.mp4") as container:
        frames = list(container.decode(video=0))
    for method in get_args(Resampling):
        images = decode_segments(segments, tmp_path, **size, resampling=method)
        resized = frames[3].reformat(60, 40, "rgb24", interpolation=method.upper()).to_ndarray()
        np.testing.assert_array_equal(images[3], resized)


def test_the_cache_folder_can_be_chosen_and_has_a_fallback_if_not_writable(tmp_path, monkeypatch):
    root, home = tmp_path / "data", tmp_path / "home"
    make_video(root / "a.mp4")
    segments = [Segment(root / "a.mp4", 0, 12)]
    decode_segments(segments, root, decoded_dir=str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache").glob("image_primary-*.npy"))) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.setattr(os, "access", lambda path, mode: pathlib.Path(path) != root)
    with pytest.warns(UserWarning, match="is not writable; decoded images go to"):
        decode_segments(segments, root)
    assert len(list(home.glob("vla_jax/frames/*.npy"))) == 1
    assert not (root / ".frames").exists()


def test_a_missing_video_is_refused_by_name(tmp_path):
    segments = [Segment(tmp_path / "a.mp4", 0, 12)]
    with pytest.raises(FileNotFoundError, match=r"video .*a\.mp4 is missing; copy"):
        decode_segments(segments, tmp_path)


def test_a_video_with_too_few_frames_is_refused_and_nothing_is_cached(tmp_path):
    make_video(tmp_path / "a.mp4")
    segments = [Segment(tmp_path / "a.mp4", 8, 6)]
    with pytest.raises(
        ValueError, match=r"a\.mp4 must hold a frame at 1\.2 s .*, got 12 frames from 0 s to 1\.1 s"
    ):
        decode_segments(segments, tmp_path)
    assert not list((tmp_path / ".frames").iterdir())


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.9])
def test_a_truncated_video_is_refused_by_name(kept, tmp_path):
    path = tmp_path / "a.mp4"
    make_video(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    segments = [Segment(path, 0, 12)]
    with pytest.raises(ValueError, match=r"video .*a\.mp4 cannot be decoded, the file is damaged"):
        decode_segments(segments, tmp_path)


def test_a_video_with_damaged_frames_is_refused_by_name(tmp_path):
    path = tmp_path / "a.mp4"
    make_video(path)
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 4
    content[start + 900 : start + 2000] = bytes(1100)
    path.write_bytes(content)
    segments = [Segment(path, 0, 12)]
    with pytest.raises(ValueError, match=r"video .*a\.mp4"):
        decode_segments(segments, tmp_path)


FULL_DISK = """
import pathlib, resource, sys
sys.path.insert(0, sys.argv[2])
from tiny_video import Segment, decode_segments
root = pathlib.Path(sys.argv[1])
segments = [Segment(root / "a.mp4", 0, 12)]
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    decode_segments(segments, root)
except OSError as error:
    print(error)
"""


def test_a_full_disk_raises_one_sentence(tmp_path):
    make_video(tmp_path / "a.mp4")
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(pathlib.Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "decoded images of 0 MB in" in done.stdout
    assert "free space, give another decoded_dir, or decode on demand" in done.stdout
    assert not list((tmp_path / ".frames").iterdir())


DECODER = """
import pathlib, sys
sys.path.insert(0, sys.argv[2])
from tiny_video import Segment, decode_segments
from vla_jax import folder_lock
from vla_jax.data import raw_frames
create = raw_frames._create
def create_when_asked(path, shape):
    print("decodes", flush=True)
    sys.stdin.readline()
    return create(path, shape)
raw_frames._create, folder_lock._POLL = create_when_asked, 0.1
root = pathlib.Path(sys.argv[1])
print(decode_segments([Segment(root / "a.mp4", 0, 12)], root).sum(dtype=int))
"""


def test_of_two_processes_one_decodes_and_the_other_waits_and_reads(tmp_path):
    make_video(tmp_path / "a.mp4")
    command = [sys.executable, "-c", DECODER, tmp_path, pathlib.Path(__file__).parent]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **pipes, text=True) as decoder:
        assert decoder.stdout.readline() == "decodes\n"
        with subprocess.Popen(command, **pipes, text=True) as reader:
            assert f"is in use by process {decoder.pid}" in reader.stderr.readline()
            found = decoder.communicate("go\n", timeout=120)
            read = reader.communicate(timeout=120)
    expected = decode_segments([Segment(tmp_path / "a.mp4", 0, 12)], tmp_path)
    assert found[0] == read[0] == f"{expected.sum(dtype=int)}\n", (found, read)
    assert len(list((tmp_path / ".frames").iterdir())) == 2  # images and checksum
