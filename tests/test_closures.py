"""Networks that a function uses, wherever it has them from, are parameters of the module."""

import functools
from functools import partial
from types import SimpleNamespace

import closure_nets
import pyro
import pyro.distributions as dist
import pytest
import torch
from closure_nets import BATCH, B, N, X, Y, guide, in_closure, linear, observe, steps
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta
from torch import nn

from pyro_lightning import PyroSVIModule

pytestmark = pytest.mark.usefixtures("untouched_store")


def as_argument(net, x, y):
    observe(net(x), y)


def as_keyword(x, y, *, net):
    observe(net(x), y)


def as_default(net):
    def model(x, y, net=net):
        observe(net(x), y)

    return model


def as_keyword_default(net):
    def model(x, y, *, net=net):
        observe(net(x), y)

    return model


class Callable:
    def __init__(self, **held):
        self.__dict__.update(held)

    def __call__(self, x, y):
        observe(self.net(x), y)

    def model(self, x, y):
        self(x, y)


def through_helper(net):
    def predict(x):
        return net(x)

    def model(x, y):
        observe(predict(x), y)

    return model


def in_inner_function(net):
    def model(x, y):
        def predict():
            return net(x)

        observe(predict(), y)

    return model


def in_list(nets):
    def model(x, y):
        observe(nets[0](x), y)

    return model


def in_dict(nets):
    def model(x, y):
        observe(nets["mean"](x), y)

    return model


def in_namespace(config):
    def model(x, y):
        observe(config.mean.net(x), y)

    return model


def decorated(net):
    def unchanged(fn):
        @functools.wraps(fn)
        def run(*args):
            return fn(*args)

        return run

    return unchanged(in_closure(net))


def by_method_of_the_network(net):
    def model(x, y):
        observe(net.forward(x), y)

    return model


def by_weights_alone(net):
    def model(x, y):
        observe(nn.functional.linear(x, net.weight, net.bias), y)

    return model


NET = nn.Linear(2, 1)


def in_globals(x, y):
    observe(NET(x), y)


def in_another_python_module(x, y):
    observe(closure_nets.net(x), y)


def through_a_function_of_another_python_module(x, y):
    observe(closure_nets.predict(x), y)


def in_a_namespace_of_another_python_module(x, y):
    observe(closure_nets.held.net(x), y)


class Plain(nn.Module):
    """Keeps a network in a list, where torch does not see it."""

    def __init__(self, net):
        super().__init__()
        self.nets = [net]

    def forward(self, x, y):
        observe(self.nets[0](x), y)


WAYS = {
    "closure": (in_closure, "net"),
    "partial": (lambda net: partial(as_argument, net), "net"),
    "partial, by keyword": (lambda net: partial(as_keyword, net=net), "net"),
    "default": (as_default, "net"),
    "keyword default": (as_keyword_default, "net"),
    "callable object": (lambda net: Callable(net=net), "net"),
    "bound method": (lambda net: Callable(net=net).model, "net"),
    "helper": (through_helper, "net"),
    "inner function": (in_inner_function, "net"),
    "list": (lambda net: in_list([net]), "nets_0"),
    "dict": (lambda net: in_dict({"mean": net}), "nets_mean"),
    "namespace": (
        lambda net: in_namespace(SimpleNamespace(mean=Callable(net=net))),
        "config_mean_net",
    ),
    "decorated": (decorated, "net"),
    "block": (lambda net: poutine.block(in_closure(net), hide=["nothing"]), "net"),
    "config_enumerate": (lambda net: config_enumerate(in_closure(net)), "net"),
    "scale, and mask": (lambda net: poutine.mask(poutine.scale(in_closure(net), 1.0), True), "net"),
    "method of the network": (by_method_of_the_network, "net"),
    "weights alone": (by_weights_alone, "net"),
    "list of an nn.Module": (Plain, "nets_0"),
    "globals": (lambda net: in_globals, "NET"),
    "another Python module": (lambda net: in_another_python_module, "net"),
    "function elsewhere": (lambda net: through_a_function_of_another_python_module, "net"),
    "namespace elsewhere": (lambda net: in_a_namespace_of_another_python_module, "held_net"),
}
GLOBALS = [NET, closure_nets.net, closure_nets.held.net]


@pytest.fixture(scope="module")
def pyros_network():
    """The network after the same steps of Pyro's own SVI, to which it is named."""
    net = linear()

    def model(x, y):
        pyro.module("net", net)
        observe(net(x), y)

    with pyro.get_param_store().scope():
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
        for seed in range(5):
            torch.manual_seed(seed)
            svi.step(*BATCH)
    return net


@pytest.mark.parametrize("way", WAYS)
def test_a_network_trains_to_the_values_of_pyros_own_svi(way, pyros_network):
    make, name = WAYS[way]
    net = linear()
    for each in GLOBALS:
        each.load_state_dict(net.state_dict())
    svi = PyroSVIModule(make(net), guide, dataset_size=N)
    steps(svi)
    parameters = dict(svi.named_parameters())
    names = {f"_networks.{name}.weight", f"_networks.{name}.bias"}
    assert set(parameters) == names | {"_pyro_param_store.loc", "_pyro_param_store.scale"}
    for kind in ("weight", "bias"):
        ours, theirs = parameters[f"_networks.{name}.{kind}"], getattr(pyros_network, kind)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    # In place, as in Pyro: the function's network is the trained one.
    assert any(each.weight is parameters[f"_networks.{name}.weight"] for each in [net, *GLOBALS])


def test_the_first_loss_is_that_of_the_network_as_it_was_built():
    net = linear()
    svi = PyroSVIModule(in_closure(net), guide, dataset_size=N)
    z = torch.tensor(0.25)
    fixed = PyroSVIModule(
        in_closure(net), partial(AutoDelta, init_loc_fn=lambda site: z), dataset_size=N
    )
    rows = dist.Normal(linear()(X[:B])[:, 0] + z, 0.5).log_prob(Y[:B]).sum()
    expected = -dist.Normal(0.0, 1.0).log_prob(z) - N / B * rows
    torch.testing.assert_close(fixed.loss(BATCH), expected)
    assert torch.isfinite(svi.loss(BATCH))


def test_a_type_whose_module_is_no_string_is_no_error():
    # As that of functions that Cython compiled, NumPy's generators among them.
    compiled = type("compiled", (), {"__module__": property(lambda self: "numpy.random")})()

    def model(x, y):
        observe(torch.full((len(x), 1), float(compiled is None)), y)

    assert not list(PyroSVIModule(model, guide, dataset_size=N).named_parameters())
