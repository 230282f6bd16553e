"""Models and guides of every kind that is compiled, each with its batches."""

from functools import partial
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import (
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
)
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.ops.indexing import Vindex
from torch import nn

from pyro_lightning import IndexedBatch, PyroSVIModule

N, B = 40, 8


class Case(NamedTuple):
    """How to make a module, by options of ``PyroSVIModule``, and a batch of it, by a number."""

    make: Any
    batch: Any


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def regression_batch(seed, rows=B):
    x = randn(rows, 3, seed=seed)
    return x, x.sum(-1) + 0.3 * randn(rows, seed=seed + 1000)


def counts_batch(seed, rows=B):
    return (torch.poisson(torch.full((rows,), 3.0), generator=generator(seed)),)


def bits_batch(seed, rows=B):
    return (torch.bernoulli(torch.full((rows, 6), 0.4), generator=generator(seed)),)


def values_batch(seed, rows=B):
    return (randn(rows, seed=seed) + 0.5,)


def indexed_batch(seed, rows=B):
    order = torch.randperm(N, generator=generator(seed))[:rows]
    return IndexedBatch(values_batch(seed, rows), order)


# -- global latents --------------------------------------------------------------------------------


def regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    bias = pyro.sample("bias", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + bias, sigma), obs=y)


def broadcast_regression(x, y):
    """The same, for vectorised particles."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((w * x).sum(-1), sigma), obs=y)


def subsampling_regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", N, subsample_size=len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def sequential_regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"y_{i}", dist.Normal(x[i] @ w, 0.5), obs=y[i])


def masked_regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)), poutine.mask(mask=y > -0.5):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def imputing_regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y, obs_mask=y > -0.5)


def imputing_guide(x, y):
    loc = pyro.param("loc", torch.zeros(3))
    pyro.sample("w", dist.Normal(loc, 0.3).to_event(1))
    shift = pyro.param("shift", torch.tensor(0.1))
    with pyro.plate("data", len(x)), poutine.mask(mask=y <= -0.5):
        pyro.sample("y_unobserved", dist.Normal(x.sum(-1) * shift, 0.4))


def hand_scaled(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x @ w, 0.5).to_event(1), obs=y)


def columns(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("users", len(x), dim=-2), pyro.plate("items", 6, dim=-1):
        pyro.sample("x", dist.Bernoulli(logits=loc), obs=x)


def parameters_only(x, y):
    w = pyro.param("w", torch.ones(3))
    sigma = pyro.param("sigma", torch.tensor(0.7), constraint=constraints.positive)
    mix = pyro.param("mix", torch.tensor([0.2, 0.8]), constraint=constraints.simplex)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w * mix[0], sigma), obs=y)


def no_guide(*batch):
    pass


def gammas(x):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    mix = pyro.sample("mix", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Poisson(rate * (1 + share) * (1 + mix[0])), obs=x)


def gammas_guide(x):
    def positive(name, *shape):
        return pyro.param(name, torch.full(shape, 2.0), constraint=constraints.positive)

    pyro.sample("rate", dist.Gamma(positive("a"), positive("b")))
    pyro.sample("share", dist.Beta(positive("c"), positive("d")))
    pyro.sample("mix", dist.Dirichlet(positive("e", 3)))


def switched(x):
    """Neither global nor local latents can be reparametrised."""
    state = pyro.sample("state", dist.Bernoulli(0.3))
    count = pyro.sample("count", dist.Poisson(2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(state + z + 0.1 * count, 1.0), obs=x)


def switched_guide(x):
    pyro.sample("state", dist.Bernoulli(logits=pyro.param("state.logit", torch.tensor(0.2))))
    rate = pyro.param("rate", torch.tensor(2.0), constraint=constraints.positive)
    pyro.sample("count", dist.Poisson(rate))
    slope = pyro.param("slope", torch.tensor(0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=slope * x))


# -- enumeration -----------------------------------------------------------------------------------


@config_enumerate
def mixture(x):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("components", 3):
        locs = pyro.sample("locs", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(locs[z], 1.0), obs=x)


@config_enumerate
def broadcast_mixture(x):
    """The same, for vectorised particles."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    locs = pyro.sample("locs", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(Vindex(locs)[..., z], 1.0), obs=x)


@config_enumerate
def mixture_guide_in_rows(x):
    alpha = pyro.param("alpha", torch.ones(3) * 2, constraint=constraints.positive)
    pyro.sample("weights", dist.Dirichlet(alpha))
    loc = pyro.param("loc", torch.tensor([-1.0, 0.1, 1.2]))
    with pyro.plate("components", 3):
        pyro.sample("locs", dist.Normal(loc, 0.3))
    slope = pyro.param("slope", torch.tensor([0.1, -0.2, 0.3]))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Categorical(logits=x[:, None] * slope))


def globals_of_mixture(model):
    return AutoNormal(poutine.block(model, expose=["weights", "locs"]))


# -- rows ------------------------------------------------------------------------------------------


def rows(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 0.8))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
        pyro.sample("x", dist.Normal(z, scale), obs=x)


def rows_guide(x):
    pyro.sample("mu", dist.Normal(pyro.param("mu.loc", torch.tensor(0.1)), 0.3))
    with pyro.plate("data", len(x)):
        loc = pyro.param("loc", torch.linspace(-1, 1, N), event_dim=0)
        scale = pyro.param(
            "z.scale", torch.full((N,), 0.5), constraint=constraints.positive, event_dim=0
        )
        pyro.sample("z", dist.Normal(loc, scale))
        pyro.sample("scale", dist.LogNormal(0.1 * x, 0.2))


# -- networks --------------------------------------------------------------------------------------


def vae(dropout=0.0, norm=False):
    """A variational autoencoder of functions with networks in their closures."""
    middle = [nn.BatchNorm1d(5)] if norm else []
    encoder = nn.Sequential(nn.Linear(6, 5), *middle, nn.Tanh(), nn.Dropout(dropout))
    to_loc, to_scale = nn.Linear(5, 2), nn.Linear(5, 2)
    decoder = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 6))

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        hidden = encoder(x)
        with pyro.plate("data", len(x)):
            scale = nn.functional.softplus(to_scale(hidden))
            pyro.sample("z", dist.Normal(to_loc(hidden), scale).to_event(1))

    return model, guide


def make_vae(dropout=0.0, norm=False, **options):
    torch.manual_seed(0)
    return PyroSVIModule(*vae(dropout, norm), dataset_size=N, **options)


class Subclass(PyroSVIModule):
    """The form with methods, a network, a constrained parameter and a latent of attributes."""

    def __init__(self, **options):
        super().__init__(dataset_size=N, **options)
        self.net = nn.Linear(3, 1)
        self.sigma = PyroParam(torch.tensor(1.0), constraint=constraints.positive)
        self.bias = PyroSample(dist.Normal(0.0, 1.0))

    def model(self, x, y):
        bias = self.bias
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(self.net(x).squeeze(-1) + bias, self.sigma), obs=y)


class Bayesian(PyroModule):
    """A layer whose weights are latents."""

    def __init__(self):
        super().__init__()
        self.layer = PyroModule[nn.Linear](3, 1)
        self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        self.log_sigma = nn.Parameter(torch.tensor(-0.3))

    def forward(self, x, y):
        loc = self.layer(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(loc, self.log_sigma.exp()), obs=y)


def list_of_guides(model):
    guide = AutoGuideList(model)
    guide.append(AutoMultivariateNormal(poutine.block(model, expose=["w", "bias"])))
    guide.append(AutoDelta(poutine.block(model, expose=["sigma"])))
    return guide


def flow(dim):
    return dist.transforms.affine_autoregressive(dim, hidden_dims=[8])


def made(model, guide=AutoNormal, elbo=Trace_ELBO, **fixed):
    """Make what makes a module, always with the same initial parameters."""

    def make(**options):
        torch.manual_seed(0)
        own = model() if isinstance(model, type) else model
        its = guide(own) if guide in MADE_OF_MODEL else guide
        return PyroSVIModule(own, its, elbo(), dataset_size=N, **fixed, **options)

    return make


def subclass(**options):
    torch.manual_seed(0)
    return Subclass(**options)


# Guides that are made of the model, beforehand.
MADE_OF_MODEL = (list_of_guides, globals_of_mixture)
LOOPED = partial(Trace_ELBO, num_particles=3)
VECTORISED = partial(Trace_ELBO, num_particles=4, vectorize_particles=True)
ENUMERATED = partial(TraceEnum_ELBO, max_plate_nesting=1)
FLOW = partial(AutoNormalizingFlow, init_transform_fn=flow)
SEVERAL = {"num_particles": 3}
AT_ONCE = {**SEVERAL, "vectorize_particles": True}

CASES = {
    "AutoNormal": Case(made(regression), regression_batch),
    "AutoDelta": Case(made(regression, AutoDelta), regression_batch),
    "AutoDiagonalNormal": Case(made(regression, AutoDiagonalNormal), regression_batch),
    "AutoMultivariateNormal": Case(made(regression, AutoMultivariateNormal), regression_batch),
    "AutoLowRank": Case(
        made(regression, partial(AutoLowRankMultivariateNormal, rank=2)), regression_batch
    ),
    "AutoIAFNormal": Case(made(regression, AutoIAFNormal), regression_batch),
    "AutoNormalizingFlow": Case(made(regression, FLOW), regression_batch),
    "AutoGuideList": Case(made(regression, list_of_guides), regression_batch),
    "looped particles": Case(made(regression, elbo=LOOPED), regression_batch),
    "vectorised particles": Case(made(broadcast_regression, elbo=VECTORISED), regression_batch),
    "mean field": Case(made(regression, elbo=TraceMeanField_ELBO), regression_batch),
    "mean field, points": Case(made(regression, AutoDelta, TraceMeanField_ELBO), regression_batch),
    "graph": Case(made(regression, elbo=TraceGraph_ELBO), regression_batch),
    "graph, score function": Case(made(switched, switched_guide, TraceGraph_ELBO), values_batch),
    "score function": Case(made(switched, switched_guide), values_batch),
    "score function, particles": Case(made(switched, switched_guide, LOOPED), values_batch),
    "Gamma, Beta, Dirichlet": Case(made(gammas, gammas_guide), counts_batch),
    "mean field, Gamma": Case(made(gammas, gammas_guide, TraceMeanField_ELBO), counts_batch),
    "parameters": Case(made(parameters_only, no_guide), regression_batch),
    "enumeration": Case(made(mixture, globals_of_mixture, ENUMERATED), values_batch),
    "enumeration in the guide": Case(
        made(mixture, mixture_guide_in_rows, ENUMERATED), values_batch
    ),
    "enumeration, particles": Case(
        made(mixture, globals_of_mixture, partial(ENUMERATED, **SEVERAL)), values_batch
    ),
    "enumeration, vectorised particles": Case(
        made(broadcast_mixture, globals_of_mixture, partial(ENUMERATED, **AT_ONCE)), values_batch
    ),
    "mean field, particles": Case(
        made(regression, elbo=partial(TraceMeanField_ELBO, **SEVERAL)), regression_batch
    ),
    "mean field, vectorised particles": Case(
        made(broadcast_regression, elbo=partial(TraceMeanField_ELBO, **AT_ONCE)), regression_batch
    ),
    "flow, particles": Case(made(regression, FLOW, LOOPED), regression_batch),
    "flow, vectorised particles": Case(
        made(broadcast_regression, FLOW, VECTORISED), regression_batch
    ),
    "rows, particles": Case(made(rows, elbo=LOOPED), indexed_batch),
    "VAE, particles": Case(partial(make_vae, elbo=LOOPED()), bits_batch),
    "VAE, vectorised particles": Case(partial(make_vae, elbo=VECTORISED()), bits_batch),
    "rows": Case(made(rows), indexed_batch),
    "rows, points": Case(made(rows, AutoDelta), indexed_batch),
    "rows, by hand": Case(made(rows, rows_guide), indexed_batch),
    "VAE": Case(make_vae, bits_batch),
    "VAE, dropout": Case(partial(make_vae, 0.3), bits_batch),
    "VAE, BatchNorm": Case(partial(make_vae, 0.0, True), bits_batch),
    "subclass": Case(subclass, regression_batch),
    "latent weights": Case(made(Bayesian), regression_batch),
    "subsampling plate": Case(made(subsampling_regression), regression_batch),
    "sequential plate": Case(made(sequential_regression), regression_batch),
    "mask": Case(made(masked_regression), regression_batch),
    "obs_mask": Case(made(imputing_regression, imputing_guide), regression_batch),
    "scale_sites": Case(made(hand_scaled, data_plate=None, scale_sites=("y",)), regression_batch),
    "columns": Case(made(columns, data_plate={"users": None, "items": 6}), bits_batch),
}
