"""A ``training_step`` of the user's own, of ``loss`` and ``batch_weight``, is that of the class."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning.pytorch import Callback
from pyro.infer.autoguide import AutoDelta
from support import normal_mean, quiet_trainer

from pyro_lightning import ArrayDataModule, IndexedBatch, PyroSVIModule

N, B, AT = 10, 4, 0.25
X = torch.linspace(-1.0, 3.0, N)


class Own(PyroSVIModule):
    def training_step(self, batch, batch_idx):
        return self.loss(batch) * self.batch_weight(batch)


class WeightFirst(PyroSVIModule):
    def training_step(self, batch, batch_idx):
        weight = self.batch_weight(batch)
        return weight * self.loss(batch)


class Gradients(Callback):
    def __init__(self):
        self.found = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.found.append(float(pl_module.guide.mu.grad))


@pytest.mark.parametrize("kind", [Own, WeightFirst])
def test_each_row_weighs_the_same_over_an_epoch(kind):
    point = partial(AutoDelta, init_loc_fn=lambda site: torch.tensor(AT))
    svi = kind(normal_mean, point, optimizer=partial(torch.optim.SGD, lr=0.0))
    gradients = Gradients()
    trainer = quiet_trainer(max_epochs=1, callbacks=[gradients])
    trainer.fit(svi, datamodule=ArrayDataModule(X, batch_size=B))
    # Three batches, the last of two rows.
    exact = float(AT / 0.1**2 - (X - AT).sum())
    assert sum(gradients.found) / 3 == pytest.approx(exact, rel=1e-5)


def effects(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def test_rows_that_trained_are_known():
    svi = Own(effects)
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=2)
    trainer.fit(svi, datamodule=ArrayDataModule(X, batch_size=B, shuffle=False))
    assert svi.posterior_samples(3, rows=range(2 * B))["z"].shape == (3, 2 * B)
    with pytest.raises(ValueError, match="rows 8 did not train"):
        svi.posterior_samples(3, rows=[8])


def test_a_loss_outside_a_fit_trains_no_row():
    svi = Own(effects)
    data = ArrayDataModule(X, batch_size=B, shuffle=False)
    quiet_trainer(max_epochs=1, limit_train_batches=1).fit(svi, datamodule=data)
    svi.loss(IndexedBatch(X[2 * B :], torch.arange(2 * B, N)))
    with pytest.raises(ValueError, match="rows 8 did not train"):
        svi.posterior_samples(3, rows=[8])
