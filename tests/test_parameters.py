"""Parameters belong to the module: Pyro's global store is neither read nor written."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from support import normal_mean, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_lightning import PyroSVIModule

N = 60
X = torch.randn(N, 2, generator=torch.Generator().manual_seed(3))
Y = X @ torch.tensor([1.0, -2.0]) + 0.5
LR = 0.03


@pytest.fixture
def store():
    """Pyro's global store, emptied, and as it was afterwards."""
    with pyro.get_param_store().scope():
        yield pyro.get_param_store()


def fit(svi, epochs=2, size=20):
    loader = DataLoader(TensorDataset(X, Y), batch_size=size)
    quiet_trainer(max_epochs=epochs).fit(svi, loader)
    return svi


def step(svi, count=5):
    """Take steps of Adam on the full data, each with noise of its own seed."""
    svi.loss((X, Y))
    optimizer = torch.optim.Adam(svi.parameters(), lr=LR)
    for seed in range(count):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        svi.loss((X, Y)).backward()
        optimizer.step()
    return svi


def pyro_step(model, guide, count=5):
    """The same steps by Pyro's own SVI, whose parameters are in the global store."""
    svi = SVI(model, guide, pyro.optim.Adam({"lr": LR}), Trace_ELBO())
    for seed in range(count):
        torch.manual_seed(seed)
        svi.step(X, Y)


def sites(fn):
    """Names of the sample and param statements that run, as Pyro calls them."""
    trace = pyro.poutine.trace(fn).get_trace(X, Y)
    kinds = "sample", "param"
    return {n for n, s in trace.nodes.items() if s["type"] in kinds and n[0] != "_"} - {"data"}


def model(x, y):
    """All parameters by bare statements: one by a callable, two constrained, a dotted name."""
    weight = pyro.param("net.weight", lambda: torch.tensor([0.3, 0.1]))
    noise = pyro.param("noise", torch.tensor(0.7), constraint=constraints.positive)
    mix = pyro.param("mix", torch.tensor([0.2, 0.8]), constraint=constraints.simplex)
    bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ weight + bias + mix[0], noise), obs=y)


def guide(x, y):
    loc = pyro.param("bias.loc", torch.tensor(0.1))
    scale = pyro.param("bias.scale", torch.tensor(0.2), constraint=constraints.positive)
    pyro.sample("bias", dist.Normal(loc, scale))


NAMES = ["net.weight", "noise", "mix", "bias.loc", "bias.scale"]


def test_the_global_store_is_not_written(store):
    fit(PyroSVIModule(model, guide))
    fit(PyroSVIModule(lambda x, y: normal_mean(y), AutoNormal))
    assert list(store) == []


def test_the_global_store_is_not_read(store):
    for name in [*NAMES, "AutoNormal.locs.mu", "guide.locs.mu", "locs.mu"]:
        store.setdefault(name, torch.full((2,), 0.01))
    before = {name: value.detach().clone() for name, value in store.items()}
    svi = PyroSVIModule(model, guide, dataset_size=N)
    svi.loss((X, Y))
    params = svi.state_dict()
    assert any(torch.equal(value, torch.tensor([0.3, 0.1])) for value in params.values())
    assert not any(torch.equal(value, torch.full((2,), 0.01)) for value in params.values())
    auto = PyroSVIModule(lambda x, y: normal_mean(y), AutoNormal, dataset_size=N)
    auto.loss((X, Y))
    assert auto.guide.locs.mu.shape == ()
    assert store.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in store.items())


@pytest.mark.parametrize("local", [True, False])
def test_pyros_settings_are_as_before(local):
    with pyro.settings.context(module_local_params=local):
        before = pyro.settings.get()
        fit(PyroSVIModule(model, guide)).posterior_samples(2)
        assert pyro.settings.get() == before


class Regression(PyroSVIModule):
    """The subclass form: a network, a PyroParam and a PyroSample of its own."""

    def __init__(self, **options):
        super().__init__(**options)
        self.net = nn.Linear(2, 1, bias=False)
        self.noise = PyroParam(torch.tensor(0.7), constraint=constraints.positive)
        self.bias = PyroSample(dist.Normal(0.0, 1.0))

    def model(self, x, y):
        loc = self.net(x)[:, 0] + self.bias
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(loc, self.noise), obs=y)


def test_two_modules_of_a_class_share_nothing():
    for make in (Regression, partial(PyroSVIModule, model, guide)):
        one, other = make(dataset_size=N), make(dataset_size=N)
        other.loss((X, Y))
        before = {name: p.detach().clone() for name, p in other.named_parameters()}
        step(one)
        assert before
        assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())
        assert not {id(p) for p in one.parameters()} & {id(p) for p in other.parameters()}


def test_bare_param_statements_train_to_the_values_of_pyros_own_svi(store):
    svi = step(PyroSVIModule(model, guide, dataset_size=N))
    model(X, Y), guide(X, Y)
    start = {name: store[name].unconstrained().detach().clone() for name in NAMES}
    pyro_step(model, guide)
    ours = {k.rpartition(".")[2].replace("|", "."): p for k, p in svi.named_parameters()}
    assert sorted(ours) == sorted(NAMES) == sorted(store)
    for name in NAMES:
        theirs = store[name].unconstrained()
        torch.testing.assert_close(ours[name], theirs, rtol=1e-5, atol=1e-6, check_stride=False)
        assert not torch.equal(theirs, start[name])


def test_bare_params_are_in_the_state_dict_and_come_back_from_it():
    svi = fit(PyroSVIModule(model, guide))
    state = svi.state_dict()
    assert len(state) == len(NAMES)
    fresh = PyroSVIModule(model, guide, dataset_size=N)
    fresh.loss((X, Y))
    fresh.load_state_dict(state)
    torch.manual_seed(0)
    expected = svi.loss((X, Y))
    torch.manual_seed(0)
    assert torch.equal(fresh.loss((X, Y)), expected)


def test_a_param_keeps_its_first_value_whatever_init_says_later():
    inits = iter([1.0, 5.0, 9.0])

    def counting(x, y):
        loc = pyro.param("loc", lambda: torch.tensor(next(inits)))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    svi = PyroSVIModule(counting, lambda x, y: None, dataset_size=N)
    losses = [svi.loss((X, Y)).detach() for _ in range(3)]
    expected = -dist.Normal(1.0, 1.0).log_prob(Y).sum()
    torch.testing.assert_close(torch.stack(losses), expected.expand(3))


def test_a_param_without_initial_value_is_refused():
    def forgetful(x, y):
        loc = pyro.param("loc")
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    with pytest.raises(RuntimeError, match="'loc'.*no initial value"):
        PyroSVIModule(forgetful, lambda x, y: None, dataset_size=N).loss((X, Y))


def networks():
    torch.manual_seed(4)
    decoder, encoder = nn.Linear(2, 1), nn.Linear(2, 2)

    def run_model(x, y):
        pyro.module("decoder", decoder)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(decoder(x)[:, 0] + z, 1.0), obs=y)

    def run_guide(x, y):
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(x).mean(0)
        pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    return decoder, encoder, run_model, run_guide


def test_pyro_module_in_functions_trains_the_very_networks(store):
    *nets, run_model, run_guide = networks()
    svi = PyroSVIModule(run_model, run_guide, dataset_size=N)
    svi.loss((X, Y))
    wanted = {id(p) for net in nets for p in net.parameters()}
    assert {id(p) for p in svi.parameters()} == wanted
    step(svi)
    *theirs, run_model, run_guide = networks()
    pyro_step(run_model, run_guide)
    for net, other in zip(nets, theirs, strict=True):
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


class Autoencoder(nn.Module):
    """As in Pyro's tutorials: an ``nn.Module`` with methods ``model`` and ``guide``."""

    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = nn.Linear(1, 2), nn.Linear(2, 1)

    def model(self, x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))


def test_bound_methods_train_the_parameters_of_their_module_once():
    vae = Autoencoder()
    svi = PyroSVIModule(vae.model, vae.guide)
    before = [p.detach().clone() for p in vae.parameters()]
    assert list(map(id, svi.parameters())) == list(map(id, vae.parameters()))
    fit(svi)
    pairs = zip(before, vae.parameters(), strict=True)
    assert not any(torch.equal(old, new) for old, new in pairs)


class Bayesian(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.noise = PyroParam(torch.tensor(0.7), constraint=constraints.positive)

    def forward(self, x, y):
        loc = self.linear(x)[:, 0]
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(loc, self.noise), obs=y)


def test_a_pyro_module_keeps_its_site_names(store):
    svi = PyroSVIModule(Bayesian(), dataset_size=N)
    svi.loss((X, Y))
    assert sites(svi.model) == sites(Bayesian()) == {"linear.weight", "linear.bias", "noise", "y"}
    assert set(svi.posterior_samples(2)) == {"linear.weight"}


def test_params_of_a_pyro_module_train_to_the_values_of_pyros_own_svi(store):
    def pair():
        torch.manual_seed(6)
        bayesian = Bayesian()
        return bayesian, AutoNormal(bayesian)

    ours, our_guide = pair()
    step(PyroSVIModule(ours, our_guide, dataset_size=N))
    theirs, their_guide = pair()
    their_guide(X, Y)
    pyro_step(theirs, their_guide)
    torch.testing.assert_close(ours.noise, theirs.noise, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.linear.bias, theirs.linear.bias, rtol=1e-5, atol=1e-6)
    name = "linear.weight"
    medians = (each.median()[name] for each in (our_guide, their_guide))
    torch.testing.assert_close(*medians, rtol=1e-5, atol=1e-6)
    assert float(ours.noise.detach()) != pytest.approx(0.7, abs=1e-3)


def test_pyro_params_and_samples_of_a_subclass_train():
    svi = Regression(dataset_size=N)
    svi.loss((X, Y))
    names = {name for name, _ in svi.named_parameters()}
    assert {"net.weight", "noise_unconstrained"} <= names
    assert len(names) == 4  # and the guide's loc and scale of the bias
    before = {name: p.detach().clone() for name, p in svi.named_parameters()}
    fit(svi)
    assert not any(torch.equal(p, before[name]) for name, p in svi.named_parameters())
    assert float(svi.noise.detach()) > 0
    draws = svi.posterior_samples(2)
    assert set(draws) == {"bias"}
    assert draws["bias"][0] != draws["bias"][1]
