"""A discrete latent of each row is summed out, and its data plate scaled once."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from support import assert_equal_to_pyro, with_plate
from torch import nn

from pyro_lightning import PyroSVIModule

N, ROWS = 50, torch.tensor([3, 8, 20, 41])


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def by_rows(y, rows):
    """What Pyro asks for: the size of the data set and which of its rows these are."""
    return pyro.plate("data", N, subsample=rows)


STYLES = {
    "len": lambda y, rows: pyro.plate("data", len(y)),
    "subsample_size": lambda y, rows: pyro.plate("data", N, subsample_size=len(y)),
    "subsample": by_rows,
    "dim": lambda y, rows: pyro.plate("data", len(y), dim=-1),
}


class Mixture(nn.Module):
    """Two components, the label of each row summed out, by enumeration or in closed form."""

    def __init__(self, plate, enumerate_labels):
        super().__init__()
        self.plate, self.enumerate_labels = plate, enumerate_labels
        self.logits = nn.Parameter(torch.tensor([0.2, -0.4]))

    def forward(self, y, rows):
        locs = pyro.sample("locs", dist.Normal(torch.tensor([-1.0, 1.0]), 0.5).to_event(1))
        with self.plate(y, rows):
            labels = dist.Categorical(logits=self.logits)
            if self.enumerate_labels:
                label = pyro.sample("label", labels, infer={"enumerate": "parallel"})
                pyro.sample("y", dist.Normal(locs[label], 0.5), obs=y)
            else:
                each = dist.Normal(locs.expand(len(y), 2), 0.5)
                labels = dist.Categorical(logits=self.logits.expand(len(y), 2))
                pyro.sample("y", dist.MixtureSameFamily(labels, each), obs=y)


class LocsGuide(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([-0.8, 0.9]))

    def forward(self, y, rows):
        pyro.sample("locs", dist.Normal(self.loc, 0.3).to_event(1))


@pytest.mark.parametrize("style", STYLES)
def test_enumerated_local_site(style):
    model, guide, y = Mixture(STYLES[style], True), LocsGuide(), torch.linspace(-2, 2, 4)
    elbo = partial(TraceEnum_ELBO, max_plate_nesting=1)
    assert_equal_to_pyro(elbo, (model, guide), (with_plate(model, by_rows), guide), (y, ROWS), N)


def test_enumerated_sum_is_the_marginal_likelihood_scaled():
    # The scale multiplies the log of the sum over labels, not its terms.
    model, guide, y = Mixture(STYLES["len"], True), LocsGuide(), torch.linspace(-2, 2, 4)
    marginal = Mixture(by_rows, False)
    marginal.logits = model.logits
    svi = PyroSVIModule(model, guide, TraceEnum_ELBO(max_plate_nesting=1), dataset_size=N)
    svi.loss((y, ROWS))
    torch.manual_seed(3)
    loss = svi.loss((y, ROWS))
    torch.manual_seed(3)
    expected = Trace_ELBO().differentiable_loss(marginal, guide, y, ROWS)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
