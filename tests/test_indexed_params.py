"""Dense parameters of all rows that a batch's data index: warned of where the optimizer moves them.

Without the warning (Adam, lr 0.1, N = 40): a row outside the batch has gradient 0 and still moves
by 0.067 in one step, by the momentum of its last one.
"""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from support import quiet_trainer
from torch import nn

from pyro_lightning import ArrayDataModule, PyroSVIModule

N, B = 40, 10
X = 5 + torch.randn(N, generator=torch.Generator().manual_seed(3))
ROWS = torch.arange(N)


def model(x, rows):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 10.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def by_index(x, rows):
    loc = pyro.param("z.loc", torch.zeros(N))
    scale = pyro.param("z.scale", torch.ones(N, 1), constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc[rows], scale[rows].squeeze(-1)))


class Embedded(nn.Module):
    def __init__(self, size=N, columns=False, net=None):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, size) if columns else torch.zeros(size))
        self.columns = columns

    def forward(self, x, rows):
        loc = (self.table[0] if self.columns else self.table)[rows]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.5))


THRESHOLDS = X[0] - 1.2 + 0.5 * torch.arange(N)


class Network(nn.Module):
    """An encoder with N hidden units, of which the first batch reaches less than B."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, N), nn.ReLU(), nn.Linear(N, 1))
        with torch.no_grad():
            self.net[0].weight.fill_(1.0)
            self.net[0].bias.copy_(-THRESHOLDS)

    def forward(self, x, rows):
        loc = self.net(x[:, None]).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.5))


def served(x, rows):
    with pyro.plate("data", len(x)):
        loc = pyro.param("loc", torch.zeros(N), event_dim=0)
        pyro.sample("z", dist.Normal(loc, 0.5))


def every_row(x, rows):
    # A parameter of size N that each row reads whole.
    weights = pyro.param("weights", torch.full((N,), 0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(weights.sum() * x, 0.5))


ADAM = partial(torch.optim.Adam, lr=0.1)


def fit(guide, optimizer=ADAM, batch_size=B, **options):
    svi = PyroSVIModule(model, guide, optimizer=optimizer, **options)
    data = ArrayDataModule((X, ROWS), batch_size=batch_size)
    quiet_trainer(max_epochs=1).fit(svi, datamodule=data)
    return svi


@pytest.mark.parametrize(
    "guide, names",
    [
        (by_index, ["'z.loc' (shape (40,))", "'z.scale' (shape (40, 1))"]),
        (Embedded(), ["'guide.table' (shape (40,))"]),
        (Embedded(columns=True), ["'guide.table' (shape (1, 40))"]),
    ],
    ids=["params", "module", "columns"],
)
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.NAdam])
def test_parameters_that_the_data_index(guide, names, optimizer):
    with pytest.warns(UserWarning, match="event_dim") as caught:
        fit(guide, partial(optimizer, lr=0.01))
    message = "".join(str(each.message) for each in caught)
    assert optimizer.__name__ in message
    for name in names:
        assert name in message


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.SGD,
        torch.optim.Adagrad,
        torch.optim.RMSprop,
        torch.optim.Adadelta,
        torch.optim.Rprop,
    ],
)
def test_an_optimizer_that_moves_nothing_without_a_gradient_is_silent(optimizer):
    svi = fit(by_index, partial(optimizer, lr=0.01))
    before = svi._pyro_param_store._parameters["z|loc"].detach().clone()
    step = svi.trainer.optimizers[0]
    step.zero_grad(set_to_none=False)
    step.step()
    assert torch.equal(svi._pyro_param_store._parameters["z|loc"], before)


@pytest.mark.parametrize(
    "guide",
    [Network, lambda: served, lambda: every_row, lambda: Embedded(2 * N)],
    ids=["network of N units", "event_dim", "read whole", "embedding of another size"],
)
def test_other_parameters_are_not_warned_of(guide):
    fit(guide())


def test_the_network_looks_like_an_index_on_one_batch():
    # What the test above would not tell otherwise: some units, and fewer than B, have a gradient.
    reached = (X[:B, None] > THRESHOLDS).any(0).sum()
    assert 1 < (X[0] > THRESHOLDS).sum() < reached < B


def test_batches_of_all_rows_are_not_warned_of():
    fit(by_index, batch_size=N)


def test_without_checks():
    fit(by_index, checks=False)


def test_event_dim_is_the_remedy():
    # Rows 30 to 39 have no gradient in the second step, and stay where the first left them.
    svi = PyroSVIModule(model, served, optimizer=partial(torch.optim.Adam, lr=0.1))
    data = ArrayDataModule((X, ROWS), batch_size=B, shuffle=False)
    quiet_trainer(max_epochs=1, limit_train_batches=1).fit(svi, datamodule=data)
    before = svi._pyro_param_store.loc.detach().clone()
    assert (before[:B] != 0).all() and (before[B:] == 0).all()
