"""Shards on disk feed two processes: each row once, N the whole set, and the exact posterior."""

import pytest
from stream_support import DATA, B, N
from support import run_script

SD = (100 + N) ** -0.5


@pytest.fixture(scope="module")
def found(shards):
    return run_script("ddp_streams_fit.py", shards)


@pytest.mark.parametrize(
    "name", ["litdata", "litdata, workers", "WebDataset", "WebDataset, workers"]
)
def test_the_ranks_have_every_row_once_between_them(name, found):
    first, second = found["rows"][name]
    assert len(first) == len(second) == N // 2
    assert sorted(first + second) == list(range(N))


def test_litdata_leaves_rows_out_so_that_ranks_have_equal_batches(found):
    # 103 rows in batches of 8 are six whole ones for each rank.
    first, second = found["rows"]["litdata, ragged"]
    assert len(first) == len(second) == 48
    assert len(set(first + second)) == 96


def test_each_rank_goes_on_in_the_middle_of_an_epoch(found):
    rows = found["rows"]
    assert rows["rest"] == [whole[7 * B :] for whole in rows["first"]]


def test_n_is_the_whole_training_set_on_each_rank(found):
    assert found["sizes"].pop("litdata, ragged") == [103, 103]
    assert list(found["sizes"].values()) == [[N, N]] * 4


def test_the_posterior_is_the_exact_one(found):
    # The learning rate ends at 4e-4, so that noise of the last steps is far below a tenth of an sd.
    assert found["mean"] == pytest.approx(float(DATA.sum() / (100 + N)), abs=0.1 * SD)
    assert found["sd"] == pytest.approx(SD, rel=0.05)
