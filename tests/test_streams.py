"""What is read from a streaming library's data set before the first step, and that it stays so."""

import gc
import multiprocessing
import threading

import pytest
import torch
from stream_support import (
    DATA,
    B,
    N,
    lit_loader,
    litdata,
    quiet,
    web_loader,
    web_rows,
    webdataset,
)
from torch.utils.data import DataLoader

from pyro_lightning import dataset_size_of
from pyro_lightning.batches import example_batch

pytestmark = quiet


@pytest.fixture
def second_of_two(monkeypatch):
    """What litdata reads of the processes when a data set is made."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("GLOBAL_RANK", "1")


def whole(folder):
    return litdata.StreamingDataset(str(folder / "lit"))


def split(folder):
    parts = litdata.train_test_split(whole(folder), [0.2, 0.7])
    return litdata.StreamingDataLoader(parts[1], batch_size=B)


# -- N ---------------------------------------------------------------------------------------------

LOADERS = {
    "all rows": (lit_loader, N),
    "shuffled": (lambda folder: lit_loader(folder, shuffle=True), N),
    "subsample": (lambda folder: lit_loader(folder, subsample=0.3), 300),
    "subsample, shuffled": (lambda folder: lit_loader(folder, subsample=0.35, shuffle=True), 350),
    "subset": (lambda folder: lit_loader(folder, rows=slice(65, 168)), 103),
    "subset in no order": (lambda folder: lit_loader(folder, rows=[900, 3, 72, 4, 2]), 5),
    "split": (split, 700),
    "torch's loader": (lambda folder: DataLoader(lit_loader(folder).dataset, batch_size=B), N),
}


@pytest.mark.parametrize("name", LOADERS)
def test_size_is_the_number_of_rows_that_an_epoch_visits(name, shards):
    make, expected = LOADERS[name]
    loader = make(shards)
    assert dataset_size_of(loader) == expected
    seen = torch.cat([batch["row"] for batch in loader]).tolist()
    assert len(seen) == len(set(seen)) == expected


@pytest.mark.parametrize("drop_last", [True, False])
def test_size_is_no_ranks_share(drop_last, second_of_two, shards):
    loader = lit_loader(shards, drop_last=drop_last)
    assert len(loader.dataset) == N // 2
    assert dataset_size_of(loader) == N


def test_rows_that_no_epoch_shows_are_warned_of(second_of_two, shards):
    # 103 rows in batches of 20 are 2 whole ones for each rank.
    with pytest.warns(UserWarning, match="the same 23 of 103 rows.*batch size times processes"):
        assert dataset_size_of(lit_loader(shards, batch_size=20, rows=slice(103))) == 103


def test_rows_left_out_in_turns_are_not_warned_of(second_of_two, shards):
    # A warning would be an error.
    assert dataset_size_of(lit_loader(shards, rows=slice(103), shuffle=True)) == 103


def test_whole_chunks_of_a_parallel_file_system_are_warned_of(monkeypatch, shards):
    # litdata shares whole chunks out there, the same in every epoch: 15 of 70 rows, the last of 20.
    monkeypatch.setenv("LITDATA_POSIX_FAST", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    loaders = []
    for rank in "01":
        monkeypatch.setenv("GLOBAL_RANK", rank)
        loaders.append(lit_loader(shards, shuffle=True))
    seen = sum(len(batch["row"]) for loader in loaders for batch in loader)
    assert seen < N
    with pytest.warns(UserWarning, match=f"the same {N - seen} of {N} rows"):
        assert dataset_size_of(loaders[0]) == N


class Chosen(litdata.StreamingDataset):
    """Leaves rows out as it goes."""

    def __next__(self):
        item = super().__next__()
        return item if item["row"] % 2 else super().__next__()


UNCLEAR = {
    "subsample above 1": (lambda folder: lit_loader(folder, subsample=2.0), "more than once"),
    "repeats": (lambda folder: lit_loader(folder, rows=[7, 7, 8]), "more than once"),
    "own items": (
        lambda folder: DataLoader(Chosen(str(folder / "lit")), batch_size=B),
        "Chosen has an __iter__ or __next__ of its own",
    ),
    "items that are batches": (
        lambda folder: DataLoader(whole(folder), batch_size=None),
        "batch_size=None",
    ),
    "combined": (
        lambda folder: litdata.StreamingDataLoader(
            litdata.CombinedStreamingDataset([whole(folder)], seed=0)
        ),
        "CombinedStreamingDataset",
    ),
    "WebDataset": (web_loader, "WebDataset"),
    "WebDataset with a length": (
        lambda folder: DataLoader(web_rows(folder).with_length(N, silent=True), batch_size=None),
        "WebDataset_Length",
    ),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_unclear_size_is_an_error_that_says_how_to_state_it(name, shards):
    make, match = UNCLEAR[name]
    with pytest.raises(ValueError, match=f"{match}.*dataset_size=N"):
        dataset_size_of(make(shards))


# -- the batch of set-up ---------------------------------------------------------------------------


def test_the_first_rows_of_litdata_are_taken_by_number(shards):
    batch = example_batch(lit_loader(shards, rows=slice(65, 168)))
    assert batch["row"].tolist() == list(range(65, 115))
    assert torch.equal(batch["x"], DATA[65:115])


def test_fewer_rows_than_a_batch_are_all_taken(shards):
    assert example_batch(lit_loader(shards, rows=[900, 3]))["row"].tolist() == [900, 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_litdata_is_left_as_it_was(workers, shards):
    loader = lit_loader(shards, workers, shuffle=True)
    before, place = dict(vars(loader.dataset)), loader.state_dict()
    example_batch(loader)
    dataset_size_of(loader)
    assert dict(vars(loader.dataset)) == before
    assert loader.state_dict() == place


def test_an_epoch_of_litdata_goes_on_where_it_was(shards):
    loader = lit_loader(shards, shuffle=True)
    batches = iter(loader)
    seen = [next(batches)["row"]]
    example_batch(loader)
    dataset_size_of(loader)
    seen.extend(batch["row"] for batch in batches)
    assert sorted(torch.cat(seen).tolist()) == list(range(N))


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: lit_loader(folder, workers=2),
        lambda folder: web_loader(folder, workers=2),
        lambda folder: webdataset.WebLoader(web_rows(folder), batch_size=None, num_workers=2),
    ],
    ids=["litdata", "WebDataset", "WebLoader"],
)
def test_no_thread_or_process_is_left(make, shards):
    gc.collect()
    threads, children = set(threading.enumerate()), set(multiprocessing.active_children())
    example_batch(make(shards))
    gc.collect()
    # torch tells the threads of a loader's queues to end, and does not wait for them. What other
    # tests have left may end meanwhile.
    left = set(multiprocessing.active_children()) - children
    for each in (set(threading.enumerate()) - threads) | left:
        each.join(10)
    assert set(threading.enumerate()) <= threads
    assert set(multiprocessing.active_children()) <= children


def test_the_first_batch_of_webdataset_is_one_of_its_own(shards):
    x, rows = example_batch(web_loader(shards))
    assert rows.tolist() == list(range(0, 4 * B, 4))
    assert torch.equal(x, DATA[rows])
