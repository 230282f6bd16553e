"""Copies of a module that keeps parameters of each row are whole."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal
from support import quiet_trainer

from pyro_lightning import ArrayDataModule, IndexedBatch, PyroSVIModule

N = 60
X = torch.randn(N, generator=torch.Generator().manual_seed(0))


def model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def fitted(guide):
    svi = PyroSVIModule(model, guide)
    quiet_trainer(max_epochs=2).fit(svi, datamodule=ArrayDataModule(X, batch_size=20))
    return svi


def values(svi):
    return {name: parameter.detach().clone() for name, parameter in svi.named_parameters()}


def seeded(svi):
    torch.manual_seed(5)
    rows = torch.tensor([9, 4])
    draws = svi.posterior_samples(3, rows=rows)
    return svi.loss(IndexedBatch(X[rows], rows)).detach(), draws["z"]


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda svi: pickle.loads(pickle.dumps(svi))])
def test_copies_are_equal_and_train_apart(way, guide):
    svi = fitted(guide)
    copied = way(svi)
    before = values(svi)
    assert all(torch.equal(value, before[name]) for name, value in values(copied).items())
    for one, other in zip(seeded(svi), seeded(copied), strict=True):
        assert torch.equal(one, other)
    quiet_trainer(max_epochs=1).fit(copied, datamodule=ArrayDataModule(X, batch_size=20))
    assert all(torch.equal(value, before[name]) for name, value in values(svi).items())
    assert not any(torch.equal(value, before[name]) for name, value in values(copied).items())


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta])
def test_state_dict_of_a_fresh_module(guide):
    svi = fitted(guide)
    fresh = PyroSVIModule(model, guide, dataset_size=N)
    fresh.loss(IndexedBatch(X[:3], torch.arange(3)))
    fresh.load_state_dict(svi.state_dict())
    for one, other in zip(seeded(svi), seeded(fresh), strict=True):
        assert torch.equal(one, other)
