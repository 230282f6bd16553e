"""What fits by each ELBO end at, known in closed form.

In a conjugate Normal with a Normal guide the exact posterior is the optimum of TraceGraph_ELBO,
TraceTMC_ELBO, RenyiELBO and ReweightedWakeSleep alike, though only the first is a KL(q || p).
Trace_MMD and EnergyDistance have optima of their own.
"""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from elbo_models import RowGuide, RowModel
from pyro.contrib.gp.kernels import RBF
from pyro.infer import (
    EnergyDistance,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_MMD,
    TraceGraph_ELBO,
    TraceTMC_ELBO,
)
from pyro.infer.autoguide import AutoNormal, init_to_value
from support import normal_mean
from test_elbos_others import expected_mmd_loss
from test_posterior import DRAWS, B, N, assert_matches, centred, decaying, exact_mean, fit
from torch import nn

from pyro_lightning import PyroSVIModule


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


PARTICLES = {"num_particles": 16, "vectorize_particles": True, "max_plate_nesting": 1}


# The tolerance of test_posterior: 0.1 exact sds in the mean, 5% in the sd. The fits start within a
# few sds of the posterior: far from it Renyi's gradients are some hundred times those about it, and
# Adam would remember them for the rest of the fit.
@pytest.mark.parametrize(
    ("elbo", "batch_size"),
    [
        (lambda: TraceGraph_ELBO(**PARTICLES), B),
        (lambda: TraceTMC_ELBO(**PARTICLES, strict_enumeration_warning=False), B),
        # With a global latent these two need all rows in a batch.
        (lambda: RenyiELBO(0.5, **PARTICLES), N),
        (lambda: ReweightedWakeSleep(**PARTICLES), N),
    ],
    ids=["TraceGraph", "TraceTMC", "Renyi", "wake-sleep"],
)
def test_normal_mean(elbo, batch_size):
    x = centred(1.0285)
    near = partial(
        AutoNormal, init_loc_fn=init_to_value(values={"mu": torch.tensor(0.85)}), init_scale=0.06
    )
    svi = PyroSVIModule(normal_mean, near, elbo(), **decaying(800))
    draws = fit(svi, x, batch_size, 800 * batch_size // N).posterior_samples(DRAWS)["mu"]
    assert_matches(draws, *exact_mean(x))


# Latents of rows in ragged batches: the model's parameter ends at the maximum of the evidence, the
# mean of y, and the guide at the exact posterior of each row. What the steps leave is under half
# of the tolerances.
@pytest.mark.parametrize(
    ("elbo", "infer"),
    [
        (lambda: RenyiELBO(0.0, 4, 1, vectorize_particles=True), None),
        (lambda: ReweightedWakeSleep(4, 0.5, max_plate_nesting=1), None),
        (
            lambda: TraceTMC_ELBO(max_plate_nesting=1),
            {"enumerate": "parallel", "num_samples": 4},
        ),
    ],
    ids=["Renyi", "wake-sleep", "TraceTMC"],
)
def test_latents_of_rows(elbo, infer):
    y = 0.7 + 2**0.5 * torch.randn(400)
    elbo = elbo()
    svi = Rows(RowModel(), RowGuide(elbo.vectorize_particles, infer), elbo, **decaying(800))
    fit(svi, y, 96, epochs=160)
    prior, a, b, log_s = (
        float(value.detach())
        for value in (svi.model.prior, svi.guide.a, svi.guide.b, svi.guide.log_s)
    )
    assert prior == pytest.approx(float(y.mean()), abs=0.02)
    assert a == pytest.approx(prior / 2, abs=0.03)
    assert b == pytest.approx(0.5, abs=0.02)
    assert log_s == pytest.approx(0.5 * math.log(0.5), abs=0.03)


class Rows(PyroSVIModule):
    def model_inputs(self, batch):
        return (batch, None), {}


class Guide(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc, self.log_s = (nn.Parameter(torch.tensor(v)) for v in (0.5, -2.0))

    def forward(self, y):
        pyro.sample("mu", dist.Normal(self.loc, self.log_s.exp()))


def test_mmd_ends_at_the_minimum_of_its_closed_form():
    # Prior N(0, 1) and kernel of width 1 weigh 2000 against 1000 rows. The posterior has an sd of
    # 0.03: this is another, wider optimum.
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu + 0.3, 1.0), obs=y)

    y = centred(1.3)
    elbo = Trace_MMD(RBF(1), 2000.0, **PARTICLES)
    svi = fit(PyroSVIModule(model, Guide(), elbo, **decaying(800)), y, B, epochs=80)
    exact = [torch.tensor(v, requires_grad=True) for v in (0.5, -2.0)]
    optimizer = torch.optim.LBFGS(exact, max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = expected_mmd_loss(exact[0], exact[1].exp(), y, N, 16, 2000.0, 1.0)
        loss.backward()
        return loss

    optimizer.step(closure)
    loc, scale = (float(v.detach()) for v in (exact[0], exact[1].exp()))
    assert float(svi.guide.loc.detach()) == pytest.approx(loc, abs=0.02)
    assert float(svi.guide.log_s.detach().exp()) == pytest.approx(scale, rel=0.05)


def test_energy_distance_ends_at_the_mean_of_the_data():
    # Without the prior's weight nothing pulls mu from there; the spread is not the posterior's.
    x = centred(1.0285)
    elbo = EnergyDistance(num_particles=16, max_plate_nesting=1)
    optimizer = partial(torch.optim.Adam, lr=2e-2)
    svi = fit(PyroSVIModule(normal_mean, Guide(), elbo, optimizer), x, N, epochs=400)
    assert float(svi.guide.loc.detach()) == pytest.approx(1.0285, abs=0.05)
