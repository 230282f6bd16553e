"""Initial values of latents of rows: one for each of all N, or one for all."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoNormal,
    init_to_mean,
    init_to_value,
)
from pyro.poutine import block

from pyro_lightning import IndexedBatch, PyroSVIModule

N, ROWS = 12, torch.tensor([7, 2, 11, 0])
X = torch.linspace(-1, 2, N)


def model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("row.z", dist.LogNormal(mu, 1.0))
        w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
        pyro.sample("x", dist.Normal(z + w[..., 0], 0.5), obs=x)


def started(guide, **values):
    start = init_to_value(values={name.replace("_", "."): each for name, each in values.items()})
    svi = PyroSVIModule(model, partial(guide, init_loc_fn=start), dataset_size=N)
    svi.loss(IndexedBatch(X[ROWS], ROWS))
    return svi


def drawn(svi, site):
    """Where the guide has each row, drawn without its noise."""
    if isinstance(svi.guide, AutoNormal):
        with torch.no_grad():
            for parameter in svi.guide.scales.parameters():
                parameter.fill_(-30.0)  # by softplus, sd 1e-13
    return svi.posterior_samples(1, rows=range(N))[site][0]


EACH = torch.arange(1.0, N + 1)
EVENTS = torch.softmax(torch.arange(3.0) * EACH[:, None] / N, -1)


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta])
@pytest.mark.parametrize(
    "value, expected",
    [(EACH, EACH), (torch.tensor(2.5), torch.full((N,), 2.5)), (EACH[:1], torch.ones(N))],
    ids=["each", "constant", "of shape (1,)"],
)
def test_value_of_each_row(guide, value, expected):
    torch.testing.assert_close(drawn(started(guide, row_z=value), "row.z"), expected)


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta])
@pytest.mark.parametrize("value", [EVENTS, EVENTS[4]], ids=["each", "constant"])
def test_events_of_each_row(guide, value):
    found = drawn(started(guide, w=value), "w")
    torch.testing.assert_close(found, value.expand(N, 3))


def test_part_of_a_list():
    guide = AutoGuideList(model)
    guide.append(AutoNormal(block(model, expose=["mu"])))
    start = init_to_value(values={"row.z": EACH})
    guide.append(AutoDelta(block(model, hide=["mu"]), init_loc_fn=start))
    svi = PyroSVIModule(model, guide, dataset_size=N)
    svi.loss(IndexedBatch(X[ROWS], ROWS))
    torch.testing.assert_close(drawn(svi, "row.z"), EACH)


def test_batch_of_another_size_than_the_first():
    svi = started(AutoDelta, row_z=EACH)
    svi.loss(IndexedBatch(X, torch.arange(N)))
    svi.loss(IndexedBatch(X[:1], torch.tensor([3])))


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta])
def test_value_of_another_size(guide):
    with pytest.raises(ValueError, match=r"'row.z' a value of shape \(5,\): expected \(12,\)"):
        started(guide, row_z=torch.ones(5))


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta])
def test_entries_that_start_at_one_mean_train_apart(guide):
    def equal_means(x):
        w = pyro.sample("w", dist.Normal(0.5, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 0.1).to_event(1), obs=x)

    svi = PyroSVIModule(equal_means, partial(guide, init_loc_fn=init_to_mean), dataset_size=100)
    x = torch.tensor([0.0, 1.0, 2.0]).expand(100, 3)
    svi.loss(x)
    adam = torch.optim.Adam(svi.parameters(), lr=0.1)
    for _ in range(100):
        adam.zero_grad()
        svi.loss(x).backward()
        adam.step()
    # The posterior's sd is 0.01; what Adam's steps of 0.1 leave is of that size.
    assert torch.allclose(svi.guide.median()["w"], x[0], atol=0.1)
