"""A loss that is not finite is an error that names sites and rows, validation on or off."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from support import no_validation, normal_mean, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader

from pyro_lightning import PyroSVIModule

# Pyro warns of a NaN as well, before the loss is in our hands.
pytestmark = pytest.mark.filterwarnings("ignore:Encountered NaN")

N, B = 20, 6
CLEAN = torch.linspace(0.5, 2.0, B)


@pytest.fixture(params=[True, False], ids=["validation", "no validation"], autouse=True)
def validation(request):
    with pyro.validation_enabled(request.param):
        yield request.param


def with_rows(value, *rows):
    x = CLEAN.clone()
    x[list(rows)] = value
    return x


def warmed(model, guide=AutoNormal, **options):
    svi = PyroSVIModule(model, guide, dataset_size=N, **options)
    svi.loss(CLEAN)
    return svi


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_of_the_data(value, elbo):
    svi = warmed(normal_mean, elbo=elbo())
    with pytest.raises(ValueError, match="argument 0 holds .* not finite in rows 2, 4 of") as error:
        svi.loss(with_rows(value, 2, 4))
    assert "site 'x' is not finite in rows 2, 4 of the batch" in str(error.value)
    assert "poutine.trace" in str(error.value)


def test_rows_of_the_data_under_enumeration():
    def model(x):
        with pyro.plate("data", len(x)):
            label = pyro.sample("label", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.ones(())) * label, 1.0), obs=x)

    svi = warmed(model, lambda x: None, elbo=TraceEnum_ELBO(max_plate_nesting=1))
    with pytest.raises(ValueError, match="site 'x' is not finite in rows 3 of the batch"):
        svi.loss(with_rows(float("nan"), 3))


def test_rows_of_the_first_batch_of_all():
    svi = PyroSVIModule(normal_mean, dataset_size=N)
    with pytest.raises(ValueError, match="site 'x' is not finite in rows 0 of the batch"):
        svi.loss(with_rows(float("nan"), 0))


def test_rows_of_a_plate_that_is_not_rightmost():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-2), pyro.plate("columns", 3, dim=-1):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x[:, None].expand(-1, 3))

    with pytest.raises(ValueError, match="site 'x' is not finite in rows 5 of the batch"):
        warmed(model).loss(with_rows(float("nan"), 5))


def test_keyword_of_a_batch():
    def model(x, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mu * x, 1.0), obs=y)

    svi = PyroSVIModule(model, dataset_size=N)
    svi.loss({"x": CLEAN, "y": CLEAN})
    with pytest.raises(ValueError, match="y holds values that are not finite in rows 1 of"):
        svi.loss({"x": CLEAN, "y": with_rows(float("nan"), 1)})


def test_rows_outside_the_support(validation):
    def model(x):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Gamma(2.0, rate), obs=x)

    # The data are finite: the site alone tells the row. Gamma's density takes log(x).
    with pytest.raises(ValueError, match="site 'x' is not finite in rows 3 of the batch"):
        warmed(model).loss(with_rows(-1.0, 3))


def test_rows_of_a_factor():
    def model(x):
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.factor("penalty", torch.log(x))

    with pytest.raises(ValueError, match="site 'penalty' is not finite in rows 3 of the batch"):
        warmed(model).loss(with_rows(-1.0, 3))


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
def test_parameter_of_the_guide(guide):
    svi = warmed(normal_mean, guide)
    with torch.no_grad():
        next(svi.guide.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="site 'mu' is not finite"):
        svi.loss(CLEAN)


def test_parameter_of_the_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.ones(()))

        def forward(self, x):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mu + self.slope * x, 1.0), obs=x)

    svi = warmed(Model())
    with torch.no_grad():
        svi.model.slope.fill_(float("nan"))
    with pytest.raises(ValueError, match="site 'y' is not finite in rows 0, 1, 2, 3, 4, 5 of"):
        svi.loss(CLEAN)


def test_many_rows_are_counted_not_listed():
    x = torch.full((30,), float("nan"))
    with pytest.raises(ValueError, match="in rows 0, 1, .*, 9 and 20 more of the batch"):
        PyroSVIModule(normal_mean, dataset_size=30).loss(x)


def test_finite_terms_whose_scaled_sum_overflows():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1e-18), obs=x)

    svi = PyroSVIModule(model, dataset_size=10**6)
    with pytest.raises(ValueError, match="scaled sum that overflows"):
        svi.loss(CLEAN)


@no_validation
def test_training_stops_at_the_row():
    x = torch.zeros(N)
    x[13] = float("nan")  # row 5 of the second batch of 8
    svi = PyroSVIModule(normal_mean)
    with pytest.raises(ValueError, match="site 'x' is not finite in rows 5 of the batch"):
        quiet_trainer(max_epochs=1).fit(svi, DataLoader(x, batch_size=8))


def test_evaluation_without_gradients():
    svi = warmed(normal_mean)
    with torch.no_grad(), pytest.raises(ValueError, match="site 'x' is not finite in rows 2 of"):
        svi.loss(with_rows(float("nan"), 2))
