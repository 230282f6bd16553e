"""Rows by columns: ``data_plate={"users": n, "items": m}``, each plate scaled by its own size.

Pyro's side runs on plates of n users and m items, both with the rows and columns of the batch.
"""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoGuideList, AutoNormal
from support import quiet_trainer
from torch import nn

from pyro_lightning import ArrayDataModule, IndexedBatch, PyroSVIModule

USERS, ITEMS = 20, 6
ROWS, COLUMNS = torch.tensor([3, 17, 8]), torch.tensor([0, 2, 5, 1])
Y = torch.randn(USERS, ITEMS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SIZES = {"users": USERS, "items": ITEMS}


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def by_numbers(y, dims=(-2, -1), columns=None):
    """What Pyro asks for: sizes of both plates, and which rows and columns these are."""
    columns = torch.arange(ITEMS) if columns is None else columns
    return [
        pyro.plate("users", USERS, subsample=ROWS, dim=dims[0]),
        pyro.plate("items", ITEMS, subsample=columns, dim=dims[1]),
    ]


def by_length(y, dims=(-2, -1), columns=None):
    return [pyro.plate(name, n, dim=d) for name, n, d in zip(SIZES, y.shape, dims, strict=True)]


def by_subsample_size(y, dims=(-2, -1), columns=None):
    columns = torch.arange(ITEMS) if columns is None else columns
    return [
        pyro.plate("users", USERS, subsample_size=len(y), dim=dims[0]),
        pyro.plate("items", ITEMS, subsample=columns, dim=dims[1]),
    ]


STYLES = {"len": by_length, "subsample_size": by_subsample_size, "subsample": by_numbers}


def factors(y, plates=by_length, dims=(-2, -1), columns=None, latents=("user", "item", "cell")):
    """A latent of each user, of each item, and of each cell, or some of them."""
    users, items = plates(y, dims, columns)
    mean = pyro.sample("mu", dist.Normal(0.1, 2.0))
    if "user" in latents:
        with users:
            mean = mean + pyro.sample("user", dist.Normal(0.2, 0.5))
    if "item" in latents:
        with items:
            mean = mean + pyro.sample("item", dist.Normal(-0.3, 0.7))
    with users, items:
        if "cell" in latents:
            mean = pyro.sample("cell", dist.Normal(mean, 0.8))
        pyro.sample("y", dist.Normal(mean, 0.6), obs=y if dims == (-2, -1) else y.T)


class Written(nn.Module):
    """A guide that draws each latent from parameters shared by its plate."""

    def __init__(self, plates, dims=(-2, -1), columns=None):
        super().__init__()
        self.plates, self.dims, self.columns = plates, dims, columns
        self.loc = nn.Parameter(torch.tensor([0.1, 0.2, 0.3, 0.4]))

    def forward(self, y):
        users, items = self.plates(y, self.dims, self.columns)
        pyro.sample("mu", dist.Normal(self.loc[0], 0.5))
        with users:
            pyro.sample("user", dist.Normal(self.loc[1], 0.5))
        with items:
            pyro.sample("item", dist.Normal(self.loc[2], 0.5))
        with users, items:
            pyro.sample("cell", dist.Normal(self.loc[3], 0.5))


ELBOS = {
    "Trace": Trace_ELBO,
    "TraceMeanField": TraceMeanField_ELBO,
    "vectorised": partial(
        Trace_ELBO, num_particles=3, vectorize_particles=True, max_plate_nesting=2
    ),
}


def assert_equal(ours, theirs, mine, others):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    gradients, wanted = torch.autograd.grad(ours, mine), torch.autograd.grad(theirs, others)
    for gradient, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient.to_dense(), other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("elbo", ELBOS)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dims", [(-2, -1), (-1, -2)])
@pytest.mark.parametrize("columns", [None, COLUMNS], ids=["full", "cut"])
def test_hand_written_guide(columns, dims, style, elbo):
    plates, y = STYLES[style], Y[ROWS] if columns is None else Y[ROWS][:, columns]
    options = {"dims": dims, "columns": columns}
    guide = Written(plates, **options)
    model = partial(factors, plates=plates, **options)
    svi = PyroSVIModule(model, guide, elbo=ELBOS[elbo](), data_plate=SIZES)
    svi.loss(y)
    torch.manual_seed(3)
    loss = svi.loss(y)
    guide.plates = by_numbers
    torch.manual_seed(3)
    raw = partial(factors, plates=by_numbers, **options)
    expected = ELBOS[elbo]().differentiable_loss(raw, guide, y)
    assert_equal(loss, expected, [guide.loc], [guide.loc])


@pytest.mark.parametrize("elbo", ELBOS)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dims", [(-2, -1), (-1, -2)])
@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta])
def test_autoguide_of_users_items_and_cells(guide, dims, style, elbo):
    model = partial(factors, plates=STYLES[style], dims=dims)
    svi = PyroSVIModule(model, guide, elbo=ELBOS[elbo](), data_plate=SIZES)
    batch = IndexedBatch(Y[ROWS], ROWS)
    svi.loss(batch)
    with torch.no_grad():
        for parameter in svi.guide.parameters():
            parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)
    loss = svi.loss(batch)
    raw = partial(factors, plates=by_numbers, dims=dims)
    with pyro.settings.context(module_local_params=True):
        theirs = guide(raw, create_plates=partial(by_numbers, dims=dims))
        theirs(Y[ROWS])
        theirs.load_state_dict(svi.guide.state_dict())
        torch.manual_seed(3)
        expected = ELBOS[elbo]().differentiable_loss(raw, theirs, Y[ROWS])
    assert_equal(loss, expected, list(svi.guide.parameters()), list(theirs.parameters()))


def test_autoguide_of_users_beside_columns_that_are_cut_short():
    plates = partial(factors, plates=by_length, latents=("user",))
    y = Y[ROWS][:, COLUMNS]
    svi = PyroSVIModule(plates, AutoNormal, data_plate=SIZES)
    svi.loss(IndexedBatch(y, ROWS))
    torch.manual_seed(3)
    loss = svi.loss(IndexedBatch(y, ROWS))
    raw = partial(factors, plates=by_numbers, columns=COLUMNS, latents=("user",))
    with pyro.settings.context(module_local_params=True):
        theirs = AutoNormal(
            raw, create_plates=lambda y: pyro.plate("users", USERS, subsample=ROWS, dim=-2)
        )
        theirs(y)
        theirs.load_state_dict(svi.guide.state_dict())
        torch.manual_seed(3)
        expected = Trace_ELBO().differentiable_loss(raw, theirs, y)
    assert_equal(loss, expected, list(svi.guide.parameters()), list(theirs.parameters()))


# -- fits and draws --------------------------------------------------------------------------------


def test_fit_finds_the_posterior_mean_of_users_and_items():
    model = partial(factors, latents=("user", "item"))
    svi = PyroSVIModule(
        model,
        AutoDelta,
        optimizer=partial(torch.optim.SGD, lr=0.005),
        lr_scheduler=lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, 0.99),
        data_plate=SIZES,
    )
    quiet_trainer(max_epochs=300).fit(svi, datamodule=ArrayDataModule(Y, batch_size=5))
    # The mode is where the sum of squares, each over its sd, is least: a linear system.
    count = 1 + USERS + ITEMS
    design = torch.zeros(USERS, ITEMS, count)
    design[..., 0] = 1.0
    design[..., 1 : 1 + USERS] = torch.eye(USERS)[:, None]
    design[..., 1 + USERS :] = torch.eye(ITEMS)
    design = design.reshape(-1, count) / 0.6
    sds = torch.tensor([2.0] + [0.5] * USERS + [0.7] * ITEMS)
    means = torch.tensor([0.1] + [0.2] * USERS + [-0.3] * ITEMS)
    precision = design.T @ design + torch.diag(sds**-2)
    mode = torch.linalg.solve(precision, design.T @ Y.flatten() / 0.6 + means / sds**2)
    guide = svi.guide
    found = torch.cat([guide.mu[None], guide.user.flatten(), guide.item.flatten()])
    torch.testing.assert_close(found.detach(), mode, rtol=0, atol=0.01)


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta])
def test_draws_of_items_come_with_the_globals_and_users_with_their_rows(guide):
    svi = PyroSVIModule(factors, guide, data_plate=SIZES)
    svi.loss(IndexedBatch(Y[ROWS], ROWS))
    draws = svi.posterior_samples(7)
    assert {name: tuple(d.shape) for name, d in draws.items()} == {"mu": (7,), "item": (7, ITEMS)}
    draws = svi.posterior_samples(7, rows=[4, 0])
    assert {name: tuple(d.shape) for name, d in draws.items()} == {
        "mu": (7,),
        "item": (7, ITEMS),
        "user": (7, 2, 1),
        "cell": (7, 2, ITEMS),
    }
    if guide is AutoDelta:
        assert torch.equal(draws["cell"][0], svi.guide.cell[[4, 0]])


# -- refusals --------------------------------------------------------------------------------------


def refused(match, model, y, guide=AutoNormal, **options):
    svi = PyroSVIModule(model, guide, **{"data_plate": SIZES, **options})
    with pytest.raises(ValueError, match=match):
        svi.loss(IndexedBatch(y, ROWS))


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta, AutoDiagonalNormal])
@pytest.mark.parametrize("latent", ["item", "cell"])
@pytest.mark.parametrize("style", STYLES)
def test_autoguide_of_columns_that_are_cut_short(style, latent, guide):
    # It would keep parameters for the columns of its first batch.
    model = partial(factors, plates=STYLES[style], columns=COLUMNS, latents=(latent,))
    match = rf"site '{latent}' stands in the data plate 'items'.* 4 of 6.*by hand"
    refused(match, model, Y[ROWS][:, COLUMNS], guide)


def test_cut_columns_in_a_list_beside_a_guide_of_users():
    def make_guide(model):
        guide = AutoGuideList(model)
        guide.append(AutoNormal(poutine.block(model, hide=["item"])))
        guide.append(AutoDelta(poutine.block(model, expose=["item"])))
        return guide

    model = partial(factors, latents=("user", "item"))
    refused(
        "site 'item' stands in the data plate 'items'",
        model,
        Y[ROWS][:, COLUMNS],
        make_guide(model),
    )


def test_more_columns_than_stated():
    model = partial(factors, latents=())
    sizes = {"users": USERS, "items": 4}
    refused("plate 'items' has size 6, more than the 4", model, Y[ROWS], data_plate=sizes)


def test_columns_without_a_size_in_the_model():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("users", len(y), dim=-2), pyro.plate("items", dim=-1):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    refused("plate 'items' must be given its size", model, Y[ROWS])


@pytest.mark.parametrize("count", [len(ROWS), ITEMS], ids=["as many as rows", "more"])
def test_names_alone_of_plates_that_cross(count):
    model = partial(factors, latents=())
    names = {"data_plate": ("users", "items"), "dataset_size": USERS}
    refused("data_plate={'rows': n_rows, 'columns'", model, Y[ROWS][:, :count], **names)


def test_sizes_that_disagree():
    with pytest.raises(ValueError, match=r"dataset_size=21, but data_plate states 20"):
        PyroSVIModule(factors, data_plate=SIZES, dataset_size=21)
    assert PyroSVIModule(factors, data_plate=SIZES, dataset_size=USERS).dataset_size == USERS
    assert PyroSVIModule(factors, data_plate={"users": None, "items": 6}).dataset_size is None
