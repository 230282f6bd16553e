"""Which rows of a batch a distributed sampler repeats, and how many all ranks have without them."""

import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from pyro_lightning import mean_batch_size
from pyro_lightning.arrays import ArrayDataset
from pyro_lightning.loader import RowLoader
from pyro_lightning.orders import shuffled
from pyro_lightning.padding import share_of
from pyro_lightning.samplers import DistributedRows, RowBatches
from pyro_lightning.sizes import cut_sizes


class EveryRow(SequentialSampler):
    """A sampler that Lightning wraps."""


def torchs(rows, size, drop_last=False, **share):
    sampler = DistributedSampler(range(rows), **share)
    return DataLoader(range(rows), size, sampler=sampler, drop_last=drop_last)


def wrapped(rows, size, drop_last=False, **share):
    sampler = DistributedSamplerWrapper(EveryRow(range(rows)), **share)
    return DataLoader(range(rows), size, sampler=sampler, drop_last=drop_last)


def ours(rows, size, drop_last=False, **share):
    data = ArrayDataset(torch.arange(rows))
    batches = RowBatches(DistributedRows(data, shuffled, **share), size, drop_last)
    return RowLoader(data, batch_sampler=batches)


KINDS = {"torch's": torchs, "Lightning's": wrapped, "ours": ours}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_size = pytest.mark.parametrize(
    ("rows", "ranks", "size"),
    [
        (1001, 2, 100),  # the repeat is alone in its batch
        (1001, 2, 167),  # and at the end of a full one
        (1001, 3, 50),
        (1000, 3, 50),  # two ranks have one
        (12, 3, 4),  # none is repeated
        (2, 5, 3),  # three ranks have nothing else
    ],
)


def batches_of(kind, rows, ranks, size, **options):
    """Each rank's loader, and its batches."""
    loaders = [KINDS[kind](rows, size, num_replicas=ranks, rank=r, **options) for r in range(ranks)]
    return [(loader, list(loader)) for loader in loaders]


@every_kind
@every_size
def test_rows_that_are_no_repeats_are_all_rows_once(kind, rows, ranks, size):
    found = []
    for loader, batches in batches_of(kind, rows, ranks, size):
        for number, batch in enumerate(batches):
            found += batch[: share_of(loader).real_rows(number, len(batch))].tolist()
    assert sorted(found) == list(range(rows))


@every_kind
@every_size
def test_all_ranks_know_which_batches_may_hold_a_repeat(kind, rows, ranks, size):
    every = batches_of(kind, rows, ranks, size)
    for number in range(len(every[0][1])):
        shares = [(share_of(loader), len(batches[number])) for loader, batches in every]
        held = any(share.real_rows(number, count) < count for share, count in shares)
        assert [share.may_repeat(number) for share, _ in shares] == [held] * ranks


@every_kind
@every_size
def test_the_mean_batch_size_is_of_all_ranks_without_repeats(kind, rows, ranks, size):
    every = batches_of(kind, rows, ranks, size)
    for loader, batches in every:
        expected = rows / (ranks * len(batches))
        assert mean_batch_size(loader, len(batches)) == pytest.approx(expected, rel=1e-12)


@every_kind
@pytest.mark.parametrize("batches", [1, 2])
def test_an_epoch_cut_short_has_full_batches(kind, batches):
    for loader, _ in batches_of(kind, 11, 2, 2):  # shares of 6, in three batches
        assert mean_batch_size(loader, batches) == 2


@every_kind
def test_drop_last_leaves_out_repeats_that_fill_no_batch(kind):
    # Shares of 51: the last row, on rank 1 a repeat, is left out.
    for loader, batches in batches_of(kind, 101, 2, 10, drop_last=True):
        counts = [share_of(loader).real_rows(i, len(batch)) for i, batch in enumerate(batches)]
        assert counts == [10] * 5
        assert mean_batch_size(loader, 5) == 10


def test_a_sampler_that_drops_rows_repeats_none():
    sampler = DistributedSampler(range(101), num_replicas=2, rank=1, drop_last=True)
    loader = DataLoader(range(101), 10, sampler=sampler)
    assert share_of(loader).real_rows(4, 10) == 10
    assert mean_batch_size(loader, 5) == 10


def test_lightnings_sampler_for_predictions_repeats_none():
    sampler = UnrepeatedDistributedSampler(range(101), num_replicas=2, rank=1)
    loader = DataLoader(range(101), 10, sampler=sampler)
    assert share_of(loader).real_rows(4, 10) == 10


@pytest.mark.parametrize("steps", [1, 2, 5])
@every_size
def test_steps_of_a_batch_have_the_mean_of_all_ranks(rows, ranks, size, steps):
    counts = []
    for _, batches in batches_of("ours", rows, ranks, size * steps):
        for batch in batches:
            counts += [len(part) for part in batch.split(size)]
    for loader, batches in batches_of("ours", rows, ranks, size * steps):
        taken, mean = cut_sizes(loader, len(batches), len(batches[0]), steps)
        assert taken == size
        assert mean == pytest.approx(rows / len(counts), rel=1e-12)


# -- batches that are items of a sampler -----------------------------------------------------------


def shares_of_batches(rank):
    batches = BatchSampler(SequentialSampler(range(50)), 10, False)
    sampler = DistributedSamplerWrapper(batches, num_replicas=2, rank=rank)
    return DataLoader(torch.arange(50), batch_size=None, sampler=sampler)


def test_a_batch_that_is_repeated_counts_nothing():
    # Five batches in shares of three: the last one of rank 1 is rank 0's first.
    counts = [
        [share_of(shares_of_batches(rank)).real_rows(number, 10) for number in range(3)]
        for rank in range(2)
    ]
    assert counts == [[10, 10, 10], [10, 10, 0]]


def test_the_mean_size_of_such_batches_is_not_known():
    assert mean_batch_size(shares_of_batches(0), 3) is None


def test_several_steps_of_such_batches_are_refused():
    with pytest.raises(ValueError, match="as batch_sampler, not as sampler"):
        cut_sizes(shares_of_batches(0), 3, 10, 5)


# -- what cannot be told ---------------------------------------------------------------------------


class Sorted(BatchSampler):
    """A batch sampler with an order of its own."""


def test_repeats_in_batches_of_an_unknown_order_are_not_placed():
    sampler = DistributedSampler(range(11), num_replicas=2, rank=1)
    loader = DataLoader(range(11), batch_sampler=Sorted(sampler, 2, False))
    assert [share_of(loader).real_rows(number, 2) for number in range(3)] == [None] * 3


def test_repeats_in_a_batch_of_another_size_are_not_placed():
    loader = torchs(11, 2, num_replicas=2, rank=1)
    assert share_of(loader).real_rows(2, 5) is None


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize(
    "loader",
    [DataLoader(Stream()), DataLoader(range(4), batch_sampler=[[0, 1], [2, 3]]), range(3)],
    ids=["stream", "list of batches", "no loader"],
)
def test_nothing_is_known_of_other_loaders(loader):
    assert share_of(loader) is None


def test_one_process_repeats_nothing():
    share = share_of(DataLoader(range(11), 2, sampler=RandomSampler(range(11))))
    assert not any(share.may_repeat(number) for number in range(6))
