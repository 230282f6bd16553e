"""What tests of checks share: N, B and a batch, and the ways to be refused or served."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_lightning import PyroSVIModule

N, B = 20, 5
SCALE = N / B
X = torch.linspace(-1, 2, B)
POINTER = "svi.site_table(batch)"


@pytest.fixture(params=[True, False], ids=["validation", "no validation"], autouse=True)
def validation(request):
    """Every check holds whether Pyro's own validation is on or not."""
    with pyro.validation_enabled(request.param):
        yield


def no_guide(*batch, **named):
    """For a model without latents."""


def refused(match, model, guide=no_guide, batch=X, **options):
    """The loss is refused by a message in which every part of ``match`` occurs, and the table."""
    svi = PyroSVIModule(model, guide, **{"dataset_size": N, **options})
    with pytest.raises(ValueError) as caught:
        svi.loss(batch)
    for part in [*match, POINTER]:
        assert part in str(caught.value)


def loss_of(model, guide=no_guide, batch=X, **options):
    return PyroSVIModule(model, guide, **{"dataset_size": N, **options}).loss(batch).item()


def log_normal(x, loc=0.0, scale=1.0):
    """Log-density of a Normal, summed over its values, written out."""
    z = (x - loc) / scale
    return (-0.5 * z * z - math.log(scale) - 0.5 * math.log(2 * math.pi)).sum()


def log_standard(x):
    """Log-density of a standard Normal, summed over its values, as a number."""
    return log_normal(x).item()


def bias():
    """Something that trains, at 0."""
    return pyro.param("bias", torch.tensor(0.0))


def observe(x, name="x"):
    pyro.sample(name, dist.Normal(bias(), 1.0), obs=x)
