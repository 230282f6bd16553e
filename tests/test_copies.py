"""Copies are whole, and leave what was copied as it was."""

import copy
import pickle
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from support import quiet_trainer
from torch import nn

from pyro_lightning import ArrayDataModule, PyroSVIModule

N = 50
X = torch.randn(N, generator=torch.Generator().manual_seed(5)) + 1.0


def model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, sigma), obs=x)


def list_guide():
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["mu"])))
    guide.append(AutoDelta(poutine.block(model, expose=["sigma"])))
    return guide


class Methods(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_noise = nn.Parameter(torch.zeros(()))
        self.loc = nn.Parameter(torch.zeros(()))

    def model(self, x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, self.log_noise.exp()), obs=x)

    def guide(self, x):
        pyro.sample("mu", dist.Normal(self.loc, 0.1))


class OwnModel(PyroSVIModule):
    def __init__(self):
        super().__init__(guide=AutoMultivariateNormal, dataset_size=N)
        self.shift = nn.Parameter(torch.zeros(()))

    def model(self, x):
        model(x - self.shift)


def from_functions(guide, fn=model):
    return PyroSVIModule(fn, guide, dataset_size=N)


def from_methods():
    both = Methods()
    return PyroSVIModule(both.model, both.guide, dataset_size=N)


def bare_params():
    def guide(x):
        pyro.sample("mu", dist.Delta(pyro.param("mu_loc", torch.tensor(0.1))))
        positive = dist.constraints.positive
        scale = pyro.param("sigma_loc", torch.tensor(0.7), constraint=positive)
        pyro.sample("sigma", dist.Delta(scale))

    return from_functions(guide)


def from_network(run):
    """A model whose noise is computed by what it closes over."""

    def fn(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, run(x[:, None]).sum(-1).exp()), obs=x)

    return from_functions(AutoNormal, fn)


def networks():
    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.BatchNorm1d(2), nn.Linear(2, 1))
    last = net[2]  # which has a name of its own, too
    return from_network(lambda x: last(net[:2](x)))


def recurrent():
    net = nn.GRU(1, 2)  # holds its parameters twice: by name, and in a list
    return from_network(lambda x: net(x)[0])


def argument():
    return from_network(partial(lambda net, x: net(x), nn.Linear(1, 1)))


def named():
    net = nn.Linear(1, 1)
    return from_network(lambda x: pyro.module("net", net)(x))


class Encoder(nn.Module):
    """A guide that owns the network which the model closes over."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        loc = self.net(x[:, None]).mean()
        pyro.sample("mu", dist.Normal(loc, 0.1))
        pyro.sample("sigma", dist.LogNormal(loc, 0.1))


def shared():
    net = nn.Linear(1, 1)
    return from_functions(Encoder(net), lambda x: model(x + net(x[:, None])[:, 0]))


MODULES = {
    "autoguide": lambda: from_functions(AutoNormal),
    "joint autoguide": lambda: from_functions(AutoMultivariateNormal),
    "guide list": lambda: from_functions(list_guide()),
    "bound methods": from_methods,
    "bare params": bare_params,
    "subclass": OwnModel,
    "networks": networks,
    "recurrent network": recurrent,
    "network in a partial": argument,
    "pyro.module": named,
    "network of model and guide": shared,
}


def fit(svi):
    quiet_trainer(max_epochs=2).fit(svi, datamodule=ArrayDataModule(X, batch_size=10))


def values(svi):
    return {name: p.detach().clone() for name, p in svi.named_parameters()}


def seeded_loss(svi):
    torch.manual_seed(0)
    return svi.loss(X[:10]).detach()


@pytest.fixture(params=MODULES)
def svi(request):
    return MODULES[request.param]()


def check_apart(one, other):
    """Train ``one``: it moves, in all its parameters, and ``other`` does not."""
    seeded_loss(one), seeded_loss(other)
    ours, theirs = values(one), values(other)
    other.zero_grad()
    fit(one)
    assert all(p.grad is None for p in other.parameters())
    assert ours
    assert ours.keys() == theirs.keys()
    assert not any(torch.equal(p, ours[name]) for name, p in one.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in other.named_parameters())


@pytest.mark.parametrize("initialised", [False, True])
def test_copy_and_original_train_apart(svi, initialised):
    if initialised:
        fit(svi)
    copied = copy.deepcopy(svi)
    check_apart(copied, svi)
    check_apart(svi, copied)


def test_a_copy_of_a_fitted_module_is_equal_to_it(svi):
    fit(svi)
    copied = copy.deepcopy(svi)
    assert all(torch.equal(p, values(svi)[name]) for name, p in copied.named_parameters())
    assert torch.equal(seeded_loss(copied), seeded_loss(svi))
    for each in (svi, copied):
        each._globals_of_data = ()  # of the batch that both remember, which is as good here
    torch.manual_seed(0)
    ours = svi.posterior_samples(3)
    torch.manual_seed(0)
    theirs = copied.posterior_samples(3)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("initialised", [False, True])
def test_copying_leaves_the_live_autoguide_its_model_and_master(initialised):
    svi = from_functions(list_guide())
    if initialised:
        svi.loss(X)
    parts = [svi.guide, *svi.guide]
    before = [(part.model, part.master) for part in parts]
    copied = copy.deepcopy(svi)
    for part, (fn, master) in zip([svi.guide, *svi.guide], before, strict=True):
        assert part.model is fn
        assert part.master is master
    assert copied.guide is not svi.guide
    assert copied.guide.model is not None
    for part in copied.guide:
        assert part.master() is copied.guide
        assert part.model is not None


def test_a_copy_of_bound_methods_is_bound_to_the_copied_module():
    svi = from_methods()
    copied = copy.deepcopy(svi)
    assert copied.model.__self__ is copied.guide.__self__
    assert copied.model.__self__ is not svi.model.__self__
    assert {id(p) for p in copied.parameters()} == {
        id(p) for p in copied.model.__self__.parameters()
    }


def test_a_copy_within_a_container_is_whole():
    svi = from_functions(AutoNormal)
    svi.loss(X)
    both = copy.deepcopy({"one": svi, "again": svi})
    assert both["one"] is both["again"]
    check_apart(both["one"], svi)


def test_copying_the_guide_itself_leaves_the_module_working():
    svi = from_functions(AutoNormal)
    svi.loss(X)
    copy.deepcopy(svi.guide)
    expected = seeded_loss(svi)
    pickle.dumps(svi.guide)
    assert torch.equal(seeded_loss(svi), expected)
    assert svi.guide.model is not None
    fit(svi)


def test_a_copied_module_can_be_copied_again():
    first = from_functions(AutoNormal)
    fit(first)
    third = copy.deepcopy(copy.deepcopy(first))
    check_apart(third, first)


def test_a_flow_that_remembers_its_last_call_is_copied():
    svi = from_functions(partial(AutoIAFNormal, hidden_dim=[4]))
    fit(svi)
    copied = copy.deepcopy(svi)
    assert torch.equal(seeded_loss(copied), seeded_loss(svi))
    for each in (svi, copied):
        torch.manual_seed(1)
        fit(each)
    assert values(svi).keys() == values(copied).keys()
    assert all(torch.equal(each, values(copied)[name]) for name, each in values(svi).items())


def test_what_a_network_of_the_users_keeps_of_its_last_run_is_copied():
    class Keeping(nn.Linear):
        def forward(self, x):
            self.last = super().forward(x)
            return self.last

    net = Keeping(1, 1)
    svi = from_network(lambda x: net(x))
    svi.loss(X)
    assert not net.last.is_leaf
    check_apart(copy.deepcopy(svi), svi)
