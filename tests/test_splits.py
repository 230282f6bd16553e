"""Which rows are held out, where N is too large for a table of rows."""

import numpy as np
import pytest
import torch

from pyro_lightning import ArrayDataModule, splits
from pyro_lightning.rows import row_source
from pyro_lightning.splits import RowsWithout, split_rows


@pytest.mark.parametrize("held_out", [[], [0], [9], [0, 1, 9], [2, 3, 5, 7], [*range(1, 10)]])
def test_rows_without_others_are_those_that_are_left(held_out):
    rows = RowsWithout(10, np.array(held_out, np.int64))
    left = np.delete(np.arange(10), held_out)
    assert len(rows) == len(left)
    assert np.array_equal(rows[np.arange(len(left))], left)
    assert np.array_equal(np.asarray(rows), left)
    assert rows[0] == left[0]
    assert rows.mask().nonzero()[:, 0].tolist() == left.tolist()


@pytest.fixture
def few_for_a_table(monkeypatch):
    monkeypatch.setattr(splits, "LARGEST_TABLE", 50)


def test_a_split_of_many_rows_leaves_none_out(few_for_a_table):
    left, first, second = split_rows(1000, [100, 30], seed=3)
    assert (len(left), len(first), len(second)) == (870, 100, 30)
    assert sorted([*np.asarray(left), *first, *second]) == list(range(1000))
    assert np.array_equal(split_rows(1000, [100, 30], seed=3)[1], first)
    assert not np.array_equal(split_rows(1000, [100, 30], seed=4)[1], first)


def test_rows_are_held_out_equally_often(few_for_a_table):
    counts = np.bincount(np.concatenate([split_rows(60, [15], seed)[1] for seed in range(2000)]))
    # Without replacement: 59 degrees of freedom, cells of variance p (1 - p) n times 60 / 59.
    statistic = ((counts - 500) ** 2).sum() / (2000 * 0.25 * 0.75) * 59 / 60
    assert abs(statistic - 59) < 5 * np.sqrt(2 * 59)


def test_a_datamodule_of_many_rows_feeds_each_row_to_one_stage(few_for_a_table):
    data = ArrayDataModule(torch.arange(1000), 64, val_split=0.1, test_split=0.05)
    loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    stages = [torch.cat(list(loader)) for loader in loaders]
    assert [len(stage) for stage in stages] == [850, 100, 50]
    assert torch.cat(stages).sort().values.tolist() == list(range(1000))


def test_the_rows_that_train_are_known_of_a_split_of_many_rows(few_for_a_table):
    data = ArrayDataModule(torch.arange(1000), 64, val_split=0.1)
    trained = row_source(data.train_dataloader()).trained
    assert trained.nonzero()[:, 0].tolist() == sorted(
        torch.cat(list(data.train_dataloader())).tolist()
    )


def test_holding_out_a_few_of_a_billion_rows_takes_memory_for_these_alone():
    left, part = split_rows(10**9, [1000], seed=0)  # a table would have 8 gigabytes
    assert len(np.unique(part)) == 1000
    places = np.array([0, 10**6, len(left) - 1])
    assert not np.isin(left[places], part).any()
    assert (np.diff(left[np.arange(10**4)]) > 0).all()
