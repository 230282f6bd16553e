"""Rows that never trained: their latents are drawn from the prior, given the globals."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from support import quiet_trainer
from torch.utils.data import DataLoader, random_split

from pyro_lightning import ArrayDataModule, IndexedDataset, PyroSVIModule
from pyro_lightning.rows import data_of

N, N_TRAIN, PARTICLES = 60, 48, 4000
TAU, S = 1.0, 0.5
Z, NOISE = torch.randn(2, N, generator=torch.Generator().manual_seed(0))
X = 2 + TAU * Z + S * NOISE


def model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, TAU))
        pyro.sample("x", dist.Normal(z, S), obs=x)


def expected_loss(loc, sd, x):
    """The mean loss of held-out x, with mu ~ N(loc, sd) and z ~ N(mu, TAU), and a draw's sd."""
    prior = -0.5 * (loc**2 + sd**2) / 100 - math.log(10) - 0.5 * math.log(2 * math.pi)
    entropy = 0.5 * math.log(2 * math.pi * math.e * sd**2) if sd else 0.0
    spread, miss = TAU**2 + sd**2, (x - loc) ** 2
    fits = -0.5 * (miss + spread) / S**2 - math.log(S) - 0.5 * math.log(2 * math.pi)
    scale = N_TRAIN / len(x)
    # The sd of a sum is at most the sum of the sds.
    sds = (4 * miss * spread + 2 * spread**2).sqrt() / (2 * S**2)
    return -(prior + entropy + scale * fits.sum()), float(scale * sds.sum())


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO])
@pytest.mark.parametrize("way", ["val_split", "val", "random_split", "plain loader"])
@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta])
def test_latents_of_held_out_rows_are_drawn_from_the_prior_given_the_globals(guide, way, elbo):
    many = elbo(
        num_particles=PARTICLES,
        vectorize_particles=True,
        max_plate_nesting=1,
        strict_enumeration_warning=False,
    )
    svi = PyroSVIModule(model, guide)
    if way in ("val_split", "val"):
        given = {"val_split": 0.2} if way == "val_split" else {"val": X[N_TRAIN:]}
        data = ArrayDataModule(X if way == "val_split" else X[:N_TRAIN], batch_size=12, **given)
        train, val = None, data.val_dataloader()
    else:
        indexed = IndexedDataset(X)
        train, val = random_split(indexed, [N_TRAIN, N - N_TRAIN], torch.Generator())
        data = None
        train, val = DataLoader(train, batch_size=12), DataLoader(val, batch_size=12)
        if way == "plain loader":
            val = DataLoader([batch.data for batch in val.dataset], batch_size=12)
    quiet_trainer(max_epochs=5).fit(svi, train, datamodule=data)
    assert svi.dataset_size == N_TRAIN
    svi.elbo = many
    trainer = quiet_trainer()
    trainer.validate(svi, val, verbose=False)
    held_out = torch.cat([data_of(batch) for batch in val])
    assert len(held_out) == N - N_TRAIN
    mu = svi.guide.median()["mu"] if guide is AutoNormal else svi.guide.mu.detach()
    sd = svi.guide.scales.mu.detach() if guide is AutoNormal else torch.tensor(0.0)
    expected, spread = expected_loss(mu, sd, held_out)
    found = float(trainer.callback_metrics["val_loss"])
    assert found == pytest.approx(float(expected), abs=5 * spread / PARTICLES**0.5)


def test_rows_that_trained_are_validated_by_their_own_parameters():
    data = IndexedDataset(X)
    loader = DataLoader(data, batch_size=N)
    svi = PyroSVIModule(model, AutoDelta)
    trainer = quiet_trainer(max_epochs=5)
    trainer.fit(svi, DataLoader(data, batch_size=10))
    trainer.validate(svi, loader, verbose=False)
    with torch.no_grad():
        expected = svi.loss(next(iter(loader)))  # without noise
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(float(expected), rel=1e-5)
