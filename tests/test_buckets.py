"""Batches of one width: every row once per epoch, no target truncated, resumed = uninterrupted."""

import numpy as np
import pytest

from vla_jax.data.buckets import Buckets
from vla_jax.data.scan_commands import Ids

F, K, B, STEP = 50, 11, 4, 4
LENGTHS = np.random.default_rng(0).integers(0, K, F)


def rows():
    """Targets consist of `length` times the row's number, which identifies the row."""
    number = np.arange(1, F + 1)[:, None]
    return Ids(source=number, target=np.where(np.arange(K) < LENGTHS[:, None], number, 0))


def take(batches, count):
    return [next(batches) for _ in range(count)]


def test_an_epoch_has_every_row_in_full_batches():
    batches = Buckets(rows(), batch_size=B, width_step=STEP)
    epoch = take(batches, batches.batches_per_epoch)
    numbers = np.concatenate([batch.source[:, 0] for batch in epoch])
    assert set(numbers) == set(range(1, F + 1))
    counts = np.bincount(numbers)[1:]
    assert counts.max() <= 2
    assert (counts == 2).sum() < B * 3  # less than one batch per width
    assert {len(batch.source) for batch in epoch} == {B}


def test_a_target_keeps_all_ids_and_its_end_in_the_smallest_width():
    batches = Buckets(rows(), batch_size=B, width_step=STEP)
    longest = LENGTHS.max() + 1
    for source, target in take(batches, batches.batches_per_epoch):
        lengths = LENGTHS[source[:, 0] - 1] + 1
        width = target.shape[1]
        assert (np.minimum(-(-lengths // STEP) * STEP, longest) == width).all()
        np.testing.assert_array_equal((target > 0).sum(axis=1), lengths - 1)
        assert not target[:, -1].any()


def test_epochs_differ_and_depend_on_the_seed():
    one, same, other = (Buckets(rows(), batch_size=B, seed=seed) for seed in (1, 1, 2))
    count = one.batches_per_epoch
    first, second = take(one, count), take(one, count)
    orders = [np.concatenate([batch.source[:, 0] for batch in epoch]) for epoch in (first, second)]
    assert (orders[0] != orders[1]).any()
    np.testing.assert_array_equal(
        np.concatenate([b.source[:, 0] for b in take(same, count)]), orders[0]
    )
    assert (np.concatenate([b.source[:, 0] for b in take(other, count)]) != orders[0]).any()


def test_processes_take_the_rows_of_one_process_in_their_order():
    options = {"batch_size": B, "width_step": STEP}
    whole = Buckets(rows(), **options)
    parts = [Buckets(rows(), **options, process_index=i, process_count=2) for i in range(2)]
    for _ in range(2 * whole.batches_per_epoch):
        batch, own = next(whole), [next(part) for part in parts]
        np.testing.assert_array_equal(np.concatenate([part.source for part in own]), batch.source)
        np.testing.assert_array_equal(np.concatenate([part.target for part in own]), batch.target)


@pytest.mark.parametrize("position", [0, 5, 40])
def test_resumed_equals_uninterrupted(position):
    whole = Buckets(rows(), batch_size=B, width_step=STEP)
    resumed = Buckets(rows(), batch_size=B, width_step=STEP)
    take(whole, position)
    resumed.set_state(whole.get_state())
    for one, other in zip(take(whole, 30), take(resumed, 30), strict=True):
        np.testing.assert_array_equal(one.target, other.target)
