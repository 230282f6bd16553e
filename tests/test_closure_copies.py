"""A copy lends its own networks to functions, which are not copied with it."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from support import quiet_trainer
from torch import nn

from pyro_lightning import ArrayDataModule, PyroSVIModule

X = torch.randn(50, generator=torch.Generator().manual_seed(5)) + 1.0
STATISTICS = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1), nn.Dropout(0.5))


def with_statistics(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu + STATISTICS(x[:, None])[:, 0], 1.0), obs=x)


def fit(svi):
    quiet_trainer(max_epochs=2).fit(svi, datamodule=ArrayDataModule(X, batch_size=10))


def seeded_loss(svi):
    torch.manual_seed(0)
    return svi.loss(X[:10]).detach()


COPIERS = {"deepcopy": copy.deepcopy, "pickle": lambda svi: pickle.loads(pickle.dumps(svi))}


@pytest.fixture(params=COPIERS)
def pair(request):
    """A module whose function is not copied with it, and a copy of it."""
    svi = PyroSVIModule(with_statistics, dataset_size=len(X))
    svi.loss(X)
    yield svi, COPIERS[request.param](svi)
    STATISTICS.train()


def test_a_copys_network_is_its_own_in_values_statistics_and_mode(pair):
    svi, copied = pair
    state = {name: value.clone() for name, value in svi.state_dict().items()}
    fit(copied)
    copied.eval()
    copied.loss(X)
    assert all(torch.equal(value, state[name]) for name, value in svi.state_dict().items())
    changed = {n for n, value in copied.state_dict().items() if not torch.equal(value, state[n])}
    assert {"_networks.STATISTICS.1.running_mean", "_networks.STATISTICS.0.weight"} <= changed
    assert STATISTICS.training
    # Without dropout and with fixed statistics a copy in eval mode repeats itself.
    assert torch.equal(seeded_loss(copied), seeded_loss(copied))


def test_a_function_has_its_own_network_again_after_a_copys_run(pair):
    svi, copied = pair
    parts = {name: vars(part) for name, part in STATISTICS.named_modules()}
    copied.loss(X)
    with pytest.raises(RuntimeError):  # in the network
        copied.loss(X.double())
    assert all(vars(part) is parts[name] for name, part in STATISTICS.named_modules())
    assert svi._networks.STATISTICS is STATISTICS
    assert copied._networks.STATISTICS is not STATISTICS


def test_a_copy_loads_the_state_of_its_original(pair):
    svi, copied = pair
    fit(svi)
    copied.load_state_dict(svi.state_dict())
    svi.eval(), copied.eval()
    assert torch.equal(seeded_loss(copied), seeded_loss(svi))


def test_a_copy_whose_function_lost_its_network_says_so(monkeypatch):
    svi = PyroSVIModule(with_statistics, dataset_size=len(X))
    copied = copy.deepcopy(svi)
    monkeypatch.delitem(globals(), "STATISTICS")
    with pytest.raises(RuntimeError, match="network 'STATISTICS'"):
        copied.loss(X)
