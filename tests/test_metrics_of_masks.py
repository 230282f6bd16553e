"""Log predictive densities of rows of which masks leave out a part, or all."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta
from scipy import stats
from support import quiet_trainer
from torch.utils.data import DataLoader, TensorDataset

from pyro_lightning import LogPredictiveDensity, PyroSVIModule

MU = 0.3


def two_sites(x, y, sees_x, sees_y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        with poutine.mask(mask=sees_x):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
        with poutine.mask(mask=sees_y):
            pyro.sample("y", dist.Normal(mu, 2.0), obs=y)


def data():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 20, generator=generator)
    rows = torch.arange(20)
    return x, y, rows % 2 == 0, rows % 3 == 0  # a third of the rows shows nothing


def validated(metrics):
    svi = PyroSVIModule(two_sites, AutoDelta, dataset_size=20, metrics=metrics)
    svi.loss(data())
    with torch.no_grad():
        svi.guide.mu.fill_(MU)
    loader = DataLoader(TensorDataset(*data()), batch_size=6)
    trainer = quiet_trainer()
    trainer.validate(svi, loader, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def densities():
    """Of each row by SciPy, at a point: sums over what is seen."""
    x, y, sees_x, sees_y = (each.double().numpy() for each in data())
    return stats.norm.logpdf(x, MU, 1) * sees_x, stats.norm.logpdf(y, MU, 2) * sees_y


def test_rows_that_masks_leave_out_do_not_count_in_the_elpd():
    of_x, of_y = densities()
    seen = (of_x + of_y)[of_x + of_y != 0]
    assert len(seen) == 13
    figures = validated([LogPredictiveDensity()])
    assert figures["val_elpd"] == pytest.approx(seen.mean(), rel=1e-5)
    error = seen.std(ddof=1) / len(seen) ** 0.5
    assert figures["val_elpd_se"] == pytest.approx(error, rel=1e-5)


def test_the_elpd_of_a_site_is_of_the_rows_that_show_it():
    of_y = densities()[1]
    figures = validated({"y": [LogPredictiveDensity()]})
    assert figures["val_y_elpd"] == pytest.approx(of_y[of_y != 0].mean(), rel=1e-5)


def test_a_site_whose_likelihood_is_not_apart_is_named():
    def mixture(x, y):
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(p), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)
            pyro.sample("y", dist.Normal(-k, 1.0), obs=y)

    guide = AutoDelta(poutine.block(mixture, hide=["k"]))
    metrics = {"y": [LogPredictiveDensity()]}
    svi = PyroSVIModule(mixture, guide, TraceEnum_ELBO(), dataset_size=20, metrics=metrics)
    svi.loss(data()[:2])
    loader = DataLoader(TensorDataset(*data()[:2]), batch_size=6)
    with pytest.raises(ValueError, match=r"'y' has no log-likelihood of its own.*'x\+y'"):
        quiet_trainer().validate(svi, loader, verbose=False)
