"""Each ELBO with each guide on each kind of latents is right, or refused; never silently wrong.

``MATRIX`` says which. What is right is shown without chance: the models are linear and Normal, so
that with noise of exact moments (``matrix_models.Design``) a loss is its own expectation, and value
and gradient of an epoch must equal those of the full data's closed form to rounding, at the closed
form's optimum and away from it. Fits of a diagonal of the matrix are in ``test_matrix_fits.py``.
"""

from functools import cache, partial

import pyro
import pytest
import torch
from matrix_models import GUIDES, PRIORS, B, Design, N, Quadratic, matrix_rows, model
from pyro import poutine
from pyro.contrib.gp.kernels import Polynomial
from pyro.infer import (
    EnergyDistance,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    Trace_MMD,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
)
from pyro.poutine.util import prune_subsample_sites

from pyro_lightning import IndexedBatch, PyroSVIModule, batch_weight

# What a cell must do. Right, at the optimum of KL(q || p) over a family:
#   exact   all Normals: the posterior.
#   each    Normals without correlation: exact means, and the sds of each latent given the others.
#   parts   mu and slope jointly, each row's latent by itself.
#   mode    points: the mode, which is the mean.
#   mmd     the optimum of Trace_MMD's own closed form, which is no posterior.
# Refused before the first step, by an error of this type that says this:
REFUSED = {
    "log": (ValueError, r"takes the logarithm of a mean .* latent site 'mu' .* Use Trace_ELBO"),
    "rows": (ValueError, r"latent site 'z' stands in the data plate .* write an amortised guide"),
    "all-z": (ValueError, r"discrepancy of latent site 'z'.* over all rows at once.* Trace_ELBO"),
    "all-x": (ValueError, r"squared distance of all N rows at once.* Use Trace_ELBO"),
    "again": (TypeError, r"re-runs the model inside the guide .* Use AutoNormal"),
    "point": (ValueError, r"site 'z'.* Use Trace_ELBO"),
    "tail": (TypeError, r"weighs its particles by their rank over all rows.* Use one of Trace_ELBO"),
    "jit": (TypeError, r"does not support parameters that belong to a module.* use Trace"),
}

MATRIX = {
    "global": """
                           Trace MeanField Enum  Graph TMC   MMD Renyi WakeSleep Energy Tail Jit
    AutoNormal             each  each      each  each  each  mmd log   log       all-x  tail jit
    AutoDelta              mode  mode      mode  mode  mode  mmd log   log       all-x  tail jit
    AutoDiagonalNormal     each  each      each  each  each  mmd log   log       all-x  tail jit
    AutoMultivariateNormal exact exact     exact exact exact mmd log   log       all-x  tail jit
    AutoLowRank            exact exact     exact exact exact mmd log   log       all-x  tail jit
    AutoIAFNormal          exact exact     exact exact exact mmd log   log       all-x  tail jit
    AutoNormalizingFlow    exact exact     exact exact exact mmd log   log       all-x  tail jit
    AutoLaplace            mode  mode      mode  mode  mode  mmd log   log       all-x  tail jit
    AutoGaussian           exact exact     exact exact exact mmd log   log       all-x  tail jit
    AutoStructured         exact exact     exact exact exact mmd log   log       all-x  tail jit
    AutoGuideList          exact exact     exact exact exact mmd log   log       all-x  tail jit
    function               each  each      each  each  each  mmd log   log       all-x  tail jit
    nn.Module              exact exact     exact exact exact mmd log   log       all-x  tail jit
    AutoNormalMessenger    again again     again again again again again again   again  tail jit
    AutoHierarchical       again again     again again again again again again   again  tail jit
    AutoRegressive         again again     again again again again again again   again  tail jit
    """,
    "local": """
                           Trace MeanField Enum  Graph TMC   MMD   Renyi WakeSleep Energy Tail Jit
    AutoNormal             exact exact     exact exact exact all-z exact exact     all-x  tail jit
    AutoDelta              mode  mode      mode  mode  mode  all-z mode  point     all-x  tail jit
    AutoDiagonalNormal     rows  rows      rows  rows  rows  rows  rows  rows      rows   tail jit
    AutoMultivariateNormal rows  rows      rows  rows  rows  rows  rows  rows      rows   tail jit
    AutoLowRank            rows  rows      rows  rows  rows  rows  rows  rows      rows   tail jit
    AutoIAFNormal          rows  rows      rows  rows  rows  rows  rows  rows      rows   tail jit
    AutoNormalizingFlow    rows  rows      rows  rows  rows  rows  rows  rows      rows   tail jit
    AutoLaplace            rows  rows      rows  rows  rows  rows  rows  rows      rows   tail jit
    AutoGaussian           rows  rows      rows  rows  rows  rows  rows  rows      rows   tail jit
    AutoStructured         rows  rows      rows  rows  rows  rows  rows  rows      rows   tail jit
    AutoGuideList          exact exact     exact exact exact all-z exact exact     all-x  tail jit
    function               exact exact     exact exact exact all-z exact exact     all-x  tail jit
    nn.Module              exact exact     exact exact exact all-z exact exact     all-x  tail jit
    AutoNormalMessenger    again again     again again again again again again     again  tail jit
    AutoHierarchical       again again     again again again again again again     again  tail jit
    AutoRegressive         again again     again again again again again again     again  tail jit
    """,
    "mixed": """
                           Trace MeanField Enum  Graph TMC   MMD   Renyi WakeSleep Energy Tail Jit
    AutoNormal             each  each      each  each  each  all-z log   log       all-x  tail jit
    AutoDelta              mode  mode      mode  mode  mode  all-z log   log       all-x  tail jit
    AutoDiagonalNormal     rows  rows      rows  rows  rows  rows  rows  rows      rows   tail jit
    AutoMultivariateNormal rows  rows      rows  rows  rows  rows  rows  rows      rows   tail jit
    AutoLowRank            rows  rows      rows  rows  rows  rows  rows  rows      rows   tail jit
    AutoIAFNormal          rows  rows      rows  rows  rows  rows  rows  rows      rows   tail jit
    AutoNormalizingFlow    rows  rows      rows  rows  rows  rows  rows  rows      rows   tail jit
    AutoLaplace            rows  rows      rows  rows  rows  rows  rows  rows      rows   tail jit
    AutoGaussian           rows  rows      rows  rows  rows  rows  rows  rows      rows   tail jit
    AutoStructured         rows  rows      rows  rows  rows  rows  rows  rows      rows   tail jit
    AutoGuideList          parts parts     parts parts parts all-z log   log       all-x  tail jit
    function               each  each      each  each  each  all-z log   log       all-x  tail jit
    nn.Module              exact exact     exact exact exact all-z log   log       all-x  tail jit
    AutoNormalMessenger    again again     again again again again again again     again  tail jit
    AutoHierarchical       again again     again again again again again again     again  tail jit
    AutoRegressive         again again     again again again again again again     again  tail jit
    """,
}

K, BY_HAND = 32, 128  # particles: more than the numbers that a batch draws, and all rows
IN_PLATE = {"num_particles": K, "vectorize_particles": True, "max_plate_nesting": 1}
MMD_SCALE, MMD_BIAS = 30.0, 1.0

ELBOS = {
    "Trace": [partial(Trace_ELBO, **IN_PLATE)],
    "MeanField": [partial(TraceMeanField_ELBO, **IN_PLATE)],
    "Enum": [partial(TraceEnum_ELBO, strict_enumeration_warning=False, **IN_PLATE)],
    "Graph": [partial(TraceGraph_ELBO, **IN_PLATE)],
    "TMC": [partial(TraceTMC_ELBO, strict_enumeration_warning=False, **IN_PLATE)],
    "MMD": [lambda: Trace_MMD(kernel(), MMD_SCALE, **IN_PLATE)],
    "Renyi": [partial(RenyiELBO, 0.5, **IN_PLATE)],
    "WakeSleep": [partial(ReweightedWakeSleep, **IN_PLATE)],
    "Energy": [partial(EnergyDistance, num_particles=K, max_plate_nesting=2)],
    "Tail": [partial(TraceTailAdaptive_ELBO, **IN_PLATE)],
    "Jit": [JitTrace_ELBO, JitTraceMeanField_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO],
}


def kernel():
    """A kernel of degree 2, whose means are functions of two moments."""
    return Polynomial(1, bias=torch.tensor(MMD_BIAS), degree=2)


def cells(refused):
    for latents, table in MATRIX.items():
        header, *lines = table.strip().splitlines()
        elbos = header.split()
        assert set(elbos) == set(ELBOS)
        assert {line.split()[0] for line in lines} == set(GUIDES)
        for guide, *outcomes in map(str.split, lines):
            for elbo, outcome in zip(elbos, outcomes, strict=True):
                if (outcome in REFUSED) == refused:
                    yield pytest.param(latents, guide, elbo, outcome, id=f"{latents}-{guide}-{elbo}")


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def make(latents, guide, elbo):
    of_latents = partial(model, latents)
    return PyroSVIModule(of_latents, GUIDES[guide](of_latents, latents), elbo(), dataset_size=N)


def batches():
    """The rows of an epoch, shuffled: 20, 20, 20 and 2 of them."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    columns = matrix_rows()
    return [IndexedBatch(tuple(c[rows] for c in columns), rows) for rows in order.split(B)]


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("latents", "guide", "elbo", "outcome"), list(cells(refused=True)))
def test_refused(latents, guide, elbo, outcome):
    error, match = REFUSED[outcome]
    for each in ELBOS[elbo]:
        with pytest.raises(error, match=match):
            make(latents, guide, each).loss(batches()[0])


# -- right -----------------------------------------------------------------------------------------


def drawn_by_hand(svi, latents):
    """All latents, ``(BY_HAND, d)``, and log q of each draw: Pyro's own guide on all rows."""
    with (
        pyro.settings.context(module_local_params=True),
        svi._pyro_param_store.as_global_store(),
        Design(BY_HAND),
        poutine.trace() as traced,
        pyro.plate("particles", BY_HAND, dim=-2),
    ):
        svi.guide(*matrix_rows())
    trace = prune_subsample_sites(traced.trace)
    trace.compute_log_prob()
    sites = {n: s for n, s in trace.nodes.items() if s["type"] == "sample"}
    log_q = sum(s["log_prob"].expand(BY_HAND, -1).sum(-1) for s in sites.values())
    names = [n for n in (*PRIORS, "z") if n in sites]
    return torch.cat([sites[n]["value"].reshape(BY_HAND, -1) for n in names], -1), log_q


def closed_form(svi, latents, outcome):
    """The loss of the full data as a function of the guide's parameters."""
    draws, log_q = drawn_by_hand(svi, latents)
    joint = Quadratic(latents, *matrix_rows())
    if outcome != "mmd":
        return log_q.mean() - joint.mean_log_density(draws)
    prior = Quadratic(latents, *(column[:0] for column in matrix_rows()))
    loss = prior.mean_log_density(draws) - joint.mean_log_density(draws)
    moments = draws.mean(0), (draws**2).mean(0)
    for i, (loc, scale) in enumerate(PRIORS.values()):
        first, second = moments[0][i] - loc, moments[1][i] - (loc**2 + scale**2)
        # The kernel (bias + a b)^2 of an independent a and b is bias^2 + 2 bias E a E b + ...
        loss = loss + MMD_SCALE * (2 * MMD_BIAS * first**2 + second**2)
    return loss


@cache
def parameters_at_optimum(latents, guide, outcome):
    """The guide's parameters where the closed form is least."""
    torch.manual_seed(0)
    svi = make(latents, guide, ELBOS["Trace"][0])
    svi.loss(batches()[0])
    parameters = list(svi.parameters())
    optimizer = torch.optim.LBFGS(
        parameters, 1.0, 500, 2000, 1e-10, 1e-15, history_size=50, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = closed_form(svi, latents, outcome)
        loss.backward()
        return loss

    optimizer.step(closure)
    return [parameter.detach().clone() for parameter in parameters]


def put(svi, values):
    for parameter, value in zip(svi.parameters(), values, strict=True):
        parameter.data = value.clone()


def gradients(svi):
    found = [p.grad.to_dense().flatten() for p in svi.parameters() if p.grad is not None]
    return torch.cat(found)


def epoch(svi):
    """Mean of the weighted losses of an epoch, and its gradient."""
    svi.zero_grad()
    parts, total = batches(), 0.0
    for batch in parts:
        with Design(K):
            loss = svi.loss(batch) * batch_weight(len(batch.rows), N / len(parts)) / len(parts)
        loss.backward()
        total += loss.detach()
    return total, gradients(svi)


def by_closed_form(svi, latents, outcome):
    svi.zero_grad()
    loss = closed_form(svi, latents, outcome)
    loss.backward()
    return loss.detach(), gradients(svi)


@pytest.mark.parametrize(("latents", "guide", "elbo", "outcome"), list(cells(refused=False)))
def test_right(latents, guide, elbo, outcome):
    optimum = parameters_at_optimum(latents, guide, outcome)
    (each,) = ELBOS[elbo]
    svi = make(latents, guide, each)
    svi.loss(batches()[0])
    put(svi, optimum)
    # Doubles: sums of some hundred terms, of which the optimum is found to about 1e-8.
    close = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-5)
    value, gradient = epoch(svi)
    close(value, by_closed_form(svi, latents, outcome)[0])
    close(gradient, torch.zeros_like(gradient))
    # Away from there it does not vanish, and is the closed form's where the ELBO is that KL.
    put(svi, [v + 0.1 * torch.randn(v.shape) for v in optimum])
    value, gradient = epoch(svi)
    assert gradient.abs().max() > 0.1
    if elbo not in ("Renyi", "WakeSleep"):
        expected = by_closed_form(svi, latents, outcome)
        close(value, expected[0])
        close(gradient, expected[1])
