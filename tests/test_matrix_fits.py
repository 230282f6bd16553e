"""Fits under a Trainer of a diagonal of the matrix end at the closed form of ``matrix_models``."""

import pyro
import pytest
import torch
from matrix_cells import ELBOS, drawn_by_hand, make
from matrix_models import B, Quadratic, matrix_rows
from support import quiet_trainer
from test_posterior import decaying

from pyro_lightning import ArrayDataModule


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def draws_of(svi, latents, guide):
    if guide in ("function", "nn.Module"):
        return drawn_by_hand(svi)[
            0
        ].detach()  # of exact moments, the latents of all rows among them
    if guide == "AutoLaplace":
        with pyro.settings.context(module_local_params=True):
            normal = svi.guide.laplace_approximation(*matrix_rows())
        return normal.get_posterior().sample((10_000,))
    rows = None if latents == "global" else torch.arange(len(matrix_rows()[0]))
    draws = svi.posterior_samples(10_000, rows=rows).values()
    return torch.cat([draw.reshape(10_000, -1) for draw in draws], -1)


# Tolerances: twice what was met over three seeds. The worst are rows by Renyi's bound, where a row
# has one step an epoch: one of 62 means off by 0.14 sds, all by 0.04 in the mean square, and one sd
# by 6%. Without N/B mu and slope are off by 0.8 to 1.2 sds.
@pytest.mark.parametrize(
    ("latents", "guide", "elbo", "family"),
    [
        ("global", "AutoMultivariateNormal", "Trace", "exact"),
        ("global", "AutoGaussian", "MeanField", "exact"),
        ("global", "AutoIAFNormal", "Enum", "exact"),
        ("global", "AutoStructured", "Graph", "exact"),
        ("global", "AutoLaplace", "TMC", "exact"),
        ("local", "AutoNormal", "Renyi", "exact"),
        ("local", "nn.Module", "WakeSleep", "exact"),
        ("mixed", "AutoNormal", "MeanField", "each"),
        ("mixed", "AutoGuideList", "Enum", "parts"),
        ("mixed", "function", "TMC", "each"),
    ],
)
def test_fit(latents, guide, elbo, family):
    epochs = 160
    (each,) = ELBOS[elbo]
    svi = make(latents, guide, each, **decaying(4 * epochs, first=0.2, last=1e-3))
    quiet_trainer(max_epochs=epochs).fit(svi, datamodule=ArrayDataModule(matrix_rows(), B))
    draws = draws_of(svi, latents, guide)
    mean, covariance = Quadratic(latents, *matrix_rows()).optimum(family)
    sd = covariance.diagonal().sqrt()
    errors = (draws.mean(0) - mean) / sd
    ratios = draws.std(0, unbiased=False) / sd - 1
    assert errors.abs().max() < 0.25
    assert errors.square().mean().sqrt() < 0.1
    assert ratios.abs().max() < 0.12
