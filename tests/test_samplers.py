"""Batches of row numbers: the same rows as torch's samplers give, in arrays."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from pyro_lightning import mean_batch_size, orders, samplers
from pyro_lightning.loader import RowLoader
from pyro_lightning.orders import in_order, shuffled
from pyro_lightning.samplers import DistributedRows, RowBatches, ShuffledRows


def lists(batches):
    return [batch.tolist() if hasattr(batch, "tolist") else batch for batch in batches]


def subset(size):
    return SubsetRandomSampler(range(size), generator=torch.Generator().manual_seed(5))


def share(shuffle, rank):
    return lambda size: DistributedSampler(
        range(size), num_replicas=3, rank=rank, shuffle=shuffle, seed=2
    )


SAMPLERS = {
    "in order": lambda size: SequentialSampler(range(size)),
    "random": subset,
    "share in order": share(False, 1),
    "last share in order": share(False, 2),
    "shuffled share": share(True, 1),
}


@pytest.mark.parametrize("chunk", [1, 7, 2**16])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_batches_are_those_of_torchs_batch_sampler(kind, drop_last, chunk, monkeypatch):
    monkeypatch.setattr(orders, "CHUNK", chunk)
    monkeypatch.setattr(samplers, "CHUNK", chunk)
    for size in (1, 2, 22, 23, 24):
        for batch_size in (1, 4, 30):
            ours = RowBatches(SAMPLERS[kind](size), batch_size, drop_last)
            theirs = BatchSampler(SAMPLERS[kind](size), batch_size, drop_last)
            assert lists(ours) == list(theirs)
            assert len(ours) == len(theirs)


@pytest.mark.parametrize("chunk", [3, 2**16])
def test_shares_are_those_of_torchs_distributed_sampler(chunk, monkeypatch):
    monkeypatch.setattr(orders, "CHUNK", chunk)
    for size in range(1, 14):
        for replicas in range(1, 6):
            for rank in range(replicas):
                place = {"num_replicas": replicas, "rank": rank}
                ours = DistributedRows(range(size), in_order, **place)
                theirs = DistributedSampler(range(size), shuffle=False, **place)
                assert list(ours) == list(theirs), (size, place)
                assert len(ours) == len(theirs)


def test_shares_of_an_epoch_are_one_order_and_each_epoch_has_another():
    def epoch(number):
        make = partial(DistributedRows, range(100), shuffled, num_replicas=2, seed=4)
        ranks = [make(rank=rank) for rank in (0, 1)]
        for rank in ranks:
            rank.set_epoch(number)
        return [list(rank) for rank in ranks]

    first, second = epoch(0), epoch(1)
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(100))
    assert first != second
    assert first == epoch(0)


def test_an_epoch_draws_its_seed_from_torchs_generator():
    torch.manual_seed(1)
    first, second = [list(ShuffledRows(range(50))) for _ in range(2)]
    assert first != second
    torch.manual_seed(1)
    assert list(ShuffledRows(range(50))) == first


@pytest.mark.parametrize("drop_last, visited", [(False, 103), (True, 100)])
def test_rows_for_several_steps_at_once_come_in_the_same_order(drop_last, visited):
    def epoch(steps):
        torch.manual_seed(6)
        batches = RowBatches(ShuffledRows(range(103)), 10 * steps, drop_last, rows_per_step=10)
        cut = list(batches)
        assert len(cut) == len(batches)
        return np.concatenate(cut)

    one, four = epoch(1), epoch(4)
    assert np.array_equal(one, four)
    assert len(one) == visited


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_mean_batch_size_of_several_steps_counts_the_rows_that_come(drop_last):
    data = torch.utils.data.TensorDataset(torch.arange(103))
    batches = RowBatches(SequentialSampler(data), 40, drop_last, rows_per_step=10)
    loader = RowLoader(data, batch_sampler=batches)
    sizes = [len(batch) for batch in batches]
    assert mean_batch_size(loader, len(loader)) == pytest.approx(np.mean(sizes))


def test_numbers_on_a_device_are_tensors_of_the_same_rows():
    here = RowBatches(SequentialSampler(range(23)), 5, False, device=torch.device("cpu"))
    batches = list(here)
    assert all(isinstance(batch, torch.Tensor) for batch in batches)
    assert torch.cat(batches).tolist() == list(range(23))


@pytest.mark.parametrize("attribute", ["sampler", "batch_size", "drop_last"])
def test_a_loader_tells_what_its_batch_sampler_does(attribute):
    batches = RowBatches(ShuffledRows(range(23)), 5, True)
    loader = RowLoader(list(range(23)), batch_sampler=batches)
    assert getattr(loader, attribute) is getattr(batches, attribute)
