"""W4: random effects, a latent of each row with parameters of its own: mu -> z_i -> x_i."""

import numpy as np
import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule

from benchmarks.speed.workloads.base import Workload


def make(rows):
    rng = np.random.default_rng(4)
    effects = 1.5 + rng.standard_normal(rows, np.float32)
    x = effects + 0.5 * rng.standard_normal(rows, np.float32)
    return (x.astype(np.float32),), {}


class Effects(PyroModule):
    def __init__(self, constants):
        super().__init__()

    def prior(self):
        return pyro.sample("mu", dist.Normal(0.0, 10.0))

    def likelihood(self, mu, x):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def in_numpyro(constants):
    import numpyro
    import numpyro.distributions as dist

    class Parts:
        def prior(self):
            return numpyro.sample("mu", dist.Normal(0.0, 10.0))

        def likelihood(self, mu, x):
            z = numpyro.sample("z", dist.Normal(mu, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    return Parts()


WORKLOAD = Workload(
    "W4",
    "random effects, a latent of each row",
    rows=200_000,
    batch_size=256,
    make=make,
    pyro=Effects,
    numpyro=in_numpyro,
    local=True,
)
