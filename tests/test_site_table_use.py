"""The table of sites where it is needed: of models that are refused, and around a fit.

Nothing is changed by a look at it.
"""

import math
from copy import deepcopy

import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning.pytorch import Trainer
from pyro.infer.autoguide import AutoNormal
from support import normal_mean, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader

from pyro_lightning import ArrayDataModule, PyroSVIModule

N, B = 20, 4
HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)


# -- where the checks refuse the model -------------------------------------------------------------


def refused_and_listed(model, guide, batch, **options):
    svi = PyroSVIModule(model, guide, dataset_size=N, **options)
    with pytest.raises(ValueError, match=r"svi\.site_table\(batch\)"):
        svi.loss(batch)
    return svi.site_table(batch)


def test_sites_that_do_not_match():
    def guide(x):
        pyro.sample("mean", dist.Delta(torch.tensor(0.0)))

    rows = refused_and_listed(normal_mean, guide, torch.zeros(B))
    assert (rows["mu"].kind, rows["mu"].guide) == ("global latent", "-")
    assert (rows["mean"].kind, rows["mean"].guide) == ("only in guide", "guide function")


def test_rows_that_are_broadcast():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0 * mu + x[:, None], 1.0), obs=x)

    row = refused_and_listed(model, AutoNormal, torch.zeros(B))["x"]
    # B times the rows that there are.
    assert row.log_prob == pytest.approx(-N * B * HALF_LOG_2_PI, rel=1e-6)


def test_table_without_any_data_plate():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(mu, 1.0).expand([len(x)]).to_event(1), obs=x)

    rows = PyroSVIModule(model, AutoNormal, dataset_size=N).site_table(torch.zeros(B))
    assert (rows["x"].scale, rows["x"].plates) == (1, ())


def test_log_probability_that_cannot_be_taken():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(B), 1.0), obs=torch.zeros(3))

    rows = PyroSVIModule(model, lambda x: None, dataset_size=N).site_table(torch.zeros(B))
    assert rows["x"].log_prob is None
    assert "cannot be taken" in rows["x"].problem
    assert f"x: {rows['x'].problem}" in str(rows)


def test_value_outside_its_support():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.HalfNormal(1.0), obs=x)

    rows = PyroSVIModule(model, lambda x: None, dataset_size=N).site_table(-torch.ones(B))
    assert rows["x"].log_prob == -math.inf


# -- state -----------------------------------------------------------------------------------------


def test_number_of_observations_must_be_known():
    with pytest.raises(RuntimeError, match="dataset_size=N"):
        PyroSVIModule(normal_mean).site_table(torch.zeros(B))


class Counting(nn.Module):
    """A model with a buffer that moves, and noise of its own."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu + self.norm(x[:, None]).squeeze(-1), 1.0), obs=x)


@pytest.mark.parametrize("warm", [True, False], ids=["after a loss", "at first"])
def test_nothing_is_changed(warm):
    svi = PyroSVIModule(Counting(), AutoNormal, dataset_size=N)
    if warm:
        svi.loss(torch.randn(B))
    store = set(pyro.get_param_store().keys())
    before, random = deepcopy(svi.state_dict()), torch.get_rng_state()
    svi.site_table(torch.randn(B, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), random)
    after = svi.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert set(pyro.get_param_store().keys()) == store
    assert all(parameter.grad is None for parameter in svi.parameters())


def test_table_before_a_fit_leaves_the_fit_as_it_is():
    def fitted(look):
        torch.manual_seed(5)
        svi = PyroSVIModule(normal_mean, AutoNormal, dataset_size=N)
        if look:
            svi.site_table(torch.zeros(2))
        data = ArrayDataModule((torch.linspace(0, 1, N),), batch_size=B)
        quiet_trainer(max_epochs=2, num_sanity_val_steps=0).fit(svi, datamodule=data)
        return svi.state_dict()

    with_table, without = fitted(True), fitted(False)
    assert list(with_table) == list(without)
    for name, value in without.items():
        torch.testing.assert_close(with_table[name], value, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_table_within_a_fit_and_after_one_that_was_refused():
    svi = PyroSVIModule(normal_mean, lambda x: None)
    loader = DataLoader(torch.zeros(N), batch_size=B)
    with pytest.raises(ValueError, match="latent site 'mu'"):
        quiet_trainer(max_epochs=1).fit(svi, loader)
    assert isinstance(svi.trainer, Trainer)
    assert svi.site_table(torch.zeros(B))["x"].scale == N / B


def test_table_in_inference_mode():
    svi = PyroSVIModule(normal_mean, AutoNormal, dataset_size=N)
    with torch.inference_mode():
        assert svi.site_table(torch.zeros(B))["x"].shape == (B,)


X = torch.linspace(-1, 2, B)


def no_guide(x):
    """For a model without latents."""


def test_plate_of_a_wrong_size_is_shown():
    def model(x):
        with pyro.plate("data", 7):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(7))

    with pytest.raises(ValueError, match=r"plate 'data' has size 7.*site_table\(batch\)"):
        PyroSVIModule(model, no_guide, dataset_size=N).loss(X)
    table = PyroSVIModule(model, no_guide, dataset_size=N).site_table(X)
    assert table["x"].plates == (("data", 7),)
    assert table["x"].shape == (7,)
    assert f"plate 'data' has size 7 and holds 7 rows, but the data set has N = {N}" in str(table)


def test_plates_over_rows_that_cross_are_shown():
    def model(x):
        with pyro.plate("one", len(x), dim=-1), pyro.plate("other", len(x), dim=-2):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(len(x), len(x)))

    svi = PyroSVIModule(model, no_guide, dataset_size=N, data_plate=("one", "other"))
    table = svi.site_table(X)
    assert dict(table["x"].plates) == {"one": len(X), "other": len(X)}
    assert "stands in the data plates" in str(table) and "scaled by N/B twice" in str(table)


def test_a_model_that_stops_is_shown_up_to_there():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 7):
            pyro.sample("x", dist.Normal(mu * x, 1.0), obs=x)

    svi = PyroSVIModule(model, lambda x: pyro.sample("mu", dist.Normal(0.0, 1.0)), dataset_size=N)
    table = svi.site_table(X)
    assert [row.name for row in table] == ["mu"]
    assert "what comes next does not run: " in str(table) and "site x dim -1" in str(table)
    # The module itself refuses as before.
    with pytest.raises(ValueError, match="plate 'data' has size 7"):
        svi.loss(X)
