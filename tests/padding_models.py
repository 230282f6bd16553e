"""Models whose losses have no noise but that of their rows, their full-data values in closed form.

A batch is (x, noise): the guide's draws are functions of these, so that a loss is a number of its
rows alone, on any number of processes.
"""

import math

import pyro
import pyro.distributions as dist
import torch
from support import RowNormal
from torch import nn

N = 1001
DTYPE = torch.float64
LOC, LOG_SCALE, SLOPE, MU_NOISE = 0.3, -1.0, 0.5, 0.4


def rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, count, generator=generator, dtype=DTYPE))


TRAIN, VAL, OTHER, TEST = rows(N, 1), rows(101, 2), rows(7, 3), rows(64, 4)
FEW = rows(2, 5)
ROW_LOCS = torch.linspace(-1, 1, N, dtype=DTYPE)


class Model(nn.Module):
    """A mean, a latent of each row, and its observation."""

    def forward(self, x, noise):
        mu = pyro.sample("mu", dist.Normal(0.2, 0.8))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 0.9))
            pyro.sample("x", dist.Normal(z, 0.6), obs=x)


class Guide(nn.Module):
    """A guide that computes a row's latent from its data, or keeps a parameter of it."""

    def __init__(self, of_rows=False):
        super().__init__()
        self.of_rows = of_rows
        self.loc = nn.Parameter(torch.tensor(LOC, dtype=DTYPE))
        self.log_scale = nn.Parameter(torch.tensor(LOG_SCALE, dtype=DTYPE))
        self.slope = nn.Parameter(torch.tensor(SLOPE, dtype=DTYPE))

    def forward(self, x, noise):
        pyro.sample("mu", RowNormal(self.loc, self.log_scale.exp(), MU_NOISE))
        with pyro.plate("data", len(x)):
            shift = pyro.param("row_locs", ROW_LOCS, event_dim=0) if self.of_rows else 0.0
            pyro.sample(
                "z", RowNormal(self.slope * x + shift, torch.tensor(0.7, dtype=DTYPE), noise)
            )


def full_loss(data, size, loc, log_scale, slope, row_locs=0.0):
    """The negative ELBO of as many rows as ``size`` says, estimated from all of ``data``."""
    x, noise = data
    mu = loc + log_scale.exp() * MU_NOISE
    centres = slope * x + row_locs
    z = centres + 0.7 * noise
    outside = log_normal(mu, 0.2, 0.8) - log_normal(mu, loc, log_scale.exp())
    inside = log_normal(z, mu, 0.9) + log_normal(x, z, 0.6) - log_normal(z, centres, 0.7)
    return -outside - size / len(x) * inside.sum()


def log_normal(value, loc, scale):
    scale = torch.as_tensor(scale, dtype=DTYPE)
    return -((value - loc) ** 2) / (2 * scale**2) - scale.log() - 0.5 * math.log(2 * math.pi)


def exact(data, of_rows=False, size=N):
    """Value, and gradient by the parameter's name, at the parameters of a new guide."""
    start = {"loc": LOC, "log_scale": LOG_SCALE, "slope": SLOPE}
    if of_rows:
        start["row_locs"] = ROW_LOCS
    start = {
        name: torch.as_tensor(value, dtype=DTYPE).clone().requires_grad_()
        for name, value in start.items()
    }
    loss = full_loss(data, size, **start)
    gradient = torch.autograd.grad(loss, list(start.values()))
    return loss.item(), dict(zip(start, gradient, strict=True))


def alone(x, noise):
    """A model of one row by itself, scaled by nothing: its loss is a batch's alone."""
    loc = pyro.param("loc", torch.tensor(LOC, dtype=DTYPE))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc, 0.6), obs=x)


def no_guide(x, noise):
    """For a model without latents."""
