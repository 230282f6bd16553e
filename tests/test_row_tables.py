"""Autoguides with latents of each row: loss and gradients are those of Pyro.

Pyro's side runs on ``plate("data", N, subsample=rows)``, with ``create_plates`` of the same rows
and without any code of this package.
"""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_sample,
)
from torch import nn

from pyro_lightning import IndexedBatch, PyroSVIModule

N, ROWS = 30, torch.tensor([17, 3, 29, 8])
X = torch.linspace(-1, 2, N, dtype=torch.float64)


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def by_rows(x, rows, dim=None):
    """What Pyro asks for: the size of the data set and which of its rows these are."""
    return pyro.plate("data", N, subsample=rows, dim=dim)


STYLES = {
    "len": lambda x, rows, dim=None: pyro.plate("data", len(x), dim=dim),
    "subsample_size": lambda x, rows, dim=None: pyro.plate(
        "data", N, subsample_size=len(x), dim=dim
    ),
    "subsample": by_rows,
    "no size": lambda x, rows, dim=None: pyro.plate("data", dim=dim),
}
ELBOS = {
    "Trace": Trace_ELBO,
    "TraceMeanField": TraceMeanField_ELBO,
    "TraceEnum": partial(TraceEnum_ELBO, max_plate_nesting=2, strict_enumeration_warning=False),
    "particles": partial(Trace_ELBO, num_particles=2),
    "vectorised": partial(
        Trace_ELBO, num_particles=2, vectorize_particles=True, max_plate_nesting=2
    ),
}
MEAN_FIELD = {"AutoNormal": partial(AutoNormal, init_loc_fn=init_to_sample), "AutoDelta": AutoDelta}


def assert_equal_to_pyro(
    program, make_guide, style="len", elbo=Trace_ELBO, rows=ROWS, ragged=None, dim=None
):
    """Compare the loss and every gradient; ``program`` takes the plate, then a batch."""
    first = X[rows], rows
    # Nothing of these guides has a KL in closed form, and Pyro's own of a point lacks its density.
    theirs_elbo = Trace_ELBO if elbo is TraceMeanField_ELBO else elbo
    model, raw = partial(program, STYLES[style]), partial(program, by_rows)
    svi = PyroSVIModule(model, make_guide(model), elbo=elbo(), dataset_size=N)
    svi.loss(IndexedBatch(first, rows))  # makes the parameters
    with torch.no_grad():
        for parameter in svi.guide.parameters():
            parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
    rows = rows if ragged is None else ragged
    batch = X[rows], rows
    with pyro.settings.context(module_local_params=True):
        guide = make_guide(raw, create_plates=lambda x, rows: by_rows(x, rows, dim))
        guide(*batch)
        guide.load_state_dict(svi.guide.state_dict())
        torch.manual_seed(3)
        expected = theirs_elbo().differentiable_loss(raw, guide, *batch)
        torch.manual_seed(3)
        loss = svi.loss(IndexedBatch(batch, rows))
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
        mine, theirs = (dict(part.named_parameters()) for part in (svi.guide, guide))
        assert list(mine) == list(theirs)
        gradients = torch.autograd.grad(loss, list(mine.values()))
        wanted = torch.autograd.grad(expected, list(theirs.values()))
        assert any(gradient.is_sparse for gradient in gradients)
        for gradient, other in zip(gradients, wanted, strict=True):
            # The absolute tolerance is for sums that cancel to zero but for rounding.
            torch.testing.assert_close(gradient.to_dense(), other, rtol=1e-9, atol=1e-12)
        with torch.no_grad():
            torch.manual_seed(3)
            evaluated = svi.loss(IndexedBatch(batch, rows))
            torch.manual_seed(3)
            wanted_loss = theirs_elbo().loss(raw, guide, *batch)
            assert float(evaluated) == pytest.approx(wanted_loss, rel=1e-9)


# -- programs --------------------------------------------------------------------------------------


def local(plate, x, rows):
    with plate(x, rows):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.2 * x, 0.8)), 0.6), obs=x)


def mixed(plate, x, rows):
    mu = pyro.sample("mu", dist.Normal(0.3, 0.5))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with plate(x, rows):
        z = pyro.sample("z", dist.Normal(mu + 0.2 * x, sigma))
        pyro.sample("x", dist.Normal(z, 0.6), obs=x)


def constrained(plate, x, rows):
    with plate(x, rows):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        pyro.sample("x", dist.Normal(share, rate), obs=x)


def vector(plate, x, rows):
    with plate(x, rows):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 0.6), obs=x)


def matrix(plate, x, rows):
    with plate(x, rows):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        pyro.sample("x", dist.Normal(z.sum((-1, -2)), 0.6), obs=x)


def simplex(plate, x, rows):
    with plate(x, rows):
        p = pyro.sample("p", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))
        pyro.sample("x", dist.Normal(p[..., 0] - p[..., 2], 0.6), obs=x)


def cholesky(plate, x, rows):
    with plate(x, rows):
        factor = pyro.sample("L", dist.LKJCholesky(3, 2.0))
        pyro.sample("x", dist.Normal(factor[..., 2, 0] + factor[..., 1, 1], 0.6), obs=x)


def dotted(plate, x, rows):
    mu = pyro.sample("group.mu", dist.Normal(0.3, 0.5))
    with plate(x, rows):
        z = pyro.sample("row.deep.z", dist.Normal(mu, 1.0))
        scale = pyro.sample("row.scale", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x)


def table(dim, outside, plate, x, rows):
    """A plate of three columns, around the data plate or within it."""
    data, columns = plate(x, rows, dim), pyro.plate("columns", 3, dim=-3 - dim)
    x = x if dim == -1 else x[:, None]
    with columns:
        effect = pyro.sample("effect", dist.Normal(0.1, 0.5))
    with data:
        z = pyro.sample("z", dist.Normal(0.2 * x, 0.8))
    first, second = (data, columns) if outside else (columns, data)
    with first, second:
        cell = pyro.sample("cell", dist.Normal(z + effect, 0.7))
        pyro.sample("x", dist.Normal(cell, 0.6), obs=x.expand(cell.shape))


def wide(plate, x, rows):
    """Rows in dimension -2 alone: their table has a dimension of size one."""
    with plate(x, rows, -2):
        z = pyro.sample("z", dist.Normal(0.3, 0.8).expand([2]).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 0.6), obs=x[:, None])


# -- comparisons -----------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", MEAN_FIELD)
@pytest.mark.parametrize("elbo", ELBOS)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("program", [local, mixed], ids=lambda p: p.__name__)
def test_loss_and_gradients_equal_pyros(program, style, elbo, guide):
    assert_equal_to_pyro(program, MEAN_FIELD[guide], style, ELBOS[elbo])


@pytest.mark.parametrize("guide", MEAN_FIELD)
@pytest.mark.parametrize(
    "program",
    [constrained, vector, matrix, simplex, cholesky, dotted],
    ids=lambda p: p.__name__,
)
def test_shapes_constraints_and_names(program, guide):
    assert_equal_to_pyro(program, MEAN_FIELD[guide])
    assert_equal_to_pyro(program, MEAN_FIELD[guide], elbo=ELBOS["vectorised"])


@pytest.mark.parametrize("guide", MEAN_FIELD)
def test_rows_in_a_dimension_further_left(guide):
    assert_equal_to_pyro(wide, MEAN_FIELD[guide], dim=-2)


@pytest.mark.parametrize("guide", MEAN_FIELD)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("dim", [-1, -2])
def test_plate_around_and_within_another(dim, outside, style, guide):
    assert_equal_to_pyro(partial(table, dim, outside), MEAN_FIELD[guide], style, dim=dim)


@pytest.mark.parametrize("guide", MEAN_FIELD)
@pytest.mark.parametrize("ragged", [torch.tensor([5]), torch.arange(7), torch.arange(N)])
@pytest.mark.parametrize("style", STYLES)
def test_batches_of_another_size_than_the_first(style, ragged, guide):
    assert_equal_to_pyro(mixed, MEAN_FIELD[guide], style, ragged=ragged)


@pytest.mark.parametrize("guide", MEAN_FIELD)
def test_a_row_that_is_twice_in_a_batch(guide):
    # A DistributedSampler fills up with rows that it has sent already; their gradients add up.
    assert_equal_to_pyro(mixed, MEAN_FIELD[guide], rows=torch.tensor([4, 9, 4]))


@pytest.mark.parametrize("guide", MEAN_FIELD)
@pytest.mark.parametrize("style", ["len", "subsample_size", "subsample"])
def test_enumerated_latent_of_each_row_beside(style, guide):
    def mixture(plate, x, rows):
        mu = pyro.sample("mu", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
        with plate(x, rows):
            z = pyro.sample("z", dist.Normal(0.0, 0.8))
            k = pyro.sample(
                "k",
                dist.Categorical(torch.tensor([0.3, 0.7])),
                infer={"enumerate": "parallel"},
            )
            pyro.sample("x", dist.Normal(mu[..., k] + z, 0.6), obs=x)

    def make_guide(model, **options):
        return MEAN_FIELD[guide](poutine.block(model, hide=["k"]), **options)

    elbo = partial(TraceEnum_ELBO, max_plate_nesting=1)
    assert_equal_to_pyro(mixture, make_guide, style, elbo)


def test_autoguide_list_of_rows_and_a_joint_guide_of_globals():
    def make_guide(model, create_plates=None):
        guide = AutoGuideList(model, create_plates=create_plates)
        guide.append(AutoMultivariateNormal(poutine.block(model, expose=["mu", "sigma"])))
        guide.append(AutoNormal(poutine.block(model, hide=["mu", "sigma"])))
        return guide

    assert_equal_to_pyro(mixed, make_guide)
    assert_equal_to_pyro(mixed, make_guide, "subsample_size", ragged=torch.arange(7))


def test_parameters_of_the_model_get_pyros_gradient():
    slope = nn.Parameter(torch.tensor(0.7))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = slope

        def forward(self, x, rows):
            with STYLES["len"](x, rows):
                z = pyro.sample("z", dist.Normal(self.slope * x, 0.8))
                pyro.sample("x", dist.Normal(z + self.slope, 0.6), obs=x)

    def raw(x, rows):
        with by_rows(x, rows):
            z = pyro.sample("z", dist.Normal(slope * x, 0.8))
            pyro.sample("x", dist.Normal(z + slope, 0.6), obs=x)

    svi = PyroSVIModule(Model(), AutoNormal, dataset_size=N)
    batch = X[ROWS], ROWS
    svi.loss(IndexedBatch(batch, ROWS))
    with pyro.settings.context(module_local_params=True):
        guide = AutoNormal(raw, create_plates=lambda x, rows: by_rows(x, rows))
        guide(*batch)
        guide.load_state_dict(svi.guide.state_dict())
        torch.manual_seed(3)
        expected = Trace_ELBO().differentiable_loss(raw, guide, *batch)
    torch.manual_seed(3)
    (gradient,) = torch.autograd.grad(svi.loss(IndexedBatch(batch, ROWS)), [slope])
    torch.testing.assert_close(
        gradient, torch.autograd.grad(expected, [slope])[0], rtol=1e-9, atol=0
    )
