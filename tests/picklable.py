"""Modules of models and guides that can be pickled: by name, or as objects."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

from pyro_lightning import IndexedBatch, PyroSVIModule

N, B = 40, 10
X = torch.randn(N, generator=torch.Generator().manual_seed(1)) + 1.0


def batch(number=0):
    rows = torch.arange(B) + B * number
    return IndexedBatch(X[rows], rows)


def model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, sigma), obs=x)


def guide(x):
    pyro.sample("mu", dist.Normal(pyro.param("mu.loc", torch.tensor(0.1)), 0.1))
    scale = pyro.param("scale", torch.tensor(0.3), constraint=constraints.positive)
    pyro.sample("sigma", dist.LogNormal(0.0, scale))


def list_of_guides():
    made = AutoGuideList(model)
    made.append(AutoNormal(poutine.block(model, expose=["mu"])))
    made.append(AutoDelta(poutine.block(model, expose=["sigma"])))
    return made


def of_rows(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Layer(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
        self.weight = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self, x):
        loc = self.net(x[:, None])[:, 0] + self.weight
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


class Own(PyroSVIModule):
    def __init__(self):
        super().__init__(guide=AutoMultivariateNormal, dataset_size=N)
        self.shift = nn.Parameter(torch.zeros(()))
        self.spread = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

    def model(self, x):
        mu = pyro.sample("mu", dist.Normal(self.shift, self.spread))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))

    def model(self, x):
        model(x - self.loc)

    def guide(self, x):
        guide(x)


def of_methods():
    both = Both()
    return PyroSVIModule(both.model, both.guide, dataset_size=N)


def of(fn, made_of=AutoNormal, **options):
    return PyroSVIModule(fn, made_of, dataset_size=N, **options)


MODULES = {
    "AutoNormal": lambda: of(model),
    "AutoMultivariateNormal": lambda: of(model, AutoMultivariateNormal),
    "AutoGuideList": lambda: of(model, list_of_guides()),
    "function guide": lambda: of(model, guide),
    "latents of rows": lambda: of(of_rows),
    "PyroModule": lambda: of(Layer()),
    "subclass": Own,
    "bound methods": of_methods,
    "compiled": lambda: of(model, compile=True, steps_per_batch=2),
}


def seeded(run):
    torch.manual_seed(5)
    return run()


def figures(svi):
    """A loss and draws of a module, at one random state."""
    loss = seeded(lambda: svi.loss(batch(1))).detach()
    return {"loss": loss, **seeded(lambda: svi.posterior_samples(3))}
