"""Networks that functions use: their names, and what is owned already."""

import weakref
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
import torchmetrics
from closure_nets import BATCH, B, N, X, guide, in_closure, linear, names, net, observe
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from support import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_lightning import PyroSVIModule
from pyro_lightning.closures import reached_networks

pytestmark = pytest.mark.usefixtures("untouched_store")


# -- names -----------------------------------------------------------------------------------------


def test_networks_of_one_name_are_told_apart():
    def of_guide(net):
        def guide(x, y):
            loc, log_scale = net(x).mean(0)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

        return guide

    first, second = linear(), nn.Linear(2, 2)
    svi = PyroSVIModule(in_closure(first), of_guide(second), dataset_size=N)
    svi.loss(BATCH).backward()
    assert dict(svi._networks.named_children()) == {"net": first, "net_2": second}
    assert all(p.grad is not None for p in svi.parameters())


def test_a_network_of_model_and_guide_is_registered_once():
    net = linear()

    def guide(x, y):
        pyro.sample("z", dist.Normal(net(x).mean(), 0.5))

    svi = PyroSVIModule(in_closure(net), guide, dataset_size=N)
    svi.loss(BATCH)
    assert list(map(id, svi.parameters())) == list(map(id, net.parameters()))


@pytest.mark.parametrize("name", ["train", "a.b", "T_destination"])
def test_names_that_a_submodule_may_not_have_are_changed(name):
    found = reached_networks([{name: linear()}, partial(observe, **{name: linear()})])
    assert len(nn.ModuleDict(found)) == 2  # which refuses dots and the names of attributes


def test_a_network_that_exists_only_after_the_module_is_found():
    def model(x, y):
        observe(predict(x), y)

    svi = PyroSVIModule(model, guide, dataset_size=N)  # before the helper exists
    net = linear()

    def predict(x):
        return net(x)

    svi.loss(BATCH)
    assert names(svi) == {"net"}


def test_what_cannot_be_looked_into_is_passed_over():
    class Owner:
        pass

    gone = Owner()
    dead, slots = weakref.proxy(gone), type("Slots", (), {"__slots__": ("net",)})()
    del gone
    later = None

    def model(x):
        return dead, slots, unset, later

    assert reached_networks([model, range(10**9), [0] * 10**6, iter([net])]) == {}
    unset = net  # which the closure holds from here on
    assert reached_networks([model]) == {"unset": net}


# -- what is owned already -------------------------------------------------------------------------


class Owner(PyroSVIModule):
    def __init__(self):
        super().__init__(dataset_size=N)
        self.head = net

    def model(self, x, y):
        observe(net(x), y)

    def guide(self, x, y):
        guide(x, y)


class OwnerOfPart(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([net])

    def model(self, x, y):
        observe(net(x), y)


@pytest.mark.parametrize(
    "make", [Owner, lambda: PyroSVIModule(OwnerOfPart().model, guide, dataset_size=N)]
)
def test_a_network_that_is_owned_is_not_registered_again(make):
    svi = make()
    svi.loss(BATCH)
    assert names(svi) == set()
    assert sum(p is net.weight for p in svi.parameters()) == 1
    assert sum(key.endswith("weight") for key in svi.state_dict()) == 1


def test_a_part_of_a_network_is_registered_within_it_only():
    net = nn.Sequential(linear(), nn.Tanh())
    layer = net[0]

    def model(x, y):
        observe(net(x) + layer(x), y)

    svi = PyroSVIModule(model, guide, dataset_size=N)
    svi.loss(BATCH)
    assert names(svi) == {"net"}


def test_a_network_named_by_pyro_module_is_registered_once():
    net = linear()

    def model(x, y):
        pyro.module("regression", net)
        observe(net(x), y)

    svi = PyroSVIModule(model, guide, dataset_size=N)
    svi.loss(BATCH)
    assert len(svi.state_dict()) == 4
    assert {id(p) for p in net.parameters()} <= {id(p) for p in svi.parameters()}


def test_a_model_that_names_its_own_module_does_not_hold_it():
    def model(x, y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=svi.scale_factor((x, y))), pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(net(x)[:, 0] + z, 0.5), obs=y)

    net = linear()
    svi = PyroSVIModule(model, guide, data_plate=None, dataset_size=N)
    earlier, svi = svi, PyroSVIModule(model, guide, data_plate=None, dataset_size=N)
    svi.loss(BATCH).backward()
    assert names(svi) == {"net"}
    assert earlier not in list(svi.modules())


# -- guides ----------------------------------------------------------------------------------------


def test_an_encoder_of_a_guide_function_trains():
    encoder = nn.Linear(2, 2)
    decoder = nn.Linear(1, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        loc, log_scale = encoder(x).split(1, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    svi = PyroSVIModule(model, guide)
    nets = [encoder, decoder]
    before = [p.detach().clone() for net in nets for p in net.parameters()]
    rows = DataLoader(TensorDataset(X), batch_size=B)
    quiet_trainer(max_epochs=2).fit(svi, rows)
    assert names(svi) == {"encoder", "decoder"}
    after = [p for net in nets for p in net.parameters()]
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_networks_of_the_parts_of_a_guide_list_train():
    net = nn.Linear(2, 1)

    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        observe(w * x[:, :1], y)

    def part(x, y):
        pyro.sample("z", dist.Normal(net(x).mean(), 0.5))

    guides = AutoGuideList(model)
    guides.append(AutoNormal(poutine.block(model, hide=["z"])))
    guides.append(part)
    svi = PyroSVIModule(model, guides, dataset_size=N)
    svi.loss(BATCH).backward()
    assert names(svi) == {"net"}
    assert all(p.grad is not None for p in net.parameters())


def test_a_pyro_module_of_a_function_trains_with_its_constraints_and_latents():
    class Level(PyroModule):
        def __init__(self):
            super().__init__()
            self.noise = PyroParam(torch.tensor(0.7), constraint=dist.constraints.positive)
            self.bias = PyroSample(dist.Normal(0.0, 1.0))
            self.linear = PyroModule[nn.Linear](2, 1)

        def forward(self, x):
            return self.linear(x)[:, 0] + self.bias, self.noise

    level = Level()

    def model(x, y):
        loc, noise = level(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(loc, noise), obs=y)

    svi = PyroSVIModule(model, dataset_size=N)
    svi.loss(BATCH).backward()
    assert names(svi) == {"level"}
    assert set(svi.posterior_samples(2)) == {"bias"}
    assert level.noise_unconstrained.grad is not None
    assert level.linear.weight.grad is not None


def test_code_of_torchmetrics_is_not_searched(monkeypatch):
    # Its globals lead to all that it imports, through the wrappers of each metric's methods.
    monkeypatch.setattr(torchmetrics.metric, "apply_to_collection", linear())
    metric = torchmetrics.MeanMetric()
    assert list(reached_networks([lambda: metric]).values()) == [metric]
