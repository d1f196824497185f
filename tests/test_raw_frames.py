"""Images decoded on demand equal those of whole files, whatever the cache holds."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest
import tiny_lerobot
from tiny_lerobot import make_episodes
from tiny_video import Segment, open_frames

from vla_jax.data import video_pieces
from vla_jax.data.frame_cache import FrameCache
from vla_jax.data.readers.lerobot import writer
from vla_jax.data.video_files import open_video, read_index

SIZE = (16, 24)
FRAME_BYTES = 16 * 24 * 3
NUM_FRAMES = (41, 1, 26)  # per file
VIDEOS = {  # codec, file ending and encoder options
    "groups of 10": ("libx264rgb", "mp4", {"g": "10", "crf": "18"}),
    "one group": ("libx264rgb", "mp4", {"g": "250", "crf": "18"}),
    "every frame a key frame": ("libx264", "mp4", {"g": "1"}),
    "reordered frames": ("libx264", "mp4", {"g": "12", "bf": "3"}),
    "open groups": ("libx264", "mp4", {"g": "12", "bf": "3", "x264-params": "open-gop=1"}),
    "open groups, HEVC": ("libx265", "mp4", {"g": "12", "x265-params": "log-level=none"}),
    "AV1 as lerobot writes it": ("libsvtav1", "mp4", {"g": "2", "crf": "30"}),
    "no index in the header": ("libx264", "mkv", {"g": "12", "bf": "3"}),
}


def make_video(path, num_frames, codec, options):
    """Writes a video of a bright bar that moves over noise, so that all frames differ."""
    rng = np.random.default_rng(num_frames)
    noise = rng.integers(0, 100, (*SIZE, 3))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.height, stream.width = SIZE if codec != "libsvtav1" else (64, 64)
        stream.pix_fmt = "rgb24" if codec == "libx264rgb" else "yuv420p"
        for i in range(num_frames):
            image = np.roll(noise, i, axis=0).astype(np.uint8)
            image[:, i % 20 : i % 20 + 4] = 100 + 3 * i
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            container.mux(stream.encode(frame.reformat(stream.width, stream.height)))
        container.mux(stream.encode())


def make_segments(folder, video):
    """Segments in another order than in the files, with gaps before and between them."""
    codec, ending, options = VIDEOS[video]
    paths = [folder / f"{i}.{ending}" for i in range(len(NUM_FRAMES))]
    for path, num_frames in zip(paths, NUM_FRAMES, strict=True):
        make_video(path, num_frames, codec, options)
    first, single, last = paths
    return [
        Segment(last, 3, 9),
        Segment(first, 20, 21),
        Segment(single, 0, 1),
        Segment(first, 1, 15),
        Segment(last, 12, 14),
    ]


def decode(segments, size=None):
    """Returns the frames of all segments, from whole files decoded by PyAV."""
    files = {}
    for path in {segment.path for segment in segments}:
        with av.open(str(path)) as container:
            frames = list(container.decode(video=0))
        height, width = size or (frames[0].height, frames[0].width)
        options = {"interpolation": "AREA"}
        files[path] = [frame.reformat(width, height, "rgb24", **options) for frame in frames]
    chosen = (files[s.path][s.start : s.start + s.length] for s in segments)
    return np.stack([frame.to_ndarray() for frames in chosen for frame in frames])


@pytest.fixture(scope="module", params=VIDEOS)
def video(request, tmp_path_factory):
    """Segments, and their images decoded by PyAV."""
    folder = tmp_path_factory.mktemp("videos")
    segments = make_segments(folder, request.param)
    return segments, decode(segments, SIZE)


@pytest.mark.sampled
@pytest.mark.parametrize("capacity", [0, 5 * FRAME_BYTES, 25 * FRAME_BYTES, 10**8])
def test_images_on_demand_equal_whole_files_for_random_access(video, capacity):
    segments, whole = video
    cache = FrameCache(capacity)
    frames = open_frames(segments, cache, image_size=SIZE)
    assert (frames.shape, frames.dtype, len(frames)) == (whole.shape, whole.dtype, len(whole))
    rng = np.random.default_rng(0)
    for _ in range(12):
        rows = rng.integers(-len(whole), len(whole), (3, 4))
        np.testing.assert_array_equal(frames[rows], whole[rows])
        assert cache.num_bytes <= capacity
    np.testing.assert_array_equal(frames[:], whole)
    np.testing.assert_array_equal(frames[::-3], whole[::-3])
    np.testing.assert_array_equal(frames[-1], whole[-1])
    assert cache.num_bytes <= capacity


def test_the_index_lists_every_frame_and_the_key_frames(video):
    segments, _ = video
    for path in {segment.path for segment in segments}:
        with open_video(path) as container:
            times, starts, _ = read_index(path, container)
            container.seek(0)
            decoded = [(f.pts, f.key_frame) for f in container.decode(video=0)]
        np.testing.assert_array_equal(times, [time for time, _ in decoded])
        assert starts[0] == 0
        assert len(starts) == sum(is_key for _, is_key in decoded)


@pytest.fixture(scope="module")
def h264(tmp_path_factory):
    folder = tmp_path_factory.mktemp("h264")
    segments = make_segments(folder, "groups of 10")
    return segments, decode(segments)


def count_decoded(monkeypatch):
    """Records the numbers of decoded and kept frames."""
    counts = []
    decode = video_pieces.VideoPieces.decode

    def counted(self, path, numbers, size, resampling):
        counts.append(len(numbers))
        return decode(self, path, numbers, size, resampling)

    monkeypatch.setattr(video_pieces.VideoPieces, "decode", counted)
    return counts


def test_only_missing_images_are_decoded(h264, monkeypatch):
    segments, whole = h264
    counts = count_decoded(monkeypatch)
    frames = open_frames(segments, FrameCache(10**8))
    assert counts == []
    for _ in range(2):
        frames[[10, 12]]
        assert sum(counts) == 2
    for _ in range(2):
        frames[:]
        assert sum(counts) == len(whole)


def test_without_a_cache_only_the_needed_frames_are_converted(h264, monkeypatch):
    segments, whole = h264
    counts = count_decoded(monkeypatch)
    frames = open_frames(segments, FrameCache(0))
    for _ in range(2):
        np.testing.assert_array_equal(frames[[3, 4]], whole[[3, 4]])
    assert counts == [2, 2]


def test_many_files_are_read_with_few_of_them_open(h264, monkeypatch):
    monkeypatch.setattr(video_pieces, "MAX_OPEN", 1)
    segments, whole = h264
    frames = open_frames(segments, FrameCache(0))
    rows = np.random.default_rng(0).integers(0, len(whole), 20)
    for row in rows:
        np.testing.assert_array_equal(frames[row], whole[row])
    assert len(frames._raw.episodes._make.args[1]._local.containers) == 1


def test_threads_that_share_a_reader_get_the_same_images(h264):
    segments, whole = h264
    cache = FrameCache(12 * FRAME_BYTES)
    frames = open_frames(segments, cache)

    def work(seed):
        for rows in np.random.default_rng(seed).integers(0, len(whole), (20, 5)):
            np.testing.assert_array_equal(frames[rows], whole[rows])
            assert cache.num_bytes <= cache.capacity

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_a_pickled_copy_reads_the_same_and_contains_no_images(h264):
    segments, whole = h264
    cache = FrameCache(10**8)
    cameras = {name: open_frames(segments, cache) for name in ("image_primary", "image_wrist")}
    np.testing.assert_array_equal(cameras["image_wrist"][:], whole)
    packed = pickle.dumps(cameras)
    assert len(packed) < 10_000
    there = pickle.loads(packed)
    np.testing.assert_array_equal(there["image_wrist"][5:9], whole[5:9])
    assert there["image_primary"]._cache is there["image_wrist"]._cache


def test_invalid_indices_are_refused(h264):
    frames = open_frames(h264[0], FrameCache(0))
    for index in (len(frames), [0, -len(frames) - 1]):
        with pytest.raises(IndexError, match=f"must be within {len(frames)} frames"):
            frames[index]
    with pytest.raises(IndexError, match="must be integers or a slice, got float64"):
        frames[0.5]
    assert frames[[]].shape == (0, *SIZE, 3)


def test_missing_damaged_and_short_videos_are_reported(tmp_path):
    path = tmp_path / "a.mp4"
    with pytest.raises(FileNotFoundError, match=r"video .*a\.mp4 is missing; copy"):
        open_frames([Segment(path, 0, 12)], FrameCache(0))
    make_video(path, 12, "libx264rgb", {"g": "4"})
    frames = open_frames([Segment(path, 8, 6)], FrameCache(0))
    with pytest.raises(
        ValueError, match=r"a\.mp4 must hold a frame at 1\.2 s .*, got 12 frames from 0 s to 1\.1 s"
    ):
        frames[:]
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 4
    content[start + 900 :] = bytes(len(content) - start - 900)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"video .*a\.mp4 cannot be decoded, the file is damaged"):
        open_frames([Segment(path, 0, 12)], FrameCache(0))[:]


@pytest.mark.parametrize("cache_bytes", [0, 32 * 32 * 3 * 11, 2**30])
def test_a_data_set_read_on_demand_equals_one_decoded_as_a_whole(cache_bytes, tmp_path):
    root = writer.write(tmp_path / "data", make_episodes(), fps=10)
    on_demand = tiny_lerobot.read(root, decode="on_demand", cache_bytes=cache_bytes)
    assert not (root / ".frames").exists()
    whole = tiny_lerobot.read(root, decode="whole")
    assert on_demand.fingerprint == whole.fingerprint
    assert on_demand.frames.keys() == whole.frames.keys() == tiny_lerobot.CAMERAS.keys()
    for name in whole.frames:
        np.testing.assert_array_equal(on_demand.frames[name][:], whole.frames[name])
