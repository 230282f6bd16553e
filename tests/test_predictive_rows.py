"""Latents of rows in predictive draws: from the guide, or from the prior given the globals."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_lightning import IndexedBatch, PyroSVIModule
from pyro_lightning.predictive import log_likelihood_of, predictive_draws

N, B, S = 100, 12, 40
X = torch.linspace(-1, 1, B)
Y = 0.5 * X + 0.1


def made(model, batch, *guide):
    """A module whose guide has parameters."""
    torch.manual_seed(0)
    svi = PyroSVIModule(model, *guide, dataset_size=N)
    svi.loss(batch)
    return svi


def with_local(y):
    mu = pyro.sample("mu", dist.Normal(3.0, 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 2.0))
        pyro.sample("y", dist.Normal(z, 1e-3), obs=y)


def rows_of_guide():
    """A module with a latent of each row, of which the guide says z_i = i."""
    svi = made(with_local, IndexedBatch(Y, torch.arange(B)))
    with torch.no_grad():
        svi.guide.locs._parameters["z_unconstrained"].copy_(torch.arange(float(N)))
        svi.guide.scales._parameters["z_unconstrained"].fill_(-9.0)  # softplus: 1e-4
        svi.guide.scales._parameters["mu_unconstrained"].fill_(-9.0)
    return svi


@pytest.mark.parametrize("parallel", [True, False])
def test_latents_of_rows_follow_the_numbers_of_the_rows(parallel):
    svi = rows_of_guide()
    rows = torch.tensor([70, 3, 3, 9])
    batch = IndexedBatch(Y[:4], rows)
    found = predictive_draws(
        svi, batch, svi.posterior_samples(S), sites=["z", "y"], parallel=parallel
    )
    for name in ("z", "y"):
        assert (found[name] - rows).abs().max() < 0.01


@pytest.mark.parametrize("parallel", [True, False])
def test_rows_without_a_number_have_latents_of_the_prior_given_the_globals(parallel):
    svi = rows_of_guide()
    posterior = {"mu": torch.linspace(-50, 50, 500)}
    z = predictive_draws(svi, Y[:3], posterior, sites="z", parallel=parallel)["z"]
    standard = (z - posterior["mu"][:, None]) / 2
    # Five standard errors of mean and sd of 500 draws, of each of the rows.
    assert standard.mean(0).abs().max() < 5 * 500**-0.5
    assert (standard.std(0) - 1).abs().max() < 5 * 1000**-0.5
    assert standard.T.corrcoef().fill_diagonal_(0).abs().max() < 5 * 500**-0.5


@pytest.mark.parametrize("parallel", [True, False])
def test_rows_that_never_trained_are_drawn_from_the_prior_beside_those_that_did(parallel):
    svi = rows_of_guide()
    svi._trained = torch.arange(N) < 10
    batch = IndexedBatch(Y[:4], torch.tensor([5, 50, 60, 7]))
    posterior = {"mu": torch.full((500,), -100.0)}
    z = predictive_draws(svi, batch, posterior, sites="z", parallel=parallel)["z"]
    assert (z[:, [0, 3]] - torch.tensor([5.0, 7.0])).abs().max() < 0.01
    standard = (z[:, 1:3] + 100) / 2
    assert standard.mean(0).abs().max() < 5 * 500**-0.5
    assert (standard.std(0) - 1).abs().max() < 5 * 1000**-0.5


class Amortised(nn.Module):
    """A guide whose latent of a row follows a global latent and the row."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(1.0))

    def forward(self, y):
        mu = pyro.sample("mu", dist.Normal(self.loc, 5.0))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(2 * mu + y, 1e-3))


@pytest.mark.parametrize("parallel", [True, False])
def test_an_amortised_guide_draws_latents_of_rows_given_the_globals(parallel):
    svi = made(with_local, Y, Amortised())
    posterior = svi.posterior_samples(S)
    z = predictive_draws(svi, Y, posterior, sites="z", parallel=parallel)["z"]
    assert (z - 2 * posterior["mu"][:, None] - Y).abs().max() < 6e-3
    found = log_likelihood_of(svi, Y, {"mu": torch.zeros(500)}, parallel=parallel)["y"]
    # z - y is then 1e-3 times standard noise e, as is the model's: -e^2 / 2 and constants.
    expected = -0.5 - 0.5 * torch.tensor(2 * torch.pi).log() - torch.tensor(1e-3).log()
    assert found.mean(0) == pytest.approx(float(expected), abs=5 * (0.5 / 500) ** 0.5)


def test_latents_of_rows_come_from_the_prior_where_that_is_asked_for():
    svi = made(with_local, Y, Amortised())
    posterior = {"mu": torch.full((500,), -100.0)}
    z = predictive_draws(svi, Y, posterior, sites="z", local="prior")["z"]
    assert ((z + 100) / 2).mean(0).abs().max() < 5 * 500**-0.5


def test_a_guide_that_reads_what_is_observed_does_not_serve_new_rows():
    def model(x, y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu + x, 1e-3))
            pyro.sample("y", dist.Normal(z, 1e-3), obs=y)

    def guide(x, y=None):
        pyro.sample("mu", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * (x + y), 1.0))

    svi = made(model, (X, Y), guide)
    posterior = svi.posterior_samples(S)
    with pytest.raises(TypeError, match="the guide fails on this batch: .*local='prior'"):
        predictive_draws(svi, (X,), posterior)
    y = predictive_draws(svi, (X,), posterior, local="prior")["y"]
    assert (y - posterior["mu"][:, None] - X).abs().max() < 0.01
