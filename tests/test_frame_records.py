"""Recorded frames equal decoded ones; shards are complete or absent; limits hold."""

import json
import os
import pathlib
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np
import pytest
import tiny_raw

from vla_jax.data import frame_records, frame_writer, shard_files
from vla_jax.data.dataset import Episode
from vla_jax.data.frame_cache import FrameCache
from vla_jax.data.frame_records import open_records, records_folder
from vla_jax.data.raw_frames import RawFrames
from vla_jax.data.readers.lerobot import writer

SIZE = (12, 16)
FRAME_BYTES = 12 * 16 * 3
NUM_FRAMES = sum(tiny_raw.LENGTHS)
PER_SHARD = 10
JPEG_LEVELS = 2.0  # mean difference of JPEG from the original, of 255, at most


def make_frames(size=SIZE, lengths=tiny_raw.LENGTHS):
    raw = tiny_raw.make_raw(tiny_raw.make_episodes(lengths), "data")
    episodes = np.arange(len(lengths))
    key = tiny_raw.FIELDS.cameras["image_primary"]
    return RawFrames(raw, key, FrameCache(0), episodes=episodes, image_size=size, rotate=True)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(frame_writer, "SHARD_BYTES", PER_SHARD * FRAME_BYTES)


def write(folder, images, form="raw", *, max_bytes=2**30, shards=None):
    sizes = frame_writer.prepare(folder, images, form)
    for shard in range(sizes.num_shards) if shards is None else shards:
        frame_writer.write_shard(folder, shard, sizes, images, max_bytes=max_bytes)
    return folder


@pytest.fixture(scope="module")
def images():
    return make_frames()


@pytest.fixture
def folder(images, tmp_path):
    return write(tmp_path / "image_primary-0", images)


@pytest.mark.parametrize("form", frame_records.FORMATS)
def test_recorded_frames_equal_decoded_ones_for_random_access(form, images, tmp_path):
    found = open_records(write(tmp_path, images, form), images, "image_primary")
    expected = images[:]
    assert (found.shape, found.dtype, len(found)) == (expected.shape, expected.dtype, NUM_FRAMES)
    rng = np.random.default_rng(0)
    for index in (
        3, -1, slice(None), slice(2, 33, 5), slice(None, None, -7), np.array(17),
        np.array([[0, 24, 11, 11], [9, 10, -1, 0]]), np.zeros((2, 0), int),
        *(rng.integers(-NUM_FRAMES, NUM_FRAMES, (3, 4)) for _ in range(5)),
    ):  # fmt: skip
        read, wanted = found[index], expected[index]
        assert (read.shape, read.dtype, type(read)) == (wanted.shape, wanted.dtype, np.ndarray)
        if form == "raw":
            np.testing.assert_array_equal(read, wanted)
        elif read.size:
            assert np.abs(read.astype(int) - wanted).mean() < JPEG_LEVELS
    with pytest.raises(IndexError, match=f"index must be within {NUM_FRAMES} frames"):
        found[NUM_FRAMES]
    # A training on JPEG frames is another one than on the originals.
    assert (found.fingerprint == images.fingerprint) == (form == "raw")


def test_grains_own_source_reads_the_same_records(folder, images):
    files = sorted(map(str, folder.glob("shard_*/*.array_record")))
    source = grain.sources.ArrayRecordDataSource(files)
    assert len(source) == NUM_FRAMES
    for row in (0, PER_SHARD, NUM_FRAMES - 1):
        np.testing.assert_array_equal(
            np.frombuffer(source[row], np.uint8).reshape(*SIZE, 3), images[row]
        )


def test_an_interrupted_writing_continues_after_the_last_complete_shard(images, tmp_path):
    whole = tmp_path / "whole" / "image_primary-0"
    expected = {file.name: file.read_bytes() for file in write_all(whole, images)}

    class Interrupted(RawFrames):
        def __getitem__(self, index):
            if np.any(index >= 15):
                raise KeyboardInterrupt
            return super().__getitem__(index)

    stopped = pickle.loads(pickle.dumps(images))
    stopped.__class__ = Interrupted
    folder = tmp_path / "part" / "image_primary-0"
    with pytest.raises(KeyboardInterrupt):
        write(folder, stopped)
    assert {path.name for path in folder.iterdir()} == {"frames.json", "shard_00000"}
    assert shard_files.missing(folder, 4) == [1, 2, 3]
    with pytest.raises(
        FileNotFoundError, match=r"primary-0 has 1 of 4 shards; .*--frames raw with"
    ):
        open_records(folder, images, "image_primary")
    before = (folder / "shard_00000/frames.array_record").stat().st_mtime_ns
    found = {file.name: file.read_bytes() for file in write_all(folder, images)}
    assert found == expected
    assert (folder / "shard_00000/frames.array_record").stat().st_mtime_ns == before


def write_all(folder, images):
    return sorted(write(folder, images).glob("shard_*/*"))


SENTENCE = r"shard_00001 is damaged \(.*\); delete this folder, and python -m train.cache"


def test_every_damaged_byte_gives_a_sentence_or_changes_nothing(folder, images):
    file = folder / "shard_00001/frames.array_record"
    content, expected = file.read_bytes(), images[:]
    rng, refused = np.random.default_rng(0), 0
    for place in rng.integers(0, PER_SHARD * FRAME_BYTES, 60):
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(changed)
        found = open_records(folder, images, "image_primary")  # compares sizes
        message = ""
        try:
            np.testing.assert_array_equal(found[:], expected)
        except ValueError as error:
            message = str(error)
        refused += bool(message)
        assert not message or re.search(SENTENCE, message)
        with pytest.raises(ValueError, match=r"damaged \(the checksum of frames.array_record"):
            frame_writer.check_shards([(folder, 1, found.sizes)])
    assert refused > 40
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"shard_00001 is damaged .*has \d+ bytes instead of"):
        open_records(folder, images, "image_primary")
    file.unlink()
    with pytest.raises(ValueError, match=r"shard_00001 is damaged .*No such file"):
        open_records(folder, images, "image_primary")


def test_records_of_another_shard_are_refused(folder, images):
    sizes = open_records(folder, images, "image_primary").sizes
    shutil.copytree(folder / "shard_00001", folder / "shard_00002", dirs_exist_ok=True)
    sentence = r"shard_00002 is damaged \(it was written as image_primary-0/shard_00001, frames 10 "
    with pytest.raises(ValueError, match=sentence):
        open_records(folder, images, "image_primary")
    with pytest.raises(ValueError, match=sentence):
        frame_writer.check_shards([(folder, 2, sizes)])
    folder.rename(folder.with_name("image_wrist-1"))
    with pytest.raises(
        ValueError, match=r"written as image_primary-0/shard_00000, .* instead of image_w"
    ):
        open_records(folder.with_name("image_wrist-1"), images, "image_wrist")


def test_fewer_records_than_the_index_says_are_refused(folder, images):
    shards = [folder / f"shard_0000{number}" for number in (3, 2)]
    index = [json.loads((shard / "files.json").read_text()) for shard in shards]
    shutil.copy(shards[0] / "frames.array_record", shards[1])
    (shards[1] / "files.json").write_text(json.dumps({**index[0], "place": index[1]["place"]}))
    found = open_records(folder, images, "image_primary")
    with pytest.raises(
        ValueError, match=r"shard_00002 is damaged \(it has 5 records instead of 10"
    ):
        found[25]


def test_other_sizes_data_and_formats_are_named(folder, images, tmp_path):
    other = make_frames((6, 8))
    elsewhere = records_folder(other, "image_primary", str(tmp_path))
    sentence = r"35 frames of image_primary in 6 × 8 pixels are not .*: 35 in 12 × 16\); write"
    with pytest.raises(FileNotFoundError, match=sentence):
        open_records(elsewhere, other, "image_primary")
    shorter = make_frames(lengths=(12, 7))
    for wrong in (other, shorter):
        with pytest.raises(ValueError, match=r"frames\.json does not describe these frames"):
            open_records(folder, wrong, "image_primary")
    with pytest.raises(ValueError, match=r"format 'raw', expected 'jpeg'; use --frames raw, del"):
        frame_writer.prepare(folder, images, "jpeg")
    about = folder / "frames.json"
    for change in ({"frames_per_shard": 0}, {"format": "gif"}, {"height": "12"}, {"more": 1}):
        about.write_text(json.dumps({**json.loads(about.read_text()), **change}))
        with pytest.raises(ValueError, match=r"does not describe these frames .*; delete .*"):
            open_records(folder, images, "image_primary")


@pytest.mark.parametrize("limit", [5, 20])  # images; all 80 would be 27 MB
def test_writing_and_reading_stay_below_the_limit_of_memory(limit, tmp_path, monkeypatch):
    size, lengths = (192, 192), (80,)
    monkeypatch.setattr(frame_writer, "SHARD_BYTES", 2**30)
    images = make_frames(size, lengths)
    fixed = frame_writer.FIXED_BYTES + frame_writer.DECODER_IMAGES * images.source_bytes
    max_bytes = fixed + limit * images.bytes_per_image
    folder = tmp_path / "records"
    sizes = frame_writer.prepare(folder, images, "raw")
    tracemalloc.start()
    try:
        frame_writer.write_shard(folder, 0, sizes, images, max_bytes=max_bytes)
        written = tracemalloc.get_traced_memory()[1]
        found = open_records(folder, images, "image_primary")
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        result = found[:70]
        read = tracemalloc.get_traced_memory()[1] - before - result.nbytes
    finally:
        tracemalloc.stop()
    slack = 2**21  # two blocks of a file while its checksum is computed
    assert written < max_bytes - fixed + slack
    assert read < frame_records._READ_BYTES + slack
    with pytest.raises(ValueError, match=r"cache_bytes must be at least \d+, .* raise --dataset"):
        write(tmp_path / "less", images, max_bytes=fixed + images.bytes_per_image - 1)


PEAK = """
import pathlib, sys
import numpy as np
from vla_jax.data import frame_writer
from vla_jax.data.frame_records import open_records
from vla_jax.data.readers.dataset_config import DatasetConfig
from vla_jax.data.readers.reader import read_dataset
import array_record.python.array_record_module

def memory(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

config = DatasetConfig(sys.argv[1], cache_bytes=0)
images = read_dataset(config, image_size=(192, 192)).frames["image_primary"]
images[:2]
pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
before, folder = memory("VmRSS"), pathlib.Path(sys.argv[1], "records")
sizes = frame_writer.prepare(folder, images, "raw")
frame_writer.write_shard(folder, 0, sizes, images, max_bytes=int(sys.argv[2]))
print(memory("VmHWM") - before)
frames = open_records(folder, images, "image_primary")
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
for start in range(0, len(frames), 4):
    frames[start : start + 4]
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="outside Linux")
@pytest.mark.parametrize("limit", [2**25, 2**26])
def test_the_memory_of_the_process_grows_by_less_than_the_limit(limit, tmp_path):
    action = np.where(np.arange(1000).reshape(500, 2) % 3 > 0, 1, -1).astype(np.float32)
    episodes = (
        Episode({"image_primary": tiny_raw.draw(500, 128, 160, seed)}, action, "wait")
        for seed in range(2)
    )
    root = writer.write(tmp_path / "data", episodes, fps=10)
    command = [sys.executable, "-c", PEAK, str(root), str(limit)]
    # One heap: ArrayRecord reads in a pool of 64 threads, and each heap of glibc keeps a freed
    # record, so that the peak would depend on how many threads had a turn.
    one_heap = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=one_heap)
    assert done.returncode == 0, done.stderr
    written, read = map(int, done.stdout.split())
    assert written < limit  # all images are 110 MB
    assert read < 2**22


def test_a_copy_in_another_process_and_threads_read_the_same(folder, images, monkeypatch):
    monkeypatch.setattr(frame_records, "MAX_OPEN", 1)
    found, expected = open_records(folder, images, "image_primary"), images[:]
    found[:]
    assert len(found._readers) == 1
    copy = pickle.loads(pickle.dumps(found))
    assert not copy._readers

    def work(seed):
        for rows in np.random.default_rng(seed).integers(0, NUM_FRAMES, (20, 5)):
            np.testing.assert_array_equal(copy[rows], expected[rows])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


HOLD = """
import pathlib, sys, time
from vla_jax import folder_lock
with folder_lock.hold(pathlib.Path(sys.argv[1]), "shard", "wait"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_shard_is_written_by_one_process_which_may_be_killed(images, tmp_path):
    frame_writer.prepare(tmp_path, images, "raw")
    command = [sys.executable, "-c", HOLD, str(tmp_path / "shard_00000.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=r"shard_00000 is in use by process \d+ .*dir"):
            write(tmp_path, images)
        other.send_signal(signal.SIGKILL)
        other.wait()
    write(tmp_path, images)
    np.testing.assert_array_equal(open_records(tmp_path, images, "image_primary")[:], images[:])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"frames.json", *(f"shard_0000{i}" for i in range(4))}


def test_a_full_disk_raises_one_sentence_and_leaves_complete_shards(images, tmp_path, monkeypatch):
    monkeypatch.setattr(frame_writer, "SHARD_BYTES", 2**30)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OSError, match=r"shard_00000 could not be written \(File too large\); "):
            write(tmp_path, images)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert [path.name for path in tmp_path.iterdir()] == ["frames.json"]


@pytest.mark.parametrize(("package", "form"), [("array_record.python", "raw"), ("PIL", "jpeg")])
def test_a_missing_package_is_named_with_its_extra(package, form, images, tmp_path, monkeypatch):
    found = open_records(write(tmp_path / "whole", images, form), images, "image_primary")
    monkeypatch.setitem(sys.modules, package, None)
    for use in (lambda: found[0], lambda: write(tmp_path / "new", images, form)):
        with pytest.raises(ImportError, match=r"need .*: pip install 'vla-jax\[data\]'"):
            use()
    assert not list((tmp_path / "new").glob("shard*"))


def test_frames_beside_a_data_set_that_cannot_be_written_are_found(images, tmp_path, monkeypatch):
    images = pickle.loads(pickle.dumps(images))
    images.root = tmp_path / "data"
    name = f"image_primary-{images.fingerprint}"
    write(tmp_path / "data/.frames" / name, images)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    found = records_folder(images, "image_primary", None)
    assert found == tmp_path / "data/.frames" / name
