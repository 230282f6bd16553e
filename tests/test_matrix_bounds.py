"""The matrix where batches hold all rows, and where the latents are discrete."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from matrix_cells import (
    BY_HAND,
    ELBOS,
    REFUSED,
    batches,
    cells,
    close,
    drawn_by_hand,
    epoch,
    gradients,
    make,
    parameters_at_optimum,
    put,
)
from matrix_models import Design, N, Quadratic, matrix_rows
from pyro.infer.autoguide import AutoDiscreteParallel

from pyro_lightning import IndexedBatch, PyroSVIModule

# Batches of all N rows. Equal to the formula of the K particles, or refused.
ALL_ROWS = {
    "global": """
                           Renyi WakeSleep
    AutoNormal             same  same
    AutoDelta              same  point
    AutoDiagonalNormal     same  same
    AutoMultivariateNormal same  same
    AutoLowRank            same  same
    AutoIAFNormal          same  same
    AutoNormalizingFlow    same  same
    AutoLaplace            same  point
    AutoGaussian           same  point
    AutoStructured         same  point
    AutoGuideList          same  same
    function               same  same
    nn.Module              same  same
    """,
    "mixed": """
                           Renyi WakeSleep
    AutoNormal             same  same
    AutoDelta              same  point
    AutoGuideList          same  same
    function               same  same
    nn.Module              same  same
    """,
}


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


# -- batches of all rows, for bounds of particles --------------------------------------------------


def log_density_of_draws(svi, draws):
    """log q of draws that are held fixed, as a function of the guide's parameters."""
    posterior = getattr(svi.guide, "get_posterior", None)
    if posterior is not None:
        return posterior().log_prob(draws)
    moving, _ = drawn_by_hand(svi)  # of a Normal guide, whose moments those of the design are
    centred = moving - moving.mean(0)
    covariance = centred.T @ centred / len(moving)
    return torch.distributions.MultivariateNormal(moving.mean(0), covariance).log_prob(draws)


@cells(ALL_ROWS, refused=True)
def test_refused_in_batches_of_all_rows(latents, guide, elbo, outcome):
    (each,) = ELBOS[elbo]
    error, match = REFUSED[outcome]
    with pytest.raises(error, match=match):
        make(latents, guide, each).loss(IndexedBatch(matrix_rows(), torch.arange(N)))


@cells(ALL_ROWS, refused=False)
def test_bound_of_all_rows(latents, guide, elbo, outcome):
    (each,) = ELBOS[elbo]
    svi = make(latents, guide, partial(each, num_particles=BY_HAND))
    batch = IndexedBatch(matrix_rows(), torch.arange(N))
    svi.loss(batch)
    optimum = parameters_at_optimum(latents, guide)
    put(svi, [v + 0.1 * torch.randn(v.shape) for v in optimum])
    svi.zero_grad()
    with Design(BY_HAND):
        loss = svi.loss(batch)
    loss.backward()
    found = gradients(svi)
    svi.zero_grad()
    draws, log_q = drawn_by_hand(svi)
    log_p = Quadratic(latents, *matrix_rows()).log_density(draws)
    if elbo == "Renyi":
        order = 1 - 0.5
        expected = -(order * (log_p - log_q)).exp().mean().log() / order
        expected.backward()
    else:
        log_w = (log_p - log_q).detach()
        expected = -log_w.exp().mean().log()
        (-(log_w.softmax(0) * log_density_of_draws(svi, draws.detach().clone())).sum()).backward()
    close(loss.detach(), expected.detach())
    close(found, gradients(svi))


# -- a discrete latent -----------------------------------------------------------------------------


def switches(latents, t, x):
    loc = 0.0
    if latents != "local":
        loc = pyro.sample("mu", dist.Bernoulli(0.3)) * 0.2
    with pyro.plate("data", len(t)):
        if latents != "global":
            loc = loc + pyro.sample("z", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


# AutoDiscreteParallel in the order of MATRIX: summed out, or drawn, which Pyro warns of.
DISCRETE = {
    "global": "drawn no-r summed drawn twice no-r log log no-r tail jit",
    "local": "rows rows rows rows rows rows rows rows rows tail jit",
    "mixed": "rows rows rows rows rows rows rows rows rows tail jit",
}


@pytest.mark.filterwarnings(r"ignore:[\s\S]*you need to use TraceEnum_ELBO instead")
@pytest.mark.parametrize("elbo", ELBOS)
@pytest.mark.parametrize("latents", DISCRETE)
def test_discrete(latents, elbo):
    outcome = DISCRETE[latents].split()[list(ELBOS).index(elbo)]
    of_latents = partial(switches, latents)
    for each in ELBOS[elbo]:

        def run(each=each):
            guide = AutoDiscreteParallel(of_latents)
            svi = PyroSVIModule(of_latents, guide, each(), dataset_size=N)
            svi.loss(batches()[0])
            return svi

        if outcome in REFUSED:
            error, match = REFUSED[outcome]
            with pytest.raises(error, match=match):
                run()
            continue
        svi = run()
        logit = torch.tensor(0.25).logit()  # a quarter of the particles
        put(svi, [logit])
        value, gradient = epoch(svi)
        logit.requires_grad_(True)
        q, x = dist.Bernoulli(logits=logit), matrix_rows()[1]
        rows = torch.stack([dist.Normal(loc, 1.0).log_prob(x).sum() for loc in (0.0, 0.2)])
        expected = torch.distributions.kl_divergence(q, dist.Bernoulli(0.3))
        expected = expected - (1 - q.probs) * rows[0] - q.probs * rows[1]
        close(value, expected.detach())
        close(gradient, torch.autograd.grad(expected, logit)[0][None])
