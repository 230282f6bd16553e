"""Loaders that change within a fit, come several at once, or can be read only once."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from support import StepLosses, no_validation, normal_mean, quiet_trainer
from torch.utils.data import DataLoader, IterableDataset

from pyro_lightning import ArrayDataModule, PyroSVIModule

N = 60
X = torch.linspace(-1, 3, N)
STILL = partial(torch.optim.SGD, lr=0.0)


def point(x):
    """No latents and no noise: the loss of a batch is a number of its rows alone."""
    loc = pyro.param("loc", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def no_guide(x):
    """For a model without latents."""


def full_loss(x, size):
    """Negative log-likelihood of ``size`` rows, estimated from those given."""
    return -size / len(x) * dist.Normal(0.5, 1.0).log_prob(x).sum()


class Growing(LightningDataModule):
    """Feeds more rows in larger batches from epoch to epoch, reloaded by the Trainer."""

    sizes = ((30, 10), (60, 20), (60, 30))

    def train_dataloader(self):
        rows, size = self.sizes[self.trainer.current_epoch]
        return DataLoader(X[:rows], batch_size=size)


@no_validation
def test_a_reloaded_loader_has_its_own_n_and_its_own_equal_batches():
    svi, steps = PyroSVIModule(point, no_guide, optimizer=STILL), StepLosses()
    trainer = quiet_trainer(max_epochs=3, reload_dataloaders_every_n_epochs=1, callbacks=[steps])
    trainer.fit(svi, datamodule=Growing())
    sizes = [30] * 3 + [60] * 3 + [60] * 2
    expected = [full_loss(x, n) for x, n in zip(steps.batches, sizes, strict=True)]
    torch.testing.assert_close(torch.stack(steps.losses), torch.stack(expected))
    assert svi.dataset_size == 60


@pytest.mark.parametrize("kind", [list, lambda pair: dict(zip("ab", pair, strict=True))])
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_each_of_several_loaders_has_its_own_figure(stage, kind):
    svi = PyroSVIModule(point, no_guide, dataset_size=N)
    parts = X[:20], X[20:50]
    loaders = kind([DataLoader(part, batch_size=10) for part in parts])
    found = getattr(quiet_trainer(), stage)(svi, loaders, verbose=False)
    name = "val" if stage == "validate" else "test"
    for i, part in enumerate(parts):
        figure = found[i][f"{name}_loss/dataloader_idx_{i}"]
        assert figure == pytest.approx(float(full_loss(part, N)), rel=1e-5)


class Once(IterableDataset):
    """A stream that goes on where it was left, however often it is asked to start."""

    def __init__(self):
        self.iterator = iter(X)

    def __iter__(self):
        return self.iterator


def of_pair(a, b):
    point(a)


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle"])
def test_combined_loaders_train_as_they_are(mode):
    loaders = {"a": DataLoader(X, batch_size=10), "b": DataLoader(-X[:40], batch_size=10)}
    steps = StepLosses()
    trainer = quiet_trainer(max_epochs=1, callbacks=[steps])
    svi = PyroSVIModule(of_pair, lambda a, b: None, optimizer=STILL, dataset_size=N)
    trainer.fit(svi, CombinedLoader(loaders, mode))
    assert trainer.global_step == (4 if mode == "min_size" else 6)
    for batch, loss in zip(steps.batches, steps.losses, strict=True):
        torch.testing.assert_close(loss, full_loss(batch["a"], N))


@pytest.mark.parametrize(
    "feed",
    [
        {"train_dataloaders": DataLoader(X, batch_size=N + 1, drop_last=True)},
        {"datamodule": ArrayDataModule(X, batch_size=N + 1, drop_last=True)},
    ],
    ids=["loader", "arrays"],
)
def test_a_loader_without_a_batch_is_refused(feed):
    expected = f"no batch: its data set has {N} rows, and drop_last .* batch_size={N + 1}"
    with pytest.raises(ValueError, match=expected):
        quiet_trainer(max_epochs=1).fit(PyroSVIModule(normal_mean), **feed)


def test_a_stream_that_would_lose_its_first_batch_is_refused():
    loader = DataLoader(Once(), batch_size=10)
    with pytest.raises(ValueError, match="Once gives the same iterator each time"):
        quiet_trainer(max_epochs=1).fit(PyroSVIModule(normal_mean, dataset_size=N), loader)


@no_validation
def test_a_stream_that_can_be_read_once_is_seen_whole_after_a_first_loss():
    svi, steps = PyroSVIModule(normal_mean, dataset_size=N), StepLosses()
    svi.loss(X[:10])
    quiet_trainer(max_epochs=1, callbacks=[steps]).fit(svi, DataLoader(Once(), batch_size=10))
    assert torch.equal(torch.cat(steps.batches), X)


def test_an_optimizer_made_before_the_parameters_is_refused():
    svi = PyroSVIModule(normal_mean, dataset_size=N)
    with pytest.raises(RuntimeError, match="would miss them"):
        svi.configure_optimizers()
    svi.loss(X)
    assert len(svi.configure_optimizers().param_groups[0]["params"]) == 2
