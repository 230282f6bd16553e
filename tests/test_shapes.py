"""Rows that are broadcast by accident are refused.

What is right by its shapes passes; its loss is compared with sums written out by hand.
"""

from functools import partial

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
    observe,
    refused,
    validation,  # noqa: F401
)
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO

# -- broadcast by accident -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loc", "data"),
    [((B, 1), (B,)), ((B,), (B, 1)), ((B, 1), (B, 1)), ((), (B, 1)), ((3, 1), (B,))],
    ids=str,
)
# A max_plate_nesting leaves the dimensions left of it unchecked, even by Pyro's validation.
@pytest.mark.parametrize("nesting", [1, float("inf")])
def test_data_and_parameters_of_other_shapes(loc, data, nesting):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(bias() + torch.zeros(loc), 1.0), obs=x.reshape(data))

    rows = loc[0] if 3 in loc else B
    match = [f"observed site 'x' (shape {data}, in plate 'data' of size 5)", f"({rows}, 5)"]
    match += [f"dimension -2 (size {rows})", ".squeeze(-1)"]
    refused(match, model, elbo=Trace_ELBO(max_plate_nesting=nesting))


@pytest.mark.parametrize("nesting", [1, float("inf")])
def test_as_many_columns_as_rows_beside_the_plate(nesting):
    # (B, B) data fit a plate at dimension -1, which then goes over the columns.
    def model(x):
        loc = bias()
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    match = [f"site 'x' (shape ({B}, {B})", f"holds {B} at two dimensions"]
    elbo = Trace_ELBO(max_plate_nesting=nesting)
    refused(match, model, batch=torch.arange(float(B * B)).reshape(B, B), elbo=elbo)


def test_as_many_replicates_as_rows_in_this_batch_pass():
    # Replicates stand left of the plate, and happen to be as many as the rows.
    def model(x):
        loc = bias()
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x.T)

    square = torch.arange(float(B * B)).reshape(B, B)
    elbo = Trace_ELBO(max_plate_nesting=1)
    assert loss_of(model, batch=square, elbo=elbo) == pytest.approx(-SCALE * log_standard(square))


def test_a_plate_of_another_size_than_what_stands_there():
    def model(x):
        loc = bias()
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0, validate_args=False), obs=x)

    with pyro.validation_enabled(False):
        refused(["plate 'data' of size 1 stands, holds 6"], model, batch=torch.zeros(1, 6))


def test_mask_of_another_shape():
    def model(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=(x > 0)[:, None]):
            observe(x)

    refused(["observed site 'x'", "(5, 5)", "mask"], model)


def test_factor_of_another_shape():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.factor("penalty", bias() - x[:, None] ** 2)

    refused(["observed site 'penalty'", "(5, 5)"], model)


def test_named_site_of_another_shape():
    def model(x):
        pyro.sample("x", dist.Normal(bias() + torch.zeros(B, 1), 1.0), obs=x)

    refused(["observed site 'x'", "(5, 5)"], model, data_plate=None, scale_sites=["x"])


def test_latent_of_another_shape_in_the_guide():
    # A network whose last dimension is kept: each row would get a latent for each row.
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(bias() + x[:, None], 1.0))

    refused(["'z'", "(5, 5)"], model, guide)


@pytest.mark.parametrize("named", [False, True])
def test_rows_in_an_event_dimension(named):
    # The shape of the log-probability is right, so that Pyro's validation passes it as well.
    def model(x):
        rows = dist.Normal(bias() + torch.zeros(B, 1), 1.0)
        if named:
            pyro.sample("x", rows.to_event(2), obs=x)
        else:
            with pyro.plate("data", len(x)):
                pyro.sample("x", rows.to_event(1), obs=x)

    options = {"data_plate": None, "scale_sites": ["x"]} if named else {}
    match = ["observed site 'x' (shape (5,)", "shape (5, 1)", "every row with all"]
    refused(match, model, **options)


# -- what is right, though it is broadcast ---------------------------------------------------------


def columns(x, event):
    """Two observations a row, whose parameters have neither rows nor columns of their own."""
    data = torch.stack([x, 2 * x], -1)
    with pyro.plate("data", len(x), dim=-1 if event else -2):
        if event:
            pyro.sample("x", dist.Normal(bias() + torch.zeros(1), 1.0).to_event(1), obs=data)
        else:
            with pyro.plate("columns", 2, dim=-1):
                pyro.sample("x", dist.Normal(bias(), 1.0), obs=data)


@pytest.mark.parametrize("event", [True, False])
def test_two_observations_a_row(event):
    loss = loss_of(partial(columns, event=event))
    assert loss == pytest.approx(-SCALE * (log_standard(X) + log_standard(2 * X)), rel=1e-6)


def test_constant_of_each_row():
    # The trick of ones: 1 is observed in each row, with a probability of the row's own.
    def model(x):
        with pyro.plate("data", len(x)):
            probs = (bias() + x).sigmoid()
            pyro.sample("one", dist.Bernoulli(probs), obs=torch.tensor(1.0))

    expected = SCALE * torch.log(1 / (1 + torch.exp(-X))).sum().item()
    assert loss_of(model) == pytest.approx(-expected, rel=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (B,)])
def test_factor_in_the_data_plate(shape):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.factor("penalty", bias() - torch.full(shape, 0.5))

    assert loss_of(model) == pytest.approx(0.5 * N, rel=1e-6)


def test_mask_and_weights_of_each_row():
    weights = torch.arange(1.0, B + 1)

    def model(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=x > 0), poutine.scale(scale=weights):
            observe(x)

    each = torch.stack([w * log_standard(x) * (x > 0) for w, x in zip(weights, X, strict=True)])
    assert loss_of(model) == pytest.approx(-SCALE * each.sum().item(), rel=1e-6)


def test_particles_at_once_and_enumeration_pass():
    def model(x):
        with pyro.plate("data", len(x)):
            label = pyro.sample("label", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(bias() + 0.0 * label, 1.0), obs=x)

    elbo = TraceEnum_ELBO(max_plate_nesting=1, num_particles=3, vectorize_particles=True)
    assert loss_of(model, elbo=elbo) == pytest.approx(-SCALE * log_standard(X), rel=1e-6)


def test_observations_of_no_plate_count_once_each():
    # Pyro's validation wants a plate; without it the sum is right.
    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("x", dist.Normal(bias(), 1.0), obs=torch.stack([x, 2 * x], -1))

    with pyro.validation_enabled(False):
        loss = loss_of(model)
    assert loss == pytest.approx(-SCALE * (log_standard(X) + log_standard(2 * X)), rel=1e-6)
