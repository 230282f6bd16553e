"""Networks that a function uses, wherever it has them from, are parameters of the module."""

import functools
from functools import partial
from types import SimpleNamespace

import closure_nets
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from support import StepLosses, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_lightning import PyroSVIModule
from pyro_lightning.closures import reached_networks

N, B = 60, 20
X = torch.randn(N, 2, generator=torch.Generator().manual_seed(3))
Y = X @ torch.tensor([1.0, -2.0]) + 0.5
BATCH = X[:B], Y[:B]
ROWS = DataLoader(TensorDataset(X, Y), batch_size=B)


@pytest.fixture(autouse=True)
def store():
    """Pyro's global store, which no test may write."""
    with pyro.get_param_store().scope():
        yield pyro.get_param_store()
        assert not pyro.get_param_store()


def linear():
    torch.manual_seed(4)
    return nn.Linear(2, 1)


def observe(loc, y):
    """A global latent, and the rows around it in a plate that is Pyro's own mini-batch of N."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", N, subsample=torch.arange(len(y))):
        pyro.sample("y", dist.Normal(loc[:, 0] + z, 0.5), obs=y)


# -- where a function may have its network from ----------------------------------------------------


def in_closure(net):
    def model(x, y):
        observe(net(x), y)

    return model


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


def guide(x, y):
    loc = pyro.param("loc", torch.tensor(0.1))
    scale = pyro.param("scale", torch.tensor(0.2), constraint=dist.constraints.positive)
    pyro.sample("z", dist.Normal(loc, scale))


def steps(svi, count=5):
    svi.loss(BATCH)
    optimizer = torch.optim.Adam(svi.parameters(), lr=0.03)
    for seed in range(count):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        svi.loss(BATCH).backward()
        optimizer.step()


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


# -- names -----------------------------------------------------------------------------------------


def names(svi):
    return set(dict(svi._networks.named_children()))


def test_networks_of_one_name_are_told_apart():
    def of_guide(net):
        def guide(x, y):
            loc, log_scale = net(x).mean(0)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

        return guide

    first, second = linear(), nn.Linear(2, 2)
    svi = PyroSVIModule(in_closure(first), of_guide(second), dataset_size=N)
    svi.loss(BATCH).backward()
    assert dict(svi._networks.named_children()) == {"net": first, "net_2": second}
    assert all(p.grad is not None for p in svi.parameters())


def test_a_network_of_model_and_guide_is_registered_once():
    net = linear()

    def guide(x, y):
        pyro.sample("z", dist.Normal(net(x).mean(), 0.5))

    svi = PyroSVIModule(in_closure(net), guide, dataset_size=N)
    svi.loss(BATCH)
    assert list(map(id, svi.parameters())) == list(map(id, net.parameters()))


@pytest.mark.parametrize("name", ["train", "a.b", "T_destination"])
def test_names_that_a_submodule_may_not_have_are_changed(name):
    found = reached_networks([{name: linear()}, partial(as_keyword, **{name: linear()})])
    assert len(nn.ModuleDict(found)) == 2  # which refuses dots and the names of attributes


def test_a_network_that_exists_only_after_the_module_is_found():
    def model(x, y):
        observe(predict(x), y)

    svi = PyroSVIModule(model, guide, dataset_size=N)  # before the helper exists
    net = linear()

    def predict(x):
        return net(x)

    svi.loss(BATCH)
    assert names(svi) == {"net"}


# -- what is owned already -------------------------------------------------------------------------


class Owner(PyroSVIModule):
    def __init__(self):
        super().__init__(dataset_size=N)
        self.head = NET

    def model(self, x, y):
        observe(NET(x), y)

    def guide(self, x, y):
        guide(x, y)


class OwnerOfPart(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([NET])

    def model(self, x, y):
        observe(NET(x), y)


@pytest.mark.parametrize(
    "make", [Owner, lambda: PyroSVIModule(OwnerOfPart().model, guide, dataset_size=N)]
)
def test_a_network_that_is_owned_is_not_registered_again(make):
    svi = make()
    svi.loss(BATCH)
    assert names(svi) == set()
    assert sum(p is NET.weight for p in svi.parameters()) == 1
    assert sum(key.endswith("weight") for key in svi.state_dict()) == 1


def test_a_part_of_a_network_is_registered_within_it_only():
    net = nn.Sequential(linear(), nn.Tanh())
    layer = net[0]

    def model(x, y):
        observe(net(x) + layer(x), y)

    svi = PyroSVIModule(model, guide, dataset_size=N)
    svi.loss(BATCH)
    assert names(svi) == {"net"}


def test_a_network_named_by_pyro_module_is_registered_once():
    net = linear()

    def model(x, y):
        pyro.module("regression", net)
        observe(net(x), y)

    svi = PyroSVIModule(model, guide, dataset_size=N)
    svi.loss(BATCH)
    assert len(svi.state_dict()) == 4
    assert {id(p) for p in net.parameters()} <= {id(p) for p in svi.parameters()}


def test_a_model_that_names_its_own_module_does_not_hold_it():
    def model(x, y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=svi.scale_factor((x, y))), pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(net(x)[:, 0] + z, 0.5), obs=y)

    net = linear()
    svi = PyroSVIModule(model, guide, data_plate=None, dataset_size=N)
    earlier, svi = svi, PyroSVIModule(model, guide, data_plate=None, dataset_size=N)
    svi.loss(BATCH).backward()
    assert names(svi) == {"net"}
    assert earlier not in list(svi.modules())


# -- guides ----------------------------------------------------------------------------------------


def test_an_encoder_of_a_guide_function_trains():
    encoder = nn.Linear(2, 2)
    decoder = nn.Linear(1, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        loc, log_scale = encoder(x).split(1, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    svi = PyroSVIModule(model, guide)
    nets = [encoder, decoder]
    before = [p.detach().clone() for net in nets for p in net.parameters()]
    rows = DataLoader(TensorDataset(X), batch_size=B)
    quiet_trainer(max_epochs=2).fit(svi, rows)
    assert names(svi) == {"encoder", "decoder"}
    after = [p for net in nets for p in net.parameters()]
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_networks_of_the_parts_of_a_guide_list_train():
    net = nn.Linear(2, 1)

    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        observe(w * x[:, :1], y)

    def part(x, y):
        pyro.sample("z", dist.Normal(net(x).mean(), 0.5))

    guides = AutoGuideList(model)
    guides.append(AutoNormal(poutine.block(model, hide=["z"])))
    guides.append(part)
    svi = PyroSVIModule(model, guides, dataset_size=N)
    svi.loss(BATCH).backward()
    assert names(svi) == {"net"}
    assert all(p.grad is not None for p in net.parameters())


def test_a_pyro_module_of_a_function_trains_with_its_constraints_and_latents():
    class Level(PyroModule):
        def __init__(self):
            super().__init__()
            self.noise = PyroParam(torch.tensor(0.7), constraint=dist.constraints.positive)
            self.bias = PyroSample(dist.Normal(0.0, 1.0))
            self.linear = PyroModule[nn.Linear](2, 1)

        def forward(self, x):
            return self.linear(x)[:, 0] + self.bias, self.noise

    level = Level()

    def model(x, y):
        loc, noise = level(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(loc, noise), obs=y)

    svi = PyroSVIModule(model, dataset_size=N)
    svi.loss(BATCH).backward()
    assert names(svi) == {"level"}
    assert set(svi.posterior_samples(2)) == {"bias"}
    assert level.noise_unconstrained.grad is not None
    assert level.linear.weight.grad is not None


# -- layers of every kind --------------------------------------------------------------------------


def test_running_statistics_are_saved_and_the_first_batch_leaves_them():
    net = nn.Sequential(linear(), nn.BatchNorm1d(1))
    svi = PyroSVIModule(in_closure(net), guide, dataset_size=N)
    quiet_trainer(max_epochs=1).fit(svi, ROWS)
    assert int(net[1].num_batches_tracked) == N // B
    assert torch.equal(svi.state_dict()["_networks.net.1.running_mean"], net[1].running_mean)


def test_train_and_eval_reach_the_network():
    net = nn.Sequential(linear(), nn.Dropout(0.5))
    svi = PyroSVIModule(in_closure(net), guide, dataset_size=N).eval()
    assert not net[1].training
    svi.train()
    assert net[1].training


def test_lazy_layers_are_made_by_the_first_batch():
    net = nn.LazyLinear(1)
    svi = PyroSVIModule(in_closure(net), guide)
    quiet_trainer(max_epochs=1).fit(svi, ROWS)
    assert svi.state_dict()["_networks.net.weight"].shape == (1, 2)


def test_frozen_networks_and_buffers_follow_the_module_and_do_not_train():
    frozen, center = linear().requires_grad_(False), nn.BatchNorm1d(2, affine=False).eval()

    def model(x, y):
        observe(frozen(center(x)), y)

    svi = PyroSVIModule(model, guide, dataset_size=N)
    svi.loss(BATCH)
    svi.double()
    assert svi.loss((X[:B].double(), Y[:B].double())).dtype == torch.float64
    assert names(svi) == {"frozen", "center"}
    assert [name for name, p in svi.named_parameters() if p.requires_grad] == [
        "_pyro_param_store.loc",
        "_pyro_param_store.scale",
    ]


def test_a_network_without_gradient_in_the_first_batch_follows_the_module_and_may_train_later():
    # A network of labelled rows alone: the first batch may have none.
    net = linear()

    def model(x, y):
        observe(net(x) if y.mean() > 0 else x[:, :1], y)

    svi = PyroSVIModule(model, guide, dataset_size=N)
    svi.loss((X[:B], -torch.ones(B)))
    svi.loss((X[:B], torch.ones(B))).backward()
    assert names(svi) == {"net"}
    assert net.weight.grad is not None


# -- Lightning -------------------------------------------------------------------------------------


def test_a_fit_in_double_precision():
    net = linear()
    svi = PyroSVIModule(in_closure(net), guide)
    rows = DataLoader(TensorDataset(X.double(), Y.double()), batch_size=B)
    quiet_trainer(max_epochs=1, precision="64-true").fit(svi, rows)
    assert net.weight.dtype == torch.float64


def test_a_module_that_moves_before_its_first_loss_takes_its_networks_along():
    net = linear()
    PyroSVIModule(in_closure(net), guide, dataset_size=N).to("meta")
    assert net.weight.device.type == "meta"


def test_a_first_loss_in_inference_mode_leaves_networks_that_train():
    net = nn.Sequential(nn.LazyLinear(1), nn.BatchNorm1d(1))
    svi = PyroSVIModule(in_closure(net), guide, dataset_size=N)
    quiet_trainer().validate(svi, ROWS, verbose=False)
    before = {name: p.detach().clone() for name, p in svi.named_parameters()}
    quiet_trainer(max_epochs=1).fit(svi, ROWS)
    # The bias before a normalisation has no effect and no gradient but rounding.
    moved = {name for name, p in svi.named_parameters() if not torch.equal(p, before[name])}
    assert moved >= set(before) - {"_networks.net.0.bias"}


@pytest.fixture(params=["closure", "list", "callable object", "partial"])
def build(request):
    """Makes modules of one model, each with a network of its own."""
    make, _ = WAYS[request.param]
    return lambda: PyroSVIModule(make(linear()), guide, dataset_size=N)


def seeded_loss(svi):
    torch.manual_seed(0)
    return svi.loss(BATCH)


def test_a_state_dict_comes_back_in_a_fresh_module(build):
    trained, fresh = build(), build()
    steps(trained)
    fresh.loss(BATCH)
    fresh.load_state_dict(trained.state_dict())
    torch.testing.assert_close(seeded_loss(fresh), seeded_loss(trained), rtol=0, atol=0)


def test_a_fit_goes_on_from_a_checkpoint_in_a_fresh_module(build, tmp_path):
    def fit(svi, epochs, path=None):
        # The noise of each step is that of one seed.
        trainer = quiet_trainer(max_epochs=epochs, callbacks=[StepLosses()])
        trainer.fit(svi, ROWS, ckpt_path=path)
        return trainer

    whole, half, fresh = build(), build(), build()
    fit(whole, 4)
    fit(half, 2).save_checkpoint(tmp_path / "half.ckpt")
    fit(fresh, 4, tmp_path / "half.ckpt")
    state, expected = fresh.state_dict(), whole.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
        assert not torch.equal(value, half.state_dict()[name])
