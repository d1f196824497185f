"""Endless batches: order, shards, resuming."""

import json
import multiprocessing
import sys

import jax
import numpy as np
import pytest

from vla_jax.data import dataset, loader, normalize
from vla_jax.data.image_augment import AugmentConfig
from vla_jax.data.loader import LoaderConfig
from vla_jax.data.windows import WindowConfig, Windows


def make_source(num_frames=24, window_size=3, seed=0):
    """One episode whose proprio is its step, so that a batch identifies its windows."""
    rng = np.random.default_rng(seed)
    observation = {
        "proprio": np.arange(num_frames, dtype=np.float32)[:, None],
        "image_primary": rng.integers(0, 256, (num_frames, 6, 6, 3), np.uint8),
    }
    action = rng.uniform(-1, 1, (num_frames, 2)).astype(np.float32)
    data = dataset.from_episodes([dataset.Episode(observation, action, "go")], fps=10)
    return Windows(
        data,
        WindowConfig(window_size=window_size),
        tokenize=lambda text: np.ones(2, np.int32),
        norm_stats=normalize.compute_norm_stats(data),
        normalization=normalize.NormalizeConfig(proprio="none"),
    )


def last_steps(batch):
    return batch.observation.proprio[:, -1, 0].astype(int).tolist()


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a.observation.image_primary, b.observation.image_primary)
        np.testing.assert_array_equal(a.observation.proprio, b.observation.proprio)
        np.testing.assert_array_equal(a.action, b.action)
        np.testing.assert_array_equal(a.action_mask, b.action_mask)


def test_every_epoch_contains_every_window_once_in_another_order():
    with loader.make_loader(make_source(), LoaderConfig(batch_size=8)) as batches:
        epochs = [[s for b in take(batches, 3) for s in last_steps(b)] for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(24))] * 3
    assert len({tuple(epoch) for epoch in [*epochs, range(24)]}) == 4


def test_without_shuffling_windows_are_in_order_and_batches_are_those_of_the_source():
    source = make_source()
    with loader.make_loader(source, LoaderConfig(batch_size=5, shuffle=False)) as batches:
        taken = take(batches, 6)
    steps = [step for batch in taken for step in last_steps(batch)]
    assert steps == [step % 24 for step in range(30)]
    assert_same([source[np.arange(5, 10)]], [taken[1]])


def test_equal_seeds_give_equal_batches_and_other_seeds_others():
    def first(seed):
        with loader.make_loader(make_source(), LoaderConfig(batch_size=8, seed=seed)) as batches:
            return take(batches, 4)

    assert_same(first(1), first(1))
    assert [last_steps(b) for b in first(1)] != [last_steps(b) for b in first(2)]


def test_a_data_set_smaller_than_a_batch_still_fills_it():
    with loader.make_loader(make_source(num_frames=3), LoaderConfig(batch_size=8)) as batches:
        steps = last_steps(next(batches))
    assert len(steps) == 8
    assert sorted(steps[:3]) == [0, 1, 2]


@pytest.mark.parametrize("num_frames", [3, 25])
def test_the_batches_of_all_processes_are_those_of_one(num_frames):
    source, config = make_source(num_frames=num_frames), LoaderConfig(batch_size=8, num_threads=0)
    augment = AugmentConfig(shift=2, brightness=0.1, contrast=0.1)
    whole = loader.make_loader(source, config, augment=augment)
    parts = [
        loader.make_loader(source, config, augment=augment, process_index=index, process_count=4)
        for index in range(4)
    ]
    for _ in range(7):  # two epochs
        joined = jax.tree.map(lambda *rows: np.concatenate(rows), *map(next, parts))
        assert_same([next(whole)], [joined])
    assert all(part.get_state() == whole.get_state() for part in parts)


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_a_resumed_loader_equals_an_uninterrupted_one_with_augmentation(num_threads):
    augment = AugmentConfig(shift=2, brightness=0.1, contrast=0.1)
    source = make_source()
    config = LoaderConfig(batch_size=5, num_threads=num_threads)
    with loader.make_loader(source, config, augment=augment) as batches:
        take(batches, 7)
        state = json.loads(json.dumps(batches.get_state()))
        expected = take(batches, 12)
    for threads in (0, 2):  # the number of threads may change
        config = LoaderConfig(batch_size=5, num_threads=threads)
        with loader.make_loader(source, config, augment=augment) as batches:
            next(batches)
            batches.set_state(state)
            assert batches.get_state() == state
            assert_same(expected, take(batches, 12))


@pytest.mark.slow
def test_worker_processes_give_the_same_batches_and_resume_exactly():
    augment = AugmentConfig(shift=2)
    source = make_source()
    with loader.make_loader(source, LoaderConfig(batch_size=5), augment=augment) as batches:
        expected = take(batches, 9)
    config = LoaderConfig(batch_size=5, num_workers=2)
    with loader.make_loader(source, config, augment=augment) as batches:
        assert_same(expected[:4], take(batches, 4))
        state = batches.get_state()
        next(batches)
        batches.set_state(state)
        assert_same(expected[4:], take(batches, 5))


@pytest.mark.slow
def test_a_killed_worker_process_ends_with_one_sentence():
    with loader.make_loader(make_source(), LoaderConfig(batch_size=5, num_workers=2)) as batches:
        next(batches)
        multiprocessing.active_children()[0].kill()
        with pytest.raises(
            ChildProcessError, match=r"code -9.*to resume, with fewer --num-workers"
        ):
            take(batches, 20)


def test_augmentation_differs_between_epochs():
    config = LoaderConfig(batch_size=24, shuffle=False)
    augment = AugmentConfig(shift=2)
    with loader.make_loader(make_source(), config, augment=augment) as batches:
        first, second = (next(batches).observation.image_primary for _ in range(2))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("source", "config", "options", "message"),
    [
        ({"seed": 1}, {}, {}, r"dataset was '\w+' and is '\w+'"),
        ({"window_size": 4}, {}, {}, "window_size was 3 and is 4"),
        ({}, {"batch_size": 4}, {}, "batch_size was 8 and is 4"),
        ({}, {"seed": 3}, {}, "seed was 0 and is 3"),
        ({}, {"shuffle": False}, {}, "shuffle was True and is False"),
        ({}, {}, {"augment": AugmentConfig(shift=1)}, "augment_shift was None and is 1"),
    ],
)
def test_the_state_of_another_pipeline_is_refused_with_the_differences(
    source, config, options, message
):
    state = loader.make_loader(make_source(), LoaderConfig(batch_size=8)).get_state()
    other = LoaderConfig(**{"batch_size": 8, **config})
    batches = loader.make_loader(make_source(**source), other, **options)
    with pytest.raises(ValueError, match=f"same pipeline, but .*{message}"):
        batches.set_state(state)


def test_another_number_of_processes_continues_unless_they_took_the_windows_one_by_one():
    source, config = make_source(), LoaderConfig(batch_size=8, num_threads=0)
    whole, *parts = (
        loader.make_loader(source, config, process_index=index, process_count=count)
        for index, count in ((0, 1), (0, 2), (1, 2))
    )
    take(whole, 3)
    state = whole.get_state()
    of_earlier_version = {**state["pipeline"], "process_count": 1}
    parts[0].set_state(state)
    parts[1].set_state({**state, "pipeline": of_earlier_version})
    joined = [step for part in parts for step in last_steps(next(part))]
    assert last_steps(next(whole)) == joined
    with pytest.raises(ValueError, match=r"got 2 processes, which took .* another order; start a"):
        whole.set_state({**state, "pipeline": {**of_earlier_version, "process_count": 2}})


def test_a_batch_that_cannot_be_split_among_processes_is_refused():
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 processes, got 8"):
        loader.make_loader(make_source(), LoaderConfig(batch_size=8), process_count=3)


@pytest.mark.parametrize(
    ("field", "value", "least"),
    [
        ("batch_size", 0, 1),
        ("num_workers", -1, 0),
        ("num_threads", -1, 0),
        ("prefetch", 0, 1),
        ("seed", -1, 0),
    ],
)
def test_a_size_out_of_range_is_refused(field, value, least):
    with pytest.raises(ValueError, match=f"{field} must be at least {least}, got {value}"):
        LoaderConfig(**{field: value})


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r"needs grain; .*pip install 'vla-jax\[data\]'"):
        loader.make_loader(make_source(), LoaderConfig())
