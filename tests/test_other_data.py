"""A second fit of a guide with parameters of rows: on the same rows, or on those of another set.

The warning is to come exactly where the rows differ; each test says which it is.
"""

from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from support import quiet_trainer
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pyro_lightning import ArrayDataModule, IndexedDataset, PyroSVIModule

N = 40
X = torch.linspace(-1, 2, N)
OTHER = X.flip(0)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


class Rows(Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index]


def fit(svi, data, **options):
    trainer = quiet_trainer(max_epochs=1, **options)
    by_loader = isinstance(data, DataLoader)
    trainer.fit(svi, **{"train_dataloaders" if by_loader else "datamodule": data})
    return trainer


def arrays(x):
    return ArrayDataModule(x, batch_size=10)


def wrapped(data):
    return DataLoader(IndexedDataset(data), batch_size=10)


ONE = Rows(X)
SAME = {
    "arrays": lambda: arrays(X),
    "a copy": lambda: arrays(X.clone()),
    "a view": lambda: arrays(torch.stack([X, X])[0]),
    "numpy": lambda: arrays(X.numpy()),
    "tensors": lambda: wrapped(TensorDataset(X)),
    "one data set": lambda: wrapped(ONE),
}


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in SAME.items()])
def test_the_same_rows_train_on_in_silence(make):
    svi = PyroSVIModule(model)
    fit(svi, make())
    fit(svi, make())


def test_a_memmap_that_is_opened_again_is_the_same(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, X.numpy())
    svi = PyroSVIModule(model)
    for _ in range(2):
        fit(svi, arrays(np.load(path, mmap_mode="r")))


@pytest.mark.parametrize(
    "make",
    [
        arrays,
        lambda x: arrays({"x": x}),
        lambda x: wrapped(TensorDataset(x)),
        lambda x: wrapped(Rows(x)),
        lambda x: wrapped(list(x)),
    ],
    ids=["arrays", "mapping", "tensors", "data set", "list"],
)
def test_other_rows_are_warned_of(make):
    svi = PyroSVIModule(model)
    first = make(X)
    fit(svi, first)
    with pytest.warns(UserWarning, match=r"site 'z'\).*another data set.*new PyroSVIModule"):
        fit(svi, make(OTHER))
    # Only the change is one: the second set may train on.
    second = make(OTHER) if make is arrays else None
    if second is not None:
        fit(svi, second)


def test_another_data_set_at_the_address_of_the_first():
    # CPython gives a new object the memory of the last one of its size.
    svi = PyroSVIModule(model)
    fit(svi, wrapped(Rows(X)))
    with pytest.warns(UserWarning, match="another data set"):
        fit(svi, wrapped(Rows(OTHER)))


def test_rows_that_never_trained_may_be_any():
    svi = PyroSVIModule(model)
    fit(svi, arrays(X), limit_train_batches=0)
    fit(svi, arrays(OTHER))


def test_a_resumed_fit_in_a_new_module_is_silent(tmp_path):
    # In a new process nothing is known of the data set's identity.
    svi = PyroSVIModule(model)
    fit(svi, wrapped(Rows(X))).save_checkpoint(tmp_path / "fit.ckpt")
    fresh = PyroSVIModule(model, optimizer=partial(torch.optim.Adam, lr=0.01))
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(fresh, wrapped(Rows(X)), ckpt_path=tmp_path / "fit.ckpt")
    assert trainer.current_epoch == 2


def test_a_guide_of_globals_trains_on_any_data():
    def mean(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    svi = PyroSVIModule(mean)
    fit(svi, arrays(X))
    fit(svi, arrays(OTHER))
