"""`train.cache --frames`: the images of a training, written once by one process or several."""

import dataclasses
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_demos
from processes import run_together

from train import imitate, pretrain, setup
from train.cache_frames import CACHE, CacheConfig, cache_frames
from train.data_parts import read_parts
from vla_jax.command_line import command_line
from vla_jax.data import frame_writer, shard_files

SHARD = 40 * 16 * 16 * 3  # bytes of 40 frames of the demonstrations


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    return tiny_demos.write(tmp_path_factory.mktemp("demos") / "table")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(frame_writer, "SHARD_BYTES", SHARD)


def with_decode(config, decode, folder):
    dataset = dataclasses.replace(config.dataset, decode=decode, decoded_dir=str(folder))
    return dataclasses.replace(config, dataset=dataset)


def cache_config(demos, folder, frames="raw"):
    config = tiny_demos.imitation(demos, "", backbone=tiny_demos.PERCEIVER)
    own = {each.name: getattr(config, each.name) for each in dataclasses.fields(config)}
    return with_decode(CacheConfig(**own, frames=frames), "on_demand", folder)


def batches_of(config):
    """Returns the fields of two batches of `imitate`, and the position after them."""
    (part,) = read_parts(config)
    windows = setup.make_windows(
        config, part.dataset, part.norm_stats, window_size=6, action_horizon=2
    )
    with imitate.make_batches(config, windows) as batches:
        found = [next(batches).observation for _ in range(2)]
        return found, batches.get_state()


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_training_gets_the_same_batches_from_raw_records(num_workers, demos, tmp_path):
    folders = cache_frames(cache_config(demos, tmp_path))
    assert [folder.name.partition("-")[0] for folder in folders] == ["image_primary", "image_wrist"]
    config = tiny_demos.imitation(demos, "", backbone=tiny_demos.PERCEIVER)
    loader = dataclasses.replace(config.loader, num_workers=num_workers)
    config = dataclasses.replace(config, loader=loader)
    decoded, recorded = (
        batches_of(with_decode(config, decode, tmp_path)) for decode in ("on_demand", "records")
    )
    assert recorded[1] == decoded[1]  # a run may resume with either
    for one, other in zip(recorded[0], decoded[0], strict=True):
        np.testing.assert_array_equal(one.image_primary, other.image_primary)
        np.testing.assert_array_equal(one.image_wrist, other.image_wrist)
    encoder = with_decode(tiny_demos.pretraining(demos, ""), "records", tmp_path)
    (part,) = pretrain.read_parts(encoder)
    assert {each.folder for each in part.dataset.frames.values()} == {*folders}


def test_jpeg_frames_are_those_of_another_training(demos, tmp_path):
    cache_frames(cache_config(demos, tmp_path, "jpeg"))
    config = tiny_demos.imitation(demos, "", backbone=tiny_demos.PERCEIVER)
    decoded, recorded = (
        batches_of(with_decode(config, decode, tmp_path)) for decode in ("on_demand", "records")
    )
    assert recorded[1]["pipeline"]["dataset"] != decoded[1]["pipeline"]["dataset"]
    pair = [batches[0].image_primary.astype(int) for batches in (recorded[0], decoded[0])]
    assert np.abs(pair[0] - pair[1]).mean() < 4  # of 255 levels, 16-pixel images with sharp edges


def test_a_second_command_checks_what_the_first_has_written(demos, tmp_path):
    config = cache_config(demos, tmp_path)
    folders = cache_frames(config)
    files = sorted(tmp_path.rglob("*.array_record"))
    before = [file.stat().st_mtime_ns for file in files]
    shutil.rmtree(files[1].parent)
    assert cache_frames(config) == folders
    after = [file.stat().st_mtime_ns for file in files]
    assert [old == new for old, new in zip(before, after, strict=True)] == [
        i != 1 for i in range(len(files))
    ]
    content = bytearray(files[0].read_bytes())
    content[-1] ^= 1
    files[0].write_bytes(content)
    with pytest.raises(ValueError, match=r"shard_00000 is damaged .the checksum of .* differs"):
        cache_frames(config)


def test_frames_that_cannot_be_written_are_refused(demos, tmp_path, monkeypatch):
    blind = CacheConfig(dataset=cache_config(demos, tmp_path).dataset)
    blind = dataclasses.replace(blind, agent=tiny_demos.imitation(demos, "").agent)
    with pytest.raises(ValueError, match="policy that reads images, got backbone 'state'; choose"):
        cache_frames(blind)
    config = cache_config(demos, tmp_path)
    free = shutil._ntuple_diskusage(10**6, 10**6, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: free)
        with pytest.raises(OSError, match=r"needs \d\.\d MB, but .*, or use --frames jpeg"):
            cache_frames(config)
    little = dataclasses.replace(config.dataset, cache_bytes=1000)
    with pytest.raises(ValueError, match=r"cache_bytes must be at least \d+, .*, got 1000; raise"):
        cache_frames(dataclasses.replace(config, dataset=little))


def test_the_options_are_those_of_imitate(capsys):
    chosen = command_line(CACHE, ["--preset", "tiny_vlm", "--frames", "jpeg"], description="")
    assert (chosen.frames, chosen.dataset.path) == ("jpeg", "demos/tiny_vlm")
    assert command_line(CACHE, [], description="").frames is None
    with pytest.raises(SystemExit):
        command_line(CACHE, ["--frames", "png"], description="")
    assert "png" in capsys.readouterr().err


WRITE = """
import sys
sys.path.append("tests")
from test_cache_frames import SHARD, cache_config
from train.cache_frames import cache_frames
from vla_jax.data import frame_writer
frame_writer.SHARD_BYTES = SHARD
print("start", flush=True)
cache_frames(cache_config(*sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_command_killed_at_any_time_leaves_complete_shards(demos, tmp_path):
    cache_frames(cache_config(demos, tmp_path / "whole"))
    command = [sys.executable, "-c", WRITE, str(demos), str(tmp_path / "killed")]
    root = pathlib.Path(__file__).parents[1]
    for pause in (0.0, 0.05, 0.1, 0.15, 0.2, 0.3):
        with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "start\n"
            while process.poll() is None and not (tmp_path / "killed").exists():
                time.sleep(0.001)
            time.sleep(pause)
            process.send_signal(signal.SIGKILL)
    subprocess.run(command, cwd=root, check=True)
    trees = [
        {
            path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        for folder in (tmp_path / "whole", tmp_path / "killed")
    ]
    assert trees[0] == trees[1]


TOGETHER = """
from test_cache_frames import SHARD, cache_config
from train.cache_frames import cache_frames
from vla_jax.data import frame_writer
frame_writer.SHARD_BYTES, write, numbers = SHARD, frame_writer.write_shard, []
def counted(folder, shard, *args, **options):
    numbers.append(shard)
    write(folder, shard, *args, **options)
frame_writer.write_shard = counted
cache_frames(cache_config(*args))
print(len(numbers))
"""


@pytest.mark.slow
def test_two_processes_share_the_shards(demos, tmp_path):
    (whole, *_) = cache_frames(cache_config(demos, tmp_path / "whole"))
    outputs = run_together(TOGETHER, demos, tmp_path / "shared")
    counts = [int(out.split()[-1]) for out, _ in outputs]
    assert min(counts) > 1
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.array_record"))
    assert sum(counts) == 2 * len(files)
    shared = tmp_path / "shared" / whole.name
    assert not shard_files.missing(shared, len(files))
    for file in files:
        assert (whole / file).read_bytes() == (shared / file).read_bytes()
