"""Orders of rows: every row once, and as good as a random permutation where that is claimed.

Seeds are fixed, so that a statistical test fails always or never; its bounds are five standard
deviations.
"""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

from pyro_lightning import orders
from pyro_lightning.orders import InBlocks, KeyedPermutation, shuffled


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def whole(order, size, seed):
    return np.concatenate(list(order(size, seeded(seed))))


def keyed(size, generator):
    yield KeyedPermutation(size, generator)(np.arange(size))


SMALL_BLOCKS = InBlocks(block=7, together=3)
ORDERS = {"shuffled": shuffled, "keyed": keyed, "blocks": SMALL_BLOCKS}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("sizes", [range(1, 150), [1000, 1023, 1024, 1025, 4097, 99_991]])
def test_every_row_comes_once(order, sizes):
    for size in sizes:
        assert np.array_equal(np.sort(whole(order, size, size)), np.arange(size)), size


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_an_order_follows_from_its_seed(order):
    first = whole(order, 1000, 0)
    assert np.array_equal(first, whole(order, 1000, 0))
    assert (first == whole(order, 1000, 1)).mean() < 0.02


def test_a_table_is_torchs_permutation():
    expected = torch.randperm(1000, generator=seeded(3), dtype=torch.int32)
    assert whole(shuffled, 1000, 3).tolist() == expected.tolist()


def test_more_rows_than_a_table_may_hold_come_once(monkeypatch):
    monkeypatch.setattr(orders, "CHUNK", 64)
    rows = whole(partial(shuffled, largest_table=999), 1000, 3)
    assert sorted(rows.tolist()) == list(range(1000))
    assert rows.tolist() == next(keyed(1000, seeded(3))).tolist()


def test_the_first_of_ten_billion_rows_are_known_without_the_rest():
    chunk = next(shuffled(10**10, seeded(0)))  # a table would have 40 gigabytes
    assert len(np.unique(chunk)) == len(chunk)
    # Mean of uniform numbers: the standard error is 10^10 / sqrt(12 * 65536).
    assert abs(chunk.mean() / 1e10 - 0.5) < 5 / np.sqrt(12 * len(chunk))
    assert 0 <= chunk.min() < chunk.max() < 10**10


SEEDS = 4000
MANY = np.stack([next(keyed(37, seeded(seed))) for seed in range(SEEDS)])


def assert_chi_square(counts, expected, degrees, factor=1.0):
    statistic = factor * ((counts - expected) ** 2 / expected).sum()
    assert abs(statistic - degrees) < 5 * np.sqrt(2 * degrees)


def test_a_keyed_permutation_takes_each_row_to_each_place_equally_often():
    counts = np.stack([np.bincount(places, minlength=37) for places in MANY.T])
    # Rows and columns of the table have fixed sums: (N - 1)^2 degrees of freedom, and cells whose
    # variance is that of a multinomial times N / (N - 1).
    assert_chi_square(counts, SEEDS / 37, 36**2, factor=36 / 37)


@pytest.mark.parametrize("lag", [1, 2, 6, 7])  # 6 and 7: neighbours along the axes of the grid
def test_rows_that_a_keyed_permutation_puts_near_each_other_are_any_pair(lag):
    steps = (MANY[:, lag] - MANY[:, 0]) % 37
    assert_chi_square(np.bincount(steps, minlength=37)[1:], SEEDS / 36, 35)


def test_rows_in_a_keyed_order_are_not_correlated_with_those_before():
    rows = next(keyed(10**6, seeded(1)))
    for lag in (1, 2, 100, 1000):
        assert abs(np.corrcoef(rows[:-lag], rows[lag:])[0, 1]) < 5 / np.sqrt(len(rows))
    assert abs(np.corrcoef(rows, np.arange(len(rows)))[0, 1]) < 5 / np.sqrt(len(rows))


def variance_of_batch_means(values, order, batch_size, seeds):
    rows = [whole(order, len(values), seed) for seed in range(seeds)]
    return np.mean([values[r].reshape(-1, batch_size).mean(1).var() for r in rows])


@pytest.mark.parametrize("order", [shuffled, keyed])
def test_batch_means_vary_as_those_of_simple_random_samples(order):
    values, size = np.arange(10.0**6), 100
    expected = values.var(ddof=1) / size * (1 - size / len(values))
    # 10,000 batches: the relative standard error of a variance is sqrt(2 / 10,000).
    assert variance_of_batch_means(values, order, size, 1) == pytest.approx(expected, rel=0.07)


BLOCK, TOGETHER, B = 100, 16, 50


def test_batch_means_from_blocks_vary_as_stated_where_the_file_is_sorted():
    values = np.arange(10.0**5)
    between = values.reshape(-1, BLOCK).mean(1).var()
    expected = (values.var() - between / TOGETHER) / B + between / TOGETHER
    found = variance_of_batch_means(values, InBlocks(BLOCK, TOGETHER), B, 40)
    # 40 times 62 groups of blocks: a relative standard error of sqrt(2 / 2,480); that groups are
    # drawn without replacement takes off 16 / 1,000.
    assert found == pytest.approx(expected, rel=0.15)


def test_batch_means_from_blocks_vary_as_random_ones_where_rows_are_in_no_order():
    values = np.random.default_rng(0).standard_normal(10**5)
    found = variance_of_batch_means(values, InBlocks(BLOCK, TOGETHER), B, 5)
    # V / W adds B / (W block) = 3 per cent; 10,000 batches.
    assert found == pytest.approx(values.var() / B * (1 + B / (TOGETHER * BLOCK)), rel=0.07)


def test_blocks_are_read_a_few_at_a_time():
    order = whole(InBlocks(BLOCK, TOGETHER), 10**5, 2)
    blocks = np.array_split(np.arange(10**5 // BLOCK), 63)  # 1,000 blocks in groups of 15 or 16
    groups = np.split(order, np.cumsum([BLOCK * len(group) for group in blocks])[:-1])
    # Blocks start anywhere, so that one may lie across two of those that are counted here.
    touched = [len(np.unique(group // BLOCK)) for group in groups]
    assert max(touched) <= 2 * TOGETHER
    assert max(len(np.intersect1d(a, b)) for a, b in pairwise(groups)) == 0


def test_a_group_of_blocks_of_many_rows_is_shuffled_without_a_table():
    rows = whole(InBlocks(block=2**15, together=10), 10**6, 0)
    assert np.array_equal(np.sort(rows), np.arange(10**6))


def test_blocks_begin_elsewhere_in_each_epoch():
    def partners(seed):
        rows = next(InBlocks(BLOCK, 1)(10**5, seeded(seed)))[:BLOCK]
        return int(rows.min()) % BLOCK

    assert len({partners(seed) for seed in range(10)}) > 5


def test_rows_that_fit_in_one_group_of_blocks_are_shuffled_as_a_whole():
    rows = np.stack([whole(InBlocks(10, 4), 40, seed) for seed in range(SEEDS)])
    counts = np.stack([np.bincount(places, minlength=40) for places in rows.T])
    assert_chi_square(counts, SEEDS / 40, 39**2, factor=39 / 40)
