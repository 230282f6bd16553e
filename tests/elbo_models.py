"""Conjugate models with one latent of each row or one of the whole, for ELBOs of particles."""

from itertools import cycle

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import nn

from pyro_lightning import PyroSVIModule

N, K = 12, 3


class GivenNoise(dist.Normal):
    """A Normal whose draws are ``loc + scale * noise``, the noise taken in turn from a cycle."""

    def __init__(self, loc, scale, noise):
        super().__init__(loc, scale)
        self.noise = noise

    def expand(self, batch_shape, _instance=None):
        return GivenNoise(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.noise)

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * next(self.noise)

    def sample(self, sample_shape=()):
        return self.rsample().detach()


class RowModel(PyroModule):
    """``z_i ~ N(prior, 1)``, ``y_i ~ N(z_i, 1)``, so that ``y_i ~ N(prior, 2)``."""

    def __init__(self):
        super().__init__()
        self.prior = nn.Parameter(torch.tensor(0.3))

    def forward(self, y, noise, observations=None):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(self.prior, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)


class RowGuide(PyroModule):
    """``z_i ~ N(a + b y_i, s)``; it is exact at a = prior / 2, b = 1/2, s^2 = 1/2.

    ``noise`` holds the draws of a row in its columns, one a particle; without it they are random.
    """

    def __init__(self, in_plate, infer=None, exact=False):
        super().__init__()
        self.in_plate, self.infer = in_plate, infer
        a, b, log_s = (0.15, 0.5, 0.5 * torch.tensor(0.5).log()) if exact else (0.1, 0.3, -0.6)
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))
        self.log_s = nn.Parameter(torch.as_tensor(log_s))

    def forward(self, y, noise, observations=None):
        y = y if observations is None else observations["y"]
        with pyro.plate("data", y.shape[-1]):  # particles may stand to the left
            loc, scale = self.a + self.b * y, self.log_s.exp()
            fn = dist.Normal(loc, scale)
            if noise is not None:
                given = [noise.T] if self.in_plate else list(noise.T)
                if not hasattr(self, "turns") or self.turns[0] is not noise:
                    self.turns = noise, cycle(given)
                fn = GivenNoise(loc, scale.expand(loc.shape), self.turns[1])
            pyro.sample("z", fn, infer=self.infer or {})


class WholeModel(PyroModule):
    """``mu ~ N(0, 1)``, ``y_i ~ N(mu + shift, 1)``."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(0.3))

    def forward(self, y, observations=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu + self.shift, 1.0), obs=y)


class WholeGuide(PyroModule):
    def __init__(self, infer=None):
        super().__init__()
        self.infer = infer
        self.loc, self.log_s = (nn.Parameter(torch.tensor(v)) for v in (0.1, -1.0))

    def forward(self, y, observations=None):
        pyro.sample("mu", dist.Normal(self.loc, self.log_s.exp()), infer=self.infer or {})


class Switch(nn.Module):
    """``z_i ~ Bernoulli(0.3)``, ``y_i ~ N(loc z_i, 1)``."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(1.5))

    def forward(self, y):
        with pyro.plate("data", len(y)):
            switch = pyro.sample("switch", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(self.loc * switch, 1.0), obs=y)


class SwitchGuide(nn.Module):
    def __init__(self):
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(0.4))

    def forward(self, y):
        with pyro.plate("data", len(y)):
            pyro.sample("switch", dist.Bernoulli(logits=self.logit.expand(len(y))))


def row_data(count=N, draws=K):
    """Values and noise of each row."""
    generator = torch.Generator().manual_seed(5)
    y = torch.randn(count, generator=generator)
    return y, torch.randn(count, draws, generator=generator)


def row_module(elbo, infer=None, exact=False, size=N, **options):
    guide = RowGuide(elbo.vectorize_particles or bool(infer), infer, exact)
    # The given noise is that of all particles, which a run outside of the ELBO would draw at once.
    return PyroSVIModule(RowModel(), guide, elbo, dataset_size=size, checks=False, **options)


def value_and_gradients(svi, batch, seed=0):
    """The loss of a batch, and the gradient of every parameter that has one."""
    svi.zero_grad()
    torch.manual_seed(seed)
    loss = svi.loss(batch)
    loss.backward()
    return loss.detach(), gradients(svi)


def gradients(module):
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def assert_same(pair, other, rtol=1e-9):
    torch.testing.assert_close(
        torch.as_tensor(pair[0]), torch.as_tensor(other[0]), rtol=rtol, atol=0
    )
    assert pair[1].keys() == other[1].keys()
    for name, gradient in pair[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=rtol, atol=1e-9)


def average(pairs):
    """The mean of several values with their gradients."""
    values, several = zip(*pairs, strict=True)
    means = {name: torch.stack([each[name] for each in several]).mean(0) for name in several[0]}
    return torch.stack(values).mean(), means


def log_evidence_of_rows(y, prior=0.3):
    return dist.Normal(prior, 2**0.5).log_prob(y).sum()


def log_evidence_of_whole(y, shift=0.3):
    covariance = torch.eye(len(y)) + torch.ones(len(y), len(y))
    return dist.MultivariateNormal(torch.zeros(len(y)), covariance).log_prob(y - shift)
