"""A model whose predictive draws follow from the global latents, and the metrics that see it."""

import pyro
import pyro.distributions as dist
import torch
from support import RowNormal
from torchmetrics.regression import MeanSquaredError

from pyro_lightning import (
    CRPS,
    IntervalCoverage,
    LogPredictiveDensity,
    NegativeELBO,
    PITHistogram,
)

ROWS = 31  # neither 2 nor 4 divides it


def data():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, ROWS, generator=generator, dtype=torch.float64))


def fixed_noise(y, noise):
    """A mean of rows whose noise is given with each row: draws differ by the mean alone."""
    loc = pyro.sample("loc", dist.Normal(y.new_zeros(()), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", RowNormal(loc, torch.ones_like(loc), noise), obs=y)


def all_metrics():
    return {
        "elpd": LogPredictiveDensity(),
        "intervals": IntervalCoverage((0.5, 0.9)),
        "pit": PITHistogram(bins=4),
        "nelbo": NegativeELBO(),
        "crps": CRPS(),
        "mse": MeanSquaredError(),
    }
