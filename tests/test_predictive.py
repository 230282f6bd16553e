"""Predictive draws and log-likelihoods of a batch: against Pyro's Predictive and closed forms."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive, TraceEnum_ELBO
from support import RowNormal

from pyro_lightning import PyroSVIModule
from pyro_lightning.predictive import (
    draws_vectorise,
    global_draws,
    log_likelihood_of,
    predictive_draws,
)
from pyro_lightning.targets import observed_targets

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
    assert torch.equal(observed_targets(svi, (X, Y), posterior)["y"], Y)


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


def test_as_many_rows_as_draws_are_tried_do_not_mislead():
    def model(x, y=None):
        with pyro.plate("groups", 3):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            # Of three draws in an outer plate, of three levels each, this would take draws.
            pyro.sample("y", dist.Normal(level[torch.arange(len(x)) % 3], 1e-6), obs=y)

    svi = PyroSVIModule(model, dataset_size=7)
    svi.loss((torch.zeros(7), torch.zeros(7)))
    posterior = svi.posterior_samples(S)
    found = predictive_draws(svi, (torch.zeros(3),), posterior)["y"]
    # The sd of a row is 1e-6.
    torch.testing.assert_close(found, posterior["level"], rtol=0, atol=1e-4)


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
    assert observed_targets(svi, (X, y), posterior)["y"].shape == (B, 3, 2)


def test_masked_rows_have_log_likelihood_zero():
    def model(y, kept):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)), pyro.poutine.mask(mask=kept):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    kept = torch.arange(B) > 3
    svi = made(model, (Y, kept))
    found = log_likelihood_of(svi, (Y, kept), svi.posterior_samples(S))["y"]
    assert torch.equal(found != 0, kept.expand(S, B))


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


def test_no_run_holds_more_draws_than_a_chunk():
    held = []

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        held.append(w.numel())
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    svi = made(model, (X, Y))
    posterior = svi.posterior_samples(S)
    held.clear()
    predictive_draws(svi, (X,), posterior, chunk_size=16)
    assert max(held) == 16 and held[-3:] == [16, 16, 8]


def test_plates_of_columns_stay_with_the_row():
    def model(x, y=None):
        with pyro.plate("items", 5, dim=-1):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
            with pyro.plate("users", len(x), dim=-2):
                pyro.sample("y", dist.Normal(level + x[:, None], 1e-3), obs=y)

    svi = made(model, (X, torch.zeros(B, 5)), data_plate={"users": N, "items": 5})
    posterior = svi.posterior_samples(S)
    for parallel in (True, False):
        y = predictive_draws(svi, (X,), posterior, parallel=parallel)["y"]
        assert (y - posterior["level"][:, None] - X[:, None]).abs().max() < 6e-3
