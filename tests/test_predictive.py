"""Predictive draws and log-likelihoods of a batch: against Pyro's Predictive and closed forms."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive, TraceEnum_ELBO
from support import RowNormal
from torch import nn

from pyro_lightning import IndexedBatch, PyroSVIModule
from pyro_lightning.predictive import (
    draws_vectorise,
    global_draws,
    log_likelihood_of,
    observed_values,
    predictive_draws,
)

N, B, S = 100, 12, 40
X = torch.linspace(-1, 1, B)
Y = 0.5 * X + 0.1
NOISE = torch.randn(B, generator=torch.Generator().manual_seed(1))


def line(x, y=None):
    """The likelihood's noise is given, so that its draws are exactly known."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        mu = pyro.deterministic("mu", a + b[..., 0] * x + b[..., 1] * x**2)
        pyro.sample("y", RowNormal(mu, sigma, NOISE[: len(x)]), obs=y)


def made(model, batch, *guide, **options):
    """A module whose guide has parameters."""
    torch.manual_seed(0)
    svi = PyroSVIModule(model, *guide, **{"dataset_size": N, **options})
    svi.loss(batch)
    return svi


@pytest.fixture
def fitted():
    svi = made(line, (X, Y))
    return svi, svi.posterior_samples(S)


@pytest.mark.parametrize("parallel", [None, True, False])
def test_draws_are_those_of_pyros_predictive(fitted, parallel):
    svi, posterior = fitted
    found = predictive_draws(svi, (X,), posterior, parallel=parallel)
    expected = Predictive(line, posterior)(X)
    assert found.keys() == {"mu", "y"}
    for name in found:
        assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize("chunk_size", [1, 7, 40, 1000])
def test_draws_do_not_depend_on_the_size_of_chunks(fitted, chunk_size):
    svi, posterior = fitted
    whole = predictive_draws(svi, (X,), posterior)
    found = predictive_draws(svi, (X,), posterior, chunk_size=chunk_size)
    for name in whole:
        assert torch.equal(found[name], whole[name])


def test_what_was_observed_does_not_enter_the_draws(fitted):
    svi, posterior = fitted
    without, given = (predictive_draws(svi, b, posterior) for b in [(X,), (X, Y)])
    assert torch.equal(without["y"], given["y"])


def test_draws_leave_gradients_and_parameters_alone(fitted):
    svi, posterior = fitted
    before = [p.clone() for p in svi.parameters()]
    draws = predictive_draws(svi, (X,), posterior)
    assert not draws["y"].requires_grad
    assert all(torch.equal(p, b) for p, b in zip(svi.parameters(), before, strict=True))
    assert all(p.grad is None for p in svi.parameters())


def test_asked_sites_alone_are_drawn(fitted):
    svi, posterior = fitted
    assert predictive_draws(svi, (X,), posterior, sites="y").keys() == {"y"}
    assert list(predictive_draws(svi, (X,), posterior, sites=["mu", "y"])) == ["mu", "y"]


@pytest.mark.parametrize("parallel", [None, True, False])
def test_log_likelihood_is_that_of_each_row_without_scale(fitted, parallel):
    svi, posterior = fitted
    found = log_likelihood_of(svi, (X, Y), posterior, parallel=parallel, chunk_size=7)
    a, b, sigma = (posterior[name] for name in ("a", "b", "sigma"))
    mu = a[:, None] + b[:, :1] * X + b[:, 1:] * X**2
    expected = (
        -0.5 * ((Y - mu) / sigma[:, None]) ** 2 - (sigma[:, None] * (2 * torch.pi) ** 0.5).log()
    )
    assert found.keys() == {"y"}
    torch.testing.assert_close(found["y"], expected)


def test_observed_values_are_laid_out_as_draws(fitted):
    svi, posterior = fitted
    assert torch.equal(observed_values(svi, (X, Y), posterior)["y"], Y)


def matmul(x, y=None):
    """Runs for one draw only: an outer plate puts dimensions between those that are multiplied."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        mu = pyro.deterministic("mu", x @ w)
        pyro.sample("y", dist.Normal(mu, 0.1), obs=y)


def summed(x, y=None):
    """Runs for several draws without an error, and mixes them up."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        mu = pyro.deterministic("mu", x[:, 0] * w.sum())
        pyro.sample("y", dist.Normal(mu, 0.1), obs=y)


@pytest.mark.parametrize(
    ("model", "direction"),
    [(matmul, lambda w, x: w @ x.T), (summed, lambda w, x: w.sum(1, True) * x[:, 0])],
)
def test_a_model_that_cannot_run_for_several_draws_runs_once_for_each(model, direction):
    x = torch.stack([X, X**2], 1)
    svi = made(model, (x, Y))
    posterior = svi.posterior_samples(S)
    assert not draws_vectorise(svi, (x,), posterior)
    found = predictive_draws(svi, (x,), posterior)
    torch.testing.assert_close(found["mu"], direction(posterior["w"], x))
    with pytest.raises(ValueError, match="parallel=True, but model and guide cannot be run"):
        predictive_draws(svi, (x,), posterior, parallel=True)


class Grid(PyroSVIModule):
    def num_rows(self, batch):
        return len(batch[0])

    def model(self, x, y=None):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("time", 3, dim=-2), pyro.plate("data", len(x), dim=-1):
            loc = torch.arange(3.0)[:, None, None] + torch.stack([x, x], -1)
            pyro.sample("y", dist.Normal(loc + level[..., None], 1e-3).to_event(1), obs=y)


@pytest.mark.parametrize("parallel", [True, False])
def test_rows_come_first_after_draws_and_other_plates_before_the_event(parallel):
    svi = Grid(dataset_size=N)
    y = torch.zeros(3, B, 2)
    svi.loss((X, y))
    posterior = svi.posterior_samples(S)
    found = predictive_draws(svi, (X,), posterior, parallel=parallel)["y"]
    expected = (
        posterior["level"][:, None, None, None] + X[:, None, None] + torch.arange(3.0)[:, None]
    )
    assert found.shape == (S, B, 3, 2)
    assert (found - expected).abs().max() < 6e-3  # six sd of the noise
    assert log_likelihood_of(svi, (X, y), posterior)["y"].shape == (S, B, 3)
    assert observed_values(svi, (X, y), posterior)["y"].shape == (B, 3, 2)


def test_masked_rows_have_log_likelihood_zero():
    def model(y, kept):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)), pyro.poutine.mask(mask=kept):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    kept = torch.arange(B) > 3
    svi = made(model, (Y, kept))
    found = log_likelihood_of(svi, (Y, kept), svi.posterior_samples(S))["y"]
    assert torch.equal(found != 0, kept.expand(S, B))


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


def test_draws_without_global_latents_need_their_number():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1e-3), obs=y)

    def guide(y):
        loc = pyro.param("loc", torch.tensor(1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(loc * y, 1e-3))

    for plate in ("data", None):
        svi = made(model, Y, guide, data_plate=plate)
        posterior = global_draws(svi, S)
        assert posterior == {}
        y = predictive_draws(svi, Y, posterior, S)["y"]
        assert y.shape == (S, B)
        assert (y - Y).abs().max() < 0.02
        with pytest.raises(ValueError, match="expected one number of draws"):
            predictive_draws(svi, Y, posterior)


def test_observed_sites_outside_of_a_plate_are_served_where_they_are_scaled():
    def model(x, y=None):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a[..., None] * x, 1e-3).to_event(1), obs=y)

    svi = made(model, (X, Y), scale_sites="y")
    posterior = svi.posterior_samples(S)
    for parallel in (True, False):
        found = predictive_draws(svi, (X,), posterior, parallel=parallel)["y"]
        assert found.shape == (S, B)
        assert (found - posterior["a"][:, None] * X).abs().max() < 6e-3
    with pytest.raises(ValueError, match="site 'y' stands in no data plate"):
        log_likelihood_of(svi, (X, Y), posterior)


def test_the_number_of_rows_may_exceed_n():
    svi = made(matmul, (torch.stack([X, X], 1), Y), dataset_size=B)
    x = torch.zeros(2 * B, 2)
    assert predictive_draws(svi, (x,), svi.posterior_samples(3))["y"].shape == (3, 2 * B)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ("a", "site 'a' stands outside the data plate"),
        ("w", "site 'w' is no site in the data plate"),
    ],
)
def test_sites_that_are_not_in_the_data_plate_are_refused(fitted, sites, message):
    with pytest.raises(ValueError, match=message):
        predictive_draws(fitted[0], (X,), fitted[1], sites=sites)


def test_a_batch_without_observations_has_no_log_likelihood(fitted):
    with pytest.raises(ValueError, match="nothing is observed in this batch"):
        log_likelihood_of(fitted[0], (X,), fitted[1])


def test_a_model_that_needs_what_is_observed_is_explained():
    def model(x, y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a * x, 1.0), obs=y)

    svi = made(model, (X, Y))
    with pytest.raises(TypeError, match="the model fails on this batch: .*def model.x, y=None"):
        predictive_draws(svi, (X,), svi.posterior_samples(2))


def test_a_sequential_data_plate_is_refused():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        for i in pyro.plate("data", len(y)):
            pyro.sample(f"y_{i}", dist.Normal(mu, 1.0), obs=y[i])

    svi = made(model, Y)
    with pytest.raises(ValueError, match="site 'y_0' stands in the sequential plate 'data'"):
        predictive_draws(svi, Y, svi.posterior_samples(2))


def test_global_latents_that_nothing_draws_are_refused():
    def model(y):
        k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu + k, 1.0), obs=y)

    def guide(y):
        pyro.sample("mu", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))

    svi = PyroSVIModule(model, guide, dataset_size=B, checks=False)
    svi.elbo = TraceEnum_ELBO(max_plate_nesting=1)
    svi.loss(Y)
    posterior = svi.posterior_samples(S)
    with pytest.raises(ValueError, match="global latent 'k' has no draws: .* sums it out"):
        predictive_draws(svi, Y, posterior)
    k = (torch.arange(S) % 2).float()
    y = predictive_draws(svi, Y, {**posterior, "k": 1000 * k}, chunk_size=7)["y"]
    assert torch.equal(y.mean(1) > 500, k > 0)


# -- latents that the ELBO sums out --------------------------------------------------------------

W = torch.tensor([0.2, 0.5, 0.3])
LOCS = torch.tensor([-2.0, 0.0, 3.0])


def mixture(y, u=None, t=None):
    """Discrete latents of each row, over what a row observes."""
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), dim=-1):
        k = pyro.sample("k", dist.Categorical(W), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(LOCS[k] + shift, 0.7), obs=y)
        if u is not None:
            pyro.sample("u", dist.Normal(k.float(), 1.0), obs=u)
            pyro.sample("v", dist.Normal(shift, 1.0), obs=u)
        if t is not None:
            with pyro.plate("time", 3, dim=-2):
                pyro.sample("t", dist.Normal(LOCS[k], 1.0), obs=t.T)


def component_densities(posterior, y):
    """log p(y | k), (S, B, 3)."""
    locs = LOCS + posterior["shift"][:, None, None]
    return dist.Normal(locs, 0.7).log_prob(y[:, None])


def shift_alone(y, u=None, t=None):
    pyro.sample("shift", dist.Normal(pyro.param("m", torch.tensor(0.3)), 0.5))


def summed_out(*batch):
    svi = made(mixture, batch, shift_alone, elbo=TraceEnum_ELBO(max_plate_nesting=2))
    return svi, svi.posterior_samples(S)


@pytest.mark.parametrize("parallel", [None, True, False])
@pytest.mark.parametrize("rows", [B, 1])
def test_log_likelihood_sums_out_what_the_elbo_does(parallel, rows):
    svi, posterior = summed_out(Y)
    found = log_likelihood_of(svi, Y[:rows], posterior, parallel=parallel, chunk_size=7)
    expected = (component_densities(posterior, Y[:rows]) + W.log()).logsumexp(-1)
    assert found.keys() == {"y"}
    torch.testing.assert_close(found["y"], expected)


@pytest.mark.parametrize("parallel", [True, False])
def test_sites_that_share_a_latent_that_is_summed_out_have_one_likelihood(parallel):
    svi, posterior = summed_out(Y, X)
    found = log_likelihood_of(svi, (Y, X), posterior, parallel=parallel)
    under_k = component_densities(posterior, Y) + dist.Normal(torch.arange(3.0), 1.0).log_prob(
        X[:, None]
    )
    assert found.keys() == {"u+y", "v"}
    torch.testing.assert_close(found["u+y"], (under_k + W.log()).logsumexp(-1))
    expected = dist.Normal(posterior["shift"][:, None], 1.0).log_prob(X)
    torch.testing.assert_close(found["v"], expected)


@pytest.mark.parametrize("parallel", [True, False])
def test_a_latent_that_is_summed_out_joins_the_plates_within_its_row(parallel):
    t = torch.stack([X, X + 1, X - 2], 1)
    svi, posterior = summed_out(Y, None, t)
    found = log_likelihood_of(svi, (Y, None, t), posterior, parallel=parallel)
    of_times = dist.Normal(LOCS, 1.0).log_prob(t[..., None]).sum(1)
    under_k = component_densities(posterior, Y) + of_times
    assert found.keys() == {"t+y"}
    torch.testing.assert_close(found["t+y"], (under_k + W.log()).logsumexp(-1))


def test_latents_that_are_summed_out_are_drawn_from_the_prior():
    svi, _ = summed_out(Y)
    posterior = {"shift": torch.zeros(3000)}
    k = predictive_draws(svi, Y[:2], posterior, sites="k", parallel=True)["k"]
    found = torch.stack([(k == each).float().mean() for each in range(3)])
    assert (found - W).abs().max() < 5 * (0.25 / 6000) ** 0.5
