"""Fits on mini-batches give the full data's posterior, known here in closed form."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from support import normal_mean, quiet_trainer
from torch import nn
from torch.distributions import constraints

from pyro_lightning import ArrayDataModule, PyroSVIModule

N, B, DRAWS = 1000, 100, 10_000


@pytest.fixture(autouse=True)
def one_thread():
    # Threads only wait for each other on tensors this small.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def decaying(steps, first=5e-2, last=3e-4):
    """Adam, and a schedule of its step from first to last: the noise of the steps averages out."""
    gamma = (last / first) ** (1 / steps)
    return {
        "optimizer": partial(torch.optim.Adam, lr=first, betas=(0.9, 0.99)),
        "lr_scheduler": lambda optimizer: {
            "scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma),
            "interval": "step",
        },
    }


def particles(elbo, count=16):
    """An ELBO averaged over draws of the guide, which takes fewer steps to the same accuracy."""
    return elbo(num_particles=count, vectorize_particles=True, max_plate_nesting=1)


def fit(svi, arrays, batch_size, epochs):
    quiet_trainer(max_epochs=epochs).fit(svi, datamodule=ArrayDataModule(arrays, batch_size))
    return svi


def assert_matches(draws, mean, sd, mean_within=0.1, sd_within=0.05):
    """Mean within a share of the exact sd, sd within a share of itself."""
    assert float(draws.mean()) == pytest.approx(mean, abs=mean_within * sd)
    assert float(draws.std()) == pytest.approx(sd, rel=sd_within)


# -- the mean of a Normal --------------------------------------------------------------------------
#
# N = 1000, B = 100, prior N(0, 0.1), unit noise. The exact posterior has precision 100 + N and mean
# sum(x) / (100 + N), here 0.935 with sd 0.0302. Two ways to be wrong, which no test can use as an
# oracle but which the tolerance (0.003 and 0.0015) must tell apart:
#   - no scale: the ten terms of a batch meet the whole prior each time, as if there were B = 100
#     rows; mean 0.515, sd 0.070;
#   - N/B around model and guide: the prior and the entropy grow with the likelihood, so that the
#     optimum is again that of B rows; mean 0.514, sd 0.069.
#
# The tolerances cover what is left of the steps' noise (over seeds, within 0.05 sds in the mean and
# 3% in the sd) and the Monte Carlo error of the draws (0.01 sds and 0.7%).


def centred(mean):
    x = torch.randn(N)
    return x - x.mean() + mean


def exact_mean(x):
    precision = 100 + len(x)
    return float(x.sum()) / precision, precision**-0.5


class Subclass(PyroSVIModule):
    """The same model as methods of the module, with a guide of its own."""

    def __init__(self):
        super().__init__(elbo=particles(Trace_ELBO), **decaying(800))
        self.loc = nn.Parameter(torch.tensor(0.0))
        self.scale = pyro.nn.PyroParam(torch.tensor(0.1), constraint=constraints.positive)

    def model(self, x):
        mu = pyro.sample("mu", dist.Normal(0.0, 0.1))
        with pyro.plate("data", N, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def guide(self, x):
        pyro.sample("mu", dist.Normal(self.loc, self.scale))


@pytest.mark.parametrize(
    "make",
    [
        lambda: PyroSVIModule(
            normal_mean, AutoNormal, particles(TraceMeanField_ELBO), **decaying(800)
        ),
        lambda: PyroSVIModule(
            normal_mean, AutoMultivariateNormal, particles(Trace_ELBO), **decaying(800)
        ),
        Subclass,
    ],
    ids=["AutoNormal", "AutoMultivariateNormal", "subclass"],
)
def test_normal_mean(make):
    x = centred(1.0285)
    svi = fit(make(), x, B, epochs=80)
    mean, sd = exact_mean(x)
    assert (mean, sd) == pytest.approx((0.935, 0.0302), abs=1e-4)
    assert_matches(svi.posterior_samples(DRAWS)["mu"], mean, sd)


def test_ragged_batches_give_the_same_posterior():
    # 1000 rows in batches of 96: the last holds 40.
    x = centred(1.0285)
    svi = PyroSVIModule(normal_mean, elbo=particles(Trace_ELBO), **decaying(880))
    assert_matches(fit(svi, x, 96, epochs=80).posterior_samples(DRAWS)["mu"], *exact_mean(x))


# -- a regression with a hand-written guide --------------------------------------------------------


def regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), 1.0), obs=y)


def regression_guide(x, y):
    loc = pyro.param("loc", torch.zeros(2))
    tril = pyro.param("tril", 0.1 * torch.eye(2), constraint=constraints.lower_cholesky)
    pyro.sample("w", dist.MultivariateNormal(loc, scale_tril=tril))


def test_regression_with_a_guide_function():
    x = torch.randn(400, 2)
    x[:, 1] += x[:, 0]  # the two coefficients are correlated in the posterior
    y = x @ torch.tensor([0.5, -0.3]) + torch.randn(400)
    covariance = torch.linalg.inv(torch.eye(2) + x.T @ x)
    mean = covariance @ x.T @ y
    svi = PyroSVIModule(regression, regression_guide, particles(Trace_ELBO), **decaying(1200))
    w = fit(svi, (x, y), 50, epochs=150).posterior_samples(DRAWS)["w"]
    for i in range(2):
        assert_matches(w[:, i], float(mean[i]), float(covariance[i, i]) ** 0.5)
    correlation = covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]).sqrt()
    torch.testing.assert_close(torch.corrcoef(w.T)[0, 1], correlation, atol=0.05, rtol=0)


# -- a latent of each row, with an amortised guide -------------------------------------------------


def random_effects(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


class RowwiseGuide(nn.Module):
    """A guide that can be exact: given mu, the latent of a row is Normal about a linear mean."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.0))
        self.log_scale = nn.Parameter(torch.tensor(-2.0))
        self.row = nn.Parameter(torch.zeros(2))
        self.log_row_scale = nn.Parameter(torch.tensor(0.0))

    def forward(self, y):
        mu = pyro.sample("mu", dist.Normal(self.loc, self.log_scale.exp()))
        with pyro.plate("data", len(y)):
            loc = self.row[0] * y + self.row[1] * mu
            pyro.sample("z", dist.Normal(loc, self.log_row_scale.exp()))


def test_latents_of_rows_and_a_global_one():
    # z given mu and y is N((y / 0.25 + mu) / 5, 1/5); y given mu is N(mu, 1.25).
    y = 0.7 + math.sqrt(1.25) * torch.randn(400)
    precision = 1 + 400 / 1.25
    svi = PyroSVIModule(random_effects, RowwiseGuide(), particles(Trace_ELBO), **decaying(1600))
    fit(svi, y, 100, epochs=400)
    draws = svi.posterior_samples(DRAWS)
    assert set(draws) == {"mu"}
    assert_matches(draws["mu"], float(y.sum()) / 1.25 / precision, precision**-0.5)
    torch.testing.assert_close(svi.guide.row.detach(), torch.tensor([0.8, 0.2]), atol=0.01, rtol=0)
    assert float(svi.guide.log_row_scale.detach().exp()) == pytest.approx(0.2**0.5, rel=0.02)


# -- a discrete latent of each row, summed out -----------------------------------------------------


def coins(y):
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    with pyro.plate("data", len(y)):
        coin = pyro.sample("coin", dist.Bernoulli(p), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(10.0 * coin, 1.0), obs=y)


def test_enumerated_latents_of_rows_and_a_global_one():
    # The two components lie 10 sds apart, so each label is known and p has its Beta posterior; a
    # Normal on the logit fits it to a few per cent at these counts.
    labels = torch.zeros(400)
    labels[:120] = 1.0
    y = 10 * labels + torch.randn(400)
    exact = dist.Beta(2.0 + 120, 3.0 + 280)
    guide = AutoNormal(pyro.poutine.block(coins, hide=["coin"]))
    svi = PyroSVIModule(coins, guide, particles(TraceEnum_ELBO), **decaying(800))
    fit(svi, y, 100, epochs=200)
    draws = svi.posterior_samples(DRAWS)["p"]
    assert_matches(draws, float(exact.mean), float(exact.stddev))


# -- the draws -------------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta, AutoMultivariateNormal])
@pytest.mark.parametrize("count", [1, 3])
def test_draws_are_tensors_of_their_own_without_gradient(count, guide):
    svi = PyroSVIModule(regression, guide, dataset_size=N)
    svi.loss((torch.zeros(4, 2), torch.zeros(4)))
    before = [parameter.detach().clone() for parameter in svi.parameters()]
    draws = svi.posterior_samples(count)["w"]
    assert draws.shape == (count, 2)
    assert not draws.requires_grad
    draws.fill_(7.0)
    for parameter, old in zip(svi.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


def test_draws_of_a_site_in_a_global_plate_and_of_a_scalar():
    def model(x, group):
        sd = pyro.sample("sd", dist.Gamma(2.0, 2.0))
        with pyro.plate("groups", 3):
            effect = pyro.sample("effect", dist.Normal(torch.zeros(2), sd[..., None]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(effect[group].sum(-1), 1.0), obs=x)

    svi = PyroSVIModule(model, dataset_size=N)
    svi.loss((torch.zeros(4), torch.tensor([0, 1, 2, 0])))
    shapes = {name: tuple(draw.shape) for name, draw in svi.posterior_samples(5).items()}
    assert shapes == {"sd": (5,), "effect": (5, 3, 2)}
