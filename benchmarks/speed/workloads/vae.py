"""W3: a variational autoencoder of 64 binary pixels, 200 hidden units and 20 latents."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import nn
from torch.nn.functional import softplus

from benchmarks.speed.workloads.base import Workload

PIXELS, HIDDEN, LATENT = 64, 200, 20


def make(rows):
    rng = np.random.default_rng(3)
    codes = rng.standard_normal((rows, 5)) @ rng.standard_normal((5, PIXELS))
    x = rng.random((rows, PIXELS)) < 1 / (1 + np.exp(-codes))
    return (x.astype(np.float32),), {}


def mlp(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, outputs))


class VAE(PyroModule):
    def __init__(self, constants):
        super().__init__()
        self.encoder, self.decoder = mlp(PIXELS, 2 * LATENT), mlp(LATENT, PIXELS)

    def prior(self):
        return None

    def likelihood(self, latents, x):
        origin = torch.zeros(LATENT, device=x.device)
        z = pyro.sample("z", dist.Normal(origin, 1.0).expand([len(x), LATENT]).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def variational(self, x):
        loc, scale = self.encoder(x).split(LATENT, -1)
        pyro.sample("z", dist.Normal(loc, softplus(scale)).to_event(1))


def in_numpyro(constants):
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def dense(name, inputs, outputs, x):
        # What torch's Linear begins with.
        def uniform(shape):
            bound = inputs**-0.5
            return lambda key: jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        weight = numpyro.param(f"{name}_weight", uniform((inputs, outputs)))
        return x @ weight + numpyro.param(f"{name}_bias", uniform((outputs,)))

    def mlp(name, inputs, outputs, x):
        hidden = jax.nn.softplus(dense(f"{name}_1", inputs, HIDDEN, x))
        return dense(f"{name}_2", HIDDEN, outputs, hidden)

    class Parts:
        def prior(self):
            return None

        def likelihood(self, latents, x):
            z = numpyro.sample("z", dist.Normal(jnp.zeros((len(x), LATENT)), 1.0).to_event(1))
            logits = mlp("decoder", LATENT, PIXELS, z)
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

        def variational(self, x):
            loc, scale = jnp.split(mlp("encoder", PIXELS, 2 * LATENT, x), 2, -1)
            numpyro.sample("z", dist.Normal(loc, jax.nn.softplus(scale)).to_event(1))

    return Parts()


WORKLOAD = Workload(
    "W3",
    "variational autoencoder 64-200-20",
    rows=50_000,
    batch_size=256,
    make=make,
    pyro=VAE,
    numpyro=in_numpyro,
    lr=1e-3,
    guide=None,
)
