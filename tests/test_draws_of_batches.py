"""Draws of latents that a guide computes from the data of a batch.

The oracle is the distribution that the known parameters and the data say.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.poutine import block
from support import quiet_trainer

from pyro_lightning import ArrayDataModule, IndexedBatch, PyroSVIModule

N, DRAWS = 30, 1000
X = torch.linspace(-1, 2, N)
FIVE = 5 * DRAWS**-0.5
BATCH = X[[17, 3, 29]]


def model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def local(x, mu=0.0):
    slope = pyro.param("slope", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(mu + slope * x, 0.2))


def by_hand(x):
    loc = pyro.param("loc", torch.tensor(0.0))
    local(x, pyro.sample("mu", dist.Normal(loc, 0.3)))


def in_list():
    guide = AutoGuideList(model)
    guide.append(AutoNormal(block(model, expose=["mu"])))
    guide.append(local)
    return guide


def trained(guide, **values):
    """A module whose parameters are not those that a guide starts from."""
    svi = PyroSVIModule(model, guide, dataset_size=N)
    svi.loss(X[:4])
    for name, parameter in svi.named_parameters():
        parameter.data.fill_(values.get(name.rpartition(".")[2], 0.5))
    return svi


@pytest.mark.parametrize("guide", [by_hand, in_list], ids=["function", "list"])
def test_rows_are_drawn_from_their_data_by_the_parameters_that_trained(guide):
    svi = trained(guide if guide is by_hand else guide(), loc=3.0, slope=2.0)
    draws = svi.posterior_samples(DRAWS, batch=BATCH)
    about = draws["mu"] if guide is by_hand else torch.zeros(DRAWS)
    noise = (draws["z"] - about[:, None] - 2.0 * BATCH) / 0.2
    assert noise.shape == (DRAWS, 3)
    torch.testing.assert_close(noise.mean(0), torch.zeros(3), rtol=0, atol=FIVE)
    torch.testing.assert_close(noise.std(0), torch.ones(3), rtol=0, atol=FIVE)
    if guide is by_hand:
        assert float(draws["mu"].mean()) == pytest.approx(3.0, abs=FIVE * 0.3)
    assert len(pyro.get_param_store()) == 0


def test_a_global_latent_of_the_batch():
    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.0))
        local(x, pyro.sample("mu", dist.Normal(slope * x.mean(), 0.3)))

    svi = trained(guide, slope=2.0)
    with pytest.raises(ValueError, match=r"computes global latents \(mu\).*batch=batch"):
        svi.posterior_samples(2)
    mean = float(svi.posterior_samples(DRAWS, batch=BATCH)["mu"].mean())
    assert mean == pytest.approx(2.0 * float(BATCH.mean()), abs=FIVE * 0.3)


def test_rows_and_batch_are_one_too_many():
    with pytest.raises(ValueError, match="rows and batch"):
        trained(by_hand).posterior_samples(2, rows=[0], batch=BATCH)


def test_a_batch_of_rows_that_the_guide_keeps_parameters_of():
    svi = PyroSVIModule(model, AutoNormal)
    data = ArrayDataModule(X, batch_size=10)
    quiet_trainer(max_epochs=1, limit_train_batches=1).fit(svi, datamodule=data)
    numbers = svi._trained.nonzero().flatten()[:3]
    svi.guide.locs.z_unconstrained.data.copy_(100.0 * torch.arange(N))
    draws = svi.posterior_samples(50, batch=IndexedBatch(X[numbers], numbers))["z"]
    # The sds are near 0.1, as AutoNormal starts.
    torch.testing.assert_close(draws.mean(0), 100.0 * numbers, rtol=0, atol=1.0)
    missing = (~svi._trained).nonzero().flatten()[:3]
    with pytest.raises(ValueError, match="did not train"):
        svi.posterior_samples(2, batch=IndexedBatch(X[missing], missing))
    with pytest.raises(ValueError, match="IndexedBatch"):
        svi.posterior_samples(2, batch=X[numbers])
