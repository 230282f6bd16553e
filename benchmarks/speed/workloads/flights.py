"""W5: the hierarchical regression of ``examples/flights.py``, its data, guide and rates."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule

from benchmarks.speed.workloads.base import Workload

GROUPS = ("carrier", "dest", "month")
EXAMPLE = Path(__file__).parents[3] / "examples" / "flights.py"


def make(rows):
    """x (N, 3) standardised, y (N,), the level of each flight in each group (N,) each."""
    spec = importlib.util.spec_from_file_location("flights_example", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    x, sd, codes, _, y = example.load(rows, 0)
    constants = {group: np.bincount(codes[group]) / len(y) for group in GROUPS}
    # Before any data a minute lost, on the ground or in the air, is a minute lost on arrival.
    constants["slopes"] = np.array([sd[0], sd[1], 0.0])
    arrays = (x.astype(np.float32), y.astype(np.float32), *(codes[group] for group in GROUPS))
    return arrays, constants


class Flights(PyroModule):
    def __init__(self, constants):
        super().__init__()
        for name, values in constants.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32))

    def effect(self, group):
        share = getattr(self, group)
        tau = pyro.sample(f"{group}_tau", dist.HalfNormal(10.0))
        with pyro.plate(group, len(share)):
            effect = pyro.sample(f"{group}_effect", dist.Normal(0.0, tau))
        return effect - share @ effect

    def prior(self):
        intercept = pyro.sample("intercept", dist.Normal(0.0, 20.0))
        slope = pyro.sample("slope", dist.Normal(self.slopes, 10.0).to_event(1))
        effects = [self.effect(group) for group in GROUPS]
        sigma = pyro.sample("sigma", dist.LogNormal(math.log(20.0), 1.0))
        return intercept, slope, effects, sigma

    def likelihood(self, latents, x, y, *levels):
        intercept, slope, effects, sigma = latents
        mean = intercept + x @ slope
        mean = mean + sum(e[level] for e, level in zip(effects, levels, strict=True))
        pyro.sample("y", dist.Normal(mean, sigma), obs=y)


def in_numpyro(constants):
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    constants = {name: jnp.asarray(values, jnp.float32) for name, values in constants.items()}

    def effect(group):
        share = constants[group]
        tau = numpyro.sample(f"{group}_tau", dist.HalfNormal(10.0))
        with numpyro.plate(group, len(share)):
            effect = numpyro.sample(f"{group}_effect", dist.Normal(0.0, tau))
        return effect - share @ effect

    class Parts:
        def prior(self):
            intercept = numpyro.sample("intercept", dist.Normal(0.0, 20.0))
            slope = numpyro.sample("slope", dist.Normal(constants["slopes"], 10.0).to_event(1))
            effects = [effect(group) for group in GROUPS]
            sigma = numpyro.sample("sigma", dist.LogNormal(math.log(20.0), 1.0))
            return intercept, slope, effects, sigma

        def likelihood(self, latents, x, y, *levels):
            intercept, slope, effects, sigma = latents
            mean = intercept + x @ slope
            mean = mean + sum(e[level] for e, level in zip(effects, levels, strict=True))
            numpyro.sample("y", dist.Normal(mean, sigma), obs=y)

    return Parts()


WORKLOAD = Workload(
    "W5",
    "flights: hierarchical regression, full covariance",
    rows=327_346,
    batch_size=16_384,
    make=make,
    pyro=Flights,
    numpyro=in_numpyro,
    lr=0.02,
    betas=(0.9, 0.99),
    guide="AutoMultivariateNormal",
    init_to_mean=True,
)
