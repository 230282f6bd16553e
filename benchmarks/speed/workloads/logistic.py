"""W2: logistic regression of 50 features under a horseshoe prior, of which five matter."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule

from benchmarks.speed.workloads.base import Workload

FEATURES = 50


def make(rows):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((rows, FEATURES), np.float32)
    weights = np.zeros(FEATURES)
    weights[:5] = (2.0, -1.5, 1.0, -0.5, 0.25)
    y = rng.random(rows) < 1 / (1 + np.exp(-(x @ weights)))
    return (x, y.astype(np.float32)), {}


class Logistic(PyroModule):
    def __init__(self, constants):
        super().__init__()
        self.register_buffer("zeros", torch.zeros(FEATURES))
        self.register_buffer("ones", torch.ones(FEATURES))

    def prior(self):
        tau = pyro.sample("tau", dist.HalfCauchy(self.ones[0]))
        local = pyro.sample("local", dist.HalfCauchy(self.ones).to_event(1))
        # Not centred: a mean-field guide cannot follow the funnel of scales and weights.
        return tau * local * pyro.sample("z", dist.Normal(self.zeros, 1.0).to_event(1))

    def likelihood(self, weights, x, y):
        pyro.sample("y", dist.Bernoulli(logits=x @ weights), obs=y)


def in_numpyro(constants):
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    class Parts:
        def prior(self):
            tau = numpyro.sample("tau", dist.HalfCauchy(1.0))
            local = numpyro.sample("local", dist.HalfCauchy(jnp.ones(FEATURES)).to_event(1))
            z = numpyro.sample("z", dist.Normal(jnp.zeros(FEATURES), 1.0).to_event(1))
            return tau * local * z

        def likelihood(self, weights, x, y):
            numpyro.sample("y", dist.Bernoulli(logits=x @ weights), obs=y)

    return Parts()


WORKLOAD = Workload(
    "W2",
    "logistic regression, 50 features, horseshoe prior",
    rows=200_000,
    batch_size=256,
    make=make,
    pyro=Logistic,
    numpyro=in_numpyro,
)
