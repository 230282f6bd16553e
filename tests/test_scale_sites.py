"""How a user says what is scaled: names of plates, names of sites, by hand, or nothing.

Every model here has the same observations; its loss is checked against a sum written out.
"""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from support import no_validation, quiet_trainer
from torch.utils.data import DataLoader

from pyro_lightning import PyroSVIModule

pytestmark = no_validation

N = 50
N_TRAIN = 21  # of the fits
X = torch.linspace(-1, 2, 4, dtype=torch.float64)
SCALE = N / len(X)
REGULARISER = 3.0


def log_likelihood(x):
    return float((-0.5 * x**2 - 0.5 * math.log(2 * math.pi)).sum())


def no_latents(*batch):
    """The guide of a model without latents."""


def observe(x, name="x"):
    pyro.sample(name, dist.Normal(0.0, 1.0), obs=x)


def loss_of(model, **options):
    svi = PyroSVIModule(model, no_latents, dataset_size=N, **options)
    return float(svi.loss(X))


def expected(scale=SCALE):
    return REGULARISER - scale * log_likelihood(X)


def regularise():
    pyro.factor("regulariser", torch.tensor(-REGULARISER, dtype=torch.float64))


def in_plate(x):
    regularise()
    with pyro.plate("data", len(x)):
        observe(x)


def in_event(x):
    """The rows are one event: no plate tells them apart."""
    regularise()
    pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0).to_event(1), obs=x)


def test_a_plate_is_scaled_by_its_default_name():
    assert loss_of(in_plate) == pytest.approx(expected(), rel=1e-12)


def test_data_plate_none_scales_nothing():
    assert loss_of(in_plate, data_plate=None) == pytest.approx(expected(scale=1.0), rel=1e-12)


def test_data_plate_of_another_name():
    def model(x):
        regularise()
        with pyro.plate("rows", len(x)):
            observe(x)

    assert loss_of(model, data_plate="rows") == pytest.approx(expected(), rel=1e-12)


def test_a_plate_that_is_not_over_the_rows_is_not_scaled():
    # It is as large as the batch by chance.
    def model(x):
        in_plate(x)
        with pyro.plate("other", len(X)):
            observe(X, "y")

    assert loss_of(model) == pytest.approx(expected() - log_likelihood(X), rel=1e-12)


def test_several_data_plates_side_by_side():
    # One likelihood a plate, each over the same rows.
    def model(x):
        in_plate(x)
        with pyro.plate("again", len(x)):
            observe(x, "y")

    loss = loss_of(model, data_plate=("data", "again"))
    assert loss == pytest.approx(expected() - SCALE * log_likelihood(X), rel=1e-12)


def test_a_named_site_outside_every_plate_is_scaled():
    loss = loss_of(in_event, data_plate=None, scale_sites=["x"])
    assert loss == pytest.approx(expected(), rel=1e-12)


def test_a_named_site_beside_a_data_plate():
    def model(x):
        in_plate(x)
        pyro.sample("y", dist.Normal(torch.zeros_like(x), 1.0).to_event(1), obs=x)

    loss = loss_of(model, scale_sites=["y"])
    assert loss == pytest.approx(expected() - SCALE * log_likelihood(X), rel=1e-12)


def test_a_named_factor_is_scaled():
    # The user's likelihood may be a factor.
    def model(x):
        regularise()
        pyro.factor("likelihood", -0.5 * (x**2 + math.log(2 * math.pi)).sum())

    loss = loss_of(model, scale_sites=["likelihood"], data_plate=None)
    assert loss == pytest.approx(expected(), rel=1e-12)


def test_a_named_site_in_the_data_plate_is_scaled_once():
    assert loss_of(in_plate, scale_sites=["x"]) == pytest.approx(expected(), rel=1e-12)


def test_a_named_site_in_a_plate_that_pyro_scales_is_scaled_once():
    def model(x):
        regularise()
        with pyro.plate("data", N, subsample_size=len(x)):
            observe(x)

    assert loss_of(model, scale_sites=["x"]) == pytest.approx(expected(), rel=1e-12)


def test_hand_written_scale_equals_the_plate():
    def model(x):
        regularise()
        with poutine.scale(scale=svi.scale_factor(x)):
            pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0).to_event(1), obs=x)

    svi = PyroSVIModule(model, no_latents, data_plate=None, dataset_size=N)
    assert svi.scale_factor(X) == SCALE
    assert float(svi.loss(X)) == pytest.approx(loss_of(in_plate), rel=1e-12)


def test_hand_written_plate_of_size_n_equals_the_data_plate():
    def model(x):
        regularise()
        with pyro.plate("rows", N, subsample=torch.arange(len(x))):
            observe(x)

    assert loss_of(model, data_plate=None) == pytest.approx(expected(), rel=1e-12)


def scaled_by_hand(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with poutine.scale(scale=N_TRAIN / len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0).expand([len(x)]).to_event(1), obs=x)


def local_only(x):
    loc = pyro.param("loc", torch.tensor(0.5))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def test_logged_loss_of_a_hand_scaled_model_is_the_full_datas():
    # The trainer cannot tell from data_plate that the model's loss is the whole training set's.
    x = torch.linspace(-2, 3, N_TRAIN)
    svi = PyroSVIModule(
        scaled_by_hand,
        AutoDelta,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        data_plate=None,
    )
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(svi, DataLoader(x, batch_size=8))  # 8, 8 and 5
    mu = float(next(svi.parameters()).detach())

    def log_normal(values, loc):
        return float((-0.5 * (values - loc) ** 2 - 0.5 * math.log(2 * math.pi)).sum())

    whole = -log_normal(x, mu) - log_normal(torch.tensor(mu), 0.0)
    assert float(trainer.callback_metrics["train_loss"]) == pytest.approx(whole, rel=1e-5)


def test_logged_loss_without_any_scale_is_scaled_to_the_training_set():
    # A model of its batch alone: each step's loss is its batch's, the log still the data set's.
    x = torch.linspace(-2, 3, N_TRAIN)
    svi = PyroSVIModule(
        local_only,
        no_latents,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        data_plate=None,
    )
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(svi, DataLoader(x, batch_size=8))
    with pyro.get_param_store().scope():
        whole = Trace_ELBO().loss(local_only, no_latents, x)
    assert float(trainer.callback_metrics["train_loss"]) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("checks", [True, False])
def test_a_shared_latent_that_nothing_scales_is_warned_of(checks):
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(mu, 1.0).expand([len(x)]).to_event(1), obs=x)

    svi = PyroSVIModule(model, data_plate=None, dataset_size=4 * len(X), checks=checks)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        svi.loss(X)
        svi.loss(X)
    messages = [str(each.message) for each in caught]
    assert len(messages) == checks
    assert all("'mu'" in each and "N/B = 4" in each for each in messages)
    PyroSVIModule(model, data_plate=None, dataset_size=len(X)).loss(X)  # all rows: right


def test_a_shared_latent_beside_a_scale_by_hand_is_not_warned_of():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.poutine.scale(scale=svi.scale_factor(x)):
            pyro.sample("x", dist.Normal(mu, 1.0).expand([len(x)]).to_event(1), obs=x)

    svi = PyroSVIModule(model, data_plate=None, dataset_size=4 * len(X))
    assert svi.loss(X).isfinite()  # a warning would be an error here
