"""N is the whole training set's, whatever way the loader goes through it."""

from functools import partial

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from support import no_validation, normal_mean, quiet_trainer
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)

from pyro_lightning import PyroSVIModule, batch_weight, dataset_size_of, mean_batch_size

N = 103
ROWS = TensorDataset(torch.zeros(N))
BY_TEN = partial(DataLoader, batch_size=10)


class EveryOther(Sampler):
    """A sampler of the user's own, which visits some of the rows."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter(range(0, 2 * self.count, 2))

    def __len__(self):
        return self.count


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.zeros(N))


class Batches(Dataset):
    """A data set whose items are batches."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return torch.zeros(5)


def distributed(**options):
    return DistributedSampler(ROWS, num_replicas=2, rank=1, **options)


# -- N from a loader -------------------------------------------------------------------------------

LOADERS = {
    "in order": (lambda: BY_TEN(ROWS), N),
    "shuffled": (lambda: BY_TEN(ROWS, shuffle=True), N),
    "drop_last": (lambda: BY_TEN(ROWS, drop_last=True, shuffle=True), N),
    "workers": (lambda: BY_TEN(ROWS, num_workers=2), N),
    "Subset": (lambda: BY_TEN(Subset(ROWS, range(5, 25)), shuffle=True), 20),
    "random_split": (lambda: BY_TEN(random_split(ROWS, [63, 40])[0]), 63),
    "SubsetRandomSampler": (lambda: BY_TEN(ROWS, sampler=SubsetRandomSampler(range(33))), 33),
    "ConcatDataset": (lambda: BY_TEN(ConcatDataset([ROWS, ROWS])), 2 * N),
    "BatchSampler": (
        lambda: DataLoader(ROWS, batch_sampler=BatchSampler(RandomSampler(ROWS), 10, True)),
        N,
    ),
    "BatchSampler as sampler": (
        lambda: DataLoader(
            ROWS, batch_size=None, sampler=BatchSampler(SequentialSampler(ROWS), 10, False)
        ),
        N,
    ),
    "BatchSampler of a SubsetRandomSampler": (
        lambda: DataLoader(
            ROWS, batch_sampler=BatchSampler(SubsetRandomSampler(range(33)), 10, False)
        ),
        33,
    ),
    # Each rank sees 52 of the rows, or 51; one of them may be a repeated row.
    "DistributedSampler": (lambda: BY_TEN(ROWS, sampler=distributed()), N),
    "DistributedSampler, drop_last": (lambda: BY_TEN(ROWS, sampler=distributed(drop_last=True)), N),
    # A part of the rows each epoch, and another one the next.
    "num_samples": (lambda: BY_TEN(ROWS, sampler=RandomSampler(ROWS, num_samples=50)), N),
    "a sampler that visits each row": (lambda: BY_TEN(range(50), sampler=EveryOther(50)), 50),
}


@pytest.mark.parametrize("name", LOADERS)
def test_size_is_the_training_sets(name):
    make, size = LOADERS[name]
    assert dataset_size_of(make()) == size


@pytest.mark.parametrize(
    "sampler",
    [WeightedRandomSampler([0.5] * N, 50), RandomSampler(ROWS, replacement=True)],
    ids=lambda sampler: type(sampler).__name__,
)
def test_sampler_that_changes_the_distribution_warns(sampler):
    with pytest.warns(UserWarning, match=f"{type(sampler).__name__}.*not to the data set"):
        assert dataset_size_of(BY_TEN(ROWS, sampler=sampler)) == N


def test_drop_last_without_shuffling_warns_of_the_rows_it_never_shows():
    with pytest.warns(UserWarning, match="the same last 3 rows"):
        assert dataset_size_of(BY_TEN(ROWS, drop_last=True)) == N


def test_a_list_of_batches_has_the_size_of_its_rows_where_it_holds_them_all():
    batches = [list(range(start, min(start + 10, N))) for start in range(0, N, 10)]
    assert dataset_size_of(DataLoader(ROWS, batch_sampler=batches)) == N


@pytest.mark.parametrize(
    ("loader", "match"),
    [
        (BY_TEN(Stream()), "iterable data set"),
        (DataLoader(Batches(), batch_size=None), "batch_size=None"),
        (CombinedLoader({"a": BY_TEN(ROWS), "b": BY_TEN(ROWS)}), "CombinedLoader"),
        ({"a": BY_TEN(ROWS)}, "dict"),
        ([BY_TEN(ROWS), BY_TEN(ROWS)], "list"),
        (BY_TEN(ROWS, sampler=EveryOther(50)), "EveryOther visits 50 of 103 rows"),
        (DataLoader(ROWS, batch_sampler=[[0, 1], [2, 3]]), "list visits 4 of 103 rows"),
    ],
    ids=["iterable", "batches", "combined", "dict", "list", "sampler", "list of batches"],
)
def test_unclear_size_is_an_error_that_says_how_to_state_it(loader, match):
    with pytest.raises(ValueError, match=f"{match}.*dataset_size=N"):
        dataset_size_of(loader)


# -- the mean batch size ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "in order",
        "drop_last",
        "Subset",
        "SubsetRandomSampler",
        "BatchSampler",
        "BatchSampler as sampler",
        "DistributedSampler, drop_last",
        "num_samples",
    ],
)
def test_mean_batch_size_is_the_mean_of_the_batches(name):
    loader = LOADERS[name][0]()
    sizes = [len(batch[0]) for batch in loader]
    assert mean_batch_size(loader, len(loader)) == pytest.approx(sum(sizes) / len(sizes))


@pytest.mark.parametrize("count", [1, 3, 10])
def test_mean_batch_size_of_an_epoch_cut_short(count):
    assert mean_batch_size(BY_TEN(ROWS), count) == 10


def test_mean_batch_size_is_unknown_for_a_stream():
    assert mean_batch_size(BY_TEN(Stream()), 11) is None
    assert batch_weight(3, None) == 1.0


def test_weight_of_equal_batches_is_exactly_one():
    for size in range(1, 60):
        rows = size * 7
        assert batch_weight(size, mean_batch_size(DataLoader(range(rows), size), 7)) == 1.0


# -- N in a fit ------------------------------------------------------------------------------------


class Data(LightningDataModule):
    """50 rows to train on, 30 to validate on; says another size if told to."""

    def __init__(self, dataset_size=None):
        super().__init__()
        if dataset_size is not None:
            self.dataset_size = dataset_size

    def train_dataloader(self):
        return BY_TEN(torch.zeros(50))

    def val_dataloader(self):
        return BY_TEN(torch.zeros(30))


@pytest.mark.parametrize(
    ("argument", "attribute", "size"),
    [(700, 600, 700), (700, None, 700), (None, 600, 600), (None, None, 50)],
)
def test_argument_before_datamodule_before_loader(argument, attribute, size):
    svi = PyroSVIModule(normal_mean, dataset_size=argument)
    quiet_trainer(max_epochs=1).fit(svi, datamodule=Data(attribute))
    assert svi.dataset_size == size


def test_validation_keeps_the_training_sets_size():
    svi = PyroSVIModule(normal_mean)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(svi, datamodule=Data())
    trainer.validate(svi, BY_TEN(torch.zeros(80)), verbose=False)
    assert svi.dataset_size == 50


def test_validation_before_the_fit_takes_the_datamodules_size():
    svi = PyroSVIModule(normal_mean)
    quiet_trainer().validate(svi, datamodule=Data(600), verbose=False)
    assert svi.dataset_size == 600


@no_validation
def test_second_fit_on_other_data_reads_its_size():
    svi = PyroSVIModule(normal_mean)
    quiet_trainer(max_epochs=1).fit(svi, BY_TEN(torch.zeros(50)))
    quiet_trainer(max_epochs=1).fit(svi, BY_TEN(torch.zeros(70)))
    assert svi.dataset_size == 70


@no_validation
def test_rows_left_out_by_limit_train_batches_count():
    svi = PyroSVIModule(normal_mean)
    quiet_trainer(max_epochs=1, limit_train_batches=2).fit(svi, BY_TEN(torch.zeros(50)))
    assert svi.dataset_size == 50


@no_validation
@pytest.mark.parametrize(
    "loader",
    [BY_TEN(Stream()), {"a": BY_TEN(ROWS), "b": BY_TEN(ROWS)}],
    ids=["iterable", "dict"],
)
def test_fit_without_a_clear_size_is_refused(loader):
    with pytest.raises(ValueError, match="dataset_size=N"):
        quiet_trainer(max_epochs=1).fit(PyroSVIModule(normal_mean), loader)


@no_validation
def test_iterable_data_set_of_a_stated_size():
    svi = PyroSVIModule(normal_mean, dataset_size=N)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(svi, BY_TEN(Stream()))
    assert svi.dataset_size == N
    assert trainer.global_step == 11


@no_validation
def test_fit_warns_of_replacement():
    sampler = RandomSampler(torch.zeros(N), replacement=True)
    with pytest.warns(UserWarning, match="RandomSampler.*not to the data set"):
        quiet_trainer(max_epochs=1).fit(
            PyroSVIModule(normal_mean), BY_TEN(torch.zeros(N), sampler=sampler)
        )
