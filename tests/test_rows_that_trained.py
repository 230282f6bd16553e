"""Which rows trained: noted step by step, kept in checkpoints, and what the others are given."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning.pytorch import LightningDataModule
from pyro.infer.autoguide import AutoNormal
from support import no_validation, quiet_trainer
from torch.utils.data import DataLoader, Subset, TensorDataset

from pyro_lightning import ArrayDataModule, IndexedDataset, PyroSVIModule

N, B = 40, 10
X = 5 + torch.randn(N, generator=torch.Generator().manual_seed(3))
STILL = partial(torch.optim.SGD, lr=0.0)
pytestmark = no_validation


def model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def by_hand(x):
    """Parameters of each row in a hand-written guide; its global latent is a point."""
    pyro.sample("mu", dist.Delta(pyro.param("mu.loc", torch.tensor(4.0))))
    with pyro.plate("data", len(x)):
        loc = pyro.param("loc", torch.zeros(N), event_dim=0)
        pyro.sample("z", dist.Normal(loc, 0.1))


class Split(LightningDataModule):
    """Wraps the data set anew for every loader; rows 0 to 29 train."""

    def __init__(self):
        super().__init__()
        self.data, self.dataset_size = TensorDataset(X), 30

    def loader(self, rows):
        return DataLoader(Subset(IndexedDataset(self.data), rows), batch_size=B)

    def train_dataloader(self):
        return self.loader(range(30))

    def val_dataloader(self):
        return self.loader(range(30, N))


def fitted(guide=AutoNormal, data=None, optimizer=STILL, **options):
    svi = PyroSVIModule(model, guide, optimizer=optimizer)
    trainer = quiet_trainer(max_epochs=1, **options)
    trainer.fit(svi, datamodule=data or Split())
    return svi, trainer


def test_a_data_set_that_hooks_wrap_anew_is_the_same():
    data = Split()
    svi, trainer = fitted(data=data)
    assert svi.dataset_size == 30
    trainer.validate(svi, datamodule=data, verbose=False)


def test_held_out_rows_of_a_hand_written_guide_are_drawn_from_the_prior():
    torch.manual_seed(0)
    data = Split()
    svi, trainer = fitted(by_hand, data)
    losses = []
    for _ in range(60):
        found = trainer.validate(svi, datamodule=data, verbose=False)
        losses.append(found[0]["val_loss"])
    # mu is the point 4 and z ~ N(4, 1): -30 E log N(x; z, 1/2) - log p(mu), in expectation over z.
    held_out = X[30:]
    squares = ((held_out - 4) ** 2 + 1) / (2 * 0.25)
    per_row = squares + torch.tensor(0.5 * (2 * torch.pi) ** 0.5).log()
    expected = 30 * per_row.mean() - dist.Normal(0.0, 10.0).log_prob(torch.tensor(4.0))
    losses = torch.tensor(losses)
    error = losses.std() / len(losses) ** 0.5
    # At the untrained rows' own parameters, loc = 0, it would be near 1500.
    assert abs(float(losses.mean() - expected)) < 4 * float(error)
    assert float(expected) < 300


def test_rows_that_no_step_visited_are_not_drawn():
    data = ArrayDataModule(X, batch_size=B, shuffle=False)
    svi, _ = fitted(data=data, limit_train_batches=2)
    assert svi.posterior_samples(2, rows=[0, 19])["z"].shape == (2, 2)
    with pytest.raises(ValueError, match="rows 20, 39 did not train"):
        svi.posterior_samples(2, rows=[20, 3, 39])


def test_a_checkpoint_keeps_which_rows_trained(tmp_path):
    data = ArrayDataModule(X, batch_size=B, val_split=0.25)
    svi, trainer = fitted(data=data)
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    fresh = PyroSVIModule(model, AutoNormal)
    quiet_trainer().validate(fresh, datamodule=data, ckpt_path=tmp_path / "fit.ckpt", verbose=False)
    held_out = sorted(set(range(N)) - set(data.train_dataloader().dataset.rows.tolist()))
    for each in (svi, fresh):
        with pytest.raises(ValueError, match=f"rows {held_out[0]} did not train"):
            each.posterior_samples(2, rows=held_out[:1])


def test_a_fresh_module_validates_a_split_of_numbered_rows_from_a_checkpoint(tmp_path):
    svi, trainer = fitted(optimizer=partial(torch.optim.Adam, lr=0.5))
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    fresh = PyroSVIModule(model, AutoNormal)
    path = tmp_path / "fit.ckpt"
    quiet_trainer().validate(fresh, datamodule=Split(), ckpt_path=path, verbose=False)
    assert fresh.dataset_size == 30
    assert torch.equal(fresh.guide.locs.z.detach(), svi.guide.locs.z.detach())


def outside(x):
    """A latent of each row outside of every plate, beside observations within."""
    z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def test_batches_of_one_row_are_checked_as_others_are():
    with pytest.raises(ValueError, match="'z'.*grows with the batch"):
        quiet_trainer(max_epochs=1).fit(
            PyroSVIModule(outside), datamodule=ArrayDataModule(X, batch_size=1)
        )
