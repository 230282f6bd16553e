"""Latents that a check of the guide sums out, and models, guides and data that it refuses."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from support import mixed_rows
from test_guide_check import N, correlated_data, regression

from pyro_lightning import ArrayDataModule, IndexedBatch, PyroSVIModule
from pyro_lightning.log_weights import compute_log_weights

pytest.importorskip("arviz", reason="ArviZ, which fits the tail, is not installed")


def mixture(x):
    locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("data", len(x)):
        weights = torch.tensor([0.3, 0.7])
        k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
        loc = torch.where(k == 0, locs[..., 0], locs[..., 1])
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def mixture_guide():
    return AutoNormal(pyro.poutine.block(mixture, expose=["locs"]))


def test_weights_sum_out_what_the_elbo_sums_out():
    x = mixed_rows(N)[0]
    svi = PyroSVIModule(mixture, mixture_guide(), TraceEnum_ELBO(), dataset_size=N)
    svi.loss(x)
    found = compute_log_weights(svi, [x[:40], x[40:]], 100)
    locs = found.draws["locs"].double()
    each = dist.Normal(locs[:, None], 1.0).log_prob(x.double()[:, None])
    likelihood = (each + torch.tensor([0.3, 0.7]).log()).logsumexp(-1).sum(1)
    prior = dist.Normal(0.0, 3.0).log_prob(locs).sum(1)
    loc = svi.guide.locs.locs.detach().double()
    log_q = dist.Normal(loc, svi.guide.scales.locs.detach().double()).log_prob(locs).sum(1)
    # Single precision of terms that sum to some 100 nats.
    torch.testing.assert_close(found.log_weights, likelihood + prior - log_q, rtol=0, atol=1e-3)


def refused(svi, data, match, **options):
    svi.loss(IndexedBatch(data, torch.arange(N)))
    loader = ArrayDataModule(data, batch_size=25)
    with pytest.raises(ValueError, match=match):
        svi.check_guide(loader, 100, **options)


def test_latents_of_rows_are_refused():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    svi = PyroSVIModule(model, dataset_size=N)
    refused(svi, mixed_rows(N)[0], "'z' stand in the data plate")


def test_max_rows_is_refused_where_latents_are_summed_out():
    svi = PyroSVIModule(mixture, mixture_guide(), TraceEnum_ELBO(), dataset_size=N)
    refused(svi, mixed_rows(N)[0], "max_rows needs gradients", max_rows=30)


@pytest.mark.parametrize(
    "more, match", [("factor", "'more' is a pyro.factor"), ("scale", "has a scale of its own")]
)
def test_terms_beside_latents_that_are_summed_out_are_refused(more, match):
    def model(x):
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        scale = pyro.poutine.scale(scale=2.0 if more == "scale" else 1.0)
        with scale, pyro.plate("data", len(x)):
            if more == "factor":
                pyro.factor("more", -x.square())
            weights = torch.tensor([0.3, 0.7])
            k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(locs[..., k], 1.0), obs=x)

    guide = AutoNormal(pyro.poutine.block(model, expose=["locs"]))
    svi = PyroSVIModule(model, guide, TraceEnum_ELBO(), dataset_size=N, checks=False)
    refused(svi, mixed_rows(N)[0], match)


def test_a_point_is_refused():
    svi = PyroSVIModule(regression, AutoDelta, dataset_size=N)
    refused(svi, correlated_data(), "every draw of the guide is the same point: .*'w'|a point")


def test_other_rows_than_those_of_the_training_set_are_refused():
    svi = PyroSVIModule(regression, dataset_size=2 * N)
    refused(svi, correlated_data(), "the data hold 60 rows, .* N = 120")
    refused(svi, correlated_data(), "the data hold 60 rows, .* N = 120", max_rows=50)


def test_latents_of_two_values_are_checked():
    def model(x):
        flag = pyro.sample("flag", dist.Bernoulli(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(flag, 1.0), obs=x)

    def guide(x):
        pyro.sample("flag", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.0))))

    svi = PyroSVIModule(model, guide, dataset_size=N)
    svi.loss(mixed_rows(N)[0])
    check = svi.check_guide(ArrayDataModule(mixed_rows(N)[0]), 100)
    # Data around 0: the posterior says no, the guide is a fair coin.
    assert check["flag"].guide_mean > 0.3 and check["flag"].weighted_mean < 0.01


def test_few_draws_are_refused():
    svi = PyroSVIModule(regression, dataset_size=N)
    with pytest.raises(ValueError, match="num_samples must be at least 100"):
        svi.check_guide(ArrayDataModule(correlated_data()), 50)
    with pytest.raises(RuntimeError, match="the guide has no parameters yet"):
        svi.check_guide(ArrayDataModule(correlated_data()))
    svi.loss(correlated_data())
    with pytest.raises(TypeError, match="a loader or other iterable of batches, or a datamodule"):
        svi.check_guide(correlated_data()[0])
