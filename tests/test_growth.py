"""Sites outside the data plate that hold the rows of the batch are refused, and no others.

Losses of what passes are sums written out by hand.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from check_support import (
    SCALE,
    B,
    N,
    X,
    bias,
    log_standard,
    loss_of,
    no_guide,
    observe,
    refused,
    validation,  # noqa: F401
)
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import nn

from pyro_lightning import PyroSVIModule

# -- rows outside the data plate -------------------------------------------------------------------


def also(outside):
    """A model with one observation in the data plate, and another part."""

    def model(x):
        with pyro.plate("data", len(x)):
            observe(x)
        outside(x)

    return model


def in_event(x):
    pyro.sample("y", dist.Normal(bias(), 1.0).expand([len(x)]).to_event(1), obs=x)


def in_another_plate(x):
    with pyro.plate("other", len(x)):
        observe(x, "y")


def as_columns(x):
    pyro.sample("y", dist.Normal(torch.zeros(2, len(x)), 1.0).to_event(2), obs=x.expand(2, -1))


def as_factor(x):
    with pyro.plate("other", len(x)):
        pyro.factor("y", bias() + x)


@pytest.mark.parametrize("outside", [in_event, in_another_plate, as_columns, as_factor])
def test_observations_that_grow_with_the_batch(outside):
    match = ["observed site 'y'", "grows with the batch", "with 5 rows", "with 4", "scale_sites"]
    refused([*match, "pyro.plate('data', len(x))"], also(outside))


def one_by_one(x):
    for i in range(len(x)):
        pyro.sample(f"y{i}", dist.Normal(bias(), 1.0), obs=x[i])


def summed(x):
    pyro.factor("y", dist.Normal(bias(), 1.0).log_prob(x).sum())


def counted(x):
    pyro.sample("y", dist.Poisson(3.0), obs=torch.tensor(float(len(x))))


def twice_as_many(x):
    y = torch.cat([x, x])
    pyro.sample("y", dist.Normal(bias(), 1.0).expand([len(y)]).to_event(1), obs=y)


@pytest.mark.parametrize("outside", [one_by_one, summed, counted, twice_as_many])
def test_log_probabilities_that_grow_with_the_batch(outside):
    refused(["site 'y", "grows with the batch", "5 equal rows", "scale_sites"], also(outside))
    loss_of(also(outside), checks=False)


def averaged(x):
    pyro.factor("y", -(x**2).mean() + bias())


def scaled_by_hand(x):
    with pyro.poutine.scale(scale=N / len(x)):
        one_by_one(x)


def of_latents(x):
    pyro.factor("y", -(pyro.sample("z", dist.Normal(0.0, 1.0)) ** 2))


def with_noise(x):
    pyro.factor("y", -nn.functional.dropout(torch.ones(40)).sum())


@pytest.mark.parametrize("outside", [averaged, scaled_by_hand, of_latents, with_noise])
def test_log_probabilities_that_do_not_grow_with_the_batch_pass(outside):
    model = also(outside)
    PyroSVIModule(model, AutoNormal if outside is of_latents else no_guide, dataset_size=N).loss(X)


def test_latents_of_a_loop_over_the_batch():
    def model(x):
        for i in range(len(x)):
            z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])

    names = [f"x{i}" for i in range(B)]
    refused(["latent site 'z2'", "grows with the batch"], model, AutoNormal, scale_sites=names)


@pytest.mark.parametrize("width", [1, 2])
def test_latents_of_rows_in_no_plate_under_an_autoguide_with_nothing_scaled(width):
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([width * len(x)]).to_event(1))
        pyro.sample("x", dist.Normal(z[: len(x)], 1.0).to_event(1), obs=x)

    def guide(x):  # amortised
        pyro.sample("z", dist.Normal(x.repeat(width), bias().exp()).to_event(1))

    refused(["latent site 'z'", "autoguide", "amortised"], model, AutoNormal, data_plate=None)
    loss_of(model, guide, data_plate=None)


def test_observations_in_another_plate_can_be_named():
    refused(["data_plate=('data', 'other')"], also(in_another_plate))
    expected = pytest.approx(-2 * SCALE * log_standard(X), rel=1e-6)
    assert loss_of(also(in_another_plate), data_plate=("data", "other")) == expected
    assert loss_of(also(in_another_plate), scale_sites=["y"]) == expected
    assert loss_of(also(in_event), scale_sites=["y"]) == expected


def test_latent_that_grows_with_the_batch():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    match = ["latent site 'z'", "grows with the batch: shape (5,) with 5 rows, shape (4,) with 4"]
    refused(match, model, AutoDelta)


def test_observations_that_are_as_many_as_the_rows_by_chance():
    other = torch.arange(float(B))

    def model(x):
        with pyro.plate("data", len(x)):
            observe(x)
        pyro.sample("y", dist.Normal(bias(), 1.0).expand([B]).to_event(1), obs=other)

    assert loss_of(model) == pytest.approx(-SCALE * log_standard(X) - log_standard(other), rel=1e-6)


def test_latents_that_are_as_many_as_the_rows_by_chance():
    # The shorter batch runs with the values that are there: an improper prior cannot be drawn from.
    def model(x):
        support = dist.constraints.real_vector
        w = pyro.sample("w", dist.ImproperUniform(support, (), event_shape=(B,)))
        z = pyro.sample("z", dist.HalfNormal(torch.ones(B)).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal((w + z).sum(), 1.0), obs=x)

    guide = AutoNormal(model, init_loc_fn=lambda site: torch.ones(B))
    assert math.isfinite(loss_of(model, guide))


def test_model_that_does_not_run_on_fewer_rows():
    def model(x):
        in_event(x)
        with pyro.plate("data", len(x)):
            observe(x.reshape(B, 1).squeeze(-1))

    match = ["observed site 'y'", "does not run on 4 rows", "RuntimeError", "checks=False"]
    refused(match, model)
    expected = -(SCALE + 1) * log_standard(X)
    assert loss_of(model, checks=False) == pytest.approx(expected, rel=1e-6)


def test_model_without_such_a_site_need_not_run_on_fewer_rows():
    def model(x):
        with pyro.plate("data", len(x)):
            observe(x.reshape(B, 1).squeeze(-1))

    assert loss_of(model) == pytest.approx(-SCALE * log_standard(X), rel=1e-6)


def test_checks_that_need_fewer_rows_share_a_run():
    # B columns in the plate, and B entries outside of it: two checks look at fewer rows.
    lengths, other = [], torch.zeros(B)

    def model(x):
        lengths.append(len(x))
        with pyro.plate("data", len(x), dim=-2):
            observe(x)
        pyro.sample("y", dist.Normal(bias(), 1.0).expand([B]).to_event(1), obs=other)

    square = X.expand(B, B)
    expected = -SCALE * log_standard(square) - log_standard(other)
    assert loss_of(model, batch=square) == pytest.approx(expected, rel=1e-6)
    assert lengths.count(B - 1) == 1


def test_shorter_run_leaves_buffers_and_random_states():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                observe(self.norm(x[:, None]).squeeze(-1) + 0 * torch.rand(()))
            pyro.sample("y", dist.Normal(bias(), 1.0).expand([B]).to_event(1), obs=X)

    model = Model()
    svi = PyroSVIModule(model, no_guide, dataset_size=N)

    def drawn_after_a_loss():
        torch.manual_seed(3)
        svi.loss(X)
        return torch.rand(())

    first = drawn_after_a_loss()
    assert model.norm.num_batches_tracked == 1  # by the loss alone
    torch.testing.assert_close(drawn_after_a_loss(), first, rtol=0, atol=0)


def test_batches_whose_rows_are_counted_by_the_user_are_not_cut():
    class Pairs(PyroSVIModule):
        def num_rows(self, batch):
            return len(batch["first"])

    def model(first, rest):
        with pyro.plate("data", len(first)):
            observe(first)
        pyro.sample("y", dist.Normal(bias(), 1.0).expand([B]).to_event(1), obs=X)

    svi = Pairs(model, no_guide, dataset_size=N)
    loss = svi.loss({"first": X, "rest": torch.zeros(3)}).item()
    assert loss == pytest.approx(-(SCALE + 1) * log_standard(X), rel=1e-6)


def test_after_a_batch_of_one_row_the_next_one_is_checked():
    # One row is 1, the size of anything; without a Trainer nothing says so before more rows come.
    svi = PyroSVIModule(also(in_event), no_guide, dataset_size=N)
    svi.loss(X[:1])
    with pytest.raises(ValueError, match="'y'.*grows with the batch"):
        svi.loss(X)


def test_a_second_check_leaves_parameters_and_noise_as_they_are():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            observe(x - mu)

    svi = PyroSVIModule(model, dataset_size=N)
    svi.loss(X[:1])
    parameters = dict(svi.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    torch.manual_seed(1)
    first = svi.loss(X)
    torch.manual_seed(1)
    assert torch.equal(svi.loss(X), first)
    for name, parameter in svi.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, before[name])
