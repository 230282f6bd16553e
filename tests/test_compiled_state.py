"""Python state of every kind that a model can read: a change of it is honoured by compiled code."""

import os
from collections import UserDict, deque
from functools import cached_property, lru_cache, partial, singledispatch
from types import SimpleNamespace

import config_read_late
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_models import N, regression_batch, values_batch
from compiled_support import AS_TRACED, assert_equal_steps, is_compiled, loss_and_gradients
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from support import no_validation, quiet_trainer
from torch import nn

from pyro_lightning import ArrayDataModule, PyroSVIModule

TABLE = {"beta": 1.0}


def scaled_by(scale):
    """A model whose prior is as wide as a function says."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0 * scale()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    return model


def assert_honoured(model, change, **given):
    """Compare steps before and after a change with eager ones; the first must be compiled."""
    modules = []
    for options in ({"compile": AS_TRACED}, {}):
        torch.manual_seed(0)
        modules.append(PyroSVIModule(model, dataset_size=N, checks=False, **given, **options))
    assert_changes_alike(modules, change)


def assert_changes_alike(modules, change, batch=values_batch):
    assert_equal_steps(*modules, map(batch, range(4)), 1e-6, 1e-5)
    assert is_compiled(modules[0])
    before = loss_and_gradients(modules[1], batch(9), 9)[0]
    change(*modules)
    assert_equal_steps(*modules, map(batch, range(4, 6)), 1e-6, 1e-5, first_seed=4)
    assert not torch.equal(before, loss_and_gradients(modules[1], batch(9), 9)[0])


def class_attribute():
    class Config:
        beta = 1.0

    return lambda: Config.beta, lambda: setattr(Config, "beta", 0.1)


def class_held():
    class Config:
        beta = 1.0

    held = SimpleNamespace(config=Config)
    return lambda: held.config.beta, lambda: setattr(Config, "beta", 0.1)


def inherited():
    class Base:
        beta = 1.0

    class Config(Base):
        pass

    return lambda: Config.beta, lambda: setattr(Base, "beta", 0.1)


class Reads:
    """Reads a global in methods of all kinds."""

    @property
    def by_property(self):
        return TABLE["beta"]

    @staticmethod
    def by_static():
        return TABLE["beta"]

    @classmethod
    def by_class(cls):
        return TABLE["beta"]


class ReadsOnce:
    @cached_property
    def table(self):
        return TABLE


def method(name):
    reads = Reads()

    def scale():
        value = getattr(reads, name)
        return value() if callable(value) else value

    return scale, lambda: TABLE.update(beta=0.1)


def cached():
    reads = ReadsOnce()
    assert reads.table is TABLE
    return lambda: reads.table["beta"], lambda: TABLE.update(beta=0.1)


def dispatched():
    @singledispatch
    def read(value):
        raise TypeError

    @read.register
    def _(value: str):
        return TABLE[value]

    return lambda: read("beta"), lambda: TABLE.update(beta=0.1)


def wrapped():
    inner = lru_cache(lambda number: TABLE["beta"])

    def change():
        TABLE.update(beta=0.1)
        inner.cache_clear()

    return lambda: inner(0), change


def appears_later():
    held = SimpleNamespace()
    return lambda: getattr(held, "beta", 1.0), lambda: setattr(held, "beta", 0.1)


def attribute_of_a_function():
    def scale():
        return getattr(scale, "beta", 1.0)

    return scale, lambda: setattr(scale, "beta", 0.1)


class Slotted:
    __slots__ = ("__beta",)

    def __init__(self):
        self.set(1.0)

    def set(self, beta):
        self.__beta = beta

    def get(self):
        return self.__beta


def private_slot():
    held = Slotted()
    return held.get, lambda: held.set(0.1)


def imported():
    def scale():
        import config_read_late as config

        return config.beta

    return scale, lambda: setattr(config_read_late, "beta", 0.1)


def environment():
    return lambda: float(os.environ.get("BETA", "1.0")), lambda: os.environ.update(BETA="0.1")


def user_dict():
    held = UserDict(beta=1.0)
    return lambda: held["beta"], lambda: held.update(beta=0.1)


def queue():
    held = deque([1.0])
    return lambda: held[0], lambda: held.__setitem__(0, 0.1)


def item_of_tensor():
    beta = torch.tensor(1.0)
    return lambda: beta.item(), lambda: beta.fill_(0.1)


def branch_on_tensor():
    beta = torch.tensor([0.0, 1.0])
    return lambda: 1.0 if (beta.sum() > 0.5) else 0.1, lambda: beta.zero_()


def large_tensor():
    beta = torch.ones(2000)
    return lambda: float(beta.mean()), lambda: beta.fill_(0.1)


def distribution():
    prior = dist.Normal(0.0, torch.tensor(1.0))
    return lambda: prior.scale, lambda: setattr(prior, "scale", torch.tensor(0.1))


STATES = {
    "class": class_attribute,
    "class of an attribute": class_held,
    "base class": inherited,
    "property": partial(method, "by_property"),
    "static method": partial(method, "by_static"),
    "class method": partial(method, "by_class"),
    "cached property": cached,
    "singledispatch": dispatched,
    "lru_cache": wrapped,
    "new attribute": appears_later,
    "attribute of a function": attribute_of_a_function,
    "private slot": private_slot,
    "import as it runs": imported,
    "environment": environment,
    "UserDict": user_dict,
    "deque": queue,
    "item of a tensor": item_of_tensor,
    "branch on a tensor": branch_on_tensor,
    "large tensor": large_tensor,
    "distribution": distribution,
}


@pytest.mark.parametrize("name", STATES)
def test_a_change_is_honoured(name, monkeypatch):
    monkeypatch.setitem(TABLE, "beta", 1.0)
    monkeypatch.setattr(config_read_late, "beta", 1.0)
    monkeypatch.setenv("BETA", "1.0")
    scale, change = STATES[name]()
    assert_honoured(scaled_by(scale), lambda *_: change())


def test_a_handler_that_the_model_holds_is_honoured():
    scale = poutine.scale(scale=1.0)

    def model(x):
        with scale:
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    assert_honoured(model, lambda *_: setattr(scale, "scale", 0.1))


def more_particles(*modules):
    for module in modules:
        module.elbo.num_particles = 3


def another_elbo(*modules):
    for module in modules:
        module.elbo = Trace_ELBO(num_particles=3)


@pytest.mark.parametrize("change", [more_particles, another_elbo])
def test_an_elbo_is_honoured(change):
    modules = [
        PyroSVIModule(scaled_by(lambda: 1.0), elbo=Trace_ELBO(), dataset_size=N, compile=compile)
        for compile in (AS_TRACED, False)
    ]
    assert_changes_alike(modules, change)


class Net(nn.Module):
    """A network with what its users may add."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Linear(3, 1)

    def forward(self, x, y):
        bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            loc = self.net(x).squeeze(-1) + bias
            pyro.sample("y", dist.Normal(loc, 0.5), obs=y)


def of_net(model, **options):
    torch.manual_seed(0)
    return PyroSVIModule(model, AutoDelta, dataset_size=N, checks=False, **options)


def test_a_forward_hook_is_honoured():
    def add_hooks(*modules):
        for module in modules:
            module.model.net.register_forward_hook(lambda net, args, result: result * 0.5)

    modules = [of_net(Net(), compile=AS_TRACED), of_net(Net())]
    assert_changes_alike(modules, add_hooks, regression_batch)


class Listed(Net):
    """Penalises its weights, which it has a second list of."""

    def __init__(self, kind):
        super().__init__()
        self.weights = kind(self.net.parameters())

    def forward(self, x, y):
        pyro.factor("penalty", -sum(weight.square().sum() for weight in self.weights))
        super().forward(x, y)


def test_a_list_of_parameters_is_followed():
    svi, eager = of_net(Listed(list), compile="strict"), of_net(Listed(list))
    svi._compiled.options = AS_TRACED
    assert_equal_steps(svi, eager, map(regression_batch, range(4)), 1e-6, 1e-5)
    assert is_compiled(svi)


def test_other_references_to_parameters_fall_back():
    svi = of_net(Listed(tuple), compile="strict")
    with pytest.raises(RuntimeError, match="'weight' by a second reference"):
        svi.loss(regression_batch(0))


class Sequence(Net):
    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(1)
        self.rnn, self.last = layer(1, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x, y):
        bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            loc = self.last(self.rnn(x.unsqueeze(-1))[0][:, -1]).squeeze(-1) + bias
            pyro.sample("y", dist.Normal(loc, 0.5), obs=y)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_compiled(layer):
    svi, eager = of_net(Sequence(layer), compile=AS_TRACED), of_net(Sequence(layer))
    assert_equal_steps(svi, eager, map(regression_batch, range(4)), 1e-6, 1e-5)
    assert is_compiled(svi)


class Assigns(Net):
    """Changes its own tensors as it runs."""

    def __init__(self, how):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.how = how

    def forward(self, x, y):
        if self.how == "buffer":
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        elif self.how == "dict":
            self._buffers["mean"] = 0.9 * self.mean + 0.1 * x.mean(0)
        elif self.how == "weight":
            self.net.weight.data = self.net.weight.data.clamp(-0.3, 0.3)
        else:
            self.register_buffer("other", x.mean(0), persistent=False)
        super().forward(x - self.mean, y)


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("buffer", "assigns its parameter or buffer 'mean'"),
        ("dict", "assigns its parameter or buffer 'mean'"),
        ("weight", "assigns its parameter or buffer 'weight'"),
        ("new", "assigns its parameter or buffer 'other'"),
    ],
)
def test_what_assigns_its_own_tensors_is_eager(how, cause):
    with pytest.warns(UserWarning, match=cause):
        svi, eager = of_net(Assigns(how), compile=AS_TRACED), of_net(Assigns(how))
        assert_equal_steps(svi, eager, map(regression_batch, range(4)), 0, 0)
    torch.testing.assert_close(svi.model.mean, eager.model.mean, rtol=0, atol=0)


def test_handlers_around_the_call_are_honoured():
    modules = [
        PyroSVIModule(scaled_by(lambda: 1.0), dataset_size=N, compile=compile)
        for compile in (AS_TRACED, False)
    ]
    assert_equal_steps(*modules, map(values_batch, range(4)), 1e-6, 1e-5)
    with pytest.warns(UserWarning, match="handlers of Pyro's stand around the call"):
        with poutine.scale(scale=0.1):
            assert_equal_steps(*modules, map(values_batch, range(4)), 0, 0)


def test_second_derivatives_are_refused():
    svi = PyroSVIModule(scaled_by(lambda: 1.0), dataset_size=N, compile=AS_TRACED)
    for seed in range(4):
        loss = svi.loss(values_batch(seed))
    with pytest.raises(RuntimeError, match="has first derivatives only"):
        torch.autograd.grad(loss, list(svi.parameters()), create_graph=True)


# -- the module's own state ------------------------------------------------------------------------


def beta_of(module):
    return module.beta


class Own(PyroSVIModule):
    """Reads its own state by a helper, by a computed name, or the epoch."""

    def __init__(self, how, **options):
        super().__init__(checks=False, **options)
        self.how = how
        self.beta = self._beta = 1.0
        self.counted = 0

    def training_step(self, batch, batch_idx):
        self.counted += 1
        return super().training_step(batch, batch_idx)

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.beta = self._beta = 1.0 if self.current_epoch < 2 else 0.1

    def model(self, x, y):
        if self.how == "helper":
            scale = beta_of(self)
        elif self.how == "by name":
            scale = getattr(self, "_beta", 2.0)
        else:
            scale = 1.0 / (1.0 + self.trainer.current_epoch)
        with poutine.scale(scale=scale):
            w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def fitted(how, epochs=4, **options):
    torch.manual_seed(0)
    svi = Own(how, **options)
    data = ArrayDataModule(regression_batch(0, rows=96), batch_size=4)
    quiet_trainer(max_epochs=epochs).fit(svi, datamodule=data)
    return svi


@no_validation
@pytest.mark.parametrize("how", ["helper", "by name", "epoch"])
def test_own_state_that_a_hook_sets_is_honoured(how):
    svi, eager = fitted(how, compile=AS_TRACED), fitted(how)
    found = [{n: p.detach() for n, p in each.named_parameters()} for each in (svi, eager)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert is_compiled(svi)


def test_numpy_generators_that_are_not_drawn_from_are_no_hindrance(monkeypatch):
    monkeypatch.setitem(TABLE, "beta", 1.0)
    generator = np.random.default_rng(0)
    assert_honoured(
        scaled_by(lambda: TABLE["beta"] if generator is not None else 0.0),
        lambda *_: (generator.random(), TABLE.update(beta=0.5)),
    )
