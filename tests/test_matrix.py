"""Each ELBO with each guide on each kind of latents is right, or refused; never silently wrong.

``MATRIX`` says which. What is right is shown without chance: the models are linear and Normal, so
that with noise of exact moments (``matrix_models.Design``) a loss is its own expectation, and value
and gradient of an epoch must equal those of the full data's closed form to rounding, at the closed
form's optimum and away from it. Fits of a diagonal of the matrix are in ``test_matrix_fits.py``.
"""

import pyro
import pytest
import torch
from matrix_cells import (
    BY_HAND,
    ELBOS,
    REFUSED,
    assert_moments,
    batches,
    by_closed_form,
    cells,
    close,
    closed_form,
    drawn_by_hand,
    epoch,
    make,
    parameters_at_optimum,
    put,
)
from matrix_models import GUIDES, PRIORS, Design, N, Quadratic, matrix_rows
from pyro.infer import Trace_ELBO

from pyro_lightning.losses import SERVED

# What a cell must do. Right, at the optimum of KL(q || p) over a family:
#   exact   all Normals: the posterior.
#   each    Normals without correlation: exact means, and the sds of each latent given the others.
#   parts   mu and slope jointly, each row's latent by itself.
#   mode    points: the mode, which is the mean.
#   mmd     the optimum of Trace_MMD's own closed form, which is no posterior.
# Or refused before the first step, as matrix_cells.REFUSED says.
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


# -- refused ---------------------------------------------------------------------------------------


@cells(MATRIX, refused=True)
def test_refused(latents, guide, elbo, outcome):
    error, match = REFUSED[outcome]
    for each in ELBOS[elbo]:
        with pytest.raises(error, match=match):
            make(latents, guide, each).loss(batches()[0])


# -- right -----------------------------------------------------------------------------------------


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
