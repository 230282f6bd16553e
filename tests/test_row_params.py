"""Hand-written parameters of each row: read at the batch's rows, or refused."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoCallable, AutoGuideList, AutoNormal
from pyro.nn import PyroModule, PyroParam
from pyro.poutine import block
from support import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_lightning import ArrayDataModule, IndexedBatch, PyroSVIModule

N, B = 60, 20
X = 2 + 1.2 * torch.randn(N, generator=torch.Generator().manual_seed(3))
ROWS = torch.tensor([7, 3, 58, 21])


@pytest.fixture
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


STYLES = {
    "len": lambda x: pyro.plate("data", len(x)),
    "subsample_size": lambda x: pyro.plate("data", N, subsample_size=len(x)),
}


def model(x, plate=STYLES["len"]):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with plate(x):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def rows_of(plate):
    """Parameters of each row, as Pyro writes them for a plate that is subsampled."""

    def guide(x):
        with plate(x):
            loc = pyro.param("loc", lambda: torch.linspace(-1.0, 1.0, N), event_dim=0)
            scale = pyro.param(
                "scale", lambda: torch.full((N,), 0.5), constraints.positive, event_dim=0
            )
            pyro.sample("z", dist.Normal(loc, scale))

    return guide


def guide_of(plate):
    rows = rows_of(plate)

    def guide(x):
        loc = pyro.param("mu.loc", torch.tensor(0.1))
        scale = pyro.param("mu.scale", torch.tensor(0.3), constraints.positive)
        pyro.sample("mu", dist.Normal(loc, scale))
        rows(x)

    return guide


@pytest.mark.parametrize("style", STYLES)
def test_loss_and_gradients_equal_pyros(style, double_precision):
    plate = STYLES[style]
    svi = PyroSVIModule(partial(model, plate=plate), guide_of(plate), dataset_size=N)
    batch = IndexedBatch(X[ROWS].double(), ROWS)
    svi.loss(batch)
    torch.manual_seed(3)
    loss = svi.loss(batch)
    loss.backward()
    ours = {n.rpartition(".")[2].replace("|", "."): p.grad for n, p in svi.named_parameters()}

    def by_rows(x):
        return pyro.plate("data", N, subsample=ROWS)

    with pyro.get_param_store().scope():
        torch.manual_seed(3)
        expected = Trace_ELBO().differentiable_loss(
            partial(model, plate=by_rows), guide_of(by_rows), batch.data
        )
        expected.backward()
        store = pyro.get_param_store()
        theirs = {name: store[name].unconstrained().grad for name in store}
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    assert ours.keys() == theirs.keys()
    assert ours["loc"].is_sparse and ours["scale"].is_sparse
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name].to_dense(), gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["function", "list"])
def test_a_fit_finds_every_row(form):
    guide = guide_of(STYLES["len"])
    if form == "list":
        guide = AutoGuideList(model)
        guide.append(AutoNormal(block(model, expose=["mu"])))
        guide.append(AutoCallable(model, rows_of(STYLES["len"])))
    torch.manual_seed(0)
    svi = PyroSVIModule(
        model,
        guide,
        Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
        partial(torch.optim.Adam, lr=0.1),
        partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.985),
    )
    quiet_trainer(max_epochs=300).fit(svi, datamodule=ArrayDataModule(X, batch_size=B))
    found = {n.rpartition(".")[2]: p.detach() for n, p in svi.named_parameters()}
    precision = 1 / 100 + N / 1.25
    mu = X.sum() / 1.25 / precision
    exact, sd = mu + (X - mu) / 1.25, (0.2 + 0.2**2 / precision) ** 0.5
    # As under AutoNormal: the noise of the last steps leaves a few hundredths of an sd.
    assert float(((found["loc"] - exact) / sd).square().mean().sqrt()) < 0.15


def test_a_batch_that_does_not_tell_its_rows():
    with pytest.raises(ValueError, match=r"pyro.param\('loc'\).*IndexedDataset"):
        PyroSVIModule(model, guide_of(STYLES["len"]), dataset_size=N).loss(X[:4])


def test_a_loader_without_row_numbers_is_refused_before_the_first_step():
    svi = PyroSVIModule(lambda x: model(x), guide_of(STYLES["len"]))
    with pytest.raises(ValueError, match=r"pyro.param\('loc'\).*IndexedDataset"):
        quiet_trainer(max_epochs=1).fit(svi, DataLoader(TensorDataset(X), batch_size=B))


def local(value):
    """A guide whose latents of rows are what ``value`` makes of a batch, in the data plate."""

    def guide(x):
        pyro.sample("mu", dist.Normal(pyro.param("mu.loc", torch.tensor(0.1)), 0.3))
        with pyro.plate("data", N, subsample_size=len(x)) as rows:
            pyro.sample("z", dist.Normal(value(x, rows), 0.5))

    return guide


WRONG = {
    "of the batch's size": (
        lambda x, rows: pyro.param("loc", torch.zeros(len(x))),
        r"pyro.param\('loc'\) has shape \(4,\) with 4 rows in the batch and \(3,\) with 3",
    ),
    "of the batch's size, with event_dim": (
        lambda x, rows: pyro.param("loc", torch.zeros(len(x)), event_dim=0),
        r"pyro.param\('loc', ..., event_dim=0\) has 4 entries in the data plate 'data'",
    ),
    "of all rows, read where the plate says": (
        lambda x, rows: pyro.param("loc", torch.zeros(N))[rows],
        r"parameter 'loc' \(shape \(60,\)\).*count within the batch",
    ),
    "of the first batch's size": (
        lambda x, rows: pyro.param("loc", torch.zeros(4)),
        r"pyro.param\('loc'\) has shape \(4,\) .* not run on 3 rows .*Shape mismatch.*event_dim",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_rows_that_would_be_read_at_the_wrong_place_are_refused(case):
    value, message = WRONG[case]
    svi = PyroSVIModule(model, local(value), dataset_size=N)
    with pytest.raises(ValueError, match=message):
        svi.loss(IndexedBatch(X[:4], torch.arange(4)))


class OfPlace(PyroModule):
    """A guide whose latents of rows have parameters by the places of rows in the batch."""

    def __init__(self, form):
        super().__init__()
        self.form, self.spread = form, nn.Parameter(torch.tensor(0.5))
        if form == "nn.Module":
            self.part = nn.Module()
            self.part.loc = nn.Parameter(torch.zeros(N))
        elif form == "nn.Embedding":
            self.part = nn.Embedding(N, 1)
        elif form == "PyroParam":
            self.loc = PyroParam(torch.zeros(N), event_dim=0)
        else:
            self.loc = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        pyro.sample("mu", dist.Normal(0.0, self.spread))
        with pyro.plate("data", N, subsample_size=len(x)) as rows:
            if self.form == "nn.Module":
                loc = self.part.loc[rows]
            elif self.form == "nn.Embedding":
                loc = self.part(rows).squeeze(-1)
            else:
                loc = self.loc  # a PyroParam is cut to the plate's rows by Pyro
            pyro.sample("z", dist.Normal(loc, self.spread))


@pytest.mark.parametrize("form", ["nn.Module", "nn.Embedding", "PyroParam", "of size B"])
def test_parameters_of_modules_that_rows_read_by_their_place_are_refused(form):
    batch = IndexedBatch(X[:4], torch.arange(4))
    with pytest.raises(ValueError, match=r"parameter '.*' .* by the place of a row in the batch"):
        PyroSVIModule(model, OfPlace(form), dataset_size=N).loss(batch)
    PyroSVIModule(model, OfPlace(form), dataset_size=N, checks=False).loss(batch)


def test_points_that_rows_read_by_their_place_are_refused():
    def guide(x):
        pyro.sample("mu", dist.Delta(pyro.param("mu.loc", torch.tensor(0.1))))
        with pyro.plate("data", N, subsample_size=len(x)) as rows:
            pyro.sample("z", dist.Delta(pyro.param("loc", torch.zeros(N))[rows]))

    with pytest.raises(ValueError, match=r"parameter 'loc' .* by the place of a row"):
        PyroSVIModule(model, guide, dataset_size=N).loss(X[:4])


class Wide(nn.Module):
    """A guide whose layers are as wide as the batch, or as there are rows."""

    def __init__(self, width, dropout=0.0):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(1, width), nn.BatchNorm1d(width), nn.Softmax(-1), nn.Dropout(dropout)
        )
        self.out = nn.Parameter(torch.ones(width))

    def forward(self, x):
        pyro.sample("mu", dist.Normal(self.out.sum(), 1.0))
        with pyro.plate("data", N, subsample_size=len(x)) as rows:
            loc = (self.net(x[rows].unsqueeze(-1)) * self.out).sum(-1)
            pyro.sample("z", dist.Normal(loc, 0.5))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("width", [4, N])
def test_networks_as_wide_as_the_batch_or_the_data_set_serve(width, dropout):
    PyroSVIModule(model, Wide(width, dropout), dataset_size=N).loss(X[:4])


@pytest.mark.parametrize("width", [4, 5, 6, 7])
def test_batch_norm_as_wide_as_the_batch_serves(width):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            layers = nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 1)
            self.net = nn.Sequential(*layers)

        def forward(self, x):
            bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(self.net(x)[:, 0] + bias, 1.0), obs=x.sum(-1))

    for seed in range(5):
        torch.manual_seed(seed)
        PyroSVIModule(Normed(), dataset_size=N).loss(torch.randn(width, 3))


def test_parameters_of_a_pyro_module_are_cut_to_the_rows_that_a_plate_is_given():
    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = PyroParam(torch.linspace(-1.0, 1.0, N), event_dim=0)

        def forward(self, x, rows):
            pyro.sample("mu", dist.Normal(0.1, 0.3))
            with pyro.plate("data", N, subsample=rows):
                pyro.sample("z", dist.Normal(self.loc, 0.5))

    svi = PyroSVIModule(lambda x, rows: model(x), Guide(), dataset_size=N)
    svi.loss((X[ROWS], ROWS)).backward()
    (gradient,) = (p.grad for p in svi.parameters())
    assert gradient.nonzero().flatten().tolist() == sorted(ROWS.tolist())


RIGHT = {
    "shared": lambda x, rows: pyro.param("loc", torch.zeros(1)),
    "shared, with event_dim": lambda x, rows: pyro.param("loc", torch.zeros(1), event_dim=0),
    "of size B by chance": lambda x, rows: pyro.param("loc", torch.zeros(4)).sum() + 0 * x,
    "of size N by chance": lambda x, rows: pyro.param("loc", torch.zeros(N)).sum() + 0 * x,
    "amortised, by the plate's rows": lambda x, rows: (
        pyro.param("loc", torch.tensor(0.5)) * x[rows]
    ),
    "of size N by chance, with the plate's rows": lambda x, rows: (
        x[rows] * pyro.param("loc", torch.zeros(N)).sum()
    ),
}


@pytest.mark.parametrize("case", RIGHT)
def test_parameters_that_are_of_no_row_serve(case):
    svi = PyroSVIModule(model, local(RIGHT[case]), dataset_size=N)
    svi.loss(X[:4])
    assert [n for n, _ in svi.named_parameters() if n.endswith("loc")]


def test_rows_that_the_batch_holds_itself_may_be_used_by_hand():
    def guide(x, rows):
        pyro.sample("mu", dist.Normal(pyro.param("mu.loc", torch.tensor(0.1)), 0.3))
        with pyro.plate("data", N, subsample=rows):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(N))[rows], 0.5))

    svi = PyroSVIModule(lambda x, rows: model(x), guide, dataset_size=N)
    svi.loss((X[ROWS], ROWS)).backward()
    gradient = next(p.grad for n, p in svi.named_parameters() if n.endswith(".loc"))
    assert gradient.nonzero().flatten().tolist() == sorted(ROWS.tolist())
