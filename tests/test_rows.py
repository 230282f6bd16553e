"""Row numbers: every batch of a fit tells which rows of the data set it holds, or is refused.

Row i of the data set holds the number i, so that the data tell whether the numbers are right.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning.pytorch import Callback
from support import normal_mean, quiet_trainer
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
    random_split,
)

from pyro_lightning import ArrayDataModule, IndexedBatch, IndexedDataset, PyroSVIModule

N, B = 30, 7
X = torch.arange(float(N))


def local(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Items(Dataset):
    """A map-style data set without ``__getitems__``."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return X[index]


class Batches(Callback):
    """Keeps what the loaders of a fit gave to the module."""

    def __init__(self):
        self.train, self.val = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.train.append(batch)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.val.append(batch)


def fit(*loaders, model=local, epochs=1, svi=None, **options):
    svi, seen = svi or PyroSVIModule(model), Batches()
    trainer = quiet_trainer(max_epochs=epochs, callbacks=[seen])
    trainer.fit(svi, *loaders, **options)
    return svi, seen


def rows_seen(batches, offset=0):
    """All row numbers, in order; those of each batch point to its very data."""
    for batch in batches:
        assert isinstance(batch, IndexedBatch)
        data = batch.data[0] if isinstance(batch.data, tuple | list) else batch.data
        assert torch.equal(data, torch.as_tensor(batch.rows, dtype=data.dtype) + offset)
    return torch.cat([torch.as_tensor(batch.rows) for batch in batches]).tolist()


def assert_only_these_trained(svi, rows):
    svi.posterior_samples(1, rows=rows)
    for other in set(range(N)) - set(rows):
        with pytest.raises(ValueError, match=f"rows {other} did not train"):
            svi.posterior_samples(1, rows=[other])


# -- ArrayDataModule -------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_array_data_module_numbers_rows_during_a_fit_that_needs_them(workers):
    data = ArrayDataModule(X, batch_size=B, num_workers=workers)
    assert all(isinstance(batch, torch.Tensor) for batch in data.train_dataloader())
    _, seen = fit(datamodule=data, epochs=2)
    rows = rows_seen(seen.train)
    assert rows[:N] != rows[N:]
    assert sorted(rows[:N]) == sorted(rows[N:]) == list(range(N))
    assert all(isinstance(batch, torch.Tensor) for batch in data.train_dataloader())


def test_array_data_module_numbers_no_rows_where_no_guide_needs_them():
    _, seen = fit(datamodule=ArrayDataModule(X, batch_size=B), model=normal_mean)
    assert all(isinstance(batch, torch.Tensor) for batch in seen.train)


def test_array_data_module_hands_out_plain_batches_after_a_fit_that_failed():
    class Failing(Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("stop here")

    data = ArrayDataModule(X, batch_size=B)
    with pytest.raises(RuntimeError, match="stop here"):
        quiet_trainer(max_epochs=1, callbacks=[Failing()]).fit(
            PyroSVIModule(local), datamodule=data
        )
    assert all(isinstance(batch, torch.Tensor) for batch in data.train_dataloader())


@pytest.mark.parametrize("kind", [torch.Tensor, np.ndarray, tuple, dict])
def test_array_data_module_numbers_rows_of_the_users_arrays_under_a_split(kind):
    arrays = {torch.Tensor: X, np.ndarray: X.numpy(), tuple: (X,), dict: {"x": X}}[kind]
    data = ArrayDataModule(arrays, batch_size=B, val_split=0.2, test_split=0.1)
    svi, seen = fit(datamodule=data)
    if kind is dict:
        seen.train = [batch._replace(data=batch.data["x"]) for batch in seen.train]
    rows = rows_seen(seen.train)
    assert len(set(rows)) == len(rows) == 21
    # N, the training rows, scales the loss; the numbers are those of the parent.
    assert svi.dataset_size == 21
    assert svi.guide.locs.z.shape == (N,)
    assert not any(isinstance(batch, IndexedBatch) for batch in seen.val)


# -- IndexedDataset --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dataset", [Items(), TensorDataset(X), X], ids=["items", "tensors", "list"]
)
@pytest.mark.parametrize("workers", [0, 2])
def test_shuffled_loader(workers, dataset):
    loader = DataLoader(
        IndexedDataset(dataset),
        batch_size=B,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    _, seen = fit(loader, epochs=2)
    rows = rows_seen(seen.train)
    assert sorted(rows[:N]) == sorted(rows[N:]) == list(range(N))
    assert rows[:N] != rows[N:]


def test_split_of_an_indexed_data_set_keeps_the_parents_numbers():
    train, val = random_split(IndexedDataset(Items()), [20, 10], torch.Generator().manual_seed(1))
    svi, seen = fit(
        DataLoader(train, batch_size=B, shuffle=True, drop_last=True), DataLoader(val, batch_size=B)
    )
    assert set(rows_seen(seen.train)) <= set(train.indices)
    assert set(rows_seen(seen.val)) == set(val.indices)
    assert svi.dataset_size == 20
    assert svi.guide.locs.z.shape == (N,)
    assert_only_these_trained(svi, rows_seen(seen.train))  # drop_last leaves some out


def test_indexed_data_set_within_subsets_of_subsets():
    subset = Subset(Subset(IndexedDataset(Items()), list(range(0, N, 2))), [3, 5, 7, 11])
    svi, seen = fit(DataLoader(subset, batch_size=3))
    assert rows_seen(seen.train) == [6, 10, 14, 22]
    assert svi.dataset_size == 4
    assert_only_these_trained(svi, [6, 10, 14, 22])


def test_indexed_data_set_around_a_subset_numbers_the_subset():
    subset = Subset(Items(), range(10, 20))
    svi, seen = fit(DataLoader(IndexedDataset(subset), batch_size=3, shuffle=True))
    assert sorted(rows_seen(seen.train, offset=10)) == list(range(10))
    assert svi.guide.locs.z.shape == (10,)


def test_subset_random_sampler():
    kept = [4, 9, 14, 19, 24]
    loader = DataLoader(IndexedDataset(Items()), batch_size=2, sampler=SubsetRandomSampler(kept))
    svi, seen = fit(loader)
    assert sorted(rows_seen(seen.train)) == kept
    assert svi.dataset_size == 5
    assert_only_these_trained(svi, kept)


def test_sampler_of_whole_batches():
    data = IndexedDataset(Items())
    batches = BatchSampler(RandomSampler(data), batch_size=B, drop_last=False)
    _, seen = fit(DataLoader(data, batch_sampler=batches))
    assert sorted(rows_seen(seen.train)) == list(range(N))


def test_collate_function_of_the_users():
    data = IndexedDataset(Items(), collate_fn=lambda items: {"x": torch.stack(items)})
    _, seen = fit(DataLoader(data, batch_size=B, shuffle=True, collate_fn=data.collate))
    plain = [batch._replace(data=batch.data["x"]) for batch in seen.train]
    assert sorted(rows_seen(plain)) == list(range(N))


@pytest.mark.parametrize("around", [False, True], ids=["whole", "subset"])
def test_distributed_sampler_sends_each_rank_its_rows(around):
    data = IndexedDataset(Items())
    dataset = Subset(data, range(1, N)) if around else data
    seen = []
    for rank in range(4):
        sampler = DistributedSampler(dataset, num_replicas=4, rank=rank, shuffle=True, seed=3)
        seen += rows_seen(list(DataLoader(dataset, batch_size=3, sampler=sampler)))
    # 32 numbers: the sampler fills up its last share with rows that it has sent already.
    assert len(seen) == 32
    assert sorted(set(seen)) == list(range(1 if around else 0, N))


def test_parts_of_a_batch_see_no_numbers():
    got = []

    class Own(PyroSVIModule):
        def model_inputs(self, batch):
            got.append(batch)
            return super().model_inputs(batch)

        def num_rows(self, batch):
            got.append(batch)
            return super().num_rows(batch)

    svi = Own(local)
    fit(datamodule=ArrayDataModule(X, batch_size=B), svi=svi)
    assert not any(isinstance(batch, IndexedBatch) for batch in got)


# -- refusals --------------------------------------------------------------------------------------


def refused(match, batch, error=ValueError):
    svi = PyroSVIModule(local, dataset_size=N)
    svi.loss(IndexedBatch(X[:2], torch.arange(2)))
    with pytest.raises(error, match=match):
        svi.loss(batch)


@pytest.mark.parametrize("rows", [[0, N], [-1, 3], [10**6, 0]])
def test_rows_out_of_range(rows):
    refused(r"row numbers -?\d+ to \d+ are out of range.*0 to 29", IndexedBatch(X[:2], rows))


@pytest.mark.parametrize("rows", [[0.0, 1.0], [True, False], [1], [1, 2, 3], [[1, 2]], 1])
def test_rows_that_are_no_numbers_of_the_rows(rows):
    refused(r"row numbers must be B = 2 integers", IndexedBatch(X[:2], torch.as_tensor(rows)))


def test_batch_without_numbers():
    refused(r"'z'.*'data'.*IndexedDataset", X[:2])


def test_loader_without_numbers_is_refused_before_the_first_step():
    seen = Batches()
    with pytest.raises(ValueError, match=r"IndexedDataset\(dataset\)"):
        quiet_trainer(max_epochs=1, callbacks=[seen]).fit(
            PyroSVIModule(local), DataLoader(X, batch_size=B)
        )
    assert not seen.train


def test_validation_rows_numbered_by_another_data_set():
    train, val = IndexedDataset(Items()), IndexedDataset(Items())
    with pytest.raises(ValueError, match="belong to another data set"):
        fit(DataLoader(train, batch_size=B), DataLoader(val, batch_size=B))


def test_loss_of_another_data_set_after_a_fit():
    svi, _ = fit(DataLoader(IndexedDataset(Items()), batch_size=B))
    other = default_collate([IndexedDataset(Items())[i] for i in range(3)])
    with pytest.raises(ValueError, match="belong to another data set"):
        svi.loss(other)


def test_second_fit_on_another_number_of_rows():
    svi, _ = fit(datamodule=ArrayDataModule(X, batch_size=B))
    with pytest.raises(ValueError, match=r"parameters for 30 rows \(site 'z'\).* 12 now"):
        fit(datamodule=ArrayDataModule(X[:12], batch_size=B), svi=svi)


def test_data_set_that_has_no_rows_to_number():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from X

    with pytest.raises(TypeError, match="a Stream have no numbers: expected a map-style"):
        IndexedDataset(Stream())


@pytest.mark.parametrize("kind", ["wrapped", "arrays"])
def test_negative_indices_count_from_the_end(kind):
    if kind == "wrapped":
        data = IndexedDataset(TensorDataset(X))
        svi, seen = fit(DataLoader(Subset(data, [-1, 3, -N]), batch_size=2))
    else:
        module = ArrayDataModule(X, batch_size=2)
        data = module.train_dataloader().dataset
        collate = module.train_dataloader().collate_fn
        loader = DataLoader(Subset(data, [-1, 3, -N]), batch_size=2, collate_fn=collate)
        svi, seen = fit(loader)
    assert rows_seen(seen.train) == [N - 1, 3, 0]
    assert_only_these_trained(svi, [0, 3, N - 1])
