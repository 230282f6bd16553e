"""What ``posterior_samples`` leaves alone, and what it refuses to draw."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoLaplaceApproximation
from support import normal_mean
from torch import nn

from pyro_lightning import PyroSVIModule

X = torch.linspace(-1, 3, 40)


def with_rows(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Encoder(nn.Module):
    """A guide whose network keeps running statistics; its global may ``follow`` the data."""

    def __init__(self, follows=False):
        super().__init__()
        self.norm, self.follows = nn.BatchNorm1d(1), follows
        self.loc = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        hidden = self.norm(x[:, None])[:, 0]
        shift = x.mean() if self.follows else 0.0
        pyro.sample("mu", dist.Normal(self.loc + shift, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(hidden, 1.0))


def test_drawing_leaves_running_statistics_as_they_are():
    svi = PyroSVIModule(with_rows, Encoder(), dataset_size=400)
    svi.loss(X)
    before = {name: buffer.clone() for name, buffer in svi.named_buffers()}
    assert svi.training and before
    svi.posterior_samples(20)
    assert all(torch.equal(buffer, before[name]) for name, buffer in svi.named_buffers())


def test_a_guide_whose_globals_follow_the_batch_has_no_posterior_without_data():
    svi = PyroSVIModule(with_rows, Encoder(follows=True), dataset_size=400)
    svi.loss(X)  # it trains all the same
    with pytest.raises(ValueError, match=r"global latents \(mu\) from its batch"):
        svi.posterior_samples(2)


def test_a_guide_of_parameters_alone_is_drawn_from():
    svi = PyroSVIModule(with_rows, Encoder(), dataset_size=400)
    svi.loss(X)
    draws = svi.posterior_samples(4000)["mu"]
    assert float(draws.mean()) == pytest.approx(0.3, abs=5 * 4000**-0.5)


def test_a_laplace_approximation_is_not_drawn_from_as_a_point():
    svi = PyroSVIModule(normal_mean, AutoLaplaceApproximation, dataset_size=40)
    svi.loss(X)
    with pytest.raises(ValueError, match="laplace_approximation"):
        svi.posterior_samples(2)
