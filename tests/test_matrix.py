"""Each ELBO with each guide on each kind of latents is right, or refused; never silently wrong.

``MATRIX`` says which. What is right is shown without chance: the models are linear and Normal, so
that with noise of exact moments (``matrix_models.Design``) a loss is its own expectation, and value
and gradient of an epoch must equal those of the full data's closed form to rounding, at the closed
form's optimum and away from it. Fits of a diagonal of the matrix are in ``test_matrix_fits.py``.
"""

from functools import cache, partial

import pyro
import pyro.distributions as dist
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
from pyro.infer.autoguide import AutoDiscreteParallel
from pyro.poutine.util import prune_subsample_sites

from pyro_lightning import IndexedBatch, PyroSVIModule, batch_weight
from pyro_lightning.losses import SERVED

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
    "point": (ValueError, r"site '.*' of the guide is a point .* parameters move.* Use Trace_ELBO"),
    "tail": (
        TypeError,
        r"weighs its particles by their rank over all rows.* Use one of Trace_ELBO",
    ),
    "jit": (TypeError, r"does not support parameters that belong to a module.* use Trace"),
}

MATRIX = {
    "global": """
                           Trace MeanField Enum  Graph TMC   MMD Renyi WakeSleep Energy Tail Jit
    AutoNormal             each  each      each  each  each  mmd log   log       all-x  tail jit
    AutoDelta              mode  mode      mode  mode  mode  mmd log   point     all-x  tail jit
    AutoDiagonalNormal     each  each      each  each  each  mmd log   log       all-x  tail jit
    AutoMultivariateNormal exact exact     exact exact exact mmd log   log       all-x  tail jit
    AutoLowRank            exact exact     exact exact exact mmd log   log       all-x  tail jit
    AutoIAFNormal          exact exact     exact exact exact mmd log   log       all-x  tail jit
    AutoNormalizingFlow    exact exact     exact exact exact mmd log   log       all-x  tail jit
    AutoLaplace            mode  mode      mode  mode  mode  mmd log   point     all-x  tail jit
    AutoGaussian           exact exact     exact exact exact mmd log   point     all-x  tail jit
    AutoStructured         exact exact     exact exact exact mmd log   point     all-x  tail jit
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
    AutoDelta              mode  mode      mode  mode  mode  all-z log   point     all-x  tail jit
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


def test_matrix_is_complete():
    for table in MATRIX.values():
        header, *lines = map(str.split, table.strip().splitlines())
        assert header == list(ELBOS)
        assert [line[0] for line in lines] == list(GUIDES)
    served = {type(elbo()) for elbos in ELBOS.values() for elbo in elbos}
    assert set(SERVED) <= served


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


@cells(MATRIX, refused=True)
def test_refused(latents, guide, elbo, outcome):
    error, match = REFUSED[outcome]
    for each in ELBOS[elbo]:
        with pytest.raises(error, match=match):
            make(latents, guide, each).loss(batches()[0])


# -- right -----------------------------------------------------------------------------------------


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


@cells(MATRIX, refused=False)
def test_right(latents, guide, elbo, outcome):
    optimum = parameters_at_optimum(latents, guide)
    (each,) = ELBOS[elbo]
    svi = make(latents, guide, each)
    svi.loss(batches()[0])
    if outcome != "mmd":
        put(svi, optimum)
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


BY_ROW = ("AutoNormal", "AutoDelta", "AutoGuideList")


def families(draw=False):
    """What MATRIX says of Trace_ELBO: the family of each guide that serves; or draws, without data.

    AutoLaplaceApproximation has a guide of its own to draw from, amortised guides need their rows.
    """
    found = []
    for latents, table in MATRIX.items():
        for guide, family, *_ in map(str.split, table.strip().splitlines()[1:]):
            without = guide == "AutoLaplace" or (latents == "local" and guide not in BY_ROW)
            if family not in REFUSED and not (draw and without):
                found.append(pytest.param(latents, guide, family, id=f"{latents}-{guide}"))
    return pytest.mark.parametrize(("latents", "guide", "family"), found)


@families()
def test_the_closed_form_is_least_at_the_posterior(latents, guide, family):
    svi = make(latents, guide, Trace_ELBO)
    svi.loss(batches()[0])
    put(svi, parameters_at_optimum(latents, guide))
    joint = Quadratic(latents, *matrix_rows())
    with torch.no_grad():
        if family == "exact":
            close(closed_form(svi, latents), -joint.log_evidence())
        assert_moments(drawn_by_hand(svi)[0], joint.optimum(family))
    if guide == "AutoLaplace":
        with pyro.settings.context(module_local_params=True):
            normal = svi.guide.laplace_approximation(*matrix_rows()).get_posterior()
        mean, covariance = joint.optimum("exact")
        close(normal.mean, mean)
        close(normal.covariance_matrix, covariance)


@families(draw=True)
def test_draws_have_the_posteriors_moments(latents, guide, family):
    svi = make(latents, guide, Trace_ELBO)
    svi.loss(batches()[0])
    put(svi, parameters_at_optimum(latents, guide))
    rows = torch.arange(N) if guide in BY_ROW and latents != "global" else None
    # A hand-written guide draws once a sample, the latents of the two rows that it ran on as well.
    alone = len(PRIORS) + (0 if latents == "global" else 2)
    with Design(BY_HAND, width=alone if guide in ("function", "nn.Module") else None):
        draws = svi.posterior_samples(BY_HAND, rows=rows)
    draws = torch.cat([draw.reshape(BY_HAND, -1) for draw in draws.values()], -1)
    mean, covariance = Quadratic(latents, *matrix_rows()).optimum(family)
    drawn = draws.shape[-1]
    assert drawn == (len(mean) if guide in BY_ROW else len(PRIORS))
    assert_moments(draws, (mean[:drawn], covariance[:drawn, :drawn]))


def assert_moments(draws, expected):
    centred = draws - draws.mean(0)
    close(draws.mean(0), expected[0])
    close(centred.T @ centred / len(draws), expected[1])


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
REFUSED["twice"] = ValueError, r"prior of site 'mu' twice .* Use TraceEnum_ELBO"
REFUSED["no-r"] = ValueError, r"reparam"


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
