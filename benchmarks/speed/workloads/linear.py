"""W1: the linear regression of Pyro's Lightning example, its sizes and learning rate."""

import numpy as np
import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule

from benchmarks.speed.workloads.base import Workload


def make(rows):
    rng = np.random.default_rng(1)
    covariates = rng.standard_normal(rows, np.float32)
    data = 0.7 * covariates - 0.4 + 0.5 * rng.standard_normal(rows, np.float32)
    return (covariates, data.astype(np.float32)), {}


class Linear(PyroModule):
    def __init__(self, constants):
        super().__init__()

    def prior(self):
        coeff = pyro.sample("coeff", dist.Normal(0, 1))
        bias = pyro.sample("bias", dist.Normal(0, 1))
        return coeff, bias, pyro.sample("scale", dist.LogNormal(0, 1))

    def likelihood(self, latents, covariates, data):
        coeff, bias, scale = latents
        pyro.sample("obs", dist.Normal(bias + coeff * covariates, scale), obs=data)


def in_numpyro(constants):
    import numpyro
    import numpyro.distributions as dist

    class Parts:
        def prior(self):
            coeff = numpyro.sample("coeff", dist.Normal(0, 1))
            bias = numpyro.sample("bias", dist.Normal(0, 1))
            return coeff, bias, numpyro.sample("scale", dist.LogNormal(0, 1))

        def likelihood(self, latents, covariates, data):
            coeff, bias, scale = latents
            numpyro.sample("obs", dist.Normal(bias + coeff * covariates, scale), obs=data)

    return Parts()


WORKLOAD = Workload(
    "W1",
    "linear regression of Pyro's Lightning example",
    rows=1_000_000,
    batch_size=100,
    make=make,
    pyro=Linear,
    numpyro=in_numpyro,
)
