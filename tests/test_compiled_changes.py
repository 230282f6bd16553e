"""What changes between steps is honoured by compiled code; traces are counted and bounded."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_models import CASES, N, B, regression, regression_batch
from compiled_support import AS_TRACED, assert_equal_steps, is_compiled
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from support import no_validation, quiet_trainer
from torch import nn

from pyro_lightning import ArrayDataModule, PyroSVIModule
from pyro_lightning.compiled import _MOST, _MOST_KEPT, _PATIENCE

GLOBAL_WEIGHT = 1.0
SETTINGS = {"weight": 1.0}


def batches(first, count=3):
    return map(regression_batch, range(first, first + count))


def both_after(change, svi, eager, steps=_PATIENCE + 4):
    """Compare two compiled steps and then, when both have changed, many more."""
    assert_equal_steps(svi, eager, batches(0), 1e-6, 1e-5)
    assert is_compiled(svi)
    for module in (svi, eager):
        change(module)
    assert_equal_steps(svi, eager, batches(10, steps), 1e-6, 1e-5, first_seed=10)


class Weighted(PyroSVIModule):
    """Its KL is weighted by an attribute, a buffer and a tensor, a global, and a dict's entry."""

    def __init__(self, **options):
        super().__init__(dataset_size=N, **options)
        self.beta = 1.0
        self.register_buffer("buffer", torch.tensor(1.0))
        self.plain = torch.tensor(1.0)
        self.net = nn.Linear(3, 1)
        self.drop = nn.Dropout(0.5)

    def model(self, x, y):
        weight = self.beta * GLOBAL_WEIGHT * SETTINGS["weight"]
        with poutine.scale(scale=weight), poutine.scale(scale=self.buffer * self.plain):
            bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            loc = self.net(self.drop(x)).squeeze(-1) + bias
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def weighted(**options):
    torch.manual_seed(0)
    return Weighted(checks=False, **options)


@pytest.fixture
def pair():
    return weighted(compile=AS_TRACED), weighted()


def set_attribute(name, value):
    return lambda module: setattr(module, name, value)


def in_place(module):
    module.buffer.fill_(0.25)


def in_place_of_plain(module):
    module.plain.fill_(0.25)


def swap(module):
    torch.manual_seed(9)
    module.net = nn.Linear(3, 1)


def swap_parameter(module):
    torch.manual_seed(9)
    module.net.weight = nn.Parameter(torch.randn(1, 3))


def freeze(module):
    module.net.weight.requires_grad_(False)


def other_data(module):
    module.net.weight.data = module.net.weight.data * 2


@pytest.mark.parametrize(
    "change",
    [
        in_place,
        in_place_of_plain,
        set_attribute("buffer", torch.tensor(0.3)),
        set_attribute("plain", torch.tensor(0.3)),
        set_attribute("beta", 0.2),
        set_attribute("beta", 2),
        set_attribute("_given_size", 7),
        set_attribute("_dataset_size", 400),
        nn.Module.eval,
        lambda module: module.drop.eval(),
        set_attribute("drop", nn.Identity()),
        swap,
        swap_parameter,
        other_data,
        freeze,
        nn.Module.double,
    ],
    ids=[
        "buffer in place",
        "tensor in place",
        "buffer replaced",
        "tensor replaced",
        "attribute",
        "attribute of another type",
        "size given",
        "N",
        "eval",
        "eval of a part",
        "part replaced by another kind",
        "part replaced",
        "parameter replaced",
        "parameter's data replaced",
        "frozen",
        "double precision",
    ],
)
def test_a_change_after_compilation_is_honoured(pair, change):
    both_after(change, *pair)


def test_a_global_is_honoured(pair, monkeypatch):
    both_after(lambda _: monkeypatch.setattr(__import__(__name__), "GLOBAL_WEIGHT", 0.1), *pair)


def test_an_entry_of_a_dict_is_honoured(pair, monkeypatch):
    both_after(lambda _: monkeypatch.setitem(SETTINGS, "weight", 0.1), *pair)
