"""TraceMeanField_ELBO with guides that draw a latent through a transform.

Nothing of such a guide has a KL in closed form, so that draw by draw the loss is that of Pyro's
Trace_ELBO on ``plate("data", N, subsample=rows)``.
"""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGaussian,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from torch import nn

from pyro_lightning import IndexedBatch, PyroSVIModule

N, ROWS = 12, torch.tensor([7, 2, 11, 4])
X = torch.linspace(-1, 2, N, dtype=torch.float64)


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def by_length(x):
    return pyro.plate("data", len(x))


def by_rows(x):
    return pyro.plate("data", N, subsample=ROWS)


def positive(x, plate=by_length, local=False):
    """A rate and a share, and where it is asked for a positive latent of each row."""
    rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    with plate(x):
        loc = rate * share[..., 0]
        if local:
            loc = loc * pyro.sample("z", dist.LogNormal(0.0, 0.5))
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def assert_equal(svi, batch, theirs, particles):
    svi.loss(batch)
    parameters = list(svi.parameters())
    torch.manual_seed(3)
    loss = svi.loss(batch)
    with pyro.settings.context(module_local_params=True):
        torch.manual_seed(3)
        expected = Trace_ELBO(num_particles=particles).differentiable_loss(*theirs, X[ROWS])
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    found, wanted = (torch.autograd.grad(v, parameters) for v in (loss, expected))
    for gradient, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient.to_dense(), other, rtol=1e-8, atol=1e-10)
    with torch.no_grad():
        torch.manual_seed(3)
        torch.testing.assert_close(svi.loss(batch), expected.detach(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize(
    "guide",
    [
        AutoNormal,
        AutoDelta,
        AutoMultivariateNormal,
        AutoLowRankMultivariateNormal,
        AutoIAFNormal,
        AutoGaussian,
        AutoStructured,
    ],
)
def test_autoguide_of_latents_with_a_constraint(guide, particles):
    svi = PyroSVIModule(
        positive, guide, TraceMeanField_ELBO(num_particles=particles), dataset_size=N
    )
    theirs = partial(positive, plate=by_rows), svi.guide
    assert_equal(svi, X[ROWS], theirs, particles)


def test_latents_of_rows_with_a_constraint():
    local = partial(positive, local=True)
    svi = PyroSVIModule(local, AutoNormal, TraceMeanField_ELBO(), dataset_size=N)
    batch = IndexedBatch(X[ROWS], ROWS)
    svi.loss(batch)
    with pyro.settings.context(module_local_params=True):
        raw = partial(local, plate=by_rows)
        twin = AutoNormal(raw, create_plates=by_rows)
        twin(X[ROWS])
        twin.load_state_dict(svi.guide.state_dict())
        torch.manual_seed(3)
        expected = Trace_ELBO().differentiable_loss(raw, twin, X[ROWS])
    torch.manual_seed(3)
    loss = svi.loss(batch)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    found = torch.autograd.grad(loss, list(svi.guide.parameters()))
    wanted = torch.autograd.grad(expected, list(twin.parameters()))
    for gradient, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient.to_dense(), other, rtol=1e-8, atol=1e-10)


class PointGuide(nn.Module):
    """A Normal that is stretched by hand, its density stated, alone or within ``to_event``."""

    def __init__(self, plate, event):
        super().__init__()
        self.plate, self.event = plate, event
        self.loc, self.log_scale = (nn.Parameter(torch.tensor(v)) for v in (0.3, -0.5))

    def forward(self, x):
        with self.plate(x):
            free = torch.zeros(len(x), 2), torch.ones(len(x), 2)
            auxiliary = dist.Normal(*free).to_event(1)
            noise = pyro.sample("noise", auxiliary, infer={"is_auxiliary": True})
            value, density = self.loc + self.log_scale.exp() * noise, -self.log_scale.expand(2)
            if self.event:
                point = dist.Delta(value, density.expand(value.shape)).to_event(1)
            else:
                point = dist.Delta(value, density.sum().expand(len(x)), event_dim=1)
            pyro.sample("z", point)


@pytest.mark.parametrize("event", [False, True])
def test_hand_written_point_in_the_data_plate(event):
    def model(x, plate=by_length):
        with plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    guide = PointGuide(by_length, event)
    svi = PyroSVIModule(model, guide, TraceMeanField_ELBO(), dataset_size=N)
    theirs = PointGuide(by_rows, event)
    theirs.loc, theirs.log_scale = guide.loc, guide.log_scale
    assert_equal(svi, X[ROWS], (partial(model, plate=by_rows), theirs), 1)


@pytest.mark.parametrize("validation", [True, False])
def test_draws_without_a_gradient_are_refused(validation):
    def model(x):
        with pyro.plate("data", len(x)):
            switch = pyro.sample("switch", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(switch, 1.0), obs=x)

    def guide(x):
        logit = pyro.param("logit", torch.tensor(0.4))
        with pyro.plate("data", len(x)):
            pyro.sample("switch", dist.Bernoulli(logits=logit.expand(len(x))))

    svi = PyroSVIModule(model, guide, TraceMeanField_ELBO(), dataset_size=N)
    with pyro.validation_enabled(validation):
        with pytest.raises(ValueError, match=r"'switch', since a Bernoulli.* Use Trace_ELBO"):
            svi.loss(X[ROWS])
