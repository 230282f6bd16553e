"""Python state that functions and modules reach, and whether a change of it is seen."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_lightning.guards import changed, find_guards
from pyro_lightning.names import names_read

NUMBER = 1.0
HOLDER = SimpleNamespace(number=1.0, inner=SimpleNamespace(deep=1.0))


def reads_a_global():
    return NUMBER


def calls_what_reads_a_global():
    return reads_a_global()


def reads_an_attribute_of_a_global():
    return HOLDER.number


class Plain:
    default = 1.0
    shared = {"number": 1.0}

    def __init__(self):
        self.number = 1.0
        self.values = [1.0, 2.0]
        self.names = {"a"}
        self.array = np.ones(3)
        self.tensor = torch.ones(3)

    def __call__(self):
        return self.number


@dataclasses.dataclass
class Slotted:
    __slots__ = ("number",)
    number: float


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.drop = nn.Dropout(0.5)
        self.number = 1.0

    def forward(self, x):
        return self.layer(x) * self.number


def assert_sees(root, change, name):
    guards = find_guards([root])
    assert changed(guards) is None
    change()
    assert changed(guards) == name


@pytest.mark.parametrize("function", [reads_a_global, calls_what_reads_a_global])
def test_globals(function, monkeypatch):
    change = partial(monkeypatch.setattr, __import__(__name__), "NUMBER", 2.0)
    assert_sees(function, change, "NUMBER")


def test_attributes_of_globals(monkeypatch):
    change = partial(monkeypatch.setattr, HOLDER, "number", 2.0)
    assert_sees(reads_an_attribute_of_a_global, change, "HOLDER.number")


def test_closures():
    number = 1.0

    def function():
        return number

    guards = find_guards([function])
    assert changed(guards) is None
    number = 2.0
    assert changed(guards) == "number"


def test_defaults_and_keywords():
    settings = {"number": 1.0}

    def function(x=settings):
        return x

    assert_sees(function, partial(settings.update, number=2.0), "[0].number")
    held = SimpleNamespace(number=1.0)
    assert_sees(partial(function, x=held), partial(setattr, held, "number", 2.0), "x.number")


PLAIN = {
    "attribute": (lambda p: setattr(p, "number", 2.0), "number"),
    "item": (lambda p: p.values.__setitem__(1, 5.0), "values[1]"),
    "appended": (lambda p: p.values.append(5.0), "len(values)"),
    "added to a set": (lambda p: p.names.add("b"), "names"),
    "array in place": (lambda p: p.array.fill(2.0), "array"),
    "array replaced": (lambda p: setattr(p, "array", np.ones(3)), "array"),
    "tensor replaced": (lambda p: setattr(p, "tensor", torch.ones(3)), "tensor"),
    "type of a number": (lambda p: setattr(p, "number", 1), "number"),
    "a default of its class hidden": (lambda p: setattr(p, "default", 2.0), "default"),
    "deleted": (lambda p: delattr(p, "number"), "number"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_objects(name):
    change, place = PLAIN[name]
    plain = Plain()
    assert_sees(plain, partial(change, plain), place)


def test_attributes_of_classes(monkeypatch):
    assert_sees(Plain(), partial(monkeypatch.setattr, Plain, "default", 2.0), "default")


def test_dicts_of_classes(monkeypatch):
    change = partial(monkeypatch.setitem, Plain.shared, "number", 2.0)
    assert_sees(Plain(), change, "shared.number")


def test_new_keys_of_dicts():
    settings = {"a": 1.0}
    assert_sees(lambda: settings, partial(settings.update, b=2.0), "len(settings)")


def test_slots():
    held = Slotted(1.0)
    assert_sees(lambda: held, partial(setattr, held, "number", 2.0), "held.number")


NETS = {
    "attribute": (lambda n: setattr(n, "number", 2.0), "number"),
    "mode": (lambda n: n.eval(), "training"),
    "mode of a part": (lambda n: n.drop.eval(), "drop.training"),
    "a part replaced": (lambda n: setattr(n, "layer", nn.Linear(2, 2)), "layer"),
    "rate of dropout": (lambda n: setattr(n.drop, "p", 0.1), "drop.p"),
}


@pytest.mark.parametrize("name", NETS)
def test_modules(name):
    change, place = NETS[name]
    net = Net()
    assert_sees(net, partial(change, net), place)


UNSEEN = {
    "tensor in place": lambda p: p.tensor.fill_(2.0),
    "an equal number": lambda p: setattr(p, "number", float("1.0")),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_a_trace_reads_anew_is_not_watched(name):
    plain = Plain()
    guards = find_guards([plain])
    UNSEEN[name](plain)
    assert changed(guards) is None


def test_steps_of_an_optimizer_are_no_change():
    net = Net()
    guards = find_guards([net])
    with torch.no_grad():
        net.layer.weight.add_(1.0)
    assert changed(guards) is None


def test_what_is_hidden_is_not_watched():
    net = Net()
    guards = find_guards([net], lambda holder, name: holder is net and name == "number")
    net.number = 2.0
    assert changed(guards) is None


def test_what_an_autoguide_collects_as_it_runs_is_no_state():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    guide = AutoNormal(model)
    guide(torch.zeros(3))
    guards = find_guards([guide])
    guide(torch.zeros(3))
    assert changed(guards) is None


def test_cycles_end():
    one, other = SimpleNamespace(), SimpleNamespace()
    one.other, other.one = other, one
    assert_sees(lambda: one, partial(setattr, other, "one", None), "one.other.one")


class Owner:
    @property
    def scaled(self):
        return self.inner * self.factor

    def helper(self):
        return self.depth

    def run(self):
        return self.scaled + self.helper()


def test_names_read_follow_methods_and_properties():
    names = names_read(Owner(), [Owner.run]).read
    assert {"scaled", "inner", "factor", "helper", "depth"} <= names


def test_names_that_are_computed_are_not_known():
    assert names_read(Owner(), [lambda self, name: getattr(self, name)]).computed
