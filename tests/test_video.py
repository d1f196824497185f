"""Videos written by the library are read back by PyAV; captions leave the image unchanged."""

import sys

import av
import numpy as np
import pytest

from vla_jax.evaluation import video


def frames(count=5, height=48, width=64):
    rng = np.random.default_rng(0)
    start = rng.integers(0, 255, (1, 1, 3))
    ramp = np.linspace(0, 40, width, dtype=int)[None, :, None]
    picture = np.broadcast_to(start + ramp, (height, width, 3)).clip(0, 255).astype(np.uint8)
    return [picture // (i + 1) for i in range(count)]


@pytest.mark.parametrize(("height", "width"), [(48, 64), (47, 63)])
@pytest.mark.parametrize("fps", [10.0, 29.97])
def test_a_video_has_every_frame_the_given_rate_and_even_sizes(tmp_path, height, width, fps):
    shown = frames(height=height, width=width)
    video.write_mp4(tmp_path / "new" / "video.mp4", shown, fps)
    with av.open(str(tmp_path / "new" / "video.mp4")) as container:
        stream = container.streams.video[0]
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert float(stream.average_rate) == pytest.approx(fps, rel=1e-3)
    assert len(decoded) == len(shown)
    assert decoded[0].shape == (48, 64, 3)
    for got, expected in zip(decoded, shown, strict=True):
        assert np.abs(got[:height, :width].astype(int) - expected).mean() < 4


def test_the_same_frames_give_the_same_bytes(tmp_path):
    """Frames that differ enough for threads of the encoder to matter; see `video`."""
    y, x = np.mgrid[:320, :320]
    shown = [
        np.stack([x + 3 * t, y + 2 * t, x * y // 50 + t], -1).astype(np.uint8) for t in range(30)
    ]
    written = set()
    for i in range(8):
        video.write_mp4(tmp_path / f"{i}.mp4", shown, 10)
        written.add((tmp_path / f"{i}.mp4").read_bytes())
    assert len(written) == 1


def test_a_video_can_be_streamed_and_is_written_atomically(tmp_path):
    video.write_mp4(tmp_path / "video.mp4", frames(), 10)
    data = (tmp_path / "video.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]


def test_a_video_without_frames_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be at least one frame, got none"):
        video.write_mp4(tmp_path / "video.mp4", [], 10)


def test_a_caption_is_below_the_image_and_grows_with_the_text():
    shown = frames()
    short = video.caption(shown, ["lift it"])
    long = video.caption(shown, ["lift the very long and very red block over there", "seed 1"])
    assert len(short) == len(shown)
    assert len(long[0]) > len(short[0]) > len(shown[0])
    for captioned, picture in zip(long, shown, strict=True):
        np.testing.assert_array_equal(captioned[: len(picture)], picture)
    bar = long[0][len(shown[0]) :]
    assert bar.max() > 180  # light text
    assert np.median(bar) < 40  # on a dark background


@pytest.mark.parametrize(("success", "colour"), [(True, (0, 114, 178)), (False, (213, 94, 0))])
def test_the_outcome_is_shown_at_the_end_in_its_colour(success, colour):
    shown = frames()
    captioned = video.caption(shown, ["lift it"], success)
    assert len(captioned) == len(shown) + video.HOLD
    for frame in captioned[-video.HOLD :]:
        assert tuple(frame[0, -1]) == colour
    assert tuple(captioned[-video.HOLD - 1][0, -1]) != colour


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("lift", "7_lift_success.mp4"),
        ("", "7_episode_success.mp4"),
        ("a/b c", "7_a-b-c_success.mp4"),
    ],
)
def test_a_video_is_named_after_seed_task_and_outcome(task, name):
    assert video.file_name(7, task, True) == name


@pytest.mark.parametrize(("module", "name"), [("av", "PyAV"), ("PIL", "Pillow")])
def test_a_missing_package_raises_with_the_extra_to_install(monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{name}; run pip install 'vla-jax\[data\]'"):
        video.check_packages()
