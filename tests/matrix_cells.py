"""What a cell of the matrix is made of, and the loss of its full data in closed form."""

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

# What is refused before the first step, and by which error.
REFUSED = {
    "log": (ValueError, r"takes the logarithm of a mean .* latent site 'mu' .* Use Trace_ELBO"),
    "rows": (ValueError, r"latent site 'z' stands in the data plate .* write an amortised guide"),
    "all-z": (ValueError, r"discrepancy of latent site 'z'.* over all rows at once.* Trace_ELBO"),
    "all-x": (ValueError, r"squared distance of all N rows at once.* Use Trace_ELBO"),
    "again": (TypeError, r"re-runs the model inside the guide .* Use AutoNormal"),
    "point": (ValueError, r"site '.*' of the guide is a point .* parameters move.* Use Trace_ELBO"),
    "tail": (
        TypeError,
        r"weighs its particles by their rank over all rows.* Use one of Trace_ELBO",
    ),
    "jit": (TypeError, r"does not support parameters that belong to a module.* use Trace"),
    "twice": (ValueError, r"prior of site 'mu' twice .* Use TraceEnum_ELBO"),
    "no-r": (ValueError, r"reparam"),
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


def cells(matrix, refused):
    """Parametrise a test by the cells of a matrix that are refused, or by those that are not."""
    found = []
    for latents, table in matrix.items():
        header, *lines = map(str.split, table.strip().splitlines())
        for guide, *outcomes in lines:
            for elbo, outcome in zip(header, outcomes, strict=True):
                if (outcome in REFUSED) == refused:
                    values = latents, guide, elbo, outcome
                    found.append(pytest.param(*values, id="-".join(values[:3])))
    return pytest.mark.parametrize(("latents", "guide", "elbo", "outcome"), found)


def make(latents, guide, elbo, **options):
    of_latents = partial(model, latents)
    options = options or {"dataset_size": N}
    return PyroSVIModule(of_latents, GUIDES[guide](of_latents, latents), elbo(), **options)


def batches():
    """The rows of an epoch, shuffled: 20, 20, 20 and 2 of them."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    columns = matrix_rows()
    return [IndexedBatch(tuple(c[rows] for c in columns), rows) for rows in order.split(B)]


def drawn_by_hand(svi):
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


def closed_form(svi, latents, outcome="exact"):
    """The loss of the full data as a function of the guide's parameters."""
    draws, log_q = drawn_by_hand(svi)
    joint = Quadratic(latents, *matrix_rows())
    if outcome != "mmd":
        return log_q.mean() - joint.log_density(draws).mean()
    prior = Quadratic(latents, *(column[:0] for column in matrix_rows()))
    loss = prior.log_density(draws).mean() - joint.log_density(draws).mean()
    moments = draws.mean(0), (draws**2).mean(0)
    for i, (loc, scale) in enumerate(PRIORS.values()):
        first, second = moments[0][i] - loc, moments[1][i] - (loc**2 + scale**2)
        # The kernel (bias + a b)^2 of an independent a and b is bias^2 + 2 bias E a E b + ...
        loss = loss + MMD_SCALE * (2 * MMD_BIAS * first**2 + second**2)
    return loss


@cache
def parameters_at_optimum(latents, guide):
    """The guide's parameters where the KL of its family is least."""
    torch.manual_seed(0)
    svi = make(latents, guide, ELBOS["Trace"][0])
    svi.loss(batches()[0])
    parameters = list(svi.parameters())
    optimizer = torch.optim.LBFGS(
        parameters, 1.0, 500, 2000, 1e-10, 1e-15, history_size=50, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = closed_form(svi, latents)
        loss.backward()
        return loss

    optimizer.step(closure)
    return [parameter.detach().clone() for parameter in parameters]


def put(svi, values):
    for parameter, value in zip(svi.parameters(), values, strict=True):
        parameter.data = value.clone()


# Doubles, and sums of some hundred terms; the optimum is found to about 1e-7.
close = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-5)


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


def by_closed_form(svi, latents, outcome="exact"):
    svi.zero_grad()
    loss = closed_form(svi, latents, outcome)
    loss.backward()
    return loss.detach(), gradients(svi)


def assert_moments(draws, expected):
    centred = draws - draws.mean(0)
    close(draws.mean(0), expected[0])
    close(centred.T @ centred / len(draws), expected[1])
